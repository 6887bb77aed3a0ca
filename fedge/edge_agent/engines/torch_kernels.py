"""What an operator of a plan's graph is to the torch engine.

An operator is built once for a node, when the shapes of its operands are known, into a kernel: a
function of tensors which is called at each step. Whatever decides the shape of a result (axes,
sizes, counts) is a *static* operand: it is read while building, on the host, and a kernel never
waits for the device to learn a shape. The tables of `torch_elementwise`, `torch_layout`,
`torch_reductions` and `torch_layers` hold the operators themselves.

Semantics: the ONNX operator specification, opset 18, https://onnx.ai/onnx/operators/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Tensor = torch.Tensor
Kernel = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Node:
    """One node with its operands as they are while building.

    `operands`: the tensors, None for an absent optional one; only their shapes and dtypes may be
    used, except at the operator's static positions. `output_count`: up to the last one in use.
    """

    attributes: Mapping[str, Any]
    operands: tuple[Tensor | None, ...]
    output_count: int

    def tensor(self, position: int) -> Tensor:
        """The operand at `position`. Raises `ValueError` if it is absent."""
        found = self.optional(position)
        if found is None:
            raise ValueError(f"operand {position} is missing")
        return found

    def optional(self, position: int) -> Tensor | None:
        """The operand at `position`, or None."""
        return self.operands[position] if position < len(self.operands) else None

    def numbers(self, position: int) -> list[int] | None:
        """A static operand as whole numbers, or None if it is absent."""
        found = self.optional(position)
        return None if found is None else [int(value) for value in found.reshape(-1).tolist()]

    def axis(self, default: int, rank: int) -> int:
        """The attribute `axis`, counted from the front. Raises `IndexError` if there is none."""
        return normal_axis(self.attributes.get("axis", default), rank)


@dataclass(frozen=True, slots=True)
class Operator:
    """How a node becomes a kernel.

    `static`: positions that `build` reads and the kernel does not get; the kernel gets the others
    in order, None for an absent one. `shape_only`: the kernel takes nothing and returns a host
    tensor, because the shape of its operand is all that it depends on.
    """

    build: Callable[[Node], Kernel]
    static: frozenset[int] = field(default_factory=frozenset)
    shape_only: bool = False


def normal_axis(axis: int, rank: int) -> int:
    """`axis` counted from the front. Raises `IndexError` if it is outside the rank."""
    if not -rank <= axis < rank:
        raise IndexError(f"axis {axis} of a tensor of rank {rank}")
    return axis % rank


def plain(kernel: Kernel) -> Operator:
    """An operator without attributes whose kernel is a function of torch."""
    return Operator(lambda _: kernel)
