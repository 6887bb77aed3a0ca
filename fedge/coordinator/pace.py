"""Pace steering: when devices speak, so that a fleet of any size is as much as can be served.

A small fleet comes within a moment. Of a large one, a random part is enough to fill a cohort; it
comes spread over the time that it takes to hear it, and devices that were not chosen come back
spread as well (Bonawitz et al. 2019, "Towards Federated Learning at Scale: System Design", section
2.3: "pace steering"). Pure: numbers in, numbers out.
"""

from __future__ import annotations

from dataclasses import dataclass

SURPLUS = 2.0
"""Devices invited for each one that is asked: some of them are busy, and chance has its part."""
BURST = 100
"""So many at once are no load at all."""
DRAW_S = 1.0
"""Where not all are asked, devices come at a random moment of this: those with the quickest way
would be the first, and asked, in every round."""


@dataclass(frozen=True, slots=True)
class Invitation:
    """Who checks in for a round, and within what time: see `RoundAnnouncement`."""

    share: float
    spread_s: float


def invitation(
    online: int, wanted: int, *, checkins_per_s: float, least_spread_s: float = 0.0
) -> Invitation:
    """How `online` devices are invited where `wanted` are asked in the end.

    `checkins_per_s`: what the coordinator should hear at most. `least_spread_s`: the operator's.
    """
    share = 1.0 if online <= BURST else min(1.0, SURPLUS * wanted / online)
    comers = online * share
    spread_s = 0.0 if comers <= BURST else comers / checkins_per_s
    draw_s = DRAW_S if online > wanted else 0.0
    return Invitation(share, max(least_spread_s, spread_s, draw_s))


def return_spread_s(deferred: int, after_s: float, *, checkins_per_s: float) -> float:
    """Over how long the devices that were sent away together come back, after `after_s`."""
    return max(0.25 * after_s, 0.0 if deferred <= BURST else deferred / checkins_per_s)
