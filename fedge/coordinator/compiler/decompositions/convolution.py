"""Gradients of convolutions and transposed convolutions, in one, two and three dimensions.

The gradient of the input is a transposed convolution with the same weights. The gradient of the
weights is a convolution of the input with the output's gradient, batch and channel axes swapped
and stride and dilation exchanged (Dumoulin and Visin 2016, "A guide to convolution arithmetic",
section 4). A pointwise kernel is a matrix product; a depthwise one a product and sum for each tap,
because no runtime is fast at a convolution with as many groups as channels.
"""

# ruff: noqa: PLR0917 -- the signatures are ATen's

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

aten = torch.ops.aten
_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def convolution_backward(
    grad_output: Tensor,
    inputs: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> _Gradients:
    """(input, weight and bias gradients), those not in `output_mask` being None."""
    rank = inputs.dim() - 2
    stride, padding, dilation = (_per_axis(values, rank) for values in (stride, padding, dilation))
    grad_input = grad_weight = grad_bias = None
    if output_mask[0]:
        grad_input = _input_gradient(
            grad_output, inputs, weight, stride, padding, dilation, transposed, groups
        )
    if output_mask[1]:
        # A transposed convolution is the gradient of a convolution: the two roles swap.
        source, kernel = (grad_output, inputs) if transposed else (inputs, grad_output)
        grad_weight = _weight_gradient(source, kernel, weight, stride, padding, dilation, groups)
    if output_mask[2]:
        grad_bias = grad_output.sum([0, *range(2, rank + 2)])
    return grad_input, grad_weight, grad_bias


def _per_axis(values: Sequence[int], rank: int) -> list[int]:
    return list(values) * rank if len(values) == 1 else list(values)


def _input_gradient(
    grad_output: Tensor,
    inputs: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    groups: int,
) -> Tensor:
    rank = inputs.dim() - 2
    gradient: Tensor
    if transposed:
        gradient = aten.convolution.default(
            grad_output, weight, None, stride, padding, dilation, False, [0] * rank, groups
        )
        return gradient
    # What the strides left over at the end of the input gets its (zero) gradient back.
    leftover = [
        inputs.shape[axis + 2]
        - (
            (grad_output.shape[axis + 2] - 1) * stride[axis]
            - 2 * padding[axis]
            + dilation[axis] * (weight.shape[axis + 2] - 1)
            + 1
        )
        for axis in range(rank)
    ]
    gradient = aten.convolution.default(
        grad_output, weight, None, stride, padding, dilation, True, leftover, groups
    )
    return gradient


def _weight_gradient(
    inputs: Tensor,
    grad: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`inputs` `[n, in, …]`, `grad` `[n, out, …]` → `[out, in / groups, taps…]`."""
    taps = list(weight.shape[2:])
    in_channels, out_channels = inputs.shape[1], grad.shape[1]
    if groups == 1 and math.prod(taps) == 1 and set(stride) == {1} and set(padding) == {0}:
        flat_grad = grad.transpose(0, 1).reshape(out_channels, -1)
        flat_inputs = inputs.transpose(0, 1).reshape(in_channels, -1)
        return (flat_grad @ flat_inputs.t()).reshape(weight.shape)
    if groups > 1 and groups == in_channels:
        return _depthwise_weight_gradient(inputs, grad, weight, stride, padding, dilation)
    if groups == 1:
        return _dense_weight_gradient(inputs, grad, taps, stride, padding, dilation)
    parts = [
        _dense_weight_gradient(
            inputs.narrow(1, group * (in_channels // groups), in_channels // groups),
            grad.narrow(1, group * (out_channels // groups), out_channels // groups),
            taps,
            stride,
            padding,
            dilation,
        )
        for group in range(groups)
    ]
    return torch.cat(parts)


def _dense_weight_gradient(
    inputs: Tensor,
    grad: Tensor,
    taps: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    swapped: Tensor = aten.convolution.default(
        inputs.transpose(0, 1),
        grad.transpose(0, 1),
        None,
        dilation,
        padding,
        stride,
        False,
        [0] * len(taps),
        1,
    )
    # Where the stride did not divide, the convolution has taps that the kernel does not.
    for axis, size in enumerate(taps):
        if swapped.shape[axis + 2] != size:
            swapped = swapped.narrow(axis + 2, 0, size)
    return swapped.transpose(0, 1)


def _depthwise_weight_gradient(
    inputs: Tensor,
    grad: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Each output channel sees one input channel: `[in * multiplier, 1, taps…]`."""
    rank = inputs.dim() - 2
    channels = inputs.shape[1]
    out_sizes = list(grad.shape[2:])
    edges = [edge for axis in reversed(range(rank)) for edge in (padding[axis],) * 2]
    padded = aten.constant_pad_nd.default(inputs, edges, 0.0) if any(edges) else inputs
    split = grad.reshape(grad.shape[0], channels, -1, *out_sizes)
    sums = []
    for tap in itertools.product(*(range(size) for size in weight.shape[2:])):
        window = padded
        for axis in range(rank):
            start = tap[axis] * dilation[axis]
            end = start + (out_sizes[axis] - 1) * stride[axis] + 1
            window = aten.slice.Tensor(window, axis + 2, start, end, stride[axis])
        sums.append((split * window.unsqueeze(2)).sum([0, *range(3, rank + 3)]))
    return torch.stack(sums, dim=-1).reshape(weight.shape)


DECOMPOSITIONS = {aten.convolution_backward.default: convolution_backward}
