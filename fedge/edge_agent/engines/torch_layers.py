"""Convolutions, pooling and normalisation, for one, two or three spatial dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from fedge.edge_agent.engines.torch_kernels import Kernel, Node, Operator, Tensor

_CONVOLVE: dict[int, Any] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED: dict[int, Any] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}
_MAX_POOL: dict[int, Any] = {
    1: functional.max_pool1d,
    2: functional.max_pool2d,
    3: functional.max_pool3d,
}
_AVERAGE_POOL: dict[int, Any] = {
    1: functional.avg_pool1d,
    2: functional.avg_pool2d,
    3: functional.avg_pool3d,
}


@dataclass(frozen=True, slots=True)
class _Window:
    """A sliding window, one number for each spatial dimension."""

    size: list[int]
    stride: list[int]
    dilation: list[int]
    before: list[int]
    after: list[int]

    @property
    def reach(self) -> list[int]:
        """Places from the window's first element to its last, both counted."""
        return [(k - 1) * d + 1 for k, d in zip(self.size, self.dilation, strict=True)]

    @property
    def is_symmetric(self) -> bool:
        return self.before == self.after and min(self.before, default=0) >= 0

    @property
    def padding(self) -> list[int]:
        """As `torch.nn.functional.pad` counts: from the last dimension, both ends together."""
        both = zip(reversed(self.before), reversed(self.after), strict=True)
        return [size for pair in both for size in pair]


def _window(node: Node, size: Sequence[int]) -> _Window:
    """The window of a convolution or pooling over the operand 0."""
    attributes, spatial = node.attributes, list(node.tensor(0).shape[2:])
    rank = len(spatial)
    stride = list(attributes.get("strides") or [1] * rank)
    dilation = list(attributes.get("dilations") or [1] * rank)
    pads = list(attributes.get("pads") or [0] * (2 * rank))
    mode = attributes.get("auto_pad", "NOTSET")
    window = _Window(list(size), stride, dilation, pads[:rank], pads[rank:])
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        totals = [
            max((-(-length // step) - 1) * step + reach - length, 0)
            for length, step, reach in zip(spatial, stride, window.reach, strict=True)
        ]
        low, high = [total // 2 for total in totals], [total - total // 2 for total in totals]
        low, high = (low, high) if mode == "SAME_UPPER" else (high, low)
        return _Window(list(size), stride, dilation, low, high)
    if mode == "VALID":
        return _Window(list(size), stride, dilation, [0] * rank, [0] * rank)
    return window


def _convolution(node: Node) -> Kernel:
    weight = node.tensor(1)
    window = _window(node, weight.shape[2:])
    convolve = _CONVOLVE[len(window.size)]
    settings = {
        "stride": window.stride,
        "dilation": window.dilation,
        "groups": node.attributes.get("group", 1),
    }
    if window.is_symmetric:
        settings["padding"] = window.before
        return lambda x, w, bias=None: convolve(x, w, bias, **settings)
    return lambda x, w, bias=None: convolve(functional.pad(x, window.padding), w, bias, **settings)


def _transposed_convolution(node: Node) -> Kernel:
    """Computed whole, then cut or filled to the asked size.

    A full result of `(in - 1) * stride + reach` places loses `pads` at each end and gains
    `output_padding` at the end.
    """
    attributes, x, weight = node.attributes, node.tensor(0), node.tensor(1)
    spatial, rank = list(x.shape[2:]), x.dim() - 2
    stride = list(attributes.get("strides") or [1] * rank)
    dilation = list(attributes.get("dilations") or [1] * rank)
    extra = list(attributes.get("output_padding") or [0] * rank)
    pads = list(attributes.get("pads") or [0] * (2 * rank))
    mode = attributes.get("auto_pad", "NOTSET")
    window = _Window(list(weight.shape[2:]), stride, dilation, pads[:rank], pads[rank:])
    wanted = list(attributes.get("output_shape") or [])[-rank:]
    if not wanted and mode in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [length * step for length, step in zip(spatial, stride, strict=True)]
    if wanted:
        totals = [
            max(step * (length - 1) + more + reach - size, 0)
            for step, length, more, reach, size in zip(
                stride, spatial, extra, window.reach, wanted, strict=True
            )
        ]
        low, high = [total // 2 for total in totals], [total - total // 2 for total in totals]
        low, high = (low, high) if mode == "SAME_UPPER" else (high, low)
    elif mode == "VALID":
        low, high = [0] * rank, [0] * rank
    else:
        low, high = window.before, window.after
    groups = attributes.get("group", 1)
    transposed = _TRANSPOSED[rank]
    cut = _Window(
        window.size,
        stride,
        dilation,
        [-size for size in low],
        [more - size for more, size in zip(extra, high, strict=True)],
    ).padding
    across = [1, -1] + [1] * rank

    def kernel(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        whole = transposed(x, w, None, stride=stride, dilation=dilation, groups=groups)
        y = functional.pad(whole, cut) if any(cut) else whole
        return y if bias is None else y + bias.reshape(across)

    return kernel


def _max_pool(node: Node) -> Kernel:
    x, attributes = node.tensor(0), node.attributes
    if attributes.get("storage_order", 0):
        raise ValueError("storage_order=1 (column major) is not supported")
    window = _window(node, attributes["kernel_shape"])
    spatial = list(x.shape[2:])
    pool = _MAX_POOL[len(spatial)]
    indexed = node.output_count > 1
    settings = {
        "stride": window.stride,
        "dilation": window.dilation,
        "ceil_mode": bool(attributes.get("ceil_mode", 0)),
        "return_indices": indexed,
    }
    # torch allows padding of at most half a window.
    halves = (2 * low <= size for low, size in zip(window.before, window.size, strict=True))
    if window.is_symmetric and all(halves):
        padding, settings["padding"] = None, window.before
        padded = spatial
        corner = [0] * len(spatial)
    else:
        if settings.pop("ceil_mode"):
            window = _rounded_up(window, spatial)
        padding, corner = window.padding, window.before
        sides = zip(spatial, window.before, window.after, strict=True)
        padded = [length + low + high for length, low, high in sides]
    # ONNX counts places over the whole tensor, torch within one channel of one example.
    channels = x.shape[0] * x.shape[1]
    first = torch.arange(channels, device=x.device) * math.prod(spatial)
    first = first.reshape(x.shape[0], x.shape[1], *([1] * len(spatial)))

    def kernel(x: Tensor) -> Tensor | tuple[Tensor, ...]:
        if padding is not None:
            x = functional.pad(x, padding, value=-math.inf)
        if not indexed:
            pooled: Tensor = pool(x, window.size, **settings)
            return pooled
        values, places = pool(x, window.size, **settings)
        if padding is not None:
            places = _without_padding(places, padded, corner, spatial)
        return values, places + first

    return kernel


def _rounded_up(window: _Window, spatial: Sequence[int]) -> _Window:
    """`window` with padding at the end for a last, partial place: `ceil_mode` said as padding.

    There is none if it would begin outside the image and the padding before it.
    """
    after = []
    for length, step, reach, low, high in zip(
        spatial, window.stride, window.reach, window.before, window.after, strict=True
    ):
        steps = -(-(length + low + high - reach) // step)
        steps -= steps * step >= length + low
        after.append(steps * step + reach - length - low)
    return replace(window, after=after)


def _without_padding(
    places: Tensor, padded: Sequence[int], corner: Sequence[int], spatial: Sequence[int]
) -> Tensor:
    """Places in a padded image as places in the image itself, both row-major."""
    flat, step = torch.zeros_like(places), 1
    for wide, low, length in zip(
        reversed(padded), reversed(corner), reversed(spatial), strict=True
    ):
        flat = flat + (places % wide - low) * step
        places = torch.div(places, wide, rounding_mode="floor")
        step *= length
    return flat


def _average_pool(node: Node) -> Kernel:
    x, attributes = node.tensor(0), node.attributes
    window = _window(node, attributes["kernel_shape"])
    if any(step != 1 for step in window.dilation):
        raise ValueError("average pooling with dilations is not supported")
    pool = _AVERAGE_POOL[len(window.size)]
    whole_window = bool(attributes.get("count_include_pad", 0))
    settings: dict[str, Any] = {
        "stride": window.stride,
        "ceil_mode": bool(attributes.get("ceil_mode", 0)),
    }
    halves = (2 * low <= size for low, size in zip(window.before, window.size, strict=True))
    if window.is_symmetric and all(halves):
        settings |= {"padding": window.before, "count_include_pad": whole_window}
        return lambda x: pool(x, window.size, **settings)
    if settings["ceil_mode"]:
        raise ValueError("average pooling with ceil_mode and unequal padding is not supported")
    ones = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype, device=x.device)
    counted = functional.pad(ones, window.padding, value=1.0 if whole_window else 0.0)
    share = pool(counted, window.size, **settings)
    return lambda x: pool(functional.pad(x, window.padding), window.size, **settings) / share


def _over_space(reduction: Callable[..., Tensor]) -> Operator:
    def build(node: Node) -> Kernel:
        axes = list(range(2, node.tensor(0).dim()))
        return lambda x: reduction(x, axes, keepdim=True)

    return Operator(build)


def _batch_normalisation(node: Node) -> Kernel:
    epsilon = node.attributes.get("epsilon", 1e-5)
    momentum = node.attributes.get("momentum", 0.9)
    rank = node.tensor(0).dim()
    axes, across = [0, *range(2, rank)], [1, -1] + [1] * (rank - 2)

    def scaled(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        factor = scale * torch.rsqrt(variance + epsilon)
        return (x - mean.reshape(across)) * factor.reshape(across) + bias.reshape(across)

    if not node.attributes.get("training_mode", 0):
        return scaled

    def training(
        x: Tensor, scale: Tensor, bias: Tensor, old_mean: Tensor, old_variance: Tensor
    ) -> tuple[Tensor, ...]:
        variance, mean = torch.var_mean(x, axes, correction=0)
        return (
            scaled(x, scale, bias, mean, variance),
            old_mean * momentum + mean * (1 - momentum),
            old_variance * momentum + variance * (1 - momentum),
        )

    return training


def _layer_normalisation(node: Node) -> Kernel:
    epsilon, rank = node.attributes.get("epsilon", 1e-5), node.tensor(0).dim()
    axes = list(range(node.axis(-1, rank), rank))

    def kernel(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        inverse = torch.rsqrt(variance + epsilon)
        y = (x - mean) * inverse * scale
        return (y if bias is None else y + bias), mean, inverse

    return kernel


def _instance_normalisation(node: Node) -> Kernel:
    epsilon = node.attributes.get("epsilon", 1e-5)
    return lambda x, scale, bias: functional.instance_norm(x, None, None, scale, bias, eps=epsilon)


def _group_normalisation(node: Node) -> Kernel:
    """Of opset 18 to 20: `scale` and `bias` have one value a group."""
    epsilon, groups = node.attributes.get("epsilon", 1e-5), node.attributes["num_groups"]
    each = node.tensor(0).shape[1] // groups

    def kernel(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        wide_scale, wide_bias = scale.repeat_interleave(each), bias.repeat_interleave(each)
        return functional.group_norm(x, groups, wide_scale, wide_bias, epsilon)

    return kernel


LAYERS: dict[str, Operator] = {
    "AveragePool": Operator(_average_pool),
    "BatchNormalization": Operator(_batch_normalisation),
    "Conv": Operator(_convolution),
    "ConvTranspose": Operator(_transposed_convolution),
    "GlobalAveragePool": _over_space(torch.mean),
    "GlobalMaxPool": _over_space(torch.amax),
    "GroupNormalization": Operator(_group_normalisation),
    "InstanceNormalization": Operator(_instance_normalisation),
    "LayerNormalization": Operator(_layer_normalisation),
    "MaxPool": Operator(_max_pool),
}
