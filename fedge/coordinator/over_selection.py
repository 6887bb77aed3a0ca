"""How many devices to ask for a goal, learned from how many delivered before.

The operator's factor is where it begins, and the least that is asked. A round that misses its goal
shows which share of its cohort delivers in time; from then on enough are asked for the goal to be
reached with that share, and a margin for chance. A round that reaches its goal shows nothing
about those who had no time to answer, so the number is lowered only as an experiment, rarely, and
more rarely after each experiment that failed: an asked device that is not needed costs a little,
a round that waits for its deadline costs much more.

Pure: a fold over closed rounds; the belief is kept as text for the next life. The need for it is
Bonawitz et al. 2019, "Towards Federated Learning at Scale: System Design", section 9: 6 to 10% drop
out, and asking 130% covers that; fleets behind bad links lose more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from pydantic import TypeAdapter

from fedge.coordinator.cohort import over_selected

MOST = 4.0
"""Never more than so many devices for each update of the goal, whatever was seen."""
MARGIN = 3.0
"""Standard deviations: of rounds with the share that was seen, 99.9% reach the goal."""
CAUTION = 1.5
"""Standard deviations by which the share may be less than one round showed: it was one sample."""
FIRST_PATIENCE = 100
"""Rounds that reach their goal before fewer devices are tried; doubled by each failure, to…"""
LONGEST_PATIENCE = 640
SOONER = 2
"""…and after an experiment that went well, the next comes so many times sooner."""
FIRST_STEP = 0.02
"""An experiment believes that the share is so much larger than it did, by ratio; the next, if this
one did not miss, twice as much: what one bad night taught is forgotten in a few steps."""
LARGEST_STEP = 0.5


@dataclass(frozen=True, slots=True)
class Delivery:
    """What a closed round showed: `delivered` of `cohort` before it closed."""

    cohort: int
    delivered: int
    goal: int

    @property
    def reached(self) -> bool:
        """Whether the goal was reached, or all of a smaller cohort delivered."""
        return self.delivered >= min(self.goal, self.cohort)


@dataclass(frozen=True, slots=True)
class OverSelection:
    """What is believed now. `share`: of a cohort that delivers; None before any round missed.

    `good`: rounds that reached the goal since the last change. `patience`, `step`: see above.
    `trying`: the last change was an experiment.
    """

    share: float | None = None
    good: int = 0
    patience: int = FIRST_PATIENCE
    step: float = FIRST_STEP
    trying: bool = False


def learned(belief: OverSelection, seen: Delivery, factor: float) -> OverSelection:
    """The belief after one more closed round. `factor`: the operator's."""
    if seen.cohort == 0:
        return belief
    if not seen.reached:
        patience = min(LONGEST_PATIENCE, belief.patience * 2) if belief.trying else belief.patience
        observed = seen.delivered / seen.cohort
        doubt = CAUTION * math.sqrt(observed * (1 - observed) / seen.cohort)
        return OverSelection(max(observed - doubt, 1 / MOST), patience=patience)
    if belief.share is None:
        return belief
    enough = belief.patience // SOONER if belief.trying else belief.patience
    if belief.good + 1 < enough:
        return replace(belief, good=belief.good + 1)
    step = min(LARGEST_STEP, 2 * belief.step) if belief.trying else belief.step
    share = belief.share * (1 + step)
    # At the operator's factor there is nothing more to try.
    believed = None if share >= 1 / factor else share
    return OverSelection(believed, patience=belief.patience, step=step, trying=True)


def encode_belief(belief: OverSelection) -> str:
    """The belief as JSON."""
    return _BELIEF.dump_json(belief).decode()


def decode_belief(text: str) -> OverSelection:
    """What `encode_belief` wrote. Raises `ValueError` for anything else."""
    return _BELIEF.validate_json(text)


_BELIEF = TypeAdapter(OverSelection)


def devices_to_ask(belief: OverSelection, goal: int, factor: float) -> int:
    """How many devices a cohort should have; at least `goal * factor`, at most `MOST * goal`.

    Raises `ValueError` as `over_selected`.
    """
    least = over_selected(goal, factor)
    if belief.share is None:
        return least
    return max(least, min(_with_margin(goal, belief.share), math.ceil(MOST * goal)))


def _with_margin(goal: int, share: float) -> int:
    """The least n of which `share` is `goal`, and `MARGIN` standard deviations more."""
    # n·p - m·sqrt(n·p·(1-p)) = goal, solved for sqrt(n).
    spread = MARGIN * math.sqrt(share * (1 - share))
    root = (spread + math.sqrt(spread**2 + 4 * share * goal)) / (2 * share)
    return math.ceil(root**2)
