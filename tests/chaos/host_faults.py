"""Faults of the computer a program runs on: its disk is full or read-only, its clock jumps."""

from __future__ import annotations

import asyncio
import contextlib
import random

from tests.chaos.disks import Disk, NoMounting
from tests.chaos.fault import Fault, Missed, Skipped
from tests.chaos.schedule import Aim, Drawn

REFILL_S = 0.05


class DiskFault(Fault):
    """A fault of the target's disk."""

    @property
    def disk(self) -> Disk:
        """The target's. Raises `Skipped` where nothing may be mounted."""
        found = self.world.disks.get(self.target)
        if found is None:
            raise Skipped("mounting is not allowed here")
        return found


class DiskFull(DiskFault):
    """No room, or next to none, and what becomes free is taken again."""

    @staticmethod
    def draw(rng: random.Random) -> Drawn:
        """A few pages may be left, so that a write fails in its midst."""
        return Drawn(rng.uniform(0.5, 4), {"leave_bytes": rng.choice([0, 0, 4096, 16384, 65536])})

    async def strike(self) -> None:
        """Keeps it full."""
        disk, leave_bytes = self.disk, self.planned.parameters["leave_bytes"]
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + self.planned.duration_s
        try:
            while loop.time() < ends_s:
                disk.fill(leave_bytes)
                await asyncio.sleep(REFILL_S)
        finally:
            disk.free()


class CoordinatorDiskFull(DiskFull):
    """The coordinator's."""

    name, aim, weight = "disk_full_coordinator", Aim.COORDINATOR, 3.0


class AgentDiskFull(DiskFull):
    """An agent's."""

    name, aim, weight = "disk_full_agent", Aim.AGENT, 4.0


class DiskReadOnly(DiskFault):
    """The disk came up read-only after a crash, and is put right while the program tries to start.

    A running program holds files open for writing, and Linux then refuses the remount.
    """

    occupies = True

    @staticmethod
    def draw(rng: random.Random) -> Drawn:
        """Long enough for a start to fail."""
        return Drawn(rng.uniform(1, 4))

    async def strike(self) -> None:
        """Kills, remounts, starts, remounts."""
        disk, program = self.disk, self.world.programs[self.target]
        program.kill()
        await program.gone()
        try:
            disk.free()
            disk.set_read_only(True)
            await program.start()
            await self.last()
        except NoMounting as error:
            raise Missed("the disk is in use and stays writable") from error
        finally:
            with contextlib.suppress(NoMounting):
                disk.set_read_only(False)
            disk.free()
            await program.start()


class CoordinatorDiskReadOnly(DiskReadOnly):
    """The coordinator's."""

    name, aim, weight, recovery_s = "disk_read_only_coordinator", Aim.COORDINATOR, 1.0, 7.0


class AgentDiskReadOnly(DiskReadOnly):
    """An agent's."""

    name, aim, weight, recovery_s = "disk_read_only_agent", Aim.AGENT, 1.5, 3.0


def _draw_jump(rng: random.Random) -> float:
    """Ten seconds to two days, in either direction."""
    return round(rng.choice([-1, 1]) * 10 * 17_280 ** rng.random(), 1)


class ClockJumps(Fault):
    """The wall clock jumps under a running program, and later back."""

    name, aim, weight = "clock_jump", Aim.PROGRAM, 4.0

    @staticmethod
    def draw(rng: random.Random) -> Drawn:
        """For a few seconds."""
        return Drawn(rng.uniform(1, 8), {"by_s": _draw_jump(rng)})

    async def strike(self) -> None:
        """Jumps there and back."""
        clock, by_s = self.world.clocks[self.target], self.planned.parameters["by_s"]
        clock.jump(by_s)
        try:
            await self.last()
        finally:
            clock.jump(-by_s)


class ClockWrongAfterPowerCut(Fault):
    """A computer without a battery: after a power cut its clock is wrong until time is synced."""

    name, aim, weight, occupies, recovery_s = "clock_wrong_at_start", Aim.PROGRAM, 2.0, True, 6.0

    @staticmethod
    def draw(rng: random.Random) -> Drawn:
        """For some seconds after the start."""
        return Drawn(rng.uniform(2, 10), {"by_s": _draw_jump(rng)})

    async def strike(self) -> None:
        """Kills, jumps, starts, waits, jumps back."""
        program, clock = self.world.programs[self.target], self.world.clocks[self.target]
        by_s = self.planned.parameters["by_s"]
        program.kill()
        await program.gone()
        clock.jump(by_s)
        await program.start()
        try:
            await self.last()
        finally:
            clock.jump(-by_s)
