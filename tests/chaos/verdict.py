"""What a check says: how many cases it looked at, and which of them break the promise.

Without the number "no violations" would mean little: a check that looked at nothing finds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Violation:
    """`check`: its name in `promises`. `at_s`: monotonic seconds, None if it is of no moment."""

    check: str
    text: str
    at_s: float | None = None


@dataclass(frozen=True, slots=True)
class Checked:
    """`cases`: how many of what `promises` names for this check were looked at."""

    check: str
    cases: int
    violations: tuple[Violation, ...] = ()


def together(parts: Iterable[Checked]) -> dict[str, Checked]:
    """One for each check, by name: what its parts looked at and found, in the order of the parts.

    Twice the same violation, from a check that was made twice, is one.
    """
    whole: dict[str, Checked] = {}
    for part in parts:
        before = whole.get(part.check, Checked(part.check, 0))
        whole[part.check] = Checked(
            part.check,
            before.cases + part.cases,
            tuple(dict.fromkeys((*before.violations, *part.violations))),
        )
    return whole
