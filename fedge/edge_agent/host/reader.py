"""Takes the readings that a device's rules need, and no others, as cheaply as the host allows.

A reading that cannot be had is no error here: it is a reading without a value that says why. What
the operator supplies is asked first, and the host only for the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

from fedge.edge_agent.eligibility import EligibilitySettings, Reading, Readings, Sensor
from fedge.edge_agent.host.bus import idle_reading, metered_reading
from fedge.edge_agent.host.override import command_readings, file_readings
from fedge.edge_agent.host.power import SUPPLIES, power_readings
from fedge.edge_agent.host.program import READ_LIMIT_S, NotRead

_COLDEST_CELSIUS, _HOTTEST_CELSIUS = -40.0, 150.0
"""What lies outside comes from a sensor that is not connected."""
_SERVICES = {Sensor.IDLE_FOR_S: idle_reading, Sensor.METERED: metered_reading}


class HostReader:
    """Reads for `rules`. `own_pids`: the agent's training processes, whose memory counts as free.

    `wall_clock`: seconds since the epoch, for the age of a file.
    """

    def __init__(
        self,
        rules: EligibilitySettings,
        *,
        wall_clock: Callable[[], float],
        own_pids: Callable[[], Iterable[int]] = tuple,
        supplies: Path = SUPPLIES,
    ) -> None:
        self._rules = rules
        self._own_pids = own_pids
        self._wall_clock = wall_clock
        self._supplies = supplies
        self._under_way: asyncio.Future[dict[Sensor, Reading]] | None = None

    async def read(self) -> Readings:
        """One reading for each sensor that a rule needs."""
        wanted = self._rules.sensors
        if not wanted:
            return {}
        try:
            supplied = await self._supplied()
        except NotRead as error:
            return {sensor: Reading(None, str(error)) for sensor in wanted}
        return {**await self._from_host(wanted - supplied.keys()), **supplied}

    async def _supplied(self) -> dict[Sensor, Reading]:
        rules = self._rules
        if rules.readings_file is not None:
            return file_readings(rules.readings_file, rules.readings_max_age_s, self._wall_clock())
        if rules.readings_command is not None:
            return await command_readings(rules.readings_command)
        return {}

    async def _from_host(self, wanted: Iterable[Sensor]) -> dict[Sensor, Reading]:
        local = frozenset(wanted) - _SERVICES.keys()
        asked = [sensor for sensor in wanted if sensor in _SERVICES]
        found, answers = await asyncio.gather(
            self._from_kernel(local), asyncio.gather(*(_SERVICES[sensor]() for sensor in asked))
        )
        return {**found, **dict(zip(asked, answers, strict=True))}

    async def _from_kernel(self, wanted: frozenset[Sensor]) -> dict[Sensor, Reading]:
        """In a thread: some sensors answer after hundreds of milliseconds, a stuck one never."""
        if not wanted:
            return {}
        if self._under_way is None:
            loop = asyncio.get_running_loop()
            self._under_way = loop.run_in_executor(None, self._read_kernel, wanted)
        await asyncio.wait([self._under_way], timeout=READ_LIMIT_S)
        if not self._under_way.done():
            late = Reading(None, f"the sensors took longer than {READ_LIMIT_S:g} s")
            return dict.fromkeys(wanted, late)
        found, self._under_way = self._under_way.result(), None
        return found

    def _read_kernel(self, wanted: frozenset[Sensor]) -> dict[Sensor, Reading]:
        found: dict[Sensor, Reading] = {}
        if wanted & {Sensor.CHARGING, Sensor.BATTERY}:
            found[Sensor.CHARGING], found[Sensor.BATTERY] = power_readings(self._supplies)
        if Sensor.CELSIUS in wanted:
            found[Sensor.CELSIUS] = _hottest()
        if Sensor.FREE_MEMORY_BYTES in wanted:
            found[Sensor.FREE_MEMORY_BYTES] = _free_memory(self._own_pids())
        return {sensor: reading for sensor, reading in found.items() if sensor in wanted}


def _hottest() -> Reading:
    import psutil  # noqa: PLC0415 -- an agent without such a rule needs no psutil in memory

    read = getattr(psutil, "sensors_temperatures", None)
    if read is None:
        return Reading(None, "this system does not tell temperatures")
    try:
        told = {
            f"{chip} {one.label}".strip(): float(one.current)
            for chip, sensors in read().items()
            for one in sensors
        }
    except (OSError, ValueError) as error:
        return Reading(None, f"the temperatures: {error}")
    real = {
        name: celsius
        for name, celsius in told.items()
        if _COLDEST_CELSIUS <= celsius <= _HOTTEST_CELSIUS
    }
    if not real:
        return Reading(None, "no temperature sensor found")
    hottest = max(real, key=lambda name: real[name])
    return Reading(real[hottest], hottest)


def _free_memory(own_pids: Iterable[int]) -> Reading:
    import psutil  # noqa: PLC0415 -- as above

    try:
        free_bytes = psutil.virtual_memory().available
    except (OSError, ValueError) as error:
        return Reading(None, f"the memory: {error}")
    for pid in own_pids:
        # Else the training would break the rule by itself, stop, and begin again.
        with contextlib.suppress(psutil.Error):
            memory = psutil.Process(pid).memory_info()
            free_bytes += max(memory.rss - getattr(memory, "shared", 0), 0)
    return Reading(float(free_bytes))
