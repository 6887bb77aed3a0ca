"""Every version made again from what the devices sent, by other code, on paper.

w' = w + Σ nₖ sₖ Δₖ / Σ nₖ in float64, where s is 1 (McMahan et al. 2017, Algorithm 1) or, for an
update from a version that is t versions older than the base, (1 + t)^-½ (Nguyen et al. 2022). The
kit's fleet uses no other server optimizer. Where the stored weights are these, each accepted update
is in the version once, whatever the records say. That this would show is measured, too: by how far
the result moves if one update were left out, or counted twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import safetensors.numpy

TOLERANCE = 1e-6
"""Absolute, in weight units: float32 weights of about 1 are stored to 6e-8."""

Flat = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Part:
    """One update in a version. `examples`: its weight. `staleness`: in versions."""

    update: bytes
    examples: int
    staleness: int = 0


@dataclass(frozen=True, slots=True)
class Remade:
    """`difference`: of the stored weights to those of the parts, the largest of all elements.

    `sensitivity`: the least that the largest element would move if any one of the parts were
    missing or counted twice; infinite where a version of one part would have had none.
    """

    difference: float
    sensitivity: float

    @property
    def decided(self) -> bool:
        """Whether a part too many or too few would have shown."""
        return self.sensitivity > 10 * TOLERANCE


def remake(base: bytes, parts: Sequence[Part], stored: bytes) -> Remade:
    """Compares `stored` with the version that `parts` make from `base` (safetensors, all)."""
    names = sorted(safetensors.numpy.load(base))
    weights, found = _flat(base, names), _flat(stored, names)
    updates = np.stack([_flat(part.update, names) / np.sqrt(1 + part.staleness) for part in parts])
    examples = np.array([part.examples for part in parts], np.float64)
    mean = _mean(updates, examples)
    moved = [np.inf]
    for index in range(len(parts)):
        twice = examples.copy()
        twice[index] *= 2
        # One part alone has the same mean however often it counts, and then that is no harm.
        if len(parts) > 1:
            without = np.delete(updates, index, 0), np.delete(examples, index)
            moved.append(float(np.abs(_mean(updates, twice) - mean).max()))
            moved.append(float(np.abs(_mean(*without) - mean).max()))
    difference = float(np.abs(weights + mean - found).max())
    return Remade(difference, min(moved))


def _mean(updates: Flat, examples: Flat) -> Flat:
    return examples @ updates / examples.sum()


def _flat(encoded: bytes, names: Sequence[str]) -> Flat:
    tensors = safetensors.numpy.load(encoded)
    return np.concatenate([tensors[name].astype(np.float64).reshape(-1) for name in names])
