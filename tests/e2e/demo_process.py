"""`fedge demo` as a user starts it, and the processes it starts, known by a mark they inherit."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

MARK = "FEDGE_TEST_MARK"
WAIT_S = 90.0
GONE_S = 15.0


def run_demo(
    *options: str, cwd: Path, path: str | None = None, timeout_s: float = WAIT_S
) -> subprocess.CompletedProcess[str]:
    """A demonstration run to its end."""
    environment = os.environ | ({} if path is None else {"PATH": path})
    return subprocess.run(
        [sys.executable, "-m", "fedge.coordinator", "demo", *options],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


class StartedDemo:
    """A demonstration that runs; its stderr is read line by line."""

    def __init__(self, options: Sequence[str], cwd: Path) -> None:
        self._mark = secrets.token_hex(8)
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fedge.coordinator", "demo", *options],
            cwd=cwd,
            env=os.environ | {MARK: self._mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._watchdog = threading.Timer(WAIT_S, self.process.kill)
        self._watchdog.start()

    def read_until(self, start: str) -> str:
        """The first line that begins with `start`."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if line.startswith(start):
                return self.lines[-1]
        raise AssertionError(f"no line began with {start!r}:\n" + "\n".join(self.lines))

    def read_rest(self) -> str:
        """Everything that it still says until it ends."""
        assert self.process.stderr is not None
        rest = self.process.stderr.read()
        self.process.wait(timeout=WAIT_S)
        return rest

    def family(self) -> list[psutil.Process]:
        """Every process of this demonstration that is alive, the demonstration among them."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if process.environ().get(MARK) == self._mark:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def close(self) -> None:
        """Ends whatever a failed test left."""
        self._watchdog.cancel()
        for process in self.family():
            process.kill()
        self.process.wait(timeout=WAIT_S)
        if self.process.stderr is not None:
            self.process.stderr.close()


@contextmanager
def started_demo(*options: str, cwd: Path) -> Iterator[StartedDemo]:
    """A demonstration that is ended with the test."""
    demo = StartedDemo(options, cwd)
    try:
        yield demo
    finally:
        demo.close()


def all_gone(processes: Sequence[psutil.Process]) -> bool:
    """Whether every one of them ends, within a time that a loaded computer needs."""
    return not psutil.wait_procs(processes, timeout=GONE_S)[1]
