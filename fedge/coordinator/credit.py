"""How many chunks may be on their way at once: learned from what gets lost.

A broker drops what its queue cannot hold, after it has acknowledged it, and says nothing; how long
its queue is, only losses tell. So the credit of all uploads together is halved by a loss and grows
slowly while nothing is lost (Jacobson 1988, "Congestion Avoidance and Control"; Chiu and Jain 1989:
additive increase with multiplicative decrease is what converges). Chunks that were on their way
together are lost together, so only the first of such losses counts (RFC 6582 for TCP).

Pure: knows neither uploads nor clocks.
"""

from __future__ import annotations

import math

GROWTH_STEPS = 64
"""While nothing is lost, each full credit of chunks that arrives adds the 64th part of the most."""
GROWTH_PER_CHUNK = 1 / 8
"""A small credit grows no faster than that, since each trial of more costs it a large part."""


class Credit:
    """Chunks on their way, at most `most_slots * most_window`, and how they are shared out.

    `generation`: what was sent under an older one and is lost says nothing about the credit now.
    """

    def __init__(self, most_slots: int, most_window: int) -> None:
        self._most_slots = most_slots
        self._most_window = most_window
        self._total = float(most_slots * most_window)
        self.generation = 0

    @property
    def most(self) -> int:
        """What it starts from and never exceeds."""
        return self._most_slots * self._most_window

    @property
    def total(self) -> int:
        """Chunks that may be on their way now, at least 1."""
        return int(self._total)

    @property
    def slots(self) -> int:
        """Devices that may send at a time. Slots and window shrink alike, by the square root."""
        alike = math.isqrt(self.total * self._most_slots // self._most_window)
        return max(1, min(alike, self._most_slots, self.total))

    @property
    def window(self) -> int:
        """Chunks that each of them may be ahead; `slots * window` is at most `total`."""
        return min(self._most_window, self.total // self.slots)

    def lost(self, generation: int) -> bool:
        """Something that was sent under `generation` is lost. Returns whether that counted."""
        if generation != self.generation:
            return False
        self._total = max(1.0, self._total / 2)
        self.generation += 1
        return True

    def excuse(self) -> None:
        """What is on its way now may be lost for another reason than too much credit."""
        self.generation += 1

    def arrived(self) -> None:
        """A chunk arrived whose sender had more to send than its credit allowed."""
        step = max(1.0, self.most / GROWTH_STEPS) / self._total
        self._total = min(float(self.most), self._total + min(step, GROWTH_PER_CHUNK))
