"""A violation of the promise: which check, what was found, and when."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Violation:
    """`check`: its name in `checks`. `at_s`: monotonic seconds, None if it is of no moment."""

    check: str
    text: str
    at_s: float | None = None
