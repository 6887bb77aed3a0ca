"""Operators that combine elements along axes: sums, extremes, sorts, softmax, matrix products."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

from fedge.edge_agent.engines.torch_kernels import (
    Kernel,
    Node,
    Operator,
    Tensor,
    normal_axis,
    plain,
)

_Reduction = Callable[[Tensor, list[int], bool], Tensor]


def _reduce(reduction: _Reduction) -> Operator:
    def build(node: Node) -> Kernel:
        rank = node.tensor(0).dim()
        axes = node.numbers(1)
        if not axes:
            if node.attributes.get("noop_with_empty_axes", 0):
                return lambda x: x
            axes = list(range(rank))
        chosen = [normal_axis(axis, rank) for axis in axes]
        keep = bool(node.attributes.get("keepdims", 1))
        return lambda x: reduction(x, chosen, keep)

    return Operator(build, frozenset({1}))


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    # torch adds int32 up as int64; ONNX keeps the dtype.
    return torch.sum(x, axes, keepdim=keep, dtype=x.dtype) if axes else x


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    count = math.prod(x.shape[axis] for axis in axes)
    if x.is_floating_point():
        return _sum(x, axes, keep) / count
    return torch.div(_sum(x, axes, keep), count, rounding_mode="trunc")


def _max(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.amax(x, axes, keepdim=keep)


def _min(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.amin(x, axes, keepdim=keep)


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keepdim=keep, dtype=x.dtype)
    return x


def _l1(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return _sum(torch.abs(x), axes, keep)


def _l2(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.sqrt(_sum(x * x, axes, keep))


def _log_sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.log(_sum(x, axes, keep))


def _log_sum_exp(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.logsumexp(x, axes, keepdim=keep) if axes else x


def _sum_square(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return _sum(x * x, axes, keep)


def _arg(function: Callable[..., Tensor]) -> Operator:
    def build(node: Node) -> Kernel:
        x = node.tensor(0)
        axis, size = node.axis(0, x.dim()), x.shape[node.axis(0, x.dim())]
        keep = bool(node.attributes.get("keepdims", 1))
        if not node.attributes.get("select_last_index", 0):
            return lambda x: function(x, axis, keepdim=keep)
        return lambda x: size - 1 - function(torch.flip(x, (axis,)), axis, keepdim=keep)

    return Operator(build)


def _cumulative_sum(node: Node) -> Kernel:
    x = node.tensor(0)
    axis = normal_axis((node.numbers(1) or [0])[0], x.dim())
    size = x.shape[axis]
    exclusive = bool(node.attributes.get("exclusive", 0))
    backwards = bool(node.attributes.get("reverse", 0))

    def kernel(x: Tensor) -> Tensor:
        x = torch.flip(x, (axis,)) if backwards else x
        sums = torch.cumsum(x, axis, dtype=x.dtype)
        if exclusive and size:
            # Subtracting x would leave rounding errors, and NaN where x is infinite.
            first = torch.zeros_like(x.narrow(axis, 0, 1))
            sums = torch.cat([first, sums.narrow(axis, 0, size - 1)], axis)
        return torch.flip(sums, (axis,)) if backwards else sums

    return kernel


def _top_k(node: Node) -> Kernel:
    x = node.tensor(0)
    axis, count = node.axis(-1, x.dim()), (node.numbers(1) or [0])[0]
    largest = bool(node.attributes.get("largest", 1))

    def kernel(x: Tensor) -> tuple[Tensor, ...]:
        # Among equals ONNX takes the lower index; torch.topk takes any, a stable sort the lower.
        values, order = torch.sort(x, dim=axis, descending=largest, stable=True)
        return values.narrow(axis, 0, count), order.narrow(axis, 0, count)

    return kernel


def _softmax(function: Callable[..., Tensor]) -> Operator:
    def build(node: Node) -> Kernel:
        return partial(function, dim=node.axis(-1, node.tensor(0).dim()))

    return Operator(build)


def _gemm(node: Node) -> Kernel:
    alpha, beta = node.attributes.get("alpha", 1.0), node.attributes.get("beta", 1.0)
    a_turned = bool(node.attributes.get("transA", 0))
    b_turned = bool(node.attributes.get("transB", 0))

    def kernel(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a, b = a.t() if a_turned else a, b.t() if b_turned else b
        if c is None:
            product = torch.mm(a, b)
            return product if alpha == 1.0 else product * alpha
        return torch.addmm(c, a, b, beta=beta, alpha=alpha)

    return kernel


def _einsum(node: Node) -> Kernel:
    equation = node.attributes["equation"]
    return lambda *tensors: torch.einsum(equation, *tensors)


REDUCTIONS: dict[str, Operator] = {
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "CumSum": Operator(_cumulative_sum, frozenset({1})),
    "Einsum": Operator(_einsum),
    "Gemm": Operator(_gemm),
    "LogSoftmax": _softmax(torch.log_softmax),
    "MatMul": plain(torch.matmul),
    "ReduceL1": _reduce(_l1),
    "ReduceL2": _reduce(_l2),
    "ReduceLogSum": _reduce(_log_sum),
    "ReduceLogSumExp": _reduce(_log_sum_exp),
    "ReduceMax": _reduce(_max),
    "ReduceMean": _reduce(_mean),
    "ReduceMin": _reduce(_min),
    "ReduceProd": _reduce(_product),
    "ReduceSum": _reduce(_sum),
    "ReduceSumSquare": _reduce(_sum_square),
    "Softmax": _softmax(torch.softmax),
    "TopK": Operator(_top_k, frozenset({1})),
}
