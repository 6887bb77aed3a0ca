"""Batch, layer and group normalisation, forward in training and backward.

Written out because the tables of torch keep them whole, or divide by n - 1 without asking whether
a batch has more than one row: a device's last batch may have one, and its running variance must not
become infinite by it. Derivations: Ioffe and Szegedy 2015, section 3; Ba et al. 2016, section 2.
"""

# ruff: noqa: PLR0917 -- the signatures are ATen's

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

aten = torch.ops.aten
_Three = tuple[Tensor | None, Tensor | None, Tensor | None]


def batch_norm(
    inputs: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, saved mean, saved 1/std); in training the running statistics are written to."""
    mean, variance, count = _batch_statistics(inputs)
    if running_mean is not None and running_var is not None:
        if not training:
            return _normalized(inputs, weight, bias, running_mean, running_var, eps)
        # Of one row no variance is known: the divisor n - 1 is taken as 1.
        unbiased = variance * (count / (count - 1.0).clamp(min=1.0))
        running_mean.copy_(running_mean * (1 - momentum) + mean * momentum)
        running_var.copy_(running_var * (1 - momentum) + unbiased * momentum)
    return _normalized(inputs, weight, bias, mean, variance, eps)


def batch_norm_no_stats(
    inputs: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm that keeps no running statistics."""
    mean, variance, _ = _batch_statistics(inputs)
    return _normalized(inputs, weight, bias, mean, variance, eps)


def batch_norm_no_training(
    inputs: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm by its running statistics."""
    return _normalized(inputs, weight, bias, running_mean, running_var, eps)


def batch_norm_backward(
    grad_output: Tensor,
    inputs: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    saved_mean: Tensor | None,
    saved_inverse_std: Tensor | None,
    train: bool,
    eps: float,
    output_mask: Sequence[bool],
) -> _Three:
    """(input, weight and bias gradients). In evaluation the statistics are constants."""
    if train:
        assert saved_mean is not None and saved_inverse_std is not None  # noqa: S101, PT018
        mean, inverse_std = saved_mean, saved_inverse_std
    else:
        assert running_mean is not None and running_var is not None  # noqa: S101, PT018
        mean, inverse_std = running_mean, (running_var + eps).rsqrt()
    axes = [0, *range(2, inputs.dim())]
    normalized = (inputs - _channels(mean, inputs)) * _channels(inverse_std, inputs)
    grad_bias = grad_output.sum(axes)
    grad_weight = (grad_output * normalized).sum(axes)
    scale = inverse_std if weight is None else inverse_std * weight
    inner = grad_output
    if train:
        count = _count(inputs, axes)
        inner = (
            grad_output
            - _channels(grad_bias / count, inputs)
            - normalized * _channels(grad_weight / count, inputs)
        )
    return (
        inner * _channels(scale, inputs) if output_mask[0] else None,
        grad_weight if output_mask[1] else None,
        grad_bias if output_mask[2] else None,
    )


def layer_norm_backward(
    grad_output: Tensor,
    inputs: Tensor,
    normalized_shape: Sequence[int],
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output_mask: Sequence[bool],
) -> _Three:
    """(input, weight and bias gradients)."""
    inner = list(range(inputs.dim() - len(normalized_shape), inputs.dim()))
    outer = list(range(inputs.dim() - len(normalized_shape)))
    normalized = (inputs - mean) * inverse_std
    scaled = grad_output if weight is None else grad_output * weight
    grad_input = _centered(scaled, normalized, inner) * inverse_std
    return (
        grad_input if output_mask[0] else None,
        (grad_output * normalized).sum(outer) if output_mask[1] else None,
        grad_output.sum(outer) if output_mask[2] else None,
    )


def group_norm_backward(
    grad_output: Tensor,
    inputs: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor | None,
    rows: int,
    channels: int,
    area: int,
    groups: int,
    output_mask: Sequence[bool],
) -> _Three:
    """(input, weight and bias gradients). `mean`, `inverse_std`: `[rows, groups]`."""
    grouped = [rows, groups, channels // groups, area]
    by_group = [rows, groups, 1, 1]
    normalized = (inputs.reshape(grouped) - mean.reshape(by_group)) * inverse_std.reshape(by_group)
    grad = grad_output.reshape(grouped)
    scaled = grad
    if weight is not None:
        scaled = grad * weight.reshape(1, groups, channels // groups, 1)
    grad_input = _centered(scaled, normalized, [2, 3]) * inverse_std.reshape(by_group)
    return (
        grad_input.reshape(inputs.shape) if output_mask[0] else None,
        (grad * normalized).sum([0, 3]).reshape(channels) if output_mask[1] else None,
        grad.sum([0, 3]).reshape(channels) if output_mask[2] else None,
    )


def _normalized(
    inputs: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    inverse_std = (variance + eps).rsqrt()
    output = (inputs - _channels(mean, inputs)) * _channels(inverse_std, inputs)
    if weight is not None:
        output = output * _channels(weight, inputs)
    if bias is not None:
        output = output + _channels(bias, inputs)
    return output, mean, inverse_std


def _batch_statistics(inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    axes = [0, *range(2, inputs.dim())]
    mean = inputs.mean(axes)
    variance = (inputs - _channels(mean, inputs)).square().mean(axes)
    return mean, variance, _count(inputs, axes)


def _count(inputs: Tensor, axes: Sequence[int]) -> Tensor:
    """How many numbers a statistic is of, as a scalar tensor: the batch's size is not known yet."""
    area = math.prod(inputs.shape[axis] for axis in axes if axis != 0)
    rows = inputs.new_ones([1]).expand(inputs.shape[0]).sum()
    return rows * float(area)


def _channels(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(1, -1, *([1] * (like.dim() - 2)))


def _centered(scaled: Tensor, normalized: Tensor, axes: list[int]) -> Tensor:
    """The gradient before its division by the standard deviation."""
    along = (scaled * normalized).mean(axes, keepdim=True)
    return scaled - scaled.mean(axes, keepdim=True) - normalized * along


DECOMPOSITIONS = {
    aten._native_batch_norm_legit.default: batch_norm,
    aten.native_batch_norm.default: batch_norm,
    aten._native_batch_norm_legit.no_stats: batch_norm_no_stats,
    aten._native_batch_norm_legit_no_training.default: batch_norm_no_training,
    aten.native_batch_norm_backward.default: batch_norm_backward,
    aten.native_layer_norm_backward.default: layer_norm_backward,
    aten.native_group_norm_backward.default: group_norm_backward,
}
