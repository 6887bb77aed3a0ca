"""Operators about the layout of memory, which a graph of values knows nothing of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def restrided(
    tensor: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Any:
    """`tensor` itself where the new strides name the same values (a channels-last hint).

    Strides of dimensions of size 1 do not matter. Any other use is left to torch.
    """
    same = not storage_offset and len(size) == tensor.dim()
    for have_size, have, want_size, want in zip(
        tensor.shape, tensor.stride(), size, stride, strict=False
    ):
        same = same and have_size == want_size and (want_size == 1 or have == want)
    return tensor if same else NotImplemented


def contiguous_view(
    tensor: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Any:
    """A reshape where the strides are those of `size` in rows, as in the gradient of the above."""
    expected, wanted = 1, True
    for one_size, one_stride in zip(reversed(size), reversed(stride), strict=True):
        wanted = wanted and (one_size == 1 or one_stride == expected)
        expected = expected * one_size
    if storage_offset or not wanted or not tensor.is_contiguous() or expected != tensor.numel():
        return NotImplemented
    return tensor.view(size)


def empty_permuted(
    size: Sequence[int],
    physical_layout: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    **_: object,
) -> Tensor:
    """Zeros: what is not written yet may be anything."""
    return torch.zeros(size, dtype=dtype)


DECOMPOSITIONS = {
    aten.as_strided_.default: restrided,
    aten.as_strided.default: contiguous_view,
    aten.empty_permuted.default: empty_permuted,
}
