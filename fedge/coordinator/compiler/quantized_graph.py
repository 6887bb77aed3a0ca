"""The `infer` graph with int8 weights: which of them, and what the graph does with them.

A weight's open name gives way to two, its int8 form and its scales (`fedge.schemas.quantization`).
DequantizeLinear makes the float32 weight of them when the graph runs, so whatever reads it stays as
it is, whatever operator it is; activations are never rounded. Of a table of words only the rows
that are looked up are made float32. The same file means the same numbers on every processor.

A weight stays float32 where int8 would gain little or cost much: vectors (biases, norms), small
tensors, tensors of many short rows, and all that is no parameter (statistics, constant buffers).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import onnx
from onnx import NodeProto, TensorProto, helper

from fedge.schemas.onnx_wire import inspect_graph
from fedge.schemas.plan import WeightSpec, quantized_names

MIN_ELEMENTS = 1024
"""A smaller weight takes 4 KB at most."""
MIN_ROW_ELEMENTS = 8
"""With shorter rows the scales, 4 bytes a row, eat up what int8 saves."""


def quantizable(
    infer: bytes, weights: Sequence[WeightSpec], parameters: Collection[str]
) -> tuple[WeightSpec, ...]:
    """Those of `weights` that the `infer` graph reads and that are worth to be int8, in order.

    `parameters`: the tensor names of the model's parameters, trained or frozen.
    """
    read = inspect_graph(infer).open_names
    return tuple(
        weight
        for weight in weights
        if weight.graph_name in read
        and weight.tensor.name in parameters
        and weight.tensor.dtype == "float32"
        and weight.tensor.element_count >= MIN_ELEMENTS
        and weight.tensor.element_count >= MIN_ROW_ELEMENTS * weight.tensor.shape[0]
    )


def quantize_graph(infer: bytes, chosen: Sequence[WeightSpec]) -> bytes:
    """The same graph, reading `chosen` as int8 and scales; the same bytes each time."""
    model = onnx.load_from_string(infer)
    inner_axes = {weight.graph_name: len(weight.tensor.shape) - 1 for weight in chosen}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if _looks_up_rows(node) and node.input[0] in inner_axes:
            nodes += _looked_up(node, inner_axes[node.input[0]])
        else:
            nodes.append(node)
    readers = Counter(name for node in nodes for name in node.input)
    made = [node for name in inner_axes for node in _made_float(name, readers, inner_axes[name])]
    nodes = [*made, *nodes]
    used = {name for node in nodes for name in node.input}
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for count in sorted(set(inner_axes.values())):
        if _axes(count) in used:
            axes = list(range(-count, 0))
            model.graph.initializer.append(
                helper.make_tensor(_axes(count), TensorProto.INT64, [count], axes)
            )
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _looks_up_rows(node: NodeProto) -> bool:
    axis = next((one.i for one in node.attribute if one.name == "axis"), 0)
    return node.op_type == "Gather" and axis == 0


def _looked_up(gather: NodeProto, inner_axes: int) -> Iterator[NodeProto]:
    """The rows that a Gather wants, made float32 after they were found."""
    int8, scale = quantized_names(gather.input[0])
    rows, result = gather.input[1], gather.output[0]
    yield helper.make_node("Gather", [int8, rows], [f"{result}.int8"], axis=0)
    yield helper.make_node("Cast", [f"{result}.int8"], [f"{result}.float"], to=TensorProto.FLOAT)
    yield helper.make_node("Gather", [scale, rows], [f"{result}.scale"], axis=0)
    column = f"{result}.column"
    yield helper.make_node("Unsqueeze", [f"{result}.scale", _axes(inner_axes)], [column])
    yield helper.make_node("Mul", [f"{result}.float", column], [result])


def _made_float(name: str, readers: Counter[str], inner_axes: int) -> Iterator[NodeProto]:
    """The whole weight as float32, under its own name, if anything still reads it."""
    int8, scale = quantized_names(name)
    if readers[name] == 1:
        yield helper.make_node("DequantizeLinear", [int8, scale], [name], axis=0)
    elif readers[name] > 1:
        # onnxruntime repeats a DequantizeLinear for each reader, which a recurrent net that is
        # unrolled has many of. This it computes once, when it loads the file.
        column, wide = f"{name}.column", f"{name}.float"
        yield helper.make_node("Unsqueeze", [scale, _axes(inner_axes)], [column])
        yield helper.make_node("Cast", [int8], [wide], to=TensorProto.FLOAT)
        yield helper.make_node("Mul", [wide, column], [name])


def _axes(count: int) -> str:
    """The constant that names the last `count` axes."""
    return f"last.{count}"
