"""Operators that move, select, repeat or scatter elements, and those that say or make shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from fedge.edge_agent.engines.torch_elementwise import torch_dtype
from fedge.edge_agent.engines.torch_kernels import Kernel, Node, Operator, Tensor, normal_axis

_SCATTER_REDUCTIONS = {"mul": "prod", "max": "amax", "min": "amin"}


def _constant(node: Node) -> Kernel:
    attributes = node.attributes
    value: Any
    if "value" in attributes:
        value = attributes["value"]
    elif "value_float" in attributes or "value_floats" in attributes:
        numbers = attributes.get("value_float", attributes.get("value_floats"))
        value = torch.tensor(numbers, dtype=torch.float32)
    elif "value_int" in attributes or "value_ints" in attributes:
        numbers = attributes.get("value_int", attributes.get("value_ints"))
        value = torch.tensor(numbers, dtype=torch.int64)
    else:
        raise ValueError(f"a constant given by {sorted(attributes)}")
    if not isinstance(value, Tensor):
        raise TypeError(f"a constant whose value is {value!r}, not a tensor")
    return lambda: value


def _constant_of_shape(node: Node) -> Kernel:
    shape = node.numbers(0) or []
    value = node.attributes.get("value")
    filler = torch.zeros((), dtype=torch.float32) if value is None else value
    return lambda: filler.reshape(()).expand(shape).clone()


def _eye_like(node: Node) -> Kernel:
    like, offset = node.tensor(0), node.attributes.get("k", 0)
    code = node.attributes.get("dtype")
    dtype = like.dtype if code is None else torch_dtype(code)
    rows, columns = like.shape
    diagonal = torch.triu(torch.tril(torch.ones(rows, columns, dtype=dtype), offset), offset)
    return lambda: diagonal


def _shape(node: Node) -> Kernel:
    sizes = list(node.tensor(0).shape)
    found = torch.tensor(
        sizes[node.attributes.get("start", 0) : node.attributes.get("end")], dtype=torch.int64
    )
    return lambda: found


def _size(node: Node) -> Kernel:
    count = torch.tensor(node.tensor(0).numel(), dtype=torch.int64)
    return lambda: count


def _range(node: Node) -> Kernel:
    start, limit, step = (node.tensor(position) for position in range(3))
    count = max(math.ceil((limit.item() - start.item()) / step.item()), 0)
    values = start.reshape(()) + torch.arange(count, dtype=start.dtype) * step.reshape(())
    return lambda: values


def _reshape(node: Node) -> Kernel:
    sizes, old = node.numbers(1) or [], node.tensor(0).shape
    if not node.attributes.get("allowzero", 0):
        sizes = [old[at] if size == 0 else size for at, size in enumerate(sizes)]
    return lambda x: x.reshape(sizes)


def _flatten(node: Node) -> Kernel:
    shape = node.tensor(0).shape
    axis = node.attributes.get("axis", 1)
    axis = axis + len(shape) if axis < 0 else axis
    rows, columns = math.prod(shape[:axis]), math.prod(shape[axis:])
    return lambda x: x.reshape(rows, columns)


def _squeeze(node: Node) -> Kernel:
    shape, axes = node.tensor(0).shape, node.numbers(1)
    if axes is None:
        chosen = {at for at, size in enumerate(shape) if size == 1}
    else:
        chosen = {normal_axis(axis, len(shape)) for axis in axes}
    kept = [size for at, size in enumerate(shape) if at not in chosen]
    return lambda x: x.reshape(kept)


def _unsqueeze(node: Node) -> Kernel:
    axes = node.numbers(1) or []
    old = list(node.tensor(0).shape)
    rank = len(old) + len(axes)
    chosen = {normal_axis(axis, rank) for axis in axes}
    sizes = iter(old)
    shape = [1 if at in chosen else next(sizes) for at in range(rank)]
    return lambda x: x.reshape(shape)


def _transpose(node: Node) -> Kernel:
    order = node.attributes.get("perm") or list(reversed(range(node.tensor(0).dim())))
    return lambda x: x.permute(order)


def _expand(node: Node) -> Kernel:
    # Not typed by torch 2.15.
    shape: tuple[int, ...] = torch.broadcast_shapes(  # type: ignore[no-untyped-call]
        node.tensor(0).shape, node.numbers(1) or []
    )
    return lambda x: x.expand(shape)


def _tile(node: Node) -> Kernel:
    repeats = node.numbers(1) or []
    return lambda x: x.repeat(repeats) if repeats else x


def _concat(node: Node) -> Kernel:
    axis = node.axis(0, node.tensor(0).dim())
    return lambda *tensors: torch.cat(tensors, axis)


def _split(node: Node) -> Kernel:
    x, sizes = node.tensor(0), node.numbers(1)
    axis = node.axis(0, x.dim())
    if sizes is None:
        parts = node.attributes.get("num_outputs", node.output_count)
        size = -(-x.shape[axis] // parts)
        sizes = [size] * (parts - 1) + [x.shape[axis] - size * (parts - 1)]
    return lambda x: tuple(torch.split(x, sizes, axis))


def _slice(node: Node) -> Kernel:
    x = node.tensor(0)
    starts, ends = node.numbers(1) or [], node.numbers(2) or []
    axes = node.numbers(3) or list(range(len(starts)))
    steps = node.numbers(4) or [1] * len(starts)
    window = [slice(None)] * x.dim()
    backwards: list[tuple[int, Tensor]] = []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        at = normal_axis(axis, x.dim())
        chosen = range(*slice(start, end, step).indices(x.shape[at]))
        if step > 0:
            window[at] = slice(chosen.start, max(chosen.stop, chosen.start), step)
        else:  # torch has no negative steps
            backwards.append((at, _index(chosen, x)))
    forwards = tuple(window)
    if not backwards:
        return lambda x: x[forwards]

    def kernel(x: Tensor) -> Tensor:
        x = x[forwards]
        for at, rows in backwards:
            x = x.index_select(at, rows)
        return x

    return kernel


def _pad(node: Node) -> Kernel:
    x, pads = node.tensor(0), node.numbers(1) or []
    mode = node.attributes.get("mode", "constant")
    axes = node.numbers(3)
    chosen = list(range(x.dim())) if axes is None else [normal_axis(a, x.dim()) for a in axes]
    before, after = [0] * x.dim(), [0] * x.dim()
    for place, at in enumerate(chosen):
        before[at], after[at] = pads[place], pads[place + len(chosen)]
    if mode == "constant":
        value = node.optional(2)
        filler = 0 if value is None else value.item()
        # torch counts axes from the last to the first
        both = [size for at in reversed(range(x.dim())) for size in (before[at], after[at])]
        return lambda x: functional.pad(x, both, value=filler)
    rows = [
        (at, _index([_source(i, x.shape[at], mode) for i in range(-low, x.shape[at] + high)], x))
        for at, (low, high) in enumerate(zip(before, after, strict=True))
        if low or high
    ]

    def kernel(x: Tensor) -> Tensor:
        for at, chosen_rows in rows:
            x = x.index_select(at, chosen_rows)
        return x

    return kernel


def _source(place: int, size: int, mode: str) -> int:
    """Where the element at `place` (outside 0 to `size` - 1 is padding) is taken from."""
    match mode:
        case "edge":
            return min(max(place, 0), size - 1)
        case "wrap":
            return place % size
        case "reflect":
            if size == 1:
                return 0
            place %= 2 * (size - 1)
            return min(place, 2 * (size - 1) - place)
        case _:
            raise ValueError(f"the padding mode {mode!r} is not known")


def _index(rows: Sequence[int] | range, x: Tensor) -> Tensor:
    return torch.tensor(list(rows), dtype=torch.int64, device=x.device)


def _from_front(index: Tensor, size: int) -> Tensor:
    """Negative indices count from the end."""
    return torch.where(index < 0, index + size, index).to(torch.int64)


def _gather(node: Node) -> Kernel:
    x, index = node.tensor(0), node.tensor(1)
    axis = node.axis(0, x.dim())
    size = x.shape[axis]
    shape = [*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]]

    def kernel(x: Tensor, index: Tensor) -> Tensor:
        return x.index_select(axis, _from_front(index, size).reshape(-1)).reshape(shape)

    return kernel


def _gather_elements(node: Node) -> Kernel:
    x = node.tensor(0)
    axis = node.axis(0, x.dim())
    size = x.shape[axis]
    return lambda x, index: torch.gather(x, axis, _from_front(index, size))


def _gather_nd(node: Node) -> Kernel:
    x, index = node.tensor(0), node.tensor(1)
    batch_rank = node.attributes.get("batch_dims", 0)
    batch = list(x.shape[:batch_rank])
    depth = index.shape[-1]
    sizes = x.shape[batch_rank : batch_rank + depth]
    rest = x.shape[batch_rank + depth :]
    rows = math.prod(batch)
    first = torch.arange(rows, device=x.device).reshape(rows, 1) * math.prod(sizes)
    shape = [*batch, *index.shape[batch_rank:-1], *rest]

    def kernel(x: Tensor, index: Tensor) -> Tensor:
        flat = _flat_index(index, sizes).reshape(rows, -1) + first
        table = x.reshape(rows * math.prod(sizes), *rest)
        return table.index_select(0, flat.reshape(-1)).reshape(shape)

    return kernel


def _flat_index(index: Tensor, sizes: Sequence[int]) -> Tensor:
    """Tuples along the last dimension of `index` → numbers of elements in row-major order."""
    flat = torch.zeros_like(index[..., 0]) if sizes else index.new_zeros(index.shape[:-1])
    for place, size in enumerate(sizes):
        flat = flat * size + _from_front(index[..., place], size)
    return flat.to(torch.int64)


def _scatter_elements(node: Node) -> Kernel:
    x = node.tensor(0)
    axis = node.axis(0, x.dim())
    size = x.shape[axis]
    reduction = node.attributes.get("reduction", "none")
    if reduction == "none":
        return lambda x, index, new: torch.scatter(x, axis, _from_front(index, size), new)
    if reduction == "add":
        return lambda x, index, new: torch.scatter_add(x, axis, _from_front(index, size), new)
    reduce = _SCATTER_REDUCTIONS[reduction]
    return lambda x, index, new: torch.scatter_reduce(
        x, axis, _from_front(index, size), new, reduce
    )


def _scatter_nd(node: Node) -> Kernel:
    x, index = node.tensor(0), node.tensor(1)
    depth = index.shape[-1]
    sizes = x.shape[:depth]
    rows, columns = math.prod(sizes), math.prod(x.shape[depth:])
    changed = math.prod(index.shape[:-1])
    reduction = node.attributes.get("reduction", "none")
    if reduction not in ("none", "add", *_SCATTER_REDUCTIONS):
        raise ValueError(f"the reduction {reduction!r} is not known")
    shape = x.shape

    def kernel(x: Tensor, index: Tensor, new: Tensor) -> Tensor:
        flat = _flat_index(index, sizes).reshape(changed)
        table, new = x.reshape(rows, columns), new.reshape(changed, columns)
        if reduction == "none":
            table = table.index_copy(0, flat, new)
        elif reduction == "add":
            table = table.index_add(0, flat, new)
        else:
            wide = flat.unsqueeze(1).expand(changed, columns)
            table = table.scatter_reduce(0, wide, new, _SCATTER_REDUCTIONS[reduction])
        return table.reshape(shape)

    return kernel


def _one_hot(node: Node) -> Kernel:
    index = node.tensor(0)
    depth = (node.numbers(1) or [0])[0]
    rank = index.dim() + 1
    axis = node.axis(-1, rank)
    classes = torch.arange(depth, device=index.device)
    classes = classes.reshape([depth if at == axis else 1 for at in range(rank)])

    def kernel(index: Tensor, values: Tensor) -> Tensor:
        chosen = _from_front(index, depth).unsqueeze(axis) == classes
        return torch.where(chosen, values[1], values[0])

    return kernel


def _trilu(node: Node) -> Kernel:
    offset = (node.numbers(1) or [0])[0]
    function = torch.triu if node.attributes.get("upper", 1) else torch.tril
    return partial(function, diagonal=offset)


def _depth_to_space(node: Node) -> Kernel:
    n, c, h, w = node.tensor(0).shape
    block = node.attributes["blocksize"]
    inner = c // block**2
    if node.attributes.get("mode", "DCR") == "DCR":
        split, order = (n, block, block, inner, h, w), (0, 3, 4, 1, 5, 2)
    else:
        split, order = (n, inner, block, block, h, w), (0, 1, 4, 2, 5, 3)
    return lambda x: x.reshape(split).permute(order).reshape(n, inner, h * block, w * block)


def _space_to_depth(node: Node) -> Kernel:
    n, c, h, w = node.tensor(0).shape
    block = node.attributes["blocksize"]
    split = (n, c, h // block, block, w // block, block)
    shape = (n, c * block**2, h // block, w // block)
    return lambda x: x.reshape(split).permute(0, 3, 5, 1, 2, 4).reshape(shape)


def _operator(build: Any, *static: int) -> Operator:
    return Operator(build, frozenset(static))


LAYOUT: dict[str, Operator] = {
    "Concat": Operator(_concat),
    "Constant": Operator(_constant),
    "ConstantOfShape": _operator(_constant_of_shape, 0),
    "DepthToSpace": Operator(_depth_to_space),
    "Expand": _operator(_expand, 1),
    "EyeLike": Operator(_eye_like, shape_only=True),
    "Flatten": Operator(_flatten),
    "Gather": Operator(_gather),
    "GatherElements": Operator(_gather_elements),
    "GatherND": Operator(_gather_nd),
    "OneHot": _operator(_one_hot, 1),
    "Pad": _operator(_pad, 1, 2, 3),
    "Range": _operator(_range, 0, 1, 2),
    "Reshape": _operator(_reshape, 1),
    "ScatterElements": Operator(_scatter_elements),
    "ScatterND": Operator(_scatter_nd),
    "Shape": Operator(_shape, shape_only=True),
    "Size": Operator(_size, shape_only=True),
    "Slice": _operator(_slice, 1, 2, 3, 4),
    "SpaceToDepth": Operator(_space_to_depth),
    "Split": _operator(_split, 1),
    "Squeeze": _operator(_squeeze, 1),
    "Tile": _operator(_tile, 1),
    "Transpose": Operator(_transpose),
    "Trilu": _operator(_trilu, 1),
    "Unsqueeze": _operator(_unsqueeze, 1),
}
