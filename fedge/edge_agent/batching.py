"""The order in which a device trains on its examples: one function of the assignment's seed.

Pure: numbers in, row numbers out. FedAvg's client update (McMahan et al. 2017, Algorithm 1) splits
the examples into batches of B for each of E epochs; this says which rows stand in which batch, so
that anyone can repeat a device's training from its seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedge.schemas.plan import Padding

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's examples.

    `epoch`, `step`: from 0; `step` goes on over the epochs. `rows`: int64 `[batch]`, numbers of
    examples. `mask`: float32 `[batch]`, 1 for an example, 0 for padding. `count`: examples without
    the padding, at least 1.
    """

    epoch: int
    step: int
    rows: Rows
    mask: Mask
    count: int


def epoch_order(examples: int, *, seed: int, epoch: int) -> Rows:
    """The examples in the order of epoch `epoch`: int64 `[examples]`, a fresh permutation each."""
    return np.random.default_rng([seed, epoch]).permutation(examples)


def step_seed(seed: int, step: int) -> int:
    """The seed of one step's randomness (dropout): 0 to 2**32 - 1.

    The first 32-bit word that numpy's `SeedSequence([seed, step])` generates, which mixes the two
    so that neighbouring seeds and steps share nothing.
    """
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def step_count(
    examples: int, *, batch_size: int, local_epochs: int, local_steps: int | None = None
) -> int:
    """Steps that `batches` makes: of `local_epochs` epochs, and no more than `local_steps`."""
    steps = -(-examples // batch_size) * local_epochs
    return steps if local_steps is None else min(steps, local_steps)


def batches(
    examples: int,
    *,
    batch_size: int,
    local_epochs: int,
    local_steps: int | None = None,
    seed: int,
    padding: Padding,
) -> Iterator[Batch]:
    """The batches of a round's training in order.

    Ends after `local_epochs` epochs, or within one after `local_steps` batches. The last batch of
    an epoch may be partial: with `Padding.MASK` it is filled to `batch_size` with its own first
    row under a mask of 0, with `Padding.EXACT` it is shorter.
    """
    steps = step_count(
        examples, batch_size=batch_size, local_epochs=local_epochs, local_steps=local_steps
    )
    step = 0
    for epoch in range(local_epochs):
        if step >= steps:
            return
        order = epoch_order(examples, seed=seed, epoch=epoch)
        for start in range(0, examples, batch_size):
            if step >= steps:
                return
            chosen = order[start : start + batch_size]
            rows, mask = batch_of(chosen, batch_size, padding)
            yield Batch(epoch, step, rows, mask, len(chosen))
            step += 1


def batch_of(rows: Rows, batch_size: int, padding: Padding) -> tuple[Rows, Mask]:
    """At most `batch_size` rows as a batch and its mask, filled up if `padding` says so."""
    mask = np.ones(len(rows), np.float32)
    fill = batch_size - len(rows)
    if fill == 0 or padding is Padding.EXACT:
        return rows, mask
    # A real row, not zeros: features of zeros may divide by zero inside a model.
    rows = np.concatenate([rows, np.full(fill, rows[0], rows.dtype)])
    return rows, np.concatenate([mask, np.zeros(fill, np.float32)])
