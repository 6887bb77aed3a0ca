"""Which devices take part in a round: pure choices, the generator passed in.

Sampling is uniform without replacement (McMahan et al. 2017, Algorithm 1: "random set of m
clients"), over more devices than the goal needs, because some drop out and some come late
(Bonawitz et al. 2019, "Towards Federated Learning at Scale: System Design", sections 2.2 and 9).
This module knows neither rounds nor clocks; it never sees who is connected.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np


def select_cohort(ready: Iterable[str], size: int, rng: np.random.Generator) -> tuple[str, ...]:
    """`size` devices of `ready`, each equally likely, in name order; all of them if it is fewer.

    Equal sets of names and equal generators give equal cohorts, in whatever order the devices
    checked in. Raises `ValueError` for a negative size.
    """
    if size < 0:
        raise ValueError(f"a cohort of {size} devices")
    names = sorted(set(ready))
    if size >= len(names):
        return tuple(names)
    chosen = rng.choice(len(names), size=size, replace=False)
    return tuple(names[index] for index in sorted(chosen))


def over_selected(goal: int, factor: float = 1.3) -> int:
    """How many devices to ask for `goal` updates: `goal * factor`, rounded up, at least `goal`.

    1.3 is what Bonawitz et al. 2019, section 9, ask for where 6 to 10% drop out.
    Raises `ValueError` if `goal` is below 1 or `factor` below 1.
    """
    if goal < 1 or factor < 1:
        raise ValueError(f"over-selection of {goal} updates by {factor}: both must be at least 1")
    # 10 * 1.1 is 11.000000000000002 in binary; a twelfth device would be asked for nothing.
    return max(goal, math.ceil(round(goal * factor, 9)))


def cyclic_next(devices: Sequence[str], last: str | None) -> str:
    """The device after `last` in name order, the first one after the last or if `last` is None.

    `last` may have left: its successor by name is the next all the same.
    Raises `ValueError` if there are no devices.
    """
    if not devices:
        raise ValueError("no devices to visit")
    names = sorted(devices)
    if last is None:
        return names[0]
    return next((name for name in names if name > last), names[0])
