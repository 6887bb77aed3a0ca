"""Which devices a rollout reaches first: a stable draw that both sides make for themselves.

Each device has a place between 0 and 1 in each rollout, hashed from the population, the rollout's
number and its own name. A rollout that reaches a share reaches every device whose place is below
it. So a device that is in stays in while the share grows, nobody has to keep a list, a restart
changes nothing, and it is not always the same devices that go first.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

_PLACES = 2**32
STEP = 1 / _PLACES
"""The distance of two places. Every place and the next one are exact as floats, also in JSON."""


def place_of(population: str, rollout: int, device: str) -> float:
    """The device's place in the rollout, from 0 to below 1."""
    text = f"rollout/{population}/{rollout}/{device}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / _PLACES


def reach(places: Sequence[float], stages: Sequence[float], stage: int, min_devices: int) -> float:
    """The share that reaches what stage number `stage` (from 0) should, of a fleet that is known.

    `places`: of the known devices, rising. As many of them are reached as `stages[stage]` says, to
    the device, and at least one; or more, where that is fewer than `min_devices`. For the minimum
    alone no stage reaches more than its part of the steps: of four stages the first reaches a
    quarter of the fleet at the most.
    """
    nominal = stages[stage]
    if nominal >= 1:
        return 1.0
    least = min(min_devices, len(places) * (stage + 1) // len(stages))
    wanted = min(len(places), max(math.ceil(nominal * len(places)), least))
    return places[wanted - 1] + STEP if wanted > 0 else nominal
