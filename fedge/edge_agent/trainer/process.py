"""The agent's side of the training process: starts it, asks, watches, ends it.

One job at a time in one process. A process that fails to answer as it should (it crashed, took too
long, was stopped or cancelled) is killed and never asked again; the next job gets a new one.
Waiting is on pipes and deadlines only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import ValidationError

from fedge.edge_agent.durable import partial_of
from fedge.edge_agent.trainer.jobs import (
    MAX_LINE_BYTES,
    ActivateJob,
    Failed,
    JobFor,
    Progressed,
    TrainJob,
    decode_answer,
)
from fedge.schemas.errors import TrainingFailed

log = logging.getLogger(__name__)

A = TypeVar("A")
OnProgress = Callable[[Progressed], None]

_END_GRACE_S = 2.0
_SILENCE_S = 5.0
"""A process that said nothing for so long is looked at: it may think, or have been stopped."""

_ENVIRONMENT = {
    # A device trains on one thread unless told otherwise: linear algebra for numpy needs no pool,
    # and one allocation arena keeps the memory of several threads from adding up.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
}


class TrainerKilled(TrainingFailed):
    """A signal ended or stopped the process in the midst of a job, whatever the job was."""


class Trainer(Protocol):
    """Something that does jobs: one process, or a pool of them."""

    async def run(self, job: JobFor[A], on_progress: OnProgress | None = None) -> A:
        """See `TrainerProcess.run`."""
        ...

    async def close(self) -> None:
        """Ends what runs. A job under way fails. May be called twice."""
        ...


@dataclass(frozen=True, slots=True)
class TrainerLimits:
    """What a job may take, and how long a process lives without one.

    `memory_limit_bytes`: private writable memory of the process (Linux' RLIMIT_DATA), None: no
    limit; leave it None for CUDA, which reserves far more than it uses.
    `time_limit_s`: of one job. `keep_warm_s`: an idle process ends after so long.
    `nice`: how much the process yields to others, 0 to 19.
    """

    memory_limit_bytes: int | None = None
    time_limit_s: float = 3600.0
    keep_warm_s: float = 60.0
    nice: int = 10


class TrainerProcess:
    """A training process, started when there is a job. Jobs wait for one another, first come first.

    Used within one event loop.
    """

    def __init__(self, limits: TrainerLimits | None = None) -> None:
        self._limits = limits or TrainerLimits()
        self._turn = asyncio.Lock()
        self._child: Process | None = None
        self._expiry: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The process that is there now, if any."""
        return None if self._child is None else self._child.pid

    async def run(self, job: JobFor[A], on_progress: OnProgress | None = None) -> A:
        """The answer to `job`; `on_progress` is called now and then while it trains.

        Raises what the job raised (see `fedge.edge_agent.trainer.child`); `TrainerKilled` if a
        signal ended the process or stopped it for longer than a moment; `TrainingFailed` if it
        crashed otherwise, took too long or answered nonsense. Cancelling kills it at once.
        """
        async with self._turn:
            self._stop_expiry()
            child = await self._started()
            answered = False
            try:
                if self._closed:
                    raise TrainingFailed("the training process was closed")
                async with asyncio.timeout(self._limits.time_limit_s):
                    answer = await _converse(child, job, on_progress)
                answered = True
            except TrainerKilled as error:
                if self._closed:
                    raise TrainingFailed("the training process was closed") from error
                raise
            except TimeoutError as error:
                raise TrainingFailed(
                    f"the job took longer than time_limit_s = {self._limits.time_limit_s:g}"
                ) from error
            finally:
                if answered:
                    self._start_expiry()
                else:
                    await self._kill(child)
                    _remove_partial(job)
        if isinstance(answer, Failed):
            raise answer.error()
        return answer

    async def close(self) -> None:
        """Ends the process: at once if it has a job, which fails, as later ones do.

        May be called twice.
        """
        self._closed = True
        self._stop_expiry()
        if self._child is not None and self._turn.locked():
            await self._kill(self._child)
        else:
            await self._end()

    async def _started(self) -> Process:
        if self._child is not None and self._child.returncode is None:
            return self._child
        options = ["--nice", str(self._limits.nice)]
        if self._limits.memory_limit_bytes is not None:
            options += ["--memory-limit-bytes", str(self._limits.memory_limit_bytes)]
        try:
            self._child = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "fedge.edge_agent.trainer"),
                *options,
                stdin=PIPE,
                stdout=PIPE,
                limit=MAX_LINE_BYTES,
                env=_ENVIRONMENT | os.environ,
            )
        except OSError as error:
            raise TrainingFailed(f"the training process cannot be started: {error}") from error
        log.info("trainer_started pid=%d", self._child.pid)
        return self._child

    def _start_expiry(self) -> None:
        self._expiry = asyncio.create_task(self._expire(), name="trainer-expiry")

    def _stop_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    async def _expire(self) -> None:
        await asyncio.sleep(self._limits.keep_warm_s)
        async with self._turn:
            # From here on no job waits for this task to be cancelled in the midst.
            self._expiry = None
            await self._end()

    async def _end(self) -> None:
        """Ends an idle process by the end of its stdin."""
        child, self._child = self._child, None
        if child is None or child.stdin is None:
            return
        child.stdin.close()
        try:
            async with asyncio.timeout(_END_GRACE_S):
                await child.wait()
        except TimeoutError:
            await self._kill(child)
        log.info("trainer_ended pid=%d", child.pid)

    async def _kill(self, child: Process) -> None:
        if self._child is child:
            self._child = None
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()


class TrainerPool:
    """`size` training processes for a fleet of virtual devices on one host.

    Jobs get processes first come first served, warm ones first.
    """

    def __init__(self, size: int, limits: TrainerLimits | None = None) -> None:
        self._all = [TrainerProcess(limits) for _ in range(size)]
        self._idle: asyncio.LifoQueue[TrainerProcess] = asyncio.LifoQueue()
        for trainer in self._all:
            self._idle.put_nowait(trainer)

    async def run(self, job: JobFor[A], on_progress: OnProgress | None = None) -> A:
        """As `TrainerProcess.run`, on the next process that is free."""
        trainer = await self._idle.get()
        try:
            return await trainer.run(job, on_progress)
        finally:
            self._idle.put_nowait(trainer)

    async def close(self) -> None:
        """Ends all processes; jobs under way fail. May be called twice."""
        await asyncio.gather(*(trainer.close() for trainer in self._all))


async def _converse(child: Process, job: JobFor[A], on_progress: OnProgress | None) -> A | Failed:
    """Sends `job` and reads answers up to the last one.

    Raises `TrainingFailed`, and `TrainerKilled` for a process that a signal ended or stopped.
    """
    if child.stdin is None or child.stdout is None:
        raise TrainingFailed("the training process has no pipes")
    try:
        child.stdin.write(job.encode())
        await child.stdin.drain()
        while line := await _next_line(child, child.stdout):
            answer = decode_answer(line)
            if isinstance(answer, (Failed, job.answer_type)):
                return answer
            if not isinstance(answer, Progressed):
                break
            if on_progress is not None:
                on_progress(answer)
    except (BrokenPipeError, ConnectionResetError):
        line = b""
    except (ValidationError, ValueError) as error:
        raise TrainingFailed(f"the training process gave an unreadable answer: {error}") from error
    if line:
        raise TrainingFailed("the training process gave the answer to another question")
    status = await child.wait()
    kind = TrainerKilled if status < 0 else TrainingFailed
    raise kind(f"the training process {_ending(status)}")


async def _next_line(child: Process, answers: asyncio.StreamReader) -> bytes:
    """The next line, empty at the end. Raises `TrainerKilled` for a process that stays stopped."""
    stopped = False
    while True:
        try:
            async with asyncio.timeout(_SILENCE_S):
                return await answers.readline()
        except TimeoutError:
            # Twice in a row: a stop of a moment does no harm.
            stopped, before = _is_stopped(child.pid), stopped
            if stopped and before:
                raise TrainerKilled(
                    "the training process was stopped (SIGSTOP) and not continued"
                ) from None


def _is_stopped(pid: int) -> bool:
    """Whether a signal stopped the process. Where there is no /proc, only deadlines find out."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    # "pid (name) state …", and a name may hold anything (proc(5)).
    return status.rpartition(")")[2].split()[:1] == ["T"]


def _ending(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with exit status {returncode} before it answered; its log says why"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    hint = " (the system may be out of memory)" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def _remove_partial(job: object) -> None:
    if isinstance(job, TrainJob | ActivateJob):
        # On a disk that is read-only now it stays, and goes at the next start.
        with contextlib.suppress(OSError):
            partial_of(job.output).unlink(missing_ok=True)
