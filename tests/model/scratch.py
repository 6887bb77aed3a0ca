"""Folders for one example: in memory where the system has such a place, since examples are many."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_IN_MEMORY = Path("/dev/shm")  # noqa: S108 -- each example makes a private folder in it
_PLACE = _IN_MEMORY if os.access(_IN_MEMORY, os.W_OK | os.X_OK) else None


def scratch_folder() -> Path:
    """A new empty folder. Whoever asks for it removes it."""
    return Path(tempfile.mkdtemp(prefix="fedge-model-", dir=_PLACE))
