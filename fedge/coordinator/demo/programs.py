"""The programs of a demonstration: started on a leash, read line by line, ended together.

Each program's output goes to a log file; what it writes as JSON lines is passed on as events. A
program that ends when it should not is noticed at once and named. Nothing here polls: it waits for
pipes, for processes and for deadlines.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeVar

from fedge.coordinator.demo.errors import DemoFailed, ProgramEnded

T = TypeVar("T")

Event = Mapping[str, Any]
Observe = Callable[[str, Event], None]

MAX_LINE_BYTES = 1 << 20
TAIL_LINES = 15
READY_S = 60.0
END_S = 5.0
"""How long a program may take to end by itself."""


class Program:
    """One running program; made by `Programs.start`."""

    def __init__(self, name: str, process: Process, log_path: Path, *, lasting: bool) -> None:
        self.name = name
        self.process = process
        self.log_path = log_path
        self.lasting = lasting
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.following: asyncio.Task[None]

    def ended(self) -> ProgramEnded:
        """The error that says how it ended."""
        code = self.process.returncode
        tail = "\n".join(self.tail)
        return ProgramEnded(self.name, 0 if code is None else code, tail, self.log_path)

    async def finish(self) -> None:
        """Returns when it has ended with status 0. Raises `ProgramEnded` otherwise."""
        await asyncio.wait({self.following})
        if self.process.returncode != 0:
            raise self.ended()

    async def end(self) -> None:
        """Asks it to end, and makes it end after `END_S`."""
        if self.process.returncode is not None:
            return
        try:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
            async with asyncio.timeout(END_S):
                await self.process.wait()
        except TimeoutError:
            pass  # it is killed below
        finally:
            if self.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    self.process.kill()


class Programs:
    """All programs of one demonstration. Leaving the context ends every one of them.

    `observe(name, event)`: is given each JSON line that a program writes to stderr.
    """

    def __init__(self, logs: Path, observe: Observe) -> None:
        self._logs = logs
        self._observe = observe
        self._programs: list[Program] = []
        self._ending = False
        self._failure: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.end()

    async def start(
        self, name: str, command: Sequence[str], *, ready: str | None = None, lasting: bool = True
    ) -> Program:
        """A program that runs beside us; returns when it has written a line that holds `ready`.

        `lasting`: it may not end before `end` is called. Raises `ProgramEnded`, or `DemoFailed` if
        it is not ready after `READY_S`.
        """
        log_path = self._logs / f"{name}.log"
        process = await asyncio.create_subprocess_exec(
            *_leashed(command),
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=STDOUT,
            limit=MAX_LINE_BYTES,
            # A Ctrl-C at the terminal is for the demonstration, which ends them in order.
            start_new_session=True,
            env=_environment(),
        )
        program = Program(name, process, log_path, lasting=lasting)
        is_ready = asyncio.Event()
        program.following = asyncio.create_task(
            self._follow(program, ready, is_ready), name=f"follow-{name}"
        )
        self._programs.append(program)
        if ready is not None:
            await self._until_ready(program, is_ready)
        return program

    async def run(self, name: str, command: Sequence[str]) -> str:
        """What a short program wrote to stdout. Raises `ProgramEnded` if it failed."""
        log_path = self._logs / f"{name}.log"
        process = await asyncio.create_subprocess_exec(
            *_leashed(command),
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=PIPE,
            start_new_session=True,
            env=_environment(),
        )
        try:
            out, said = await process.communicate()
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
        with log_path.open("ab") as log:
            log.write(said)
        if process.returncode != 0:
            tail = "\n".join(said.decode(errors="replace").splitlines()[-TAIL_LINES:])
            raise ProgramEnded(name, process.returncode or 0, tail, log_path)
        return out.decode()

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`; raises `ProgramEnded` as soon as a program ends that should not."""
        task = asyncio.create_task(work, name="demo")
        try:
            either: set[asyncio.Future[Any]] = {task, self._failure}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._failure.done():
                raise self._failure.result()
            return await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def end(self) -> None:
        """Ends every program: the one that was started first, the broker, after all others."""
        self._ending = True
        try:
            await asyncio.gather(*(one.end() for one in self._programs[1:]))
            await asyncio.gather(*(one.end() for one in self._programs[:1]))
            await asyncio.gather(*(one.following for one in self._programs))
        finally:
            for one in self._programs:
                if one.process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        one.process.kill()

    async def _until_ready(self, program: Program, is_ready: asyncio.Event) -> None:
        waiting = asyncio.create_task(is_ready.wait())
        try:
            await asyncio.wait(
                {waiting, program.following},
                timeout=READY_S,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            waiting.cancel()
        if is_ready.is_set():
            return
        if program.following.done():
            raise program.ended()
        raise DemoFailed(f"{program.name} was not ready after {READY_S:g} s: {program.log_path}")

    async def _follow(self, program: Program, ready: str | None, is_ready: asyncio.Event) -> None:
        stdout = program.process.stdout
        if stdout is None:
            raise RuntimeError("started without a pipe")
        with program.log_path.open("wb") as log:
            reading = asyncio.create_task(self._read(program, stdout, log, ready, is_ready))
            reading.add_done_callback(self._noticed)
            await program.process.wait()
            # A grandchild may hold the pipe a moment longer than the program lives.
            await asyncio.wait({reading}, timeout=END_S)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        if program.lasting or program.process.returncode != 0:
            self._fail(program.ended())

    def _noticed(self, reading: asyncio.Task[None]) -> None:
        error = None if reading.cancelled() else reading.exception()
        if error is not None:  # an event that could not be understood
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self._ending and not self._failure.done():
            self._failure.set_result(error)

    async def _read(
        self,
        program: Program,
        stdout: asyncio.StreamReader,
        log: BinaryIO,
        ready: str | None,
        is_ready: asyncio.Event,
    ) -> None:
        while line := await stdout.readline():
            log.write(line)
            log.flush()
            text = line.decode(errors="replace").rstrip()
            program.tail.append(text)
            if ready is not None and ready in text:
                is_ready.set()
            event = _event_in(text)
            if event is not None:
                self._observe(program.name, event)


def _leashed(command: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "fedge.coordinator.demo.leash", str(os.getpid()), *command]


def _environment() -> dict[str, str]:
    # Several programs share the cores: a pool of threads in each would only get in the way.
    return {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | os.environ


def _event_in(text: str) -> Event | None:
    if not text.startswith("{"):
        return None
    try:
        event = json.loads(text)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None
