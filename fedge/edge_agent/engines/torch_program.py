"""An ONNX graph as a flat list of calls to torch: parsed once, specialised once for each shape.

A `Program` reads the graph; a `Specialised` is what remains of it for given input shapes. The first
run with new shapes walks the graph: whatever follows from shapes and constants alone is computed
there, on the host, and is a constant from then on; everything else becomes an instruction. Later
runs only call the instructions, so nothing waits for the device, and a CUDA graph can record them.
The graph holds its own gradients: there is no autograd. Nothing of the graph is ever executed as
code: an instruction is an entry of the operator tables, bound to numbers.

It knows nothing of weights, steps or plans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # has none
from onnx import numpy_helper
from onnx.external_data_helper import uses_external_data

from fedge.edge_agent.engines.torch_elementwise import ELEMENTWISE
from fedge.edge_agent.engines.torch_kernels import Kernel, Node, Operator, Tensor
from fedge.edge_agent.engines.torch_layers import LAYERS
from fedge.edge_agent.engines.torch_layout import LAYOUT
from fedge.edge_agent.engines.torch_reductions import REDUCTIONS
from fedge.schemas.errors import PlanRefused, TrainingFailed

OPERATORS: Mapping[str, Operator] = {**ELEMENTWISE, **LAYOUT, **REDUCTIONS, **LAYERS}
"""Every operator of the torch engine, by its `ai.onnx` name."""

_OPSETS = range(18, 21)  # GroupNormalization means something else from 21 on
_ABSENT = 0
"""The slot that always holds None: an absent optional operand."""

FAILURES = (
    RuntimeError,
    AttributeError,
    IndexError,
    ValueError,
    TypeError,
    KeyError,
    OverflowError,
    ZeroDivisionError,
    MemoryError,
)
"""What torch and the kernels raise for operands that do not fit, or memory that is not there."""


@dataclass(frozen=True, slots=True)
class _Step:
    """One node of the graph as it is in the file."""

    operator: str
    attributes: Mapping[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.operator} ({self.outputs[0]})"


class Program:
    """The graph in `data`, ready to be specialised. Raises `PlanRefused` if it cannot be run.

    What `fedge.schemas.onnx_wire.check_graph` refuses was refused before.
    """

    def __init__(self, data: bytes) -> None:
        try:
            model = onnx.load_model_from_string(data)
            self.constants = {one.name: _tensor(one) for one in model.graph.initializer}
            self.steps = [_parse_node(node) for node in model.graph.node]
        except (DecodeError, *FAILURES) as error:
            raise PlanRefused(f"the graph cannot be read: {error}") from error
        opset = max((one.version for one in model.opset_import if not one.domain), default=0)
        if opset not in _OPSETS:
            raise PlanRefused(
                f"the graph uses opset {opset}, the torch engine knows {_OPSETS[0]} to "
                f"{_OPSETS[-1]}: choose the engine onnx"
            )
        self.inputs = tuple(one.name for one in model.graph.input)
        self.outputs = tuple(one.name for one in model.graph.output)
        missing = sorted({step.operator for step in self.steps} - OPERATORS.keys())
        if missing:
            raise PlanRefused(f"the torch engine has no operator {missing[0]}")


@dataclass(frozen=True, slots=True)
class _Instruction:
    """One call: `kernel` of the values in `operands`, its results into the slots `results`.

    `single`: the kernel returns a tensor rather than a tuple. `dead`: slots that nothing reads
    afterwards.
    """

    kernel: Kernel
    operands: tuple[int, ...]
    results: tuple[int, ...]
    single: bool
    label: str
    dead: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Specialised:
    """A program for one set of input shapes, on one device; `specialise` makes it.

    `slots`: the values before a run: constants, and None for everything that a run computes.
    """

    slots: tuple[Tensor | None, ...]
    instructions: tuple[_Instruction, ...]
    input_slots: Mapping[str, int]
    output_slots: Mapping[str, int]

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The graph's outputs. They may share memory with inputs; no input is written.

        Raises `TrainingFailed` naming the operator if torch fails.
        """
        values: list[Any] = list(self.slots)
        for name, slot in self.input_slots.items():
            values[slot] = inputs[name]
        for instruction in self.instructions:
            try:
                result = instruction.kernel(*[values[slot] for slot in instruction.operands])
            except FAILURES as error:
                raise TrainingFailed(f"{instruction.label} failed in torch: {error}") from error
            if instruction.single:
                values[instruction.results[0]] = result
            else:
                for slot, tensor in zip(instruction.results, result, strict=False):
                    values[slot] = tensor
            for slot in instruction.dead:
                values[slot] = None
        return {name: values[slot] for name, slot in self.output_slots.items()}


def specialise(
    program: Program, inputs: Mapping[str, Tensor], device: torch.device
) -> tuple[Specialised, dict[str, Tensor]]:
    """The program for inputs of these shapes on `device`, and its outputs for these very inputs.

    Raises `PlanRefused` if a shape would depend on data, `TrainingFailed` if torch fails.
    """
    walk = _Walk(device)
    for name, constant in program.constants.items():
        walk.values[name] = _Value(host=constant)
    for name in program.inputs:
        walk.values[name] = _Value(live=inputs[name], slot=walk.new_slot())
    input_slots = {name: _slot_of(walk.values[name]) for name in program.inputs}
    last_readers = {name: at for at, step in enumerate(program.steps) for name in step.inputs}
    for at, step in enumerate(program.steps):
        walk.visit(step)
        for name in (*step.inputs, *step.outputs):
            if last_readers.get(name, at) == at and name not in program.outputs:
                walk.values.pop(name, None)  # frees what only this node read
    outputs = {name: walk.on_device(walk.look_up(name, "the graph")) for name in program.outputs}
    output_slots = {name: _slot_of(walk.values[name]) for name in program.outputs}
    return (
        Specialised(
            slots=tuple(walk.constants.get(slot) for slot in range(walk.slot_count)),
            instructions=_prune(walk.instructions, set(output_slots.values()), walk.constants),
            input_slots=input_slots,
            output_slots=output_slots,
        ),
        outputs,
    )


@dataclass(slots=True)
class _Value:
    """A named value of the walk.

    `host`: its tensor, if it follows from shapes and constants alone. `live`: its tensor on the
    device, `slot` its place there; a host value gets them when an instruction first needs it.
    """

    host: Tensor | None = None
    live: Tensor | None = None
    slot: int | None = None


@dataclass(slots=True)
class _Walk:
    """The state of `specialise`."""

    device: torch.device
    values: dict[str, _Value] = field(default_factory=dict)
    constants: dict[int, Tensor] = field(default_factory=dict)
    instructions: list[_Instruction] = field(default_factory=list)
    slot_count: int = 1

    def new_slot(self) -> int:
        self.slot_count += 1
        return self.slot_count - 1

    def look_up(self, name: str, reader: str) -> _Value:
        if name not in self.values:
            raise PlanRefused(f"{reader} reads {name!r} before it is computed")
        return self.values[name]

    def on_device(self, value: _Value) -> Tensor:
        if value.live is None:
            assert value.host is not None  # noqa: S101 -- a value is at one place at least
            value.live, value.slot = value.host.to(self.device), self.new_slot()
            self.constants[value.slot] = value.live
        return value.live

    def visit(self, step: _Step) -> None:
        """Computes one node, on the host if it can be, otherwise as an instruction."""
        operator = OPERATORS[step.operator]
        read = [self.look_up(name, step.label) if name else None for name in step.inputs]
        try:
            if operator.shape_only or all(one is None or one.host is not None for one in read):
                self._fold(step, operator, read)
            else:
                self._record(step, operator, read)
        except FAILURES as error:
            raise TrainingFailed(f"{step.label} failed in torch: {error}") from error

    def _fold(self, step: _Step, operator: Operator, read: list[_Value | None]) -> None:
        # A shape is known from either place, a value only from the host.
        tensors = [None if one is None else _either(one) for one in read]
        kernel = operator.build(Node(step.attributes, tuple(tensors), len(step.outputs)))
        found = kernel(*([] if operator.shape_only else _dynamic(tensors, operator)))
        for name, tensor in zip(step.outputs, _as_tuple(found), strict=False):
            self.values[name] = _Value(host=tensor)

    def _record(self, step: _Step, operator: Operator, read: list[_Value | None]) -> None:
        tensors: list[Tensor | None] = []
        for position, one in enumerate(read):
            if one is None:
                tensors.append(None)
            elif position not in operator.static:
                tensors.append(self.on_device(one))
            elif one.host is not None:
                tensors.append(one.host)
            else:
                raise PlanRefused(
                    f"{step.label}: operand {position} ({step.inputs[position]!r}) decides a shape "
                    "and depends on data; the torch engine needs it to follow from shapes"
                )
        kernel = operator.build(Node(step.attributes, tuple(tensors), len(step.outputs)))
        found = kernel(*_dynamic(tensors, operator))
        slots = [_ABSENT if one is None else one.slot for one in read]
        results = tuple(self.new_slot() for _ in step.outputs)
        for name, tensor, slot in zip(step.outputs, _as_tuple(found), results, strict=False):
            self.values[name] = _Value(live=tensor, slot=slot)
        operands = tuple(slot or _ABSENT for slot in _dynamic(slots, operator))
        single = isinstance(found, Tensor)
        self.instructions.append(_Instruction(kernel, operands, results, single, step.label))


def _prune(
    instructions: list[_Instruction], wanted: set[int], constants: Mapping[int, Tensor]
) -> tuple[_Instruction, ...]:
    """The instructions that `wanted` slots need, each knowing which slots die with it."""
    kept = []
    read_later = set(wanted)
    for instruction in reversed(instructions):
        if read_later.isdisjoint(instruction.results):
            continue
        touched = {*instruction.operands, *instruction.results}
        dead = touched - read_later - constants.keys() - {_ABSENT}
        kept.append(replace(instruction, dead=tuple(sorted(dead))))
        read_later |= touched
    return tuple(reversed(kept))


def _dynamic(values: list[Any], operator: Operator) -> list[Any]:
    """Those at positions which the kernel gets."""
    return [value for at, value in enumerate(values) if at not in operator.static]


def _as_tuple(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else found


def _either(value: _Value) -> Tensor:
    found = value.live if value.host is None else value.host
    assert found is not None  # noqa: S101 -- a value is at one place at least
    return found


def _slot_of(value: _Value) -> int:
    assert value.slot is not None  # noqa: S101 -- asked only for values on the device
    return value.slot


def _parse_node(node: onnx.NodeProto) -> _Step:
    if not node.output:
        raise ValueError(f"a node {node.op_type} without outputs")
    attributes = {one.name: _attribute(one) for one in node.attribute}
    return _Step(node.op_type, attributes, tuple(node.input), tuple(node.output))


def _attribute(attribute: onnx.AttributeProto) -> Any:
    """Numbers and lists of them as they are, text as str, tensors as torch tensors."""
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, onnx.TensorProto):
        return _tensor(value)
    if isinstance(value, int | float):
        return value
    if isinstance(value, list) and all(isinstance(one, int | float) for one in value):
        return value
    raise ValueError(f"the attribute {attribute.name!r} is neither number, text nor tensor")


def _tensor(stored: onnx.TensorProto) -> Tensor:
    if uses_external_data(stored):
        raise ValueError(f"the tensor {stored.name!r} lies in another file")
    return torch.tensor(numpy_helper.to_array(stored))
