"""The parity check: whether two runtimes agree about the same version on the golden inputs.

The coordinator makes it before a version is published, each device repeats it before the version is
used, and both mean the same by it. It is as strict for a file of int8 weights: what is compared is
that file with the weights as they are in it. How far rounding them moved the answers is another
question, which only the coordinator can ask.
"""

from __future__ import annotations

import math

import numpy as np

from fedge.schemas.errors import ParityFailed
from fedge.schemas.tensors import Array


def largest_difference(actual: Array, expected: Array) -> float:
    """The largest |actual - expected| / max(1, |expected|).

    Infinite for different or empty shapes, and where either holds NaN or infinity.
    """
    if actual.shape != expected.shape or actual.size == 0:
        return math.inf
    if not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return math.inf
    wide_actual, wide_expected = actual.astype(np.float64), expected.astype(np.float64)
    scale = np.maximum(1.0, np.abs(wide_expected))
    return float(np.max(np.abs(wide_actual - wide_expected) / scale))


def check_parity(where: str, actual: Array, expected: Array, tolerance: float) -> float:
    """The largest difference, if it is within `tolerance`; else raises `ParityFailed`."""
    largest = largest_difference(actual, expected)
    if largest > tolerance:
        raise ParityFailed(where, largest, tolerance)
    return largest


def rounding_effect(rounded: Array, exact: Array, *, scores: bool) -> float:
    """How far rounding the weights moved the answers: 0 not at all, 1 about as far as chance.

    `scores`: `[…, answers]`, of which the largest is the answer. Then it is how much worse the
    exact scores find the rounded model's answers than the best, in units of how much better the
    best is than a middling one, on average: a choice between equals costs nothing. Otherwise the
    sum of the differences over that of the values. Infinite as `largest_difference` is.
    """
    if not math.isfinite(largest_difference(rounded, exact)):
        return math.inf
    wide_rounded, wide_exact = rounded.astype(np.float64), exact.astype(np.float64)
    if not scores:
        moved, of = float(np.abs(wide_rounded - wide_exact).sum()), float(np.abs(wide_exact).sum())
        return moved / of if of else (math.inf if moved else 0.0)
    rows = wide_exact.reshape(-1, exact.shape[-1])
    answers = wide_rounded.reshape(rows.shape).argmax(axis=1)
    best = rows.max(axis=1)
    lost = best - rows[np.arange(len(rows)), answers]
    lead = best - np.median(rows, axis=1)
    # Where half of the answers or more are the best, one that is not has lost everything.
    return float(np.mean(np.where(lead > 0, lost / np.where(lead > 0, lead, 1.0), lost > 0)))
