"""An exported program → a small, plain, reproducible ONNX file.

Translation is torch's; what follows only removes: functions are inlined, constants folded and
shared, unused and repeated nodes dropped. No rewrite rules: those of onnxscript compare constants
with an absolute tolerance of 1e-8 and so delete Adam's epsilon. Everything that could differ from
one compilation to the next is renamed or dropped, because a plan is named by its bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import onnx
import onnx_ir
import onnx_ir.passes.common as passes
import torch
from onnx_ir.passes import Sequential
from onnxscript.optimizer import fold_constants
from torch.export import ExportedProgram

from fedge.coordinator.compiler.step import PureFunction
from fedge.coordinator.compiler.translation import TRANSLATIONS
from fedge.coordinator.task import Task
from fedge.schemas.errors import PlanError
from fedge.schemas.tensor_spec import BATCH, TensorSpec

OPSET = 18
_IR_VERSION = 10
_FOLDED_ELEMENTS = 4096
"""Larger constants are left to be computed: a folded one is stored in the file."""


def translate(program: ExportedProgram, function: PureFunction) -> onnx.GraphProto:
    """The ONNX graph of `program`, cleaned, its inputs and outputs named as `function` says.

    Raises `torch.onnx.OnnxExporterError` for an operator without translation.
    """
    with _quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            custom_translation_table=dict(TRANSLATIONS),
        )
    if exported is None:  # pragma: no cover -- only with a file name
        raise PlanError("torch.onnx.export returned nothing")
    model = exported.model
    inputs, outputs = model.graph.inputs, model.graph.outputs
    if len(inputs) != len(function.inputs) or len(outputs) != len(function.outputs):
        raise PlanError(
            f"the exported graph has {len(inputs)} inputs and {len(outputs)} outputs, "
            f"expected {len(function.inputs)} and {len(function.outputs)}"
        )
    _read_batch_from_input(model, function)
    _clean(model)
    for value, name in zip(model.graph.inputs, function.inputs, strict=True):
        value.name = name
    for value, name in zip(model.graph.outputs, function.outputs, strict=True):
        value.name = name
    return onnx_ir.to_proto(model).graph


def cut(
    whole: onnx.GraphProto,
    inputs: Sequence[TensorSpec],
    outputs: Mapping[str, TensorSpec],
    *,
    open_inputs: bool = False,
) -> bytes:
    """The ONNX file of the part of `whole` that computes `outputs`, and of nothing else.

    `outputs`: name in `whole` → name and shape in the file. `open_inputs`: inputs other than
    `input` are left open, to be filled as initializers.
    """
    producers = {name: node for node in whole.node for name in node.output}
    names = {"": ""} | {spec.name: spec.name for spec in inputs}
    for name, spec in outputs.items():
        # Where two parts have a result in common, one of them names a copy of it.
        source, node = name, producers[name]
        while node.op_type == "Identity" and node.input[0] in producers:
            source, node = node.input[0], producers[node.input[0]]
        names[name if source in names else source] = spec.name
    needed = [producers[name] for name in names if name in producers]
    reached = {id(node) for node in needed}
    while needed:
        for name in needed.pop().input:
            if name in producers and id(producers[name]) not in reached:
                reached.add(id(producers[name]))
                needed.append(producers[name])

    graph = onnx.GraphProto(name="fedge")
    for node in whole.node:
        if id(node) not in reached:
            continue
        copied = graph.node.add()
        copied.op_type, copied.domain = node.op_type, node.domain
        copied.input.extend(_renamed(name, names) for name in node.input)
        copied.output.extend(_renamed(name, names) for name in node.output)
        copied.attribute.extend(sorted(node.attribute, key=lambda attribute: attribute.name))
    for tensor in whole.initializer:
        if tensor.name in names:
            copied_tensor = graph.initializer.add()
            copied_tensor.CopyFrom(tensor)
            copied_tensor.name = names[tensor.name]
    graph.input.extend(
        _value_info(spec) for spec in inputs if spec.name == "input" or not open_inputs
    )
    graph.output.extend(_value_info(spec) for spec in outputs.values())
    model = onnx.ModelProto(ir_version=_IR_VERSION, producer_name="fedge", graph=graph)
    model.opset_import.add(domain="", version=OPSET)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs its progress as warnings."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _clean(model: onnx_ir.Model) -> None:
    tidy = Sequential(
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
    )
    passes.InlinePass()(model)
    passes.RemoveUnusedNodesPass()(model)
    fold_constants(
        model,
        onnx_shape_inference=False,
        input_size_limit=_FOLDED_ELEMENTS,
        output_size_limit=_FOLDED_ELEMENTS,
    )
    tidy(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.DeduplicateInitializersPass()(model)
    _merge_transposes(model)
    tidy(model)
    Sequential(
        passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call] # onnx_ir's own
        passes.RemoveUnusedOpsetsPass(),
        passes.OutputFixPass(),
        passes.ClearMetadataAndDocStringPass(),
        passes.TopologicalSortPass(),
    )(model)


def describe_to_applications(infer: bytes, task: Task) -> bytes:
    """The graph with what an application must know to feed it, in the file's metadata.

    `fedge.task`, and as JSON `fedge.features` (how an example becomes the input) and `fedge.target`
    (what the output is about). The version's file inherits it.
    """
    model = onnx.load_from_string(infer)
    facts = {
        "fedge.features": task.features.model_dump_json(),
        "fedge.target": task.target.model_dump_json(),
        "fedge.task": task.name,
    }
    onnx.helper.set_model_props(model, facts)
    described: bytes = model.SerializeToString(deterministic=True)
    return described


def _read_batch_from_input(model: onnx_ir.Model, function: PureFunction) -> None:
    """The batch's size is read off `input`, which every part has, whatever the exporter took."""
    given = dict(zip(function.inputs, model.graph.inputs, strict=True))
    batched = [given[name] for name in function.batched]
    for node in model.graph:
        if node.op_type == "Shape" and node.inputs[0] is not None:
            start, end = (node.attributes.get_int(name, None) for name in ("start", "end"))
            if (start or 0) == 0 and end == 1 and node.inputs[0] in batched:
                node.replace_input_with(0, given["input"])


def _merge_transposes(model: onnx_ir.Model) -> None:
    """A transpose of a transpose is one, or none: backward passes are full of them."""
    for node in model.graph:
        if node.op_type != "Transpose" or node.inputs[0] is None:
            continue
        inner = node.inputs[0].producer()
        if inner is None or inner.op_type != "Transpose":
            continue
        first, second = (one.attributes["perm"].as_ints() for one in (inner, node))
        order = [first[axis] for axis in second]
        node.replace_input_with(0, inner.inputs[0])
        if order == sorted(order):
            node.op_type = "Identity"
            del node.attributes["perm"]
        else:
            node.attributes["perm"] = onnx_ir.AttrInt64s("perm", order)


def _renamed(name: str, names: dict[str, str]) -> str:
    """Names of values count up in their order of appearance: short, and the same each time."""
    if name not in names:
        names[name] = f"v{len(names):x}"
    return names[name]


def _value_info(spec: TensorSpec) -> onnx.ValueInfoProto:
    dtype = onnx.TensorProto.DataType.Value(_ONNX_DTYPES[spec.dtype])
    shape = ["batch" if size == BATCH else size for size in spec.shape]
    info: onnx.ValueInfoProto = onnx.helper.make_tensor_value_info(spec.name, dtype, shape)
    return info


_ONNX_DTYPES = {
    "float32": "FLOAT",
    "float64": "DOUBLE",
    "float16": "FLOAT16",
    "int64": "INT64",
    "int32": "INT32",
    "uint8": "UINT8",
    "bool": "BOOL",
}
