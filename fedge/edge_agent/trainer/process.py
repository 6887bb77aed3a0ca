"""The agent's side of the training process: starts it, asks, watches, ends it.

One job at a time in one process. A training can be interrupted: it stops after its step, leaves a
checkpoint, and its process ends, so that its memory is the host's again. A process that fails to
answer as it should (it crashed, took too long, was stopped) is killed and never asked again; the
next job gets a new one. A training that is cancelled is told to stop, and its process stays for the
next job: else a device whose jobs are cancelled sooner than a process starts would never do any.
Waiting is on pipes and deadlines only.
"""

from __future__ import annotations

import asyncio
import contextlib
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
    STOP_LINE,
    ActivateJob,
    EvaluateJob,
    Failed,
    Interrupted,
    JobFor,
    PersonaliseJob,
    Progressed,
    TrainJob,
    decode_answer,
)
from fedge.schemas.errors import TrainingFailed
from fedge.schemas.logs import EventLog

log = EventLog(__name__)

A = TypeVar("A")
OnProgress = Callable[[Progressed], None]
Interruptible = TrainJob | PersonaliseJob

STOP_GRACE_S = 0.9
"""For a training that is interrupted, to end its step and write its checkpoint; then it is killed.

The promise is 2 s. A look begins every 0.5 s and takes up to as long, so a rule that breaks right
after it was read is known to be broken after 1 s at the most; then comes this."""
CANCEL_GRACE_S = 10.0
"""For a training that is cancelled, to come to its first step and stop there; then it is killed."""
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


class TrainingInterrupted(TrainingFailed):
    """It was told to stop, and did. `kept`: there is a checkpoint at the job's `checkpoint`.

    `step`, `steps`: how far it was, 0 if it is not known.
    """

    def __init__(self, step: int, steps: int, *, kept: bool) -> None:
        super().__init__(f"interrupted after step {step} of {steps}")
        self.step = step
        self.steps = steps
        self.kept = kept


class Trainer(Protocol):
    """Something that does jobs: one process, or a pool of them."""

    async def run(self, job: JobFor[A], on_progress: OnProgress | None = None) -> A:
        """See `TrainerProcess.run`."""
        ...

    def interrupt(self, job: Interruptible) -> bool:
        """See `TrainerProcess.interrupt`."""
        ...

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes that are there now."""
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
        self._leaving: asyncio.Task[None] | None = None
        self._expiry: asyncio.Task[None] | None = None
        self._job: object = None
        self._asked = False
        self._interrupted = False
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The process that is there now, if any."""
        return None if self._child is None else self._child.pid

    @property
    def pids(self) -> tuple[int, ...]:
        """The same, as a pool tells it."""
        return () if self._child is None else (self._child.pid,)

    def interrupt(self, job: Interruptible) -> bool:
        """Has `job` stop within `STOP_GRACE_S`; its `run` raises `TrainingInterrupted`.

        False if the job has not begun, or is done.
        """
        if job is not self._job:
            return False
        if not self._interrupted:
            self._interrupted = True
            self._tell_to_stop()
        return True

    async def run(self, job: JobFor[A], on_progress: OnProgress | None = None) -> A:
        """The answer to `job`; `on_progress` is called now and then while it trains.

        Raises what the job raised (see `fedge.edge_agent.trainer.child`); `TrainerKilled` if a
        signal ended the process or stopped it for longer than a moment; `TrainingInterrupted` after
        `interrupt`; `TrainingFailed` if it crashed otherwise, took too long or answered nonsense.
        A training that is cancelled stops after its step, another job is killed at once.
        """
        async with self._turn:
            self._job, self._asked, self._interrupted = job, False, False
            try:
                return await self._run(job, on_progress)
            finally:
                self._job = None

    async def _run(self, job: JobFor[A], on_progress: OnProgress | None) -> A:
        self._stop_expiry()
        await self._left()
        child = await self._started()
        kept = False
        try:
            answer = await self._ask(child, job, on_progress)
            # One that was interrupted gives its memory back, whatever its answer was.
            kept = not self._interrupted
        except asyncio.CancelledError:
            kept = self._leave(child, job)
            raise
        finally:
            if kept:
                self._start_expiry()
            else:
                await self._kill(child)
                _remove_partial(job)
        if isinstance(answer, Interrupted):
            raise TrainingInterrupted(answer.step, answer.steps, kept=answer.kept)
        if isinstance(answer, Failed):
            raise answer.error()
        return answer

    async def _ask(
        self, child: Process, job: JobFor[A], on_progress: OnProgress | None
    ) -> A | Failed | Interrupted:
        try:
            if self._closed:
                raise TrainingFailed("the training process was closed")
            if self._interrupted:
                raise TrainingInterrupted(0, 0, kept=False)
            self._asked = True
            async with asyncio.timeout(self._limits.time_limit_s):
                return await _converse(child, job, on_progress)
        except TrainerKilled as error:
            if self._closed:
                raise TrainingFailed("the training process was closed") from error
            if self._interrupted:
                raise TrainingInterrupted(0, 0, kept=False) from error
            raise
        except TimeoutError as error:
            raise TrainingFailed(
                f"the job took longer than time_limit_s = {self._limits.time_limit_s:g}"
            ) from error

    def _leave(self, child: Process, job: object) -> bool:
        """Has a cancelled job stop after its step. False: its process has to be killed."""
        kinds = TrainJob | EvaluateJob | PersonaliseJob
        stoppable = isinstance(job, kinds) and not self._interrupted and not self._closed
        if not stoppable or child.returncode is not None:
            return False
        self._leaving = asyncio.create_task(self._stop(child, job), name="trainer-stops")
        return True

    async def _stop(self, child: Process, job: object) -> None:
        try:
            async with asyncio.timeout(CANCEL_GRACE_S):
                await _stopped(child)
        except (OSError, TimeoutError, ValueError, TrainingFailed):
            await self._kill(child)
        finally:
            _remove_partial(job)
            if isinstance(job, TrainJob):
                # Nobody waits for what it made, or for what it would go on from.
                with contextlib.suppress(OSError):
                    job.output.unlink(missing_ok=True)
                    if job.checkpoint is not None:
                        job.checkpoint.unlink(missing_ok=True)

    async def _left(self) -> None:
        """Returns when the process is done with a job that was cancelled."""
        if self._leaving is not None:
            await asyncio.shield(self._leaving)
            self._leaving = None

    def _tell_to_stop(self) -> None:
        child = self._child
        if not self._asked or child is None or child.stdin is None:
            return
        # A process that is gone is noticed by the one who waits for its answer.
        with contextlib.suppress(OSError):
            child.stdin.write(STOP_LINE)
        asyncio.get_running_loop().call_later(STOP_GRACE_S, _end_at_once, child)

    async def close(self) -> None:
        """Ends the process: at once if it has a job, which fails, as later ones do.

        May be called twice.
        """
        self._closed = True
        self._stop_expiry()
        leaving = self._leaving is not None and not self._leaving.done()
        if self._child is not None and (self._turn.locked() or leaving):
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
        log.info("trainer_started", pid=self._child.pid)
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
            await self._left()
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
        log.info("trainer_ended", pid=child.pid)

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

    def interrupt(self, job: Interruptible) -> bool:
        """As `TrainerProcess.interrupt`."""
        return any(trainer.interrupt(job) for trainer in self._all)

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes that are there now."""
        return tuple(pid for trainer in self._all for pid in trainer.pids)

    async def close(self) -> None:
        """Ends all processes; jobs under way fail. May be called twice."""
        await asyncio.gather(*(trainer.close() for trainer in self._all))


async def _stopped(child: Process) -> None:
    """Tells the process to stop its training, and reads up to the answer. Raises as `_converse`."""
    if child.stdin is None or child.stdout is None:
        raise TrainingFailed("the training process has no pipes")
    child.stdin.write(STOP_LINE)
    await child.stdin.drain()
    while line := await _next_line(child, child.stdout):
        if not isinstance(decode_answer(line), Progressed):
            return
    raise _ended(await child.wait())


async def _converse(
    child: Process, job: JobFor[A], on_progress: OnProgress | None
) -> A | Failed | Interrupted:
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
            if isinstance(answer, Interrupted) and isinstance(job, Interruptible):
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
    raise _ended(await child.wait())


def _ended(status: int) -> TrainingFailed:
    kind = TrainerKilled if status < 0 else TrainingFailed
    return kind(f"the training process {_ending(status)}")


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


def _end_at_once(child: Process) -> None:
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            child.kill()


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
    if isinstance(job, PersonaliseJob):
        with contextlib.suppress(OSError):
            job.model_output.unlink(missing_ok=True)
            job.weights_output.unlink(missing_ok=True)
    if isinstance(job, TrainJob | ActivateJob):
        # On a disk that is read-only now it stays, and goes at the next start.
        with contextlib.suppress(OSError):
            partial_of(job.output).unlink(missing_ok=True)
            if isinstance(job, TrainJob) and job.checkpoint is not None:
                partial_of(job.checkpoint).unlink(missing_ok=True)
