"""How often this device takes part, and how much a day it gives: the operator's policies.

Pure: the policies, what was used, the round and the clock come in; what is in the way goes out.
They are those of Google's clients (Hard et al. 2018, section 4; Bonawitz et al. 2019, section 3):
a least number of examples, a separation in rounds between two participations, a sampling period,
and daily limits of time, bytes and energy. What was used is counted over the last 24 hours, not
from midnight, so a device cannot give two days' worth around it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

DAY_S = 86_400.0


class ParticipationSettings(BaseModel):
    """`[participation]`: what this device gives at most.

    `minimum_examples`: fewer, and it takes no part. `minimum_hold_out`: with fewer held out it does
    not say what a version is worth on them. `every_rounds`: from one round that it made an
    update for to the next, at least so many rounds. `sampling_period_rounds`: of so many rounds in
    a row it may take part in one, drawn anew each time. `daily_training_s`, `daily_upload_bytes`,
    `daily_energy_wh`: in any 24 hours. `watts`: what the device draws more while it trains, by the
    operator's measurement; energy is this times the time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    minimum_examples: Annotated[int, Field(ge=1)] = 1
    minimum_hold_out: Annotated[int, Field(ge=1)] = 5
    every_rounds: Annotated[int, Field(ge=1)] = 1
    sampling_period_rounds: Annotated[int, Field(ge=1)] = 1
    daily_training_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    daily_upload_bytes: Annotated[int, Field(ge=1)] | None = None
    daily_energy_wh: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    watts: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _energy_needs_power(self) -> Self:
        if (self.daily_energy_wh is None) != (self.watts is None):
            raise ValueError(
                "set daily_energy_wh and watts together: the energy is counted as watts times the "
                "time of training, for a host says nothing of its power"
            )
        return self

    @property
    def has_limits(self) -> bool:
        """Whether anything but the round decides."""
        daily = (self.daily_training_s, self.daily_upload_bytes, self.daily_energy_wh)
        return self.minimum_examples > 1 or any(limit is not None for limit in daily)


@dataclass(frozen=True, slots=True)
class Usage:
    """One line of the ledger's usage. `at_s`: when it was last added to, by the wall clock.

    `training_s`: wall time of the training process, whether or not an update came of it.
    `upload_bytes`: of the update.
    """

    at_s: float
    training_s: float
    upload_bytes: int


@dataclass(frozen=True, slots=True)
class Allowance:
    """One policy and what of it is used. `used`, `limit`: in the unit of the key `policy`."""

    policy: str
    used: float
    limit: float
    holds: bool

    @property
    def reason(self) -> str:
        """What is wrong, in one line."""
        if self.policy == "minimum_examples":
            return f"minimum_examples: {self.used:g} here, {self.limit:g} wanted"
        return f"{self.policy}: {self.used:.6g} of {self.limit:.6g} used in the last 24 hours"


def allowances(
    policies: ParticipationSettings, used: Sequence[Usage], examples: int | None, now_s: float
) -> list[Allowance]:
    """Each policy that is set and holds or not whatever the round is.

    `examples`: None while they are not counted, which is nobody's fault. A line of the future (the
    clock was set back) counts as one of now.
    """
    recent = [line for line in used if line.at_s > now_s - DAY_S]
    training_s = sum(line.training_s for line in recent)
    found: list[Allowance] = []

    def daily(policy: str, total: float, limit: float | None) -> None:
        if limit is not None:
            found.append(Allowance(policy, total, limit, total < limit))

    if policies.minimum_examples > 1 and examples is not None:
        enough = examples >= policies.minimum_examples
        found.append(
            Allowance("minimum_examples", examples, policies.minimum_examples, holds=enough)
        )
    daily("daily_training_s", training_s, policies.daily_training_s)
    upload_bytes = sum(line.upload_bytes for line in recent)
    daily("daily_upload_bytes", upload_bytes, policies.daily_upload_bytes)
    energy_wh = training_s * (policies.watts or 0.0) / 3600
    daily("daily_energy_wh", energy_wh, policies.daily_energy_wh)
    return found


def is_sampled(population: str, device: str, round_number: int, period_rounds: int) -> bool:
    """Whether this round is the device's one in its period of `period_rounds` rounds.

    Drawn by hashing, so a restart changes nothing and the devices of a fleet spread evenly.
    """
    period, place = divmod(round_number, period_rounds)
    text = f"sampling/{population}/{device}/{period}/{period_rounds}"
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") % period_rounds == place


def first_round_after(took_part: int, every_rounds: int) -> int:
    """The first round that the device may take part in; `took_part`: the last one, 0: none."""
    return took_part + every_rounds if took_part > 0 else 0
