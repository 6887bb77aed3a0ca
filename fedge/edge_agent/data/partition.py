"""How one data set becomes several devices' data sets.

Pure: labels in, index arrays out, the same for the same seed. The schemes are those of the
literature on federated learning: even and random; shards of sorted labels (McMahan et al. 2017,
section 3); class mixtures drawn from a Dirichlet distribution (Hsu et al. 2019, "Measuring the
Effects of Non-Identical Data Distribution", section 3); and random with unequal sizes. Which
device takes which part is not decided here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedge.schemas.errors import ConfigError
from fedge.schemas.split_schemes import (
    Dirichlet,
    Iid,
    Ordered,
    Scheme,
    Shards,
    Weighted,
    parse_scheme,
)

Indices = npt.NDArray[np.int64]


def partition(
    targets: npt.NDArray[Any], scheme: str | Scheme, parts: int, seed: int
) -> list[Indices]:
    """`parts` arrays of sorted, distinct indices into `targets` which together hold every index.

    `targets`: one label an example, whole numbers for shards and Dirichlet. No part is empty.
    Raises `ConfigError` if the scheme does not fit the targets or there are too few examples.
    """
    scheme = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    count = len(targets)
    needed = parts * scheme.per_part if isinstance(scheme, Shards) else parts
    if parts < 1 or count < needed:
        raise ConfigError(
            f"{count} examples cannot be split into {parts} parts by {scheme}: "
            f"at least one part and {needed} examples are needed"
        )
    rng = np.random.default_rng(seed)
    match scheme:
        case Iid():
            chosen = np.array_split(rng.permutation(count), parts)
        case Ordered():
            chosen = np.array_split(np.arange(count), parts)
        case Weighted(weights):
            sizes = _sizes(weights, count, parts)
            chosen = np.split(rng.permutation(count), np.cumsum(sizes)[:-1])
        case Shards(per_part):
            chosen = _shards(_classes(targets, scheme), parts, per_part, rng)
        case Dirichlet(alpha):
            chosen = _mixtures(_classes(targets, scheme), parts, alpha, rng)
    return [np.sort(part).astype(np.int64) for part in chosen]


def _classes(targets: npt.NDArray[Any], scheme: Scheme) -> Indices:
    """Each example's class, numbered from 0 without gaps."""
    if targets.size != len(targets) or not np.issubdtype(targets.dtype, np.integer):
        raise ConfigError(
            f"the scheme {scheme} needs one class number an example, and these targets are "
            f"{targets.dtype} of shape {list(targets.shape)}: use iid or weighted"
        )
    numbered: Indices = np.unique(targets.reshape(-1), return_inverse=True)[1].astype(np.int64)
    return numbered


def _sizes(weights: tuple[float, ...], count: int, parts: int) -> Indices:
    """Whole sizes that sum to `count`: one each, the rest by largest remainder."""
    if len(weights) != parts:
        raise ConfigError(f"{len(weights)} weights for {parts} parts: give one weight a part")
    share = np.asarray(weights) / max(weights)
    ideal = share / share.sum() * count
    sizes: Indices = np.maximum(np.floor(ideal).astype(np.int64), 1)
    while sizes.sum() > count:
        sizes[np.argmax(np.where(sizes > 1, sizes - ideal, -np.inf))] -= 1
    while sizes.sum() < count:
        sizes[np.argmax(ideal - sizes)] += 1
    return sizes


def _shards(classes: Indices, parts: int, per_part: int, rng: np.random.Generator) -> list[Indices]:
    shards = np.array_split(np.argsort(classes, kind="stable"), parts * per_part)
    dealt = rng.permutation(len(shards)).reshape(parts, per_part)
    return [np.concatenate([shards[shard] for shard in hand]) for hand in dealt]


def _mixtures(
    classes: Indices, parts: int, alpha: float, rng: np.random.Generator
) -> list[Indices]:
    left = np.bincount(classes)
    frequencies = left / left.sum()
    pools = [rng.permutation(np.flatnonzero(classes == label)) for label in range(len(left))]
    chosen = []
    for size in [len(part) for part in np.array_split(classes, parts)]:
        mixture = rng.dirichlet(alpha * len(left) * frequencies)
        taken = np.zeros_like(left)
        while (missing := size - taken.sum()) > 0:
            odds = np.where(left > taken, mixture, 0.0)
            if not odds.sum() > 0:  # the drawn classes ran out: what is left decides
                odds = (left - taken).astype(np.float64)
            drawn = rng.multinomial(missing, odds / odds.sum())
            taken += np.minimum(drawn, left - taken)
        chosen.append(np.concatenate([pool[:n] for pool, n in zip(pools, taken, strict=True)]))
        pools = [pool[n:] for pool, n in zip(pools, taken, strict=True)]
        left = left - taken
    return chosen
