"""What a fault is: a name, an aim, how it is drawn, and how it strikes.

Each kind is one small class in `network_faults`, `process_faults`, `host_faults` or `stranger`;
`catalogue` lists them. A fault heals what it broke when its time is over, or when it is cancelled.
"""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from tests.chaos.schedule import BROKER, COORDINATOR, Aim, Drawn, Kind, Planned
from tests.chaos.world import World

WAIT_FOR_MOMENT_S = 3.0
"""A fault that waits for a message strikes after so long without one."""


class Missed(Exception):
    """There was nothing to strike: no connection, no training process."""


class Skipped(Exception):
    """This computer does not let the kit do it."""


@dataclass
class Fault(ABC):
    """One fault of the schedule. `rng`: its own."""

    planned: Planned
    world: World
    rng: random.Random

    name: ClassVar[str]
    aim: ClassVar[Aim]
    weight: ClassVar[float]
    occupies: ClassVar[bool] = False
    recovery_s: ClassVar[float] = 0.0

    @classmethod
    def kind(cls) -> Kind:
        """For the schedule."""
        return Kind(cls.name, cls.aim, cls.weight, cls.draw, cls.occupies, cls.recovery_s)

    @staticmethod
    @abstractmethod
    def draw(rng: random.Random) -> Drawn:
        """How long, and what else."""

    @abstractmethod
    async def strike(self) -> None:
        """Injects, waits, heals. Raises `Missed` or `Skipped` if nothing was injected."""

    @property
    def target(self) -> str:
        """Whom it strikes."""
        return self.planned.target

    async def last(self) -> None:
        """Waits as long as the fault lasts."""
        await asyncio.sleep(self.planned.duration_s)

    async def at_the_moment(self, act: Callable[[], object]) -> None:
        """Calls `act` when a message of the kind `moment` passes the target's network, or now."""
        moment = self.planned.parameters.get("moment")
        if moment is None:
            act()
            return
        acted = asyncio.Event()

        def now() -> None:
            act()
            acted.set()

        place = COORDINATOR if self.target == BROKER else self.target
        forget = self.world.evidence.when(moment, place, now)
        try:
            async with asyncio.timeout(WAIT_FOR_MOMENT_S):
                await acted.wait()
        except TimeoutError:
            act()
        finally:
            forget()
