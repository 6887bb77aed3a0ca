"""The complete decomposition table: operator → function of the same signature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._ops import OpOverload

from fedge.coordinator.compiler.decompositions import (
    convolution,
    elementwise,
    normalization,
    pooling,
    views,
)


def _table() -> Mapping[OpOverload, Callable[..., Any]]:
    default = torch.export.default_decompositions()
    table = dict(default.items())  # type: ignore[no-untyped-call] # torch's own
    for module in (convolution, elementwise, normalization, pooling, views):
        table.update(module.DECOMPOSITIONS)
    return table


TABLE: Mapping[OpOverload, Callable[..., Any]] = _table()
