"""What the benchmarks share: real programs as processes, and what the kernel says of them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

START_LIMIT_S = 120.0


@dataclass
class Program:
    """One process, started with its standard error in a file of JSON lines."""

    name: str
    process: psutil.Popen
    log: Path

    def cpu_s(self) -> float:
        """User and system time so far, of the process and its children that still live."""
        total = 0.0
        for one in [self.process, *self.process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = one.cpu_times()
                total += times.user + times.system
        return total

    def peak_bytes(self) -> int:
        """The most memory this process ever had resident, without its children."""
        return _peak_bytes(self.process.pid)

    def children_peak_bytes(self) -> int:
        """The same for its largest child, 0 without one."""
        return max((_peak_bytes(c.pid) for c in self.process.children(recursive=True)), default=0)

    def resident_bytes(self) -> int:
        return int(self.process.memory_info().rss)

    def events(self) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


def _peak_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


@contextlib.contextmanager
def program(name: str, arguments: list[str], folder: Path) -> Iterator[Program]:
    """Starts `python -m …` and stops it at the end."""
    log = folder / f"{name}.log"
    with log.open("wb") as file:
        process = psutil.Popen(
            [sys.executable, *arguments], stderr=file, stdout=file, cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        yield Program(name, process, log)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
            try:
                process.wait(15)
            except psutil.TimeoutExpired:
                process.kill()


@contextlib.contextmanager
def mosquitto(folder: Path, *settings: str) -> Iterator[tuple[int, psutil.Process]]:
    """A Mosquitto with default limits and its counters each second: its port and process."""
    binary = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
    if binary is None:
        sys.exit("mosquitto is not installed (Debian: apt-get install mosquitto)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    lines = [f"listener {port} 127.0.0.1", "allow_anonymous true", "sys_interval 1", *settings]
    config = folder / "mosquitto.conf"
    config.write_text("\n".join(lines) + "\n")
    with (folder / "mosquitto.log").open("wb") as log:
        process = psutil.Popen([binary, "-c", str(config)], stdout=log, stderr=log)
    try:
        _wait_for_port(port)
        yield port, process
    finally:
        process.terminate()
        process.wait(10)


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), 0.2):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def wait_for_event(
    one: Program, event: str, *, limit_s: float = START_LIMIT_S, **fields: Any
) -> dict[str, Any]:
    """The first line of that event with these fields; looks at the log as it grows."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        for line in one.events():
            if line["event"] == event and all(line.get(k) == v for k, v in fields.items()):
                return line
        if not one.process.is_running() or one.process.status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.1)
    sys.exit(f"{one.name} never said {event} {fields}:\n{one.log.read_text()[-3000:]}")


def print_table(rows: list[tuple[str, str, str]]) -> None:
    """Name, value, goal or remark."""
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
