"""The parity check: whether two runtimes agree about the same version on the golden inputs.

The coordinator makes it before a version is published, each device repeats it before the version is
used, and both mean the same by it.
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
