"""A folder in memory where there is one, for tests of many small transactions.

Each commit waits for the disk, and the disk of a busy machine may take its time. What a killed
process has written is there all the same; only a power cut would tell the difference.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

_MEMORY = Path("/dev/shm")  # noqa: S108 -- a new folder in it each time


@contextlib.contextmanager
def quick_folder() -> Iterator[Path]:
    """A new folder, deleted afterwards."""
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
        yield Path(folder)
