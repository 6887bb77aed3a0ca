"""Disks that a test can fill and empty: real ones, a few hundred kilobytes of memory each."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BALLAST = "ballast"


class SmallDisk:
    """A file system of its own under `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def free_bytes(self) -> int:
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize

    def fill(self, leave_bytes: int = 0) -> None:
        """Leaves so much room, or less by a page."""
        ballast = self.folder / BALLAST
        with ballast.open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, ballast.stat().st_size + self.free_bytes)
            if leave_bytes:
                file.truncate(ballast.stat().st_size - leave_bytes)

    def empty(self) -> None:
        """Makes room again."""
        (self.folder / BALLAST).unlink()


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int, *options: str) -> Iterator[SmallDisk]:
    """A tmpfs of that size, mounted on `folder`. Skips where this process may not mount."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root on Linux may mount a small tmpfs")
    folder.mkdir(parents=True, exist_ok=True)
    how = ",".join((f"size={size_bytes}", *options))
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield SmallDisk(folder)
    finally:
        # Lazily: what a failed test left open must not keep it.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
