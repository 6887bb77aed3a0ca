"""Operators that compute each element by itself, with broadcasting."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import torch
from torch.nn import functional

from fedge.edge_agent.engines.torch_kernels import Kernel, Node, Operator, Tensor, plain

# onnx.proto, TensorProto.DataType
TORCH_DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
}


def torch_dtype(code: int) -> torch.dtype:
    """The torch dtype of an ONNX data type. Raises `ValueError` for strings and the like."""
    if code not in TORCH_DTYPES:
        raise ValueError(f"the ONNX data type {code} is not supported")
    return TORCH_DTYPES[code]


def _with(kernel: Callable[..., Tensor], **defaults: Any) -> Operator:
    """An operator whose attributes, or their defaults, are keywords of `kernel`."""

    def build(node: Node) -> Kernel:
        settings = {name: node.attributes.get(name, value) for name, value in defaults.items()}
        return partial(kernel, **settings)

    return Operator(build)


def _divide(node: Node) -> Kernel:
    if node.tensor(0).is_floating_point():
        return torch.div
    return partial(torch.div, rounding_mode="trunc")


def _power(node: Node) -> Kernel:
    dtype = node.tensor(0).dtype
    if node.tensor(1).dtype == dtype:
        return torch.pow
    return lambda base, exponent: torch.pow(base, exponent).to(dtype)


def _modulo(node: Node) -> Kernel:
    # fmod=1 is C's: the sign of the dividend. Otherwise Python's: the sign of the divisor.
    return torch.fmod if node.attributes.get("fmod", 0) else torch.remainder


def _clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    if low is not None:
        x = torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def _cast(node: Node) -> Kernel:
    dtype = torch_dtype(node.attributes["to"])
    return lambda x: x.to(dtype)


def _cast_like(node: Node) -> Kernel:
    dtype = node.tensor(1).dtype
    return lambda x, _: x.to(dtype)


def _is_inf(x: Tensor, *, detect_negative: int, detect_positive: int) -> Tensor:
    if detect_negative and detect_positive:
        return torch.isinf(x)
    if detect_negative:
        return torch.isneginf(x)
    return torch.isposinf(x) if detect_positive else torch.zeros_like(x, dtype=torch.bool)


def _selu(x: Tensor, *, alpha: float, gamma: float) -> Tensor:
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(x))


def _hard_sigmoid(x: Tensor, *, alpha: float, beta: float) -> Tensor:
    return torch.clamp(x * alpha + beta, 0.0, 1.0)


def _thresholded_relu(x: Tensor, *, alpha: float) -> Tensor:
    return torch.where(x > alpha, x, torch.zeros_like(x))


def _leaky_relu(x: Tensor, *, alpha: float) -> Tensor:
    return torch.where(x < 0, x * alpha, x)


def _gelu(node: Node) -> Kernel:
    return partial(functional.gelu, approximate=node.attributes.get("approximate", "none"))


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


def _mean(*tensors: Tensor) -> Tensor:
    return reduce(torch.add, tensors) / len(tensors)


ELEMENTWISE: dict[str, Operator] = {
    "Abs": plain(torch.abs),
    "Acos": plain(torch.acos),
    "Acosh": plain(torch.acosh),
    "Add": plain(torch.add),
    "And": plain(torch.logical_and),
    "Asin": plain(torch.asin),
    "Asinh": plain(torch.asinh),
    "Atan": plain(torch.atan),
    "Atanh": plain(torch.atanh),
    "BitwiseAnd": plain(torch.bitwise_and),
    "BitwiseNot": plain(torch.bitwise_not),
    "BitwiseOr": plain(torch.bitwise_or),
    "BitwiseXor": plain(torch.bitwise_xor),
    "Cast": Operator(_cast),
    "CastLike": Operator(_cast_like),
    "Ceil": plain(torch.ceil),
    "Celu": _with(functional.celu, alpha=1.0),
    "Clip": plain(_clip),
    "Cos": plain(torch.cos),
    "Cosh": plain(torch.cosh),
    "Div": Operator(_divide),
    "Elu": _with(functional.elu, alpha=1.0),
    "Equal": plain(torch.eq),
    "Erf": plain(torch.erf),
    "Exp": plain(torch.exp),
    "Floor": plain(torch.floor),
    "Gelu": Operator(_gelu),
    "Greater": plain(torch.gt),
    "GreaterOrEqual": plain(torch.ge),
    "HardSigmoid": _with(_hard_sigmoid, alpha=0.2, beta=0.5),
    "HardSwish": plain(lambda x: x * _hard_sigmoid(x, alpha=1 / 6, beta=0.5)),
    "Identity": plain(lambda x: x),
    "IsInf": _with(_is_inf, detect_negative=1, detect_positive=1),
    "IsNaN": plain(torch.isnan),
    "LeakyRelu": _with(_leaky_relu, alpha=0.01),
    "Less": plain(torch.lt),
    "LessOrEqual": plain(torch.le),
    "Log": plain(torch.log),
    "Max": plain(lambda *tensors: reduce(torch.maximum, tensors)),
    "Mean": plain(_mean),
    "Min": plain(lambda *tensors: reduce(torch.minimum, tensors)),
    "Mish": plain(functional.mish),
    "Mod": Operator(_modulo),
    "Mul": plain(torch.mul),
    "Neg": plain(torch.neg),
    "Not": plain(torch.logical_not),
    "Or": plain(torch.logical_or),
    "PRelu": plain(_prelu),
    "Pow": Operator(_power),
    "Reciprocal": plain(torch.reciprocal),
    "Relu": plain(torch.relu),
    "Round": plain(torch.round),
    "Selu": _with(_selu, alpha=1.6732632423543772, gamma=1.0507009873554805),
    "Sigmoid": plain(torch.sigmoid),
    "Sign": plain(torch.sign),
    "Sin": plain(torch.sin),
    "Sinh": plain(torch.sinh),
    "Softplus": plain(functional.softplus),
    "Softsign": plain(functional.softsign),
    "Sqrt": plain(torch.sqrt),
    "Sub": plain(torch.sub),
    "Sum": plain(lambda *tensors: reduce(torch.add, tensors)),
    "Tan": plain(torch.tan),
    "Tanh": plain(torch.tanh),
    "ThresholdedRelu": _with(_thresholded_relu, alpha=1.0),
    "Where": plain(torch.where),
    "Xor": plain(torch.logical_xor),
}
