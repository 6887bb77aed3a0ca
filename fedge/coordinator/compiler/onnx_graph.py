"""An exported program → a small, plain, reproducible ONNX file.

Translation is torch's; what follows only removes: functions are inlined, constants folded and
shared, unused and repeated nodes dropped. No rewrite rules: those of onnxscript compare constants
with an absolute tolerance of 1e-8 and so delete Adam's epsilon. Everything that could differ from
one compilation to the next is renamed or dropped, because a plan is named by its bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import onnx
import onnx_ir
import onnx_ir.passes.common as passes
import torch
from onnx_ir.passes import Sequential
from onnxscript.optimizer import fold_constants
from torch.export import ExportedProgram

from fedge.coordinator.compiler.translation import TRANSLATIONS
from fedge.schemas.errors import PlanError
from fedge.schemas.tensors import BATCH, TensorSpec

OPSET = 18
_IR_VERSION = 10
_FOLDED_ELEMENTS = 4096
"""Larger constants are left to be computed: a folded one is stored in the file."""


def to_onnx(
    program: ExportedProgram,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    open_inputs: bool = False,
) -> bytes:
    """The ONNX file of `program`, its inputs and outputs named and shaped as given, in order.

    `open_inputs`: inputs other than `input` are left open, to be filled as initializers.
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
    if len(model.graph.inputs) != len(inputs) or len(model.graph.outputs) != len(outputs):
        raise PlanError(
            f"the exported graph has {len(model.graph.inputs)} inputs and "
            f"{len(model.graph.outputs)} outputs, expected {len(inputs)} and {len(outputs)}"
        )
    _clean(model)
    return _finished(onnx_ir.to_proto(model), inputs, outputs, open_inputs=open_inputs)


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
    tidy(model)
    Sequential(
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.OutputFixPass(),
        passes.ClearMetadataAndDocStringPass(),
        passes.TopologicalSortPass(),
    )(model)


def _finished(
    proto: onnx.ModelProto,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    open_inputs: bool,
) -> bytes:
    """Names, types and producer set; everything else that is not computation left out."""
    source = proto.graph
    names = {"": ""}
    names |= {info.name: spec.name for info, spec in zip(source.input, inputs, strict=True)}
    names |= {info.name: spec.name for info, spec in zip(source.output, outputs, strict=True)}
    graph = onnx.GraphProto(name="fedge")
    for node in source.node:
        copied = graph.node.add()
        copied.op_type, copied.domain = node.op_type, node.domain
        copied.input.extend(_renamed(name, names) for name in node.input)
        copied.output.extend(_renamed(name, names) for name in node.output)
        copied.attribute.extend(sorted(node.attribute, key=lambda attribute: attribute.name))
    for tensor in source.initializer:
        copied_tensor = graph.initializer.add()
        copied_tensor.CopyFrom(tensor)
        copied_tensor.name = _renamed(tensor.name, names)
    graph.input.extend(
        _value_info(spec) for spec in inputs if spec.name == "input" or not open_inputs
    )
    graph.output.extend(_value_info(spec) for spec in outputs)
    model = onnx.ModelProto(ir_version=_IR_VERSION, producer_name="fedge", graph=graph)
    model.opset_import.add(domain="", version=OPSET)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


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
