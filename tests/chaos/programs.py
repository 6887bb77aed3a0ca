"""The programs of the fleet as processes: started, killed, frozen, and watched.

A program that ends although no fault ended it is noted with the end of its log, and started again
as systemd would. Whether that was a violation is for `checks` to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

RESTART_S = 1.0
"""After a program ended by itself, as `RestartSec=` of a unit."""
SERVING = ("link_up", "agent_started")
"""A log line that begins so: the program had got beyond its start."""
LEASH = "fedge.coordinator.demo.leash"


@dataclass(frozen=True, slots=True)
class Exit:
    """A process ended. `status`: negative for a signal. `wanted`: a fault or the kit ended it.

    `served`: it had got beyond its start. `last_words`: the end of its log.
    """

    program: str
    at_s: float
    status: int
    wanted: bool
    served: bool
    last_words: str


@dataclass(frozen=True, slots=True)
class Stop:
    """A program was asked to end. `status`: None if it did not within the limit. See `Exit`."""

    program: str
    at_s: float
    status: int | None
    served: bool


@dataclass(frozen=True, slots=True)
class Life:
    """One process of a program, from its start on. `log_offset`: where its log lines begin."""

    pid: int
    started_s: float
    log_offset: int


class Program:
    """One program. `command`: what to run. `on_exit`: told of every end."""

    def __init__(
        self,
        name: str,
        command: tuple[str, ...],
        *,
        folder: Path,
        environment: dict[str, str],
        on_exit: Callable[[Exit], None],
    ) -> None:
        self.name = name
        self.log_path = folder / f"{name}.log"
        self.lives: list[Life] = []
        self._command = command
        self._folder = folder
        self._environment = environment
        self._on_exit = on_exit
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._wanted_down = True
        self._ended = asyncio.Event()

    @property
    def running(self) -> bool:
        """Whether there is a process now, frozen or not."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int | None:
        """Of the process that is there now."""
        return self._process.pid if self._process is not None and self.running else None

    # ------------------------------------------------------------ what faults do

    async def start(self) -> None:
        """Starts it, unless it runs."""
        self._wanted_down = False
        if self.running:
            return
        offset = self.log_path.stat().st_size if self.log_path.exists() else 0
        with self.log_path.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", LEASH, str(os.getpid())),
                *self._command,
                # Ctrl-C is for the kit, which ends the programs.
                start_new_session=True,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                env=self._environment,
            )
        self._process = process
        self._ended.clear()
        self.lives.append(Life(process.pid, time.monotonic(), offset))
        self._watcher = asyncio.create_task(self._watch(process), name=f"watch-{self.name}")

    def kill(self) -> bool:
        """kill -9, now; False if nothing ran."""
        self._wanted_down = True
        return self.signal(signal.SIGKILL)

    def signal(self, number: signal.Signals) -> bool:
        """Sends a signal; False if nothing runs."""
        pid = self.pid
        if pid is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        return True

    async def stop(self, limit_s: float) -> Stop | None:
        """Ends it with SIGTERM, and with SIGKILL after `limit_s`; None if it was down."""
        self._wanted_down = True
        process = self._process
        served = self._has_served()
        if process is None or not self.signal(signal.SIGTERM):
            return None
        try:
            async with asyncio.timeout(limit_s):
                await self._ended.wait()
        except TimeoutError:
            self.kill()
            await self._ended.wait()
            return Stop(self.name, time.monotonic(), None, served)
        return Stop(self.name, time.monotonic(), process.returncode, served)

    async def gone(self) -> None:
        """Returns when no process is there."""
        if self._process is not None:
            await self._ended.wait()

    async def end(self) -> None:
        """kill -9 for good: returns when no process is there, and none will be started."""
        while self._watcher is not None and not self._watcher.done():
            # More than once, if it was just being started again.
            self.kill()
            await asyncio.wait([self._watcher], timeout=RESTART_S / 10)

    def trainer(self) -> int | None:
        """The process id of its training process, None if it has none now."""
        pid = self.pid
        if pid is None:
            return None
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(pid).children():
                if "fedge.edge_agent.trainer" in child.cmdline():
                    return child.pid
        return None

    # ------------------------------------------------------------ what it wrote

    def events(self, offset: int = 0) -> Iterator[dict[str, object]]:
        """The JSON lines of its log from `offset` on."""
        for line in self.log_text(offset).splitlines():
            if line.startswith("{"):
                with contextlib.suppress(ValueError):
                    yield json.loads(line)

    def log_text(self, offset: int = 0) -> str:
        """Its log from `offset` on."""
        if not self.log_path.exists():
            return ""
        with self.log_path.open("rb") as log:
            log.seek(offset)
            return log.read().decode(errors="replace")

    def _has_served(self) -> bool:
        said = self.log_text(self.lives[-1].log_offset) if self.lives else ""
        return any(f'"event": "{event}' in said for event in SERVING)

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        status = await process.wait()
        said = self.log_text(self.lives[-1].log_offset)
        self._on_exit(
            Exit(
                program=self.name,
                at_s=time.monotonic(),
                status=status,
                wanted=self._wanted_down,
                served=self._has_served(),
                last_words=said[-2000:],
            )
        )
        self._ended.set()
        if not self._wanted_down:
            await asyncio.sleep(RESTART_S)
            if not self._wanted_down:
                await self.start()
