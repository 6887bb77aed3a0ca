"""int8 weights: how a version's float32 tensors become those of a small inference file.

The coordinator and each device do it for themselves and must get the same bytes, since the weights
travel once and as float32. So every step is one that IEEE 754 fixes to the bit: conversions from
float32 and division in float64, one rounding to float32, rounding to the nearest whole number with
ties to even. No number is denormal on the way, which some processors would take for zero.

The scheme is symmetric, one scale a row (the first axis: the outputs of a linear layer, the filters
of a convolution, the words of a table): weight ≈ int8 · scale, with 127 for the largest of a row
(Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference", section
2.2). Which weights are quantised, and what a graph does with them, is for others to say.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedge.schemas.tensors import Array, Tensors, check_finite

if TYPE_CHECKING:
    from fedge.schemas.plan import PlanManifest


class Scheme(StrEnum):
    """What an operator may choose for the inference file."""

    NONE = "none"
    """float32, as the weights are trained."""
    INT8 = "int8"
    """The weights that are worth it, as this module says."""


LARGEST = 127
"""Of an int8 weight, and -127 the smallest: -128 has no counterpart."""
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
"""The smallest normal float32. A row that would need a smaller scale becomes zeros."""
LARGEST_SCALE = float(np.nextafter(np.float32(np.finfo(np.float32).max / LARGEST), np.float32(0)))
"""127 times this is still a float32."""

_BLOCK_ELEMENTS = 65_536
"""A large table is done piece by piece: the pieces are float64, twice the size of the table's."""


def quantized(weight: Array) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """(int8 of the weight's shape, float32 scales `[rows]`), the same bits on every machine.

    `weight`: float32 with at least one axis. A row of zeros has the scale 1. Raises `PeerError`
    (not_finite) if the weight holds NaN or infinity.
    """
    check_finite({"to quantise": weight})
    rows = np.asarray(weight, np.float32).reshape(weight.shape[0], math.prod(weight.shape[1:]))
    values = np.zeros(rows.shape, np.int8)
    scales = np.ones(len(rows), np.float32)
    step = max(1, _BLOCK_ELEMENTS // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        block = rows[start : start + step].astype(np.float64)
        largest = np.abs(block).max(axis=1, initial=0.0)
        scale = np.minimum((largest / LARGEST).astype(np.float32), np.float32(LARGEST_SCALE))
        held = scale >= np.float32(SMALLEST_SCALE)
        scale[~held] = 1.0
        # The quotient of two float32 numbers in float64 is on the right side of every half.
        block = np.rint(block / scale.astype(np.float64)[:, np.newaxis])
        block[~held] = 0.0
        values[start : start + step] = block.astype(np.int8)
        scales[start : start + step] = scale
    return values.reshape(weight.shape), scales


def dequantized(values: Array, scales: Array) -> npt.NDArray[np.float32]:
    """The weight that they stand for, float32: what ONNX's DequantizeLinear makes of them."""
    by_row = scales.reshape(-1, *(1 for _ in values.shape[1:]))
    # One rounding: both factors are float32 numbers.
    product: npt.NDArray[np.float32] = values.astype(np.float32) * by_row.astype(np.float32)
    return product


def as_stored(manifest: PlanManifest, weights: Tensors) -> Tensors:
    """A version's tensors as its inference file has them: rounded where the plan quantises.

    What is measured with these is what applications get. `weights`: by tensor name, all of a
    version's; they are not changed. Raises as `quantized` does.
    """
    if manifest.quantization is None:
        return weights
    rounded = {name: dequantized(*quantized(weights[name])) for name in manifest.quantization.int8}
    return {**weights, **rounded}
