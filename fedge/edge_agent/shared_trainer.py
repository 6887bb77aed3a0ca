"""The training processes of a fleet, shared by all its devices: whose turn is next.

A device by itself trains first and checks versions when nobody waits. Two hundred devices that
share a process would all check a version before the first of them could train for it, and a round
would wait for what is nobody's hurry. So trainings go first, and between two of them one job of
another kind has its turn, so that no version waits for ever. A personal training goes last, and
any other job that comes meanwhile stops it: it begins again later. Knows no job's meaning but its
kind.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Any, TypeVar

from fedge.edge_agent.trainer.jobs import CountJob, JobFor, PersonaliseJob, TrainJob
from fedge.edge_agent.trainer.process import (
    Interruptible,
    OnProgress,
    Trainer,
    TrainingInterrupted,
)

A = TypeVar("A")


class SharedTrainer:
    """`trainer`, which does `at_once` jobs at a time, with its queue in order. A `Trainer`.

    Used within one event loop.
    """

    def __init__(self, trainer: Trainer, at_once: int) -> None:
        self._trainer = trainer
        self._free = at_once
        self._first: deque[asyncio.Future[None]] = deque()
        self._others: deque[asyncio.Future[None]] = deque()
        self._last: deque[asyncio.Future[None]] = deque()
        self._others_turn = False
        self._yielding: list[asyncio.Future[Any]] = []

    async def run(self, job: JobFor[A], on_progress: OnProgress | None = None) -> A:
        """As `TrainerProcess.run`, when it is this job's turn.

        A personal training that is stopped for another job raises `TrainingInterrupted`.
        """
        if isinstance(job, PersonaliseJob):
            return await self._run_last(job, on_progress)
        if self._free == 0 and self._yielding:
            # Its process stays, for this job.
            self._yielding.pop().cancel()
        await self._turn(self._first if _goes_first(job) else self._others)
        try:
            return await self._trainer.run(job, on_progress)
        finally:
            self._pass_on()

    async def _run_last(self, job: JobFor[A], on_progress: OnProgress | None) -> A:
        await self._turn(self._last)
        work = asyncio.ensure_future(self._trainer.run(job, on_progress))
        self._yielding.append(work)
        try:
            return await work
        except asyncio.CancelledError:
            own = asyncio.current_task()
            if own is not None and own.cancelling():
                raise
            raise TrainingInterrupted(0, 0, kept=False) from None
        finally:
            if work in self._yielding:
                self._yielding.remove(work)
            self._pass_on()

    def interrupt(self, job: Interruptible) -> bool:
        """As `TrainerProcess.interrupt`."""
        return self._trainer.interrupt(job)

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes that are there now."""
        return self._trainer.pids

    async def close(self) -> None:
        """Ends all processes; jobs under way and jobs that wait fail. May be called twice."""
        await self._trainer.close()

    async def _turn(self, line: deque[asyncio.Future[None]]) -> None:
        if self._free > 0:
            self._free -= 1
            return
        mine = asyncio.get_running_loop().create_future()
        line.append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                # It had its turn already, and does not need it any more.
                self._pass_on()
            else:
                # Whoever looked for the next one in this moment has taken it out already.
                with contextlib.suppress(ValueError):
                    line.remove(mine)
            raise

    def _pass_on(self) -> None:
        while (line := self._next_line()) is not None:
            waiting = line.popleft()
            if not waiting.done():
                self._others_turn = line is self._first
                waiting.set_result(None)
                return
            # It was cancelled in this turn of the loop, and has not run since.
        self._free += 1

    def _next_line(self) -> deque[asyncio.Future[None]] | None:
        both = self._first and self._others
        line = self._others if not self._first or (both and self._others_turn) else self._first
        return line or self._last or None


def _goes_first(job: object) -> bool:
    # A device that does not know its examples takes no part.
    return isinstance(job, TrainJob | CountJob)
