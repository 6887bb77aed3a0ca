"""The passes of one training: after each a measurement, and everything kept on disk.

A run of an hour that is stopped goes on after its last pass. What a pass does is its caller's: a
pass knows its number, so that nothing else has to be remembered than weights and state.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from fedge.schemas.tensors import Array, Tensors

Pass = Callable[[Tensors, Tensors, int], tuple[dict[str, Array], dict[str, Array]]]
"""(weights, the server optimizer's state, number from 1) → those after it."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Shares of all words, the perplexity over the known ones; after `passes` over the data."""

    passes: int
    top1: float
    top3: float
    perplexity: float


@dataclass(frozen=True, slots=True)
class Course:
    """A training so far. `curve`: on the validation part, before the first pass too.

    `best`: the weights at the highest `top3` of the curve, after `best_passes`.
    """

    weights: Tensors
    state: Tensors
    best: Tensors
    best_passes: int
    curve: tuple[Measured, ...]
    windows_trained: int = 0

    @property
    def passes(self) -> int:
        """Over the data, so far."""
        return self.curve[-1].passes


def begin(weights: Tensors, state: Tensors, measure: Callable[[Tensors, int], Measured]) -> Course:
    """A training before its first pass."""
    return Course(weights, state, weights, 0, (measure(weights, 0),))


def follow(
    course: Course,
    one_pass: Pass,
    *,
    passes: int,
    measure: Callable[[Tensors, int], Measured],
    windows_trained: Callable[[], int],
    on_pass: Callable[[Course], None],
) -> Course:
    """The course until it has `passes`.

    `windows_trained`: the trainer's own count, so that equal passes are seen, not assumed.
    """
    while course.passes < passes:
        number = course.passes + 1
        before = windows_trained()
        weights, state = one_pass(course.weights, course.state, number)
        found = measure(weights, number)
        better = found.top3 > max(point.top3 for point in course.curve)
        course = replace(
            course,
            weights=weights,
            state=state,
            best=weights if better else course.best,
            best_passes=found.passes if better else course.best_passes,
            curve=(*course.curve, found),
            windows_trained=course.windows_trained + windows_trained() - before,
        )
        on_pass(course)
    return course


def save(course: Course, path: Path) -> None:
    """Keeps it whole, or what was there."""
    facts = {
        "curve": [asdict(point) for point in course.curve],
        "best_passes": course.best_passes,
        "windows_trained": course.windows_trained,
    }
    groups = {"weights": course.weights, "state": course.state, "best": course.best}
    arrays = {
        f"{group}/{name}": value for group, held in groups.items() for name, value in held.items()
    }
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, facts=np.array(json.dumps(facts)), **arrays)
    partial.replace(path)


def load(path: Path) -> Course | None:
    """What `save` kept; None if there is nothing."""
    if not path.exists():
        return None
    with np.load(path) as held:
        facts = json.loads(str(held["facts"]))
        arrays = {name: held[name] for name in held.files if name != "facts"}
    return Course(
        weights=_group(arrays, "weights"),
        state=_group(arrays, "state"),
        best=_group(arrays, "best"),
        best_passes=facts["best_passes"],
        curve=tuple(Measured(**point) for point in facts["curve"]),
        windows_trained=facts["windows_trained"],
    )


def _group(arrays: Mapping[str, Array], group: str) -> dict[str, Array]:
    return {
        name.removeprefix(f"{group}/"): value
        for name, value in arrays.items()
        if name.startswith(f"{group}/")
    }
