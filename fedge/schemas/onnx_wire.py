"""ONNX files read and completed on the level of their bytes, without the onnx package.

A device has no onnx package: it would double what is installed, and all that a device needs is
small. `check_graph` decides whether a graph from the network may be given to a runtime at all;
`embed_weights` puts a version's weights into the plan's open `infer` graph. The coordinator calls
the same two functions, so both sides have the same `model.onnx`, byte for byte.

What this reader does not know it refuses: a field that it skipped and a runtime obeyed would be a
way around every check, and so would a field given twice, of which two readers may take different
ones. It knows nothing of what operators compute.

Formats: Protocol Buffers, "Encoding"; ONNX IR, `onnx.proto` (IR version 10 and the fields since).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from fedge.schemas.errors import PlanRefused
from fedge.schemas.tensors import Array

MAX_GRAPH_DEPTH = 8
"""Graphs within graphs. The compiler writes none; more than a few is an attack on the stack."""

ALLOWED_OPERATORS: frozenset[str] = frozenset(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization
    BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Celu Clip Concat Constant
    ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace Div Einsum Elu Equal Erf Exp
    Expand EyeLike Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool
    GlobalMaxPool Greater GreaterOrEqual GroupNormalization HardSigmoid HardSwish Identity
    InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax
    MatMul Max MaxPool Mean Min Mish Mod Mul Neg Not OneHot Or PRelu Pad Pow Range Reciprocal
    ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
    ReduceSum ReduceSumSquare Relu Reshape Round ScatterElements ScatterND Selu Shape Sigmoid Sign
    Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh
    ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Where Xor
    """.split()
)
"""Operators of `ai.onnx` that only compute: no control flow, randomness, strings or sequences."""

_DTYPES = {
    1: "float32",
    2: "uint8",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
}
_DTYPE_CODES = MappingProxyType({name: code for code, name in _DTYPES.items()})

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10


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
    for number, value in _message(memoryview(data), _MODEL, "the model"):
        if number == 7:
            graph = _bytes(value)
        elif number == 8:
            _read_opset(_bytes(value), found.opsets)
        elif number == 20:
            found.training_info += 1
        elif number == 25:
            found.functions += 1
            _read_function(_bytes(value), found)
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
) -> GraphInterface:
    """The interface of `data`, which obeys the rules for graphs of a plan.

    The rules: operators of `ALLOWED_OPERATORS` only, from the default domain; no external data, no
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
        if domain not in ("", "ai.onnx") or operator not in ALLOWED_OPERATORS:
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
        raise PlanRefused(f"the version has no weights for {missing[:3]}, which the graph reads")
    initializers = b"".join(
        _field(5, _encode_tensor(name, weights[name])) for name in open_names
    )
    parts: list[bytes] = []
    for start, end, number, value in _fields(memoryview(infer), "the model"):
        if number == 7:
            parts.append(_field(7, bytes(_bytes(value)) + initializers))
        else:
            parts.append(infer[start:end])
    return b"".join(parts)


class _Known(NamedTuple):
    """The fields of one message type: number → wire types, and those that may come repeatedly."""

    wire_types: Mapping[int, tuple[int, ...]]
    repeated: frozenset[int]


def _known(
    *,
    varints: str = "",
    floats: str = "",
    strings: str = "",
    numbers: Mapping[int, int] | None = None,
    repeated: str,
) -> _Known:
    wire_types: dict[int, tuple[int, ...]] = {int(n): (_VARINT,) for n in varints.split()}
    wire_types |= {int(n): (_FIXED32,) for n in floats.split()}
    wire_types |= {int(n): (_BYTES,) for n in strings.split()}
    # Repeated numbers may come packed or one by one; a reader has to take both.
    wire_types |= {n: (wire, _BYTES) for n, wire in (numbers or {}).items()}
    return _Known(wire_types, frozenset(int(n) for n in repeated.split()))


_MODEL = _known(varints="1 5", strings="2 3 4 6 7 8 14 20 25 26", repeated="8 14 20 25 26")
_OPSET = _known(varints="2", strings="1", repeated="")
_GRAPH = _known(
    strings="1 2 5 10 11 12 13 14 15 16", repeated="1 5 11 12 13 14 15 16"
)
_NODE = _known(strings="1 2 3 4 5 6 7 8 9 10", repeated="1 2 5 9 10")
_ATTRIBUTE = _known(
    varints="3 20",
    floats="2",
    strings="1 4 5 6 9 10 11 13 14 15 21 22 23",
    numbers={7: _FIXED32, 8: _VARINT},
    repeated="7 8 9 10 11 15 23",
)
_TENSOR = _known(
    varints="2 14",
    strings="3 6 8 9 12 13 16",
    numbers={1: _VARINT, 4: _FIXED32, 5: _VARINT, 7: _VARINT, 10: _FIXED64, 11: _VARINT},
    repeated="1 4 5 6 7 10 11 13 16",
)
_SPARSE = _known(strings="1 2", numbers={3: _VARINT}, repeated="3")
_VALUE_INFO = _known(strings="1 2 3 4", repeated="4")
_TYPE = _known(strings="1 4 5 6 7 8 9", repeated="")
_TENSOR_TYPE = _known(varints="1", strings="2", repeated="")
_SHAPE = _known(strings="1", repeated="1")
_DIMENSION = _known(varints="1", strings="2 3", repeated="")
_FUNCTION = _known(
    varints="2 3", strings="1 4 5 6 7 8 9 10 11 12 13 14", repeated="4 5 6 7 9 11 12 14"
)

_Value = int | memoryview


def _fields(data: memoryview, what: str) -> Iterator[tuple[int, int, int, _Value]]:
    """(start, end, number, value) of each field of a message, end being after the value."""
    position = 0
    while position < len(data):
        start = position
        key, position = _varint(data, position, what)
        number, wire_type = key >> 3, key & 7
        if not 1 <= number < 2**29:
            raise PlanRefused(f"{what}: a field with the number {number}")
        value: _Value
        if wire_type == _VARINT:
            value, position = _varint(data, position, what)
        elif wire_type == _BYTES:
            size, position = _varint(data, position, what)
            value = data[position : position + size]
            position += size
        elif wire_type in (_FIXED32, _FIXED64):
            size = 4 if wire_type == _FIXED32 else 8
            value = data[position : position + size]
            position += size
        else:
            raise PlanRefused(f"{what}: field {number} has the unknown wire type {wire_type}")
        if position > len(data):
            raise PlanRefused(f"{what} ends within field {number}")
        yield start, position, number, value


def _message(data: memoryview, known: _Known, what: str) -> Iterator[tuple[int, _Value]]:
    """(number, value) of each field, all of them known, none twice that may come once."""
    seen: set[int] = set()
    for start, _, number, value in _fields(data, what):
        wire_types = known.wire_types.get(number)
        if wire_types is None or data[start] & 7 not in wire_types:
            raise PlanRefused(f"{what} has a field {number} that is not part of ONNX")
        if number in seen and number not in known.repeated:
            raise PlanRefused(f"{what} has its field {number} twice")
        seen.add(number)
        yield number, value


def _varint(data: memoryview, position: int, what: str) -> tuple[int, int]:
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        if position + index >= len(data):
            raise PlanRefused(f"{what} ends within a number")
        byte = data[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value & (2**64 - 1), position + index + 1
    raise PlanRefused(f"{what} has a number of more than {_MAX_VARINT_BYTES} bytes")


def _bytes(value: _Value) -> memoryview:
    if isinstance(value, int):  # pragma: no cover -- the tables above give these fields bytes
        raise PlanRefused("a number where a message should be")
    return value


def _integer(value: _Value) -> int:
    """An int64 or enum. Negative ones are two's complement of 64 bits."""
    if not isinstance(value, int):  # pragma: no cover -- the tables give these fields numbers
        raise PlanRefused("a message where a number should be")
    return value - 2**64 if value >= 2**63 else value


def _text(value: _Value) -> str:
    try:
        return bytes(_bytes(value)).decode("utf-8")
    except UnicodeDecodeError as error:
        raise PlanRefused(f"a name in the graph is not UTF-8: {error}") from error


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
    for number, value in _message(data, _OPSET, "an operator set"):
        if number == 1:
            domain = _text(value)
        else:
            version = _integer(value)
    opsets[domain] = version


def _read_graph(data: memoryview, found: GraphInterface, depth: int) -> _Scope:
    if depth > MAX_GRAPH_DEPTH:
        raise PlanRefused(f"graphs nested more than {MAX_GRAPH_DEPTH} deep")
    scope = _Scope()
    for number, value in _message(data, _GRAPH, "the graph"):
        if number == 1:
            _read_node(_bytes(value), found, scope, depth)
        elif number == 5:
            scope.initializers.append(_read_tensor(_bytes(value), found))
        elif number == 11:
            scope.inputs.append(_read_value_info(_bytes(value)))
        elif number == 12:
            scope.outputs.append(_read_value_info(_bytes(value)))
        elif number == 15:
            scope.initializers.append(_read_sparse_tensor(_bytes(value), found))
    scope.used |= {info.name for info in scope.outputs}
    return scope


def _read_node(data: memoryview, found: GraphInterface, scope: _Scope, depth: int) -> None:
    domain, operator = "", ""
    for number, value in _message(data, _NODE, "a node"):
        if number == 1:
            scope.used.add(_text(value))
        elif number == 2:
            scope.computed.add(_text(value))
        elif number == 4:
            operator = _text(value)
        elif number == 5:
            _read_attribute(_bytes(value), found, scope, depth)
        elif number == 7:
            domain = _text(value)
    found.operators.add((domain, operator))


def _read_attribute(data: memoryview, found: GraphInterface, scope: _Scope, depth: int) -> None:
    for number, value in _message(data, _ATTRIBUTE, "an attribute"):
        if number in (5, 10):
            _read_tensor(_bytes(value), found)
        elif number in (22, 23):
            _read_sparse_tensor(_bytes(value), found)
        elif number in (6, 11):
            inner = _read_graph(_bytes(value), found, depth + 1)
            scope.used |= inner.used - inner.defined()


def _read_function(data: memoryview, found: GraphInterface) -> None:
    scope = _Scope()
    for number, value in _message(data, _FUNCTION, "a function"):
        if number == 7:
            _read_node(_bytes(value), found, scope, depth=1)
        elif number == 9:
            _read_opset(_bytes(value), found.opsets)
        elif number == 11:
            _read_attribute(_bytes(value), found, scope, depth=1)


def _read_tensor(data: memoryview, found: GraphInterface) -> str:
    name = ""
    for number, value in _message(data, _TENSOR, "a tensor"):
        if number == 8:
            name = _text(value)
        elif number == 13 or (number == 14 and _integer(value) != 0):
            found.external_data = True
    return name


def _read_sparse_tensor(data: memoryview, found: GraphInterface) -> str:
    name = ""
    for number, value in _message(data, _SPARSE, "a sparse tensor"):
        if number == 1:
            name = _read_tensor(_bytes(value), found)
        elif number == 2:
            _read_tensor(_bytes(value), found)
    return name


def _read_value_info(data: memoryview) -> TensorInfo:
    name, dtype, shape = "", None, None
    for number, value in _message(data, _VALUE_INFO, "a value's type"):
        if number == 1:
            name = _text(value)
        elif number == 2:
            dtype, shape = _read_type(_bytes(value))
    return TensorInfo(name, dtype, shape)


def _read_type(data: memoryview) -> tuple[str | None, tuple[int | str | None, ...] | None]:
    dtype, shape = None, None
    for number, value in _message(data, _TYPE, "a type"):
        if number != 1:
            continue
        for inner_number, inner in _message(_bytes(value), _TENSOR_TYPE, "a tensor's type"):
            if inner_number == 1:
                dtype = _DTYPES.get(_integer(inner))
            else:
                dimensions = _message(_bytes(inner), _SHAPE, "a shape")
                shape = tuple(_read_dimension(_bytes(one)) for _, one in dimensions)
    return dtype, shape


def _read_dimension(data: memoryview) -> int | str | None:
    size: int | str | None = None
    for number, value in _message(data, _DIMENSION, "a dimension"):
        if number == 1:
            size = _integer(value)
        elif number == 2:
            size = _text(value)
    return size


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, payload: bytes) -> bytes:
    return _encode_varint(number << 3 | _BYTES) + _encode_varint(len(payload)) + payload


def _encode_tensor(name: str, array: Array) -> bytes:
    code = _DTYPE_CODES.get(array.dtype.name)
    if code is None:
        raise PlanRefused(f"the weight {name!r} has the dtype {array.dtype}, which is not allowed")
    little_endian = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    dims = b"".join(_encode_varint(1 << 3) + _encode_varint(size) for size in array.shape)
    dtype = _encode_varint(2 << 3) + _encode_varint(code)
    return dims + dtype + _field(8, name.encode()) + _field(9, little_endian.tobytes())
