"""A coordinator that breaks the promise on purpose: the kit has to find it, or it finds nothing.

    python -m tests.chaos --sabotage count_twice --seconds 5 --only reset

The real program with one function replaced: what a defect there would look like from outside.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from fedge.coordinator import cli
from fedge.coordinator.intake import Intake
from fedge.coordinator.store import Store


def _count_twice() -> None:
    """The first update of every round goes into its version twice."""
    right: Callable[..., list[Any]] = Intake.accepted_updates

    def wrong(*arguments: Any, **options: Any) -> list[Any]:
        found = right(*arguments, **options)
        return [found[0], *found]

    Intake.accepted_updates = wrong  # type: ignore[method-assign] # that is the sabotage


def _leave_out() -> None:
    """The first update of every round is not in its version."""
    right: Callable[..., list[Any]] = Intake.accepted_updates

    def wrong(*arguments: Any, **options: Any) -> list[Any]:
        found = right(*arguments, **options)
        return found[1:] or found

    Intake.accepted_updates = wrong  # type: ignore[method-assign] # that is the sabotage


def _answer_without_writing() -> None:
    """One update in five gets its receipt and is in no record."""
    right: Callable[..., Any] = Store.record_accepted
    count = 0

    def wrong(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return True if count % 5 == 0 else right(*arguments, **options)

    Store.record_accepted = wrong  # type: ignore[method-assign] # that is the sabotage


def _end_now_and_then() -> None:
    """Every tenth round it ends by itself, with a traceback."""
    right: Callable[..., Any] = Store.open_round
    count = 0

    def wrong(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count % 10 == 0:
            raise ZeroDivisionError("sabotage")
        return right(*arguments, **options)

    Store.open_round = wrong  # type: ignore[method-assign] # that is the sabotage


KINDS: dict[str, Callable[[], None]] = {
    "count_twice": _count_twice,
    "leave_out": _leave_out,
    "answer_without_writing": _answer_without_writing,
    "end_now_and_then": _end_now_and_then,
}


def main() -> None:
    """`python -m tests.chaos.sabotage KIND` and what `fedge` takes."""
    KINDS[sys.argv.pop(1)]()
    cli.main()


if __name__ == "__main__":
    main()
