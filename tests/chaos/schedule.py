"""What happens when: a pure function of the seed.

Faults come in bursts, where several may hold at a time, with quiet gaps between, in which versions
are made: a fleet that is never left alone would prove only that nothing happens. Two faults never
fight over one process: while one is dead or frozen, no other fault kills, freezes or starts it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Aim(Enum):
    """What a kind of fault may strike."""

    PROGRAM = "any program"
    AGENT = "an agent"
    COORDINATOR = "the coordinator"
    BROKER = "the broker"
    FLEET = "everybody"


COORDINATOR, BROKER, FLEET = "coordinator", "broker", "fleet"


@dataclass(frozen=True, slots=True)
class Drawn:
    """How a fault will be: how long it lasts, and what else its kind has to know."""

    duration_s: float
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of fault, as the schedule sees it.

    `weight`: how often it is chosen, beside the others. `occupies`: nothing else may strike its
    target's process until `recovery_s` after its end.
    """

    name: str
    aim: Aim
    weight: float
    draw: Callable[[random.Random], Drawn]
    occupies: bool = False
    recovery_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Planned:
    """One fault. `at_s`: after the beginning."""

    number: int
    at_s: float
    kind: str
    target: str
    duration_s: float
    parameters: Mapping[str, Any]

    def __str__(self) -> str:
        told = " ".join(f"{name}={value}" for name, value in self.parameters.items())
        return (
            f"{self.number:4d}  {self.at_s:7.2f} s  {self.kind:<22} {self.target:<12} "
            f"{self.duration_s:5.2f} s  {told}"
        ).rstrip()


BURST_S, GAP_S, QUIET_S = (8.0, 14.0), 1.1, (2.5, 4.5)
"""Length of a burst, mean gap between two faults in it, quiet time after it."""
LAST_FAULT_BEFORE_END_S = 4.0


def plan(
    seed: int,
    seconds: float,
    devices: Sequence[str],
    kinds: Sequence[Kind],
) -> tuple[Planned, ...]:
    """The faults of a run, in time order; the same for the same arguments."""
    rng = random.Random(f"chaos/{seed}")
    free_at: dict[str, float] = {}
    planned: list[Planned] = []
    now = 0.0
    while now < seconds:
        burst_ends = now + rng.uniform(*BURST_S)
        while now < burst_ends:
            now += rng.expovariate(1 / GAP_S)
            if now >= seconds - LAST_FAULT_BEFORE_END_S:
                return tuple(planned)
            chosen = _choose(rng, kinds, devices, free_at, now)
            if chosen is None:
                continue
            kind, target = chosen
            drawn = kind.draw(rng)
            if kind.occupies:
                free_at[target] = now + drawn.duration_s + kind.recovery_s
            number = len(planned) + 1
            planned.append(
                Planned(
                    number,
                    round(now, 3),
                    kind.name,
                    target,
                    round(drawn.duration_s, 3),
                    drawn.parameters,
                )
            )
        now += rng.uniform(*QUIET_S)
    return tuple(planned)


def targets(aim: Aim, devices: Sequence[str]) -> tuple[str, ...]:
    """What a fault with this aim may strike."""
    match aim:
        case Aim.PROGRAM:
            return (*devices, COORDINATOR)
        case Aim.AGENT:
            return tuple(devices)
        case Aim.COORDINATOR:
            return (COORDINATOR,)
        case Aim.BROKER:
            return (BROKER,)
        case Aim.FLEET:
            return (FLEET,)


def _choose(
    rng: random.Random,
    kinds: Sequence[Kind],
    devices: Sequence[str],
    free_at: Mapping[str, float],
    now: float,
) -> tuple[Kind, str] | None:
    possible = [
        (kind, free)
        for kind in kinds
        if (
            free := [
                target
                for target in targets(kind.aim, devices)
                if not kind.occupies or free_at.get(target, 0.0) <= now
            ]
        )
    ]
    if not possible:
        return None
    chosen, free = rng.choices(possible, [kind.weight for kind, _ in possible])[0]
    return chosen, rng.choice(free)
