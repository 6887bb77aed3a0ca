"""Random numbers by counting: the same bits in torch and in an ONNX runtime, from a seed input.

A graph of a plan may not hold a random operator: two runtimes would draw different numbers, and a
training step could be neither checked nor repeated. While a step is traced, each random operator
is replaced by a hash of (seed, number of the call, position in the tensor). It is written in int64
tensor arithmetic whose products stay below 2^63, so that nothing depends on overflow.

The idea: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3". The mixing function has
the shape of MurmurHash3's finaliser with multipliers below 2^31.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from fedge.schemas.errors import UnsupportedModel

aten = torch.ops.aten

_MASK_32 = 0xFFFFFFFF
_MULTIPLIERS = (0x2C1B3C6D, 0x297A2D39)
_GOLDEN_RATIO = 0x1E3779B9
_UNIFORM_BITS = 24
"""Of a float32's significand: every uniform number is exact."""


def _mix(x: Tensor) -> Tensor:
    """A bijection of the int64s below 2^32, each output bit depending on each input bit."""
    for shift, multiplier in zip((1 << 15, 1 << 12), _MULTIPLIERS, strict=True):
        x = x ^ torch.div(x, shift, rounding_mode="trunc")
        x = (x * multiplier) & _MASK_32
    return x ^ torch.div(x, 1 << 15, rounding_mode="trunc")


def random_bits(seed: Tensor, call: int, size: Sequence[int | torch.SymInt]) -> Tensor:
    """int64 of shape `size`, each from 0 to 2^24 - 1.

    `seed`: an int64 scalar, of which the low 32 bits count. `call`: tells draws of one step apart.
    """
    count = math.prod(size)
    key = _mix((seed & _MASK_32) ^ (call * _GOLDEN_RATIO & _MASK_32))
    position = torch.arange(count, dtype=torch.int64, device=seed.device)
    mixed = _mix(_mix((position + key) & _MASK_32) ^ _mix(key ^ 0x5BD1E995))
    return torch.div(mixed, 1 << (32 - _UNIFORM_BITS), rounding_mode="trunc").reshape(size)


class CounterRandomness(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's own
    """While active, random operators draw from `seed`, calls being numbered from 0.

    Raises `UnsupportedModel` for a random operator that it has no replacement for.
    """

    def __init__(self, seed: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's own
        self._seed = seed
        self._calls = 0

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        draw = _REPLACEMENTS.get(func)
        if draw is not None:
            return draw(self, *args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise UnsupportedModel(
                "the model draws random numbers in a way that cannot be compiled",
                module="see the operator",
                operator=str(func),
                advice="Use dropout, torch.rand, torch.rand_like, torch.randn, torch.randn_like or "
                "torch.bernoulli with a fixed probability",
            )
        return func(*args, **(kwargs or {}))

    def bits(self, size: Sequence[int | torch.SymInt]) -> Tensor:
        """The next draw of `random_bits`."""
        self._calls += 1
        return random_bits(self._seed, self._calls - 1, size)

    def uniform(self, size: Sequence[int | torch.SymInt], dtype: torch.dtype | None) -> Tensor:
        """Numbers in [0, 1)."""
        scaled = self.bits(size).to(torch.float32) * 2.0**-_UNIFORM_BITS
        return scaled.to(dtype or torch.float32)

    def normal(self, size: Sequence[int | torch.SymInt], dtype: torch.dtype | None) -> Tensor:
        """Standard normal numbers: Box and Muller 1958."""
        # 1 - u is in (0, 1]: its logarithm is finite.
        radius = (-2.0 * (1.0 - self.uniform(size, None)).log()).sqrt()
        return (radius * (self.uniform(size, None) * (2.0 * math.pi)).cos()).to(
            dtype or torch.float32
        )

    def at_least(self, probability: float, like: Tensor) -> Tensor:
        """Bool of the shape of `like`, true with `probability`: an integer comparison, so exact."""
        drawn: Tensor = self.bits(like.shape) < round(probability * 2**_UNIFORM_BITS)
        return drawn


def _bernoulli_inplace(
    draws: CounterRandomness, target: Tensor, p: float = 0.5, *, generator: object = None
) -> Tensor:
    return target.copy_(draws.at_least(p, target).to(target.dtype))


def _bernoulli_p(
    draws: CounterRandomness, target: Tensor, p: float, *, generator: object = None
) -> Tensor:
    return draws.at_least(p, target).to(target.dtype)


def _bernoulli(draws: CounterRandomness, target: Tensor, *, generator: object = None) -> Tensor:
    return (draws.uniform(target.shape, None) < target).to(target.dtype)


def _native_dropout(
    draws: CounterRandomness,
    tensor: Tensor,
    p: float,
    train: bool | None,
) -> tuple[Tensor, Tensor]:
    if train is False:
        return tensor.clone(), torch.ones_like(tensor, dtype=torch.bool)
    kept = draws.at_least(1 - p, tensor)
    scale = 0.0 if p == 1 else 1 / (1 - p)
    return tensor * kept.to(tensor.dtype) * scale, kept


def _uniform_inplace(
    draws: CounterRandomness,
    target: Tensor,
    low: float = 0.0,
    high: float = 1.0,
    *,
    generator: object = None,
) -> Tensor:
    return target.copy_(draws.uniform(target.shape, target.dtype) * (high - low) + low)


def _normal_inplace(
    draws: CounterRandomness,
    target: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    *,
    generator: object = None,
) -> Tensor:
    return target.copy_(draws.normal(target.shape, target.dtype) * std + mean)


def _rand(
    draws: CounterRandomness,
    size: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    **_: object,
) -> Tensor:
    return draws.uniform(size, dtype)


def _randn(
    draws: CounterRandomness,
    size: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    **_: object,
) -> Tensor:
    return draws.normal(size, dtype)


def _rand_like(
    draws: CounterRandomness, like: Tensor, *, dtype: torch.dtype | None = None, **_: object
) -> Tensor:
    return draws.uniform(like.shape, dtype or like.dtype)


def _randn_like(
    draws: CounterRandomness, like: Tensor, *, dtype: torch.dtype | None = None, **_: object
) -> Tensor:
    return draws.normal(like.shape, dtype or like.dtype)


_REPLACEMENTS: Mapping[OpOverload, Callable[..., Any]] = {
    aten.bernoulli_.float: _bernoulli_inplace,
    aten.bernoulli.p: _bernoulli_p,
    aten.bernoulli.default: _bernoulli,
    aten.native_dropout.default: _native_dropout,
    aten.uniform_.default: _uniform_inplace,
    aten.normal_.default: _normal_inplace,
    aten.rand.default: _rand,
    aten.randn.default: _randn,
    aten.rand_like.default: _rand_like,
    aten.randn_like.default: _randn_like,
}
