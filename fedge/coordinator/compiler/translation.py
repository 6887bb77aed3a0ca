"""Translations of ATen operators to ONNX where those of torch are slow, inexact or missing.

Each is a function of ONNX values which torch's exporter calls in place of its own.
"""

# ruff: noqa: PLR0917 -- the signatures are ATen's

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from onnxscript import ir
from onnxscript import opset18 as op

aten = torch.ops.aten


def _div_mode(self: Any, other: Any, rounding_mode: str | None = None) -> Any:
    """Integers stay integers: torch's own translation divides in float32, exact up to 2^24."""
    quotient = op.Div(self, other)
    if rounding_mode is None:
        return quotient
    if not ir.DataType(self.dtype).is_integer():
        if rounding_mode == "floor":
            return op.Floor(quotient)
        return op.Mul(op.Sign(quotient), op.Floor(op.Abs(quotient)))
    if rounding_mode == "trunc":
        return quotient
    remainder = op.Sub(self, op.Mul(quotient, other))
    nought: Any = op.Constant(value_int=0)
    zero = op.CastLike(nought, self)
    inexact = op.Not(op.Equal(remainder, zero))
    opposite = op.Xor(op.Less(remainder, zero), op.Less(other, zero))
    return op.Sub(quotient, op.CastLike(op.And(inexact, opposite), self))


def _max_pool_with_indices(
    self: Any,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> Any:
    """ONNX counts indices over the whole tensor, torch within a plane: the remainder."""
    rank = len(self.shape) - 2
    pads = _per_axis(padding, rank)
    pooled, indices = op.MaxPool(
        self,
        ceil_mode=int(ceil_mode),
        dilations=_per_axis(dilation, rank),
        kernel_shape=_per_axis(kernel_size, rank),
        pads=pads + pads,
        strides=_per_axis(stride or kernel_size, rank),
    )
    area: Any = op.Constant(value_int=math.prod(int(size) for size in self.shape[2:]))
    return pooled, op.Mod(indices, area)


def _per_axis(values: Sequence[int], rank: int) -> list[int]:
    return list(values) * rank if len(values) == 1 else list(values)


TRANSLATIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    aten.div.Tensor_mode: _div_mode,
    aten.max_pool2d_with_indices.default: _max_pool_with_indices,
    aten.max_pool3d_with_indices.default: _max_pool_with_indices,
}
