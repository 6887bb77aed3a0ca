"""Gradients of pooling, and adaptive average pooling as a matrix product.

The gradient of a maximum goes to where the maximum was; that of an average to the whole window, in
equal parts. An adaptive window differs from place to place, so averaging is a multiplication by a
constant matrix along each axis, whose gradient is one by its transpose.
"""

# ruff: noqa: PLR0917 -- the signatures are ATen's

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

aten = torch.ops.aten


def max_pool_backward(
    grad_output: Tensor,
    inputs: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """`indices` count within one plane, as torch's do."""
    rank = len(kernel_size)
    planes = list(inputs.shape[:-rank])
    area = math.prod(inputs.shape[-rank:])
    zeros = aten.full.default([*planes, area], 0.0, dtype=grad_output.dtype)
    flat_indices = indices.reshape(*planes, -1)
    flat_grad = grad_output.reshape(*planes, -1)
    steps = list(stride) or list(kernel_size)
    if all(step >= size for step, size in zip(steps, kernel_size, strict=False)) and all(
        step == 1 for step in dilation
    ):
        # Windows that do not overlap name no place twice; writing is cheaper than adding.
        scattered: Tensor = aten.scatter.src(zeros, -1, flat_indices, flat_grad)
    else:
        scattered = aten.scatter_add.default(zeros, -1, flat_indices, flat_grad)
    return scattered.reshape(inputs.shape)


def avg_pool2d_backward(
    grad_output: Tensor,
    inputs: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Each gradient spread over its window, divided by the number that the average divided by."""
    kernel = _pair(kernel_size)
    steps = _pair(stride) if stride else kernel
    pads = _pair(padding)
    sizes = list(inputs.shape[-2:])
    outs = list(grad_output.shape[-2:])
    for axis in (0, 1):
        spread = _window_matrix(
            _regular_windows(outs[axis], kernel[axis], steps[axis], pads[axis]),
            sizes[axis],
            pads[axis],
            inputs.dtype,
            counts_padding=count_include_pad,
            divide=divisor_override is None,
        )
        grad_output = _along(grad_output, spread, axis)
    return grad_output if divisor_override is None else grad_output / divisor_override


def adaptive_avg_pool2d(inputs: Tensor, output_size: Sequence[int]) -> Tensor:
    """The average of each of `output_size` windows that cover the plane as evenly as they can."""
    for axis in (0, 1):
        matrix = _adaptive_matrix(inputs.shape[-2 + axis], output_size[axis], inputs.dtype)
        inputs = _along(inputs, matrix.t(), axis)
    return inputs


def adaptive_avg_pool2d_backward(grad_output: Tensor, inputs: Tensor) -> Tensor:
    """The gradient of `adaptive_avg_pool2d`."""
    for axis in (0, 1):
        matrix = _adaptive_matrix(
            inputs.shape[-2 + axis], grad_output.shape[-2 + axis], inputs.dtype
        )
        grad_output = _along(grad_output, matrix, axis)
    return grad_output


def _pair(values: Sequence[int]) -> list[int]:
    return list(values) * 2 if len(values) == 1 else list(values)


def _along(tensor: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """`tensor` `[…, height, width]` with one axis multiplied by `matrix` `[from, to]`."""
    if axis == 1:
        return tensor @ matrix
    return (tensor.transpose(-1, -2) @ matrix).transpose(-1, -2)


_Window = tuple[int, int]
"""First place and the one after the last, in the coordinates of the plane, padding below 0."""


def _regular_windows(count: int, size: int, stride: int, padding: int) -> list[_Window]:
    starts = [index * stride - padding for index in range(count)]
    return [(start, start + size) for start in starts]


def _adaptive_matrix(size: int, count: int, dtype: torch.dtype) -> Tensor:
    windows = [(index * size // count, -(-(index + 1) * size // count)) for index in range(count)]
    return _window_matrix(windows, size, 0, dtype, counts_padding=False, divide=True)


def _window_matrix(
    windows: Sequence[_Window],
    size: int,
    padding: int,
    dtype: torch.dtype,
    *,
    counts_padding: bool,
    divide: bool,
) -> Tensor:
    """`[windows, size]`: one over the number of places that a window counts, at its places."""
    rows = []
    for first, last in windows:
        inside = min(last, size) - max(first, 0)
        counted = min(last, size + padding) - first if counts_padding else inside
        share = 1.0 / counted if divide else 1.0
        row = [share if first <= place < last else 0.0 for place in range(size)]
        # Built of `full` and `cat`: a tensor made of Python numbers is not traceable as a constant.
        rows.append(_run_length(row, dtype))
    return torch.stack(rows)


def _run_length(values: Sequence[float], dtype: torch.dtype) -> Tensor:
    runs: list[tuple[float, int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1] = (value, runs[-1][1] + 1)
        else:
            runs.append((value, 1))
    parts = [aten.full.default([length], value, dtype=dtype) for value, length in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


DECOMPOSITIONS = {
    aten.max_pool2d_with_indices_backward.default: max_pool_backward,
    aten.max_pool3d_with_indices_backward.default: max_pool_backward,
    aten.avg_pool2d_backward.default: avg_pool2d_backward,
    aten._adaptive_avg_pool2d.default: adaptive_avg_pool2d,
    aten._adaptive_avg_pool2d_backward.default: adaptive_avg_pool2d_backward,
}
