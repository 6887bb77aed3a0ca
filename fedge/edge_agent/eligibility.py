"""Whether this device may train now: readings of the host, the operator's rules, a verdict.

Pure: readings, rules and the clock come in, findings and a standing go out; how a reading is taken
is the business of `fedge.edge_agent.host`. Google's keyboard trains only on phones that are idle,
charging and on an unmetered network (Bonawitz et al. 2019, section 3; Hard et al. 2018, section 4),
so that nobody notices it. Here each of these rules is one key of the table `[eligibility]`; a rule
whose key is not set does not exist, and without the table a device may always train.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_HOURS = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])-([01][0-9]|2[0-3]):([0-5][0-9])")


class Sensor(StrEnum):
    """What can be read; the names and units are those of a readings file."""

    CHARGING = "charging"
    """Whether the host is on external power."""
    BATTERY = "battery"
    """The charge, 0 to 1."""
    IDLE_FOR_S = "idle_for_s"
    """How long nobody has used the host."""
    METERED = "metered"
    """Whether somebody pays for the network by the byte."""
    CELSIUS = "celsius"
    """The hottest of the host's sensors."""
    FREE_MEMORY_BYTES = "free_memory_bytes"
    """What programs may still take without swapping, with what this agent's training holds."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a sensor said. `value`: None if it cannot be read; `note`: why not, or from where."""

    value: bool | float | None
    note: str = ""


Readings = Mapping[Sensor, Reading]


class EligibilitySettings(BaseModel):
    """`[eligibility]`: when this device may train.

    `battery_above`: 0 to 1. `hours`: local times such as `22:00-07:00`, any of which will do.
    `unknown`: what holds for a rule whose reading cannot be had. `steady_for_s`: after a rule broke
    all of them must hold for so long. `look_every_s`: how often the readings are taken while
    nothing is trained. `readings_file`, `readings_command`: readings that take the place of the
    host's, see `fedge.edge_agent.host.override`; `readings_max_age_s`: an older file is not
    believed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    charging: bool = False
    battery_above: Annotated[float, Field(ge=0, lt=1)] | None = None
    idle_for_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    unmetered: bool = False
    cooler_than_celsius: Annotated[float, Field(gt=0, le=150)] | None = None
    free_memory_bytes: Annotated[int, Field(ge=1)] | None = None
    hours: tuple[str, ...] = ()
    unknown: Literal["allow", "refuse"] = "refuse"
    steady_for_s: Annotated[float, Field(ge=0, le=3600)] = 5.0
    look_every_s: Annotated[float, Field(ge=0.5, le=3600)] = 10.0
    readings_file: Path | None = None
    readings_max_age_s: Annotated[float, Field(gt=0)] | None = None
    readings_command: Annotated[tuple[str, ...], Field(min_length=1)] | None = None

    @field_validator("hours")
    @classmethod
    def _each_is_a_range(cls, hours: tuple[str, ...]) -> tuple[str, ...]:
        for text in hours:
            begin, _, end = text.partition("-")
            if _HOURS.fullmatch(text) is None or begin == end:
                raise ValueError(f"{text!r} is no range of hours: write it as 22:00-07:00")
        return hours

    @model_validator(mode="after")
    def _one_source_of_readings(self) -> Self:
        if self.readings_file is not None and self.readings_command is not None:
            raise ValueError("set readings_file or readings_command, not both")
        if self.readings_file is None and self.readings_max_age_s is not None:
            raise ValueError("readings_max_age_s is of a readings_file: set that, too")
        return self

    @property
    def sensors(self) -> frozenset[Sensor]:
        """What must be read for these rules."""
        wanted = {
            Sensor.CHARGING: self.charging,
            Sensor.BATTERY: self.battery_above is not None,
            Sensor.IDLE_FOR_S: self.idle_for_s is not None,
            Sensor.METERED: self.unmetered,
            Sensor.CELSIUS: self.cooler_than_celsius is not None,
            Sensor.FREE_MEMORY_BYTES: self.free_memory_bytes is not None,
        }
        return frozenset(sensor for sensor, is_wanted in wanted.items() if is_wanted)

    def relative_to(self, folder: Path) -> EligibilitySettings:
        """The same rules with a relative `readings_file` or command taken from `folder`."""
        file, command = self.readings_file, self.readings_command
        if command is not None and "/" in command[0]:
            command = (str(folder / command[0]), *command[1:])
        return self.model_copy(
            update={
                "readings_file": None if file is None else folder / file,
                "readings_command": command,
            }
        )


@dataclass(frozen=True, slots=True)
class Finding:
    """One rule, looked at. `rule`: its key. `wanted`, `reading`: for people.

    `known`: whether there was a reading; if not, `holds` is as the operator's `unknown` says and
    `note` tells why there was none.
    """

    rule: str
    wanted: str
    reading: str
    holds: bool
    known: bool = True
    note: str = ""

    @property
    def reason(self) -> str:
        """What is wrong, in one line."""
        if not self.known:
            return f"{self.rule}: not known ({self.note})"
        return f"{self.rule}: {self.reading}, wanted {self.wanted}"


def look_at(rules: EligibilitySettings, readings: Readings, local_time: time) -> list[Finding]:
    """Each rule that is switched on, in the order of the table."""
    found: list[Finding] = []

    def judge(rule: str, sensor: Sensor, wanted: str, holds: bool, reading: str) -> None:
        taken = readings.get(sensor, Reading(None, "it was not read"))
        if taken.value is None:
            found.append(
                Finding(rule, wanted, "-", rules.unknown == "allow", known=False, note=taken.note)
            )
        else:
            found.append(Finding(rule, wanted, reading, holds, note=taken.note))

    def number(sensor: Sensor) -> float:
        taken = readings.get(sensor)
        return math.nan if taken is None or taken.value is None else float(taken.value)

    if rules.charging:
        is_charging = number(Sensor.CHARGING) > 0
        said = "on external power" if is_charging else "on battery"
        judge("charging", Sensor.CHARGING, "external power", is_charging, said)
    if (level := rules.battery_above) is not None:
        battery = number(Sensor.BATTERY)
        wanted = f"above {level:.0%}"
        judge("battery_above", Sensor.BATTERY, wanted, battery > level, f"{battery:.0%}")
    if (idle_s := rules.idle_for_s) is not None:
        idle = number(Sensor.IDLE_FOR_S)
        wanted = f"{idle_s:g} s"
        judge("idle_for_s", Sensor.IDLE_FOR_S, wanted, idle >= idle_s, f"{idle:.0f} s")
    if rules.unmetered:
        is_metered = number(Sensor.METERED) > 0
        said = "metered" if is_metered else "unmetered"
        judge("unmetered", Sensor.METERED, "unmetered", not is_metered, said)
    if (limit := rules.cooler_than_celsius) is not None:
        celsius = number(Sensor.CELSIUS)
        wanted = f"below {limit:g} °C"
        judge("cooler_than_celsius", Sensor.CELSIUS, wanted, celsius < limit, f"{celsius:.1f} °C")
    if (least := rules.free_memory_bytes) is not None:
        free = number(Sensor.FREE_MEMORY_BYTES)
        wanted, said = f"{least / 1e6:.0f} MB", f"{free / 1e6:.0f} MB"
        judge("free_memory_bytes", Sensor.FREE_MEMORY_BYTES, wanted, free >= least, said)
    if rules.hours:
        holds = any(_is_within(local_time, text) for text in rules.hours)
        wanted, said = " or ".join(rules.hours), f"{local_time:%H:%M}"
        found.append(Finding("hours", wanted, said, holds))
    return found


def local_time(wall_s: float) -> time:
    """The time of day here at `wall_s` seconds since the epoch."""
    return datetime.fromtimestamp(wall_s).astimezone().time()


def _is_within(now: time, hours: str) -> bool:
    begin, end = (time.fromisoformat(part) for part in hours.split("-"))
    if begin < end:
        return begin <= now < end
    # Over midnight.
    return now >= begin or now < end


@dataclass(frozen=True, slots=True)
class Standing:
    """What the device may do. `reasons`: what is in the way, none if it may train.

    `good_since_s`: since when nothing is, in the caller's clock; None: something is.
    """

    eligible: bool
    reasons: tuple[str, ...] = field(default=())
    good_since_s: float | None = None


def stand(
    before: Standing | None, reasons: Sequence[str], now_s: float, steady_for_s: float
) -> Standing:
    """The standing after a look that found `reasons`; `before`: after the last look, None: none.

    A device that may train may not as soon as there is a reason. It may again when there was none
    for `steady_for_s`, so that a temperature at its limit does not start and stop it all the time.
    """
    if reasons:
        return Standing(eligible=False, reasons=tuple(reasons))
    if before is None or before.eligible:
        return Standing(eligible=True, good_since_s=now_s)
    since_s = now_s if before.good_since_s is None else before.good_since_s
    if now_s - since_s >= steady_for_s:
        return Standing(eligible=True, good_since_s=since_s)
    wait = f"all rules hold again, and must for {steady_for_s:g} s"
    return Standing(eligible=False, reasons=(wait,), good_since_s=since_s)
