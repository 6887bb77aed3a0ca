"""The wall clock of one program, which can be moved while it runs (see `site/sitecustomize.py`)."""

from __future__ import annotations

import struct
from pathlib import Path

SITE = Path(__file__).parent / "site"
"""The folder that a program's PYTHONPATH must begin with."""


class Clock:
    """`shift_s`: by how much the program's wall clock is wrong now."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shift_s = 0.0
        self._write()

    @property
    def environment(self) -> dict[str, str]:
        """What the program must be started with."""
        return {"FEDGE_CHAOS_CLOCK": str(self.path)}

    def jump(self, by_s: float) -> None:
        """Moves the clock by so much, at once."""
        self.shift_s += by_s
        self._write()

    def _write(self) -> None:
        # In place, eight bytes at once: the program has this file in its memory.
        mode = "r+b" if self.path.exists() else "wb"
        with self.path.open(mode) as file:
            file.write(struct.pack("<d", self.shift_s))
