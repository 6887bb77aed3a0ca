"""Federated averaging: the mean of a cohort's client updates, weighted by examples.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
Algorithm 1: w ← w + Σ nₖ Δₖ / Σ nₖ. Written as a fold of three functions, init, accumulate and
finish (after fedjax's aggregators), so that another rule is another class here and nothing else.
Updates are read from files in one pass in the caller's order, a tensor at a time: memory does not
grow with the cohort, and the result depends on the order given and not on the order of arrival.
What becomes of the mean is the server optimizer's business.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from fedge.schemas.errors import PeerError, RejectReason
from fedge.schemas.plan import PlanManifest
from fedge.schemas.tensor_spec import TensorSpec
from fedge.schemas.tensors import Array, check_finite, stream_tensors

BLOCK_ELEMENTS = 1 << 16
"""Elements converted to float64 at a time: half a megabyte beside the sums."""


class Weighting(StrEnum):
    """How much one update counts beside the others."""

    EXAMPLES = "examples"
    """By the examples it was trained on: McMahan et al. 2017."""
    UNIFORM = "uniform"
    """Each the same, so that no device can claim weight by claiming examples."""

    def weight(self, examples: int) -> float:
        """The weight of an update trained on so many examples."""
        return float(examples) if self is Weighting.EXAMPLES else 1.0


@dataclass(frozen=True, slots=True)
class AcceptedUpdate:
    """One accepted update: its file, the examples it was trained on, how much of it is believed.

    `scale`: factor of the update itself, 1 for a fresh one; a stale one moves the model less.
    """

    path: Path
    examples: int
    scale: float = 1.0


S = TypeVar("S")


class Aggregator(Protocol[S]):
    """A fold over client updates; `S` is what it remembers between two of them."""

    def init(self) -> S:
        """The state before the first update."""

    def accumulate(
        self, state: S, update: Iterable[tuple[str, Array]], weight: float, scale: float = 1.0
    ) -> S:
        """The state after one more update, of `scale` times these differences.

        The state that went in may be overwritten.
        """

    def finish(self, state: S) -> dict[str, Array]:
        """The aggregate, a tensor for each spec; the state is used up."""


@dataclass(slots=True)
class RunningSum:
    """Weighted sums in float64, by tensor name, and the sum of the weights."""

    tensors: dict[str, npt.NDArray[np.float64]]
    weight: float = field(default=0.0)


@dataclass(frozen=True, slots=True)
class WeightedMean:
    """Σ weight·update / Σ weight for each tensor of `specs`, in the spec's dtype.

    Sums are float64: a float32 sum over a large cohort loses the small updates.
    """

    specs: tuple[TensorSpec, ...]

    def init(self) -> RunningSum:
        """Zeros."""
        return RunningSum({spec.name: np.zeros(spec.shape, np.float64) for spec in self.specs})

    def accumulate(
        self,
        state: RunningSum,
        update: Iterable[tuple[str, Array]],
        weight: float,
        scale: float = 1.0,
    ) -> RunningSum:
        """Adds `weight * scale` times the update, in place; `weight` alone goes into the divisor.

        So a stale update moves the mean towards zero, not towards the others (Nguyen et al. 2022,
        "Federated Learning with Buffered Asynchronous Aggregation", Algorithm 1).
        Raises `ValueError` for a weight or scale that is not positive and finite.
        """
        if not (math.isfinite(weight) and weight > 0 and math.isfinite(scale) and scale > 0):
            raise ValueError(f"an update of weight {weight} and scale {scale}")
        for name, tensor in update:
            _add_scaled(state.tensors[name], tensor, weight * scale)
        state.weight += weight
        return state

    def finish(self, state: RunningSum) -> dict[str, Array]:
        """The mean. Raises `ValueError` if nothing was accumulated."""
        if state.weight == 0:
            raise ValueError("the mean of no updates")
        mean: dict[str, Array] = {}
        for spec in self.specs:
            # Popped, so that sums and means of the whole model never stand side by side.
            total = state.tensors.pop(spec.name)
            np.divide(total, state.weight, out=total)
            mean[spec.name] = total.astype(spec.dtype)
            del total
        return mean


def aggregate(
    updates: Iterable[AcceptedUpdate],
    specs: Sequence[TensorSpec],
    aggregator: Aggregator[S] | None = None,
    *,
    weighting: Weighting = Weighting.EXAMPLES,
) -> dict[str, Array]:
    """The mean of the updates in these files, weighted, summed in the order given.

    Sort them by device name, and the result is the same bit for bit in whatever order they came.
    `specs`: the tensors of an update (`PlanManifest.update_specs`). `aggregator`: a
    `WeightedMean` unless another is given. Peak memory: about three copies of an update.
    Raises `PeerError` for a file that breaks the specs, `StoreError` for one that cannot be read,
    `ValueError` if there are no updates.
    """
    if aggregator is None:
        return _fold(updates, specs, WeightedMean(tuple(specs)), weighting)
    return _fold(updates, specs, aggregator, weighting)


def validate_update(path: Path, manifest: PlanManifest, max_norm: float = math.inf) -> None:
    """Returns if the file at `path` is a client update of the plan, finite in every number.

    `max_norm`: L2, of all differences together, in weight units: one device with finite and
    absurd numbers would otherwise decide the mean.

    Raises `PeerError`: oversized, truncated, malformed, wrong_tensors, wrong_dtype, wrong_shape,
    not_finite or norm_too_large, the first that is found; `StoreError` if the file cannot be read.
    """
    square = 0.0
    for name, tensor in stream_tensors(path, manifest.update_specs):
        check_finite({name: tensor})
        square += _sum_of_squares(tensor)
    norm = math.sqrt(square)
    if norm > max_norm:
        raise PeerError(RejectReason.NORM_TOO_LARGE, f"L2 norm {norm:.4g}, at most {max_norm:.4g}")


def _fold(
    updates: Iterable[AcceptedUpdate],
    specs: Sequence[TensorSpec],
    aggregator: Aggregator[S],
    weighting: Weighting,
) -> dict[str, Array]:
    state = aggregator.init()
    for update in updates:
        weight = weighting.weight(update.examples)
        tensors = stream_tensors(update.path, specs)
        state = aggregator.accumulate(state, tensors, weight, update.scale)
    return aggregator.finish(state)


def _add_scaled(total: npt.NDArray[np.float64], tensor: Array, weight: float) -> None:
    # By blocks: `weight * tensor` at once would be two more copies of the largest tensor.
    flat_total, flat_tensor = total.reshape(-1), tensor.reshape(-1)
    for start in range(0, flat_total.size, BLOCK_ELEMENTS):
        block = slice(start, start + BLOCK_ELEMENTS)
        flat_total[block] += weight * flat_tensor[block].astype(np.float64)


def _sum_of_squares(tensor: Array) -> float:
    # In float64, since the square of a finite float32 may be infinite; by blocks, as above.
    flat = tensor.reshape(-1)
    total = 0.0
    for start in range(0, flat.size, BLOCK_ELEMENTS):
        block = flat[start : start + BLOCK_ELEMENTS].astype(np.float64)
        total += float(block @ block)
    return total
