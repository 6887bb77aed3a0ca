"""ONNX files read and completed on the level of their bytes, without the onnx package.

A device has no onnx package: it would double what is installed, and all that a device needs is
small. `check_graph` decides whether a graph from the network may be given to a runtime at all;
`embed_weights` puts a version's weights into the plan's open `infer` graph. The coordinator calls
the same two functions, so both sides have the same `model.onnx`, byte for byte.

What this reader does not know it refuses: a field that it skipped and a runtime obeyed would be a
way around every check, and so would a field given twice, of which two readers may take different
ones. It knows nothing of what operators compute.

Format: ONNX IR, `onnx.proto` (IR version 10 and the fields since).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from fedge.schemas.errors import PlanRefused
from fedge.schemas.onnx_operators import ALLOWED_OPERATORS, INFER_OPERATORS
from fedge.schemas.protobuf_wire import (
    FIXED32,
    FIXED64,
    VARINT,
    as_bytes,
    as_integer,
    as_text,
    message_type,
    read_fields,
    read_message,
    write_field,
    write_varint,
)
from fedge.schemas.tensors import Array

__all__ = [
    "ALLOWED_OPERATORS",
    "INFER_OPERATORS",
    "GraphInterface",
    "TensorInfo",
    "check_graph",
    "embed_weights",
    "inspect_graph",
]

MAX_GRAPH_DEPTH = 8
"""Graphs within graphs. The compiler writes none; more than a few is an attack on the stack."""

_DTYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
}
_DTYPE_CODES = MappingProxyType({name: code for code, name in _DTYPES.items()})


class TensorInfo(NamedTuple):
    """A graph's input or output. A dimension is a size, a symbol, or None if it says nothing."""

    name: str
    dtype: str | None
    shape: tuple[int | str | None, ...] | None


@dataclass(slots=True)
class GraphInterface:
    """What a file says about itself, all graphs within it counted.

    `opsets`: domain → version; `operators`: (domain, operator) of every node, `ai.onnx` being "".
    `open_names`: what nodes read and nothing defines. `initializers`: of the outermost graph.
    """

    opsets: dict[str, int] = field(default_factory=dict)
    operators: set[tuple[str, str]] = field(default_factory=set)
    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()
    initializers: tuple[str, ...] = ()
    open_names: frozenset[str] = frozenset()
    external_data: bool = False
    functions: int = 0
    training_info: int = 0


def inspect_graph(data: bytes) -> GraphInterface:
    """What the ONNX file `data` holds.

    Raises `PlanRefused` if it is malformed, truncated, nested too deep, or has a field that this
    reader does not know or that is given twice.
    """
    found = GraphInterface()
    graph: memoryview | None = None
    for number, value in read_message(memoryview(data), _MODEL, "the model"):
        if number == 7:
            graph = as_bytes(value)
        elif number == 8:
            _read_opset(as_bytes(value), found.opsets)
        elif number == 20:
            found.training_info += 1
        elif number == 25:
            found.functions += 1
            _read_function(as_bytes(value), found)
    if graph is None:
        raise PlanRefused("an ONNX file without a graph")
    scope = _read_graph(graph, found, depth=1)
    found.inputs = tuple(scope.inputs)
    found.outputs = tuple(scope.outputs)
    found.initializers = tuple(scope.initializers)
    found.open_names = frozenset(scope.used - scope.defined())
    return found


def check_graph(
    data: bytes,
    *,
    inputs: Iterable[str],
    outputs: Iterable[str],
    open_names: Iterable[str] = (),
    operators: frozenset[str] = ALLOWED_OPERATORS,
) -> GraphInterface:
    """The interface of `data`, which obeys the rules for graphs of a plan.

    The rules: operators of `operators` only, from the default domain; no external data, no
    functions, no training info; exactly `inputs` and `outputs`; nothing left open but names in
    `open_names`. Raises `PlanRefused` saying which rule is broken.
    """
    found = inspect_graph(data)
    foreign = sorted(domain for domain in found.opsets if domain not in ("", "ai.onnx"))
    if foreign:
        raise PlanRefused(f"the graph imports the foreign operator domain {foreign[0]!r}")
    if not found.opsets:
        raise PlanRefused("the file imports no operator set")
    for domain, operator in sorted(found.operators):
        if domain not in ("", "ai.onnx") or operator not in operators:
            raise PlanRefused(f"the operator {domain or 'ai.onnx'}::{operator} is not allowed")
    if found.functions or found.training_info:
        raise PlanRefused("the file defines functions or training info; only a graph is allowed")
    if found.external_data:
        raise PlanRefused("the graph reads data from other files")
    for what, expected, actual in (
        ("inputs", list(inputs), [info.name for info in found.inputs]),
        ("outputs", list(outputs), [info.name for info in found.outputs]),
    ):
        if sorted(expected) != sorted(actual):
            missing = sorted(set(expected) - set(actual))[:3]
            extra = sorted(set(actual) - set(expected))[:3]
            raise PlanRefused(
                f"the graph's {what} are not the plan's: missing {missing}, foreign {extra}, "
                f"{len(actual)} instead of {len(expected)}"
            )
    undefined = sorted(found.open_names - set(open_names))
    if undefined:
        raise PlanRefused(f"the graph reads {undefined[:3]}, which nothing defines")
    return found


def embed_weights(infer: bytes, weights: Mapping[str, Array]) -> bytes:
    """The complete model: `infer` with its open names filled as initializers, sorted by name.

    `weights`: graph name (`param.…`, `frozen.…`, `buffer.…`) → array; those that the graph does
    not read (counters of batch norm, say) stay out. Equal arguments give equal bytes.

    Raises `PlanRefused` if `infer` is malformed, reads a name that is not in `weights`, or an
    array has a dtype that weights do not have.
    """
    open_names = sorted(inspect_graph(infer).open_names)
    missing = [name for name in open_names if name not in weights]
    if missing:
        raise PlanRefused(f"the graph reads {missing[:3]}, of which the version has no weights")
    initializers = b"".join(
        write_field(5, _encode_tensor(name, weights[name])) for name in open_names
    )
    parts: list[bytes] = []
    for start, end, number, value in read_fields(memoryview(infer), "the model"):
        if number == 7:
            parts.append(write_field(7, bytes(as_bytes(value)) + initializers))
        else:
            parts.append(infer[start:end])
    return b"".join(parts)


_MODEL = message_type(varints="1 5", strings="2 3 4 6 7 8 14 20 25 26", repeated="8 14 20 25 26")
_OPSET = message_type(varints="2", strings="1", repeated="")
_GRAPH = message_type(strings="1 2 5 10 11 12 13 14 15 16", repeated="1 5 11 12 13 14 15 16")
_NODE = message_type(strings="1 2 3 4 5 6 7 8 9 10", repeated="1 2 5 9 10")
_ATTRIBUTE = message_type(
    varints="3 20",
    floats="2",
    strings="1 4 5 6 9 10 11 13 14 15 21 22 23",
    numbers={7: FIXED32, 8: VARINT},
    repeated="7 8 9 10 11 15 23",
)
_TENSOR = message_type(
    varints="2 14",
    strings="3 6 8 9 12 13 16",
    numbers={1: VARINT, 4: FIXED32, 5: VARINT, 7: VARINT, 10: FIXED64, 11: VARINT},
    repeated="1 4 5 6 7 10 11 13 16",
)
_SPARSE = message_type(strings="1 2", numbers={3: VARINT}, repeated="3")
_VALUE_INFO = message_type(strings="1 2 3 4", repeated="4")
_TYPE = message_type(strings="1 4 5 6 7 8 9", repeated="")
_TENSOR_TYPE = message_type(varints="1", strings="2", repeated="")
_SHAPE = message_type(strings="1", repeated="1")
_DIMENSION = message_type(varints="1", strings="2 3", repeated="")
_FUNCTION = message_type(
    varints="2 3", strings="1 4 5 6 7 8 9 10 11 12 13 14", repeated="4 5 6 7 9 11 12 14"
)


@dataclass(slots=True)
class _Scope:
    """The names of one graph."""

    inputs: list[TensorInfo] = field(default_factory=list)
    outputs: list[TensorInfo] = field(default_factory=list)
    initializers: list[str] = field(default_factory=list)
    computed: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)

    def defined(self) -> set[str]:
        """Names that something in this graph gives a value; "" stands for an absent input."""
        return {info.name for info in self.inputs} | set(self.initializers) | self.computed | {""}


def _read_opset(data: memoryview, opsets: dict[str, int]) -> None:
    domain, version = "", 0
    for number, value in read_message(data, _OPSET, "an operator set"):
        if number == 1:
            domain = as_text(value)
        else:
            version = as_integer(value)
    opsets[domain] = version


def _read_graph(data: memoryview, found: GraphInterface, depth: int) -> _Scope:
    if depth > MAX_GRAPH_DEPTH:
        raise PlanRefused(f"graphs nested more than {MAX_GRAPH_DEPTH} deep")
    scope = _Scope()
    for number, value in read_message(data, _GRAPH, "the graph"):
        if number == 1:
            _read_node(as_bytes(value), found, scope, depth)
        elif number == 5:
            scope.initializers.append(_read_tensor(as_bytes(value), found))
        elif number == 11:
            scope.inputs.append(_read_value_info(as_bytes(value)))
        elif number == 12:
            scope.outputs.append(_read_value_info(as_bytes(value)))
        elif number == 15:
            scope.initializers.append(_read_sparse_tensor(as_bytes(value), found))
    scope.used |= {info.name for info in scope.outputs}
    return scope


def _read_node(data: memoryview, found: GraphInterface, scope: _Scope, depth: int) -> None:
    domain, operator = "", ""
    for number, value in read_message(data, _NODE, "a node"):
        if number == 1:
            scope.used.add(as_text(value))
        elif number == 2:
            scope.computed.add(as_text(value))
        elif number == 4:
            operator = as_text(value)
        elif number == 5:
            _read_attribute(as_bytes(value), found, scope, depth)
        elif number == 7:
            domain = as_text(value)
    found.operators.add((domain, operator))


def _read_attribute(data: memoryview, found: GraphInterface, scope: _Scope, depth: int) -> None:
    for number, value in read_message(data, _ATTRIBUTE, "an attribute"):
        if number in (5, 10):
            _read_tensor(as_bytes(value), found)
        elif number in (22, 23):
            _read_sparse_tensor(as_bytes(value), found)
        elif number in (6, 11):
            inner = _read_graph(as_bytes(value), found, depth + 1)
            scope.used |= inner.used - inner.defined()


def _read_function(data: memoryview, found: GraphInterface) -> None:
    scope = _Scope()
    for number, value in read_message(data, _FUNCTION, "a function"):
        if number == 7:
            _read_node(as_bytes(value), found, scope, depth=1)
        elif number == 9:
            _read_opset(as_bytes(value), found.opsets)
        elif number == 11:
            _read_attribute(as_bytes(value), found, scope, depth=1)


def _read_tensor(data: memoryview, found: GraphInterface) -> str:
    name = ""
    for number, value in read_message(data, _TENSOR, "a tensor"):
        if number == 8:
            name = as_text(value)
        elif number == 13 or (number == 14 and as_integer(value) != 0):
            found.external_data = True
    return name


def _read_sparse_tensor(data: memoryview, found: GraphInterface) -> str:
    name = ""
    for number, value in read_message(data, _SPARSE, "a sparse tensor"):
        if number == 1:
            name = _read_tensor(as_bytes(value), found)
        elif number == 2:
            _read_tensor(as_bytes(value), found)
    return name


def _read_value_info(data: memoryview) -> TensorInfo:
    name, dtype, shape = "", None, None
    for number, value in read_message(data, _VALUE_INFO, "a value's type"):
        if number == 1:
            name = as_text(value)
        elif number == 2:
            dtype, shape = _read_type(as_bytes(value))
    return TensorInfo(name, dtype, shape)


def _read_type(data: memoryview) -> tuple[str | None, tuple[int | str | None, ...] | None]:
    dtype, shape = None, None
    for number, value in read_message(data, _TYPE, "a type"):
        if number != 1:
            continue
        for inner_number, inner in read_message(as_bytes(value), _TENSOR_TYPE, "a tensor's type"):
            if inner_number == 1:
                dtype = _DTYPES.get(as_integer(inner))
            else:
                dimensions = read_message(as_bytes(inner), _SHAPE, "a shape")
                shape = tuple(_read_dimension(as_bytes(one)) for _, one in dimensions)
    return dtype, shape


def _read_dimension(data: memoryview) -> int | str | None:
    size: int | str | None = None
    for number, value in read_message(data, _DIMENSION, "a dimension"):
        if number == 1:
            size = as_integer(value)
        elif number == 2:
            size = as_text(value)
    return size


def _encode_tensor(name: str, array: Array) -> bytes:
    code = _DTYPE_CODES.get(array.dtype.name)
    if code is None:
        raise PlanRefused(f"the weight {name!r} has the dtype {array.dtype}, which is not allowed")
    little_endian = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    dims = b"".join(write_varint(1 << 3) + write_varint(size) for size in array.shape)
    dtype = write_varint(2 << 3) + write_varint(code)
    return dims + dtype + write_field(8, name.encode()) + write_field(9, little_endian.tobytes())
