"""Faults of processes: killed, ended, frozen, at any moment or at a chosen one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal

from tests.chaos.fault import Fault, Missed
from tests.chaos.schedule import BROKER, Aim, Drawn

_COORDINATOR_MOMENTS = (
    None, "assignment", "checkin", "chunk", "grant", "offer", "receipt", "round", "version",
)  # fmt: skip
_AGENT_MOMENTS = (None, "assignment", "chunk", "grant", "offer", "receipt", "version")


class Killed(Fault):
    """kill -9, and a start some time later."""

    occupies = True

    async def strike(self) -> None:
        """Kills at the drawn moment."""
        program = self.world.programs[self.target]
        try:
            await self.at_the_moment(program.kill)
            await program.gone()
            await self.last()
        finally:
            await program.start()


class CoordinatorKilled(Killed):
    """The coordinator."""

    name, aim, weight, recovery_s = "kill_coordinator", Aim.COORDINATOR, 4.5, 6.0

    @staticmethod
    def draw(rng: random.Random) -> Drawn:
        """Down for up to 2 s."""
        moment = rng.choice(_COORDINATOR_MOMENTS)
        return Drawn(rng.uniform(0, 2), {"moment": moment})


class AgentKilled(Killed):
    """An agent, and with it its training process."""

    name, aim, weight, recovery_s = "kill_agent", Aim.AGENT, 7.0, 2.0

    @staticmethod
    def draw(rng: random.Random) -> Drawn:
        """Down for up to 3 s."""
        moment = rng.choice(_AGENT_MOMENTS)
        return Drawn(rng.uniform(0, 3), {"moment": moment})


class TrainerKilled(Fault):
    """An agent's training process alone."""

    name, aim, weight = "kill_trainer", Aim.AGENT, 5.0

    @staticmethod
    def draw(rng: random.Random) -> Drawn:
        """At once, or a moment after an assignment."""
        return Drawn(0.0, {"moment": rng.choice([None, "assignment"]), "later_s": rng.random() / 2})

    async def strike(self) -> None:
        """Kills it if it is there."""
        come = asyncio.Event()
        await self.at_the_moment(come.set)
        await asyncio.sleep(self.planned.parameters["later_s"])
        pid = self.world.programs[self.target].trainer()
        if pid is None:
            raise Missed("no training process")
        _send(pid, signal.SIGKILL)


class Restarted(Fault):
    """SIGTERM, as `systemctl restart` sends it."""

    occupies = True

    @staticmethod
    def draw(rng: random.Random) -> Drawn:
        """Started again soon."""
        return Drawn(rng.uniform(0, 0.5))

    async def strike(self) -> None:
        """Ends it and starts it."""
        try:
            await self.world.stop(self.target)
            await self.last()
        finally:
            await self.world.programs[self.target].start()


class CoordinatorRestarted(Restarted):
    """The coordinator."""

    name, aim, weight, recovery_s = "restart_coordinator", Aim.COORDINATOR, 2.0, 7.0


class AgentRestarted(Restarted):
    """An agent."""

    name, aim, weight, recovery_s = "restart_agent", Aim.AGENT, 3.0, 3.0


class Frozen(Fault):
    """SIGSTOP, and SIGCONT some time later."""

    occupies = True

    @staticmethod
    def draw(rng: random.Random) -> Drawn:
        """Sometimes longer than the keep-alive and its half (5 s and 2.5 s)."""
        return Drawn(rng.choice([rng.uniform(0.3, 3), rng.uniform(3, 9)]))

    def victim(self) -> int | None:
        """The process id."""
        return self.world.programs[self.target].pid

    async def strike(self) -> None:
        """Stops it, waits, lets it go on."""
        pid = self.victim()
        if pid is None:
            raise Missed("no process")
        _send(pid, signal.SIGSTOP)
        try:
            await self.last()
        finally:
            _send(pid, signal.SIGCONT)


class CoordinatorFrozen(Frozen):
    """The coordinator."""

    name, aim, weight, recovery_s = "freeze_coordinator", Aim.COORDINATOR, 3.0, 1.0


class AgentFrozen(Frozen):
    """An agent; its training process goes on."""

    name, aim, weight, recovery_s = "freeze_agent", Aim.AGENT, 4.0, 1.0


class TrainerFrozen(Frozen):
    """An agent's training process."""

    name, aim, weight = "freeze_trainer", Aim.AGENT, 3.0

    def victim(self) -> int | None:
        """Its child."""
        return self.world.programs[self.target].trainer()


class BrokerFrozen(Frozen):
    """The broker."""

    name, aim, weight, recovery_s = "freeze_broker", Aim.BROKER, 2.0, 1.0


class BrokerKilled(Fault):
    """The broker: kill -9, and it comes back empty, as it was a moment or long ago, or smaller."""

    name, aim, weight, occupies, recovery_s = "kill_broker", Aim.BROKER, 5.0, True, 2.0

    @staticmethod
    def draw(rng: random.Random) -> Drawn:
        """Down for up to 3 s."""
        return Drawn(
            rng.uniform(0, 3),
            {
                "comes_back": rng.choice(["empty", "saved", "saved", "ancient"]),
                "limits": rng.choice(["default", "default", "small"]),
                "moment": rng.choice(_COORDINATOR_MOMENTS),
            },
        )

    async def strike(self) -> None:
        """Kills it at the drawn moment."""
        parameters = self.planned.parameters
        await self.at_the_moment(self.world.programs[BROKER].kill)
        await self.world.restart_broker(
            parameters["comes_back"], parameters["limits"], self.planned.duration_s
        )


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
