"""A task → its plan: three graphs, golden inputs, the manifest, and the weights of version 0.

The order: inspect the model in eager torch, trace three pure functions, translate them to ONNX,
quantise the inference graph if that is wanted, verify them against eager torch, describe them.
Compiling a task again gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fedge.coordinator.compiler import verification
from fedge.coordinator.compiler.diagnosis import ModelTracker, check_operators, explaining
from fedge.coordinator.compiler.examples import golden_inputs, random_batch
from fedge.coordinator.compiler.inspection import (
    Inspection,
    inspect_model,
    padding_of,
    train_example,
)
from fedge.coordinator.compiler.onnx_graph import OPSET, cut, describe_to_applications, translate
from fedge.coordinator.compiler.quantized_graph import quantizable, quantize_graph
from fedge.coordinator.compiler.step import (
    PureFunction,
    evaluate_function,
    infer_function,
    state_of,
    together,
    train_function,
    weights_of,
)
from fedge.coordinator.compiler.tracing import TRACE_BATCH, portable_operators, trace
from fedge.coordinator.task import Task
from fedge.schemas.blobs import describe
from fedge.schemas.ids import Digest
from fedge.schemas.model_file import complete_model
from fedge.schemas.plan import Graphs, PlanManifest, Quantization, WeightSpec
from fedge.schemas.quantization import Scheme, as_stored
from fedge.schemas.tensor_spec import BATCH, TensorSpec
from fedge.schemas.tensors import Array, encode_tensors

_GOLDEN_SEED = 20170428


@dataclass(frozen=True, slots=True)
class CompiledPlan:
    """A verified plan.

    `blobs`: digest → bytes of the graphs, the golden inputs and the manifest itself.
    `initial_weights`: tensor name → array, in the order of `manifest.weights`: version 0.
    """

    manifest: PlanManifest
    blobs: Mapping[Digest, bytes]
    initial_weights: dict[str, Array]


def compile_task(task: Task, quantization: Scheme | None = None) -> CompiledPlan:
    """The plan of `task`, verified. `quantization`: of its inference file; None: as the task says.

    Raises `UnsupportedModel` if the model cannot be a graph, naming the module, the operator and a
    way out; `ParityFailed` if a graph computes something else than torch; `PlanError` if a runtime
    refuses it; `ConfigError` if the task is wrong in itself.
    """
    model = task.new_model()
    tracker = ModelTracker(model)
    with portable_operators():
        facts = inspect_model(task, model, tracker)
        with explaining(tracker):
            padding = padding_of(task, model, facts.layout)
    inputs, targets = random_batch(task, TRACE_BATCH, seed=2)
    example = train_example(task, model, facts.layout, inputs, targets)
    specs = _interface(task, facts, example)

    functions = {
        "train": train_function(task, model, facts.layout),
        "eval": evaluate_function(task, model, facts.layout),
        "infer": infer_function(task, model, facts.layout),
    }
    # One trace for the three: most of the time goes into torch's exporter, whatever the size.
    whole = together(functions)
    with explaining(tracker):
        translated = translate(trace(whole, example, tracker), whole)
    graphs = {
        name: cut(
            translated,
            [specs[one] for one in function.inputs],
            {f"{name}:{one}": _output_spec(one, specs) for one in function.outputs},
            open_inputs=name == "infer",
        )
        for name, function in functions.items()
    }
    for graph in graphs.values():
        check_operators(graph, tracker)
    graphs["infer"] = describe_to_applications(graphs["infer"], task)
    weights = tuple(
        WeightSpec(tensor=specs[f"{prefix}.{name}"].of(name), role=role)
        for prefix, name, role in facts.layout.entries()
    )
    quantized = None
    if (task.quantization if quantization is None else quantization) is Scheme.INT8:
        parameters = {name for name, _ in model.named_parameters()}
        chosen = quantizable(graphs["infer"], weights, parameters)
        graphs["infer"] = quantize_graph(graphs["infer"], chosen)
        quantized = Quantization(int8=tuple(weight.tensor.name for weight in chosen))
    golden = encode_tensors({"input": golden_inputs(task, _GOLDEN_SEED)})
    words = None if task.vocabulary is None else task.vocabulary.encode()
    manifest = PlanManifest(
        task=task.name,
        weights=weights,
        state=tuple(state_of(task, model, facts.layout)),
        features=task.features,
        target=task.target,
        output=facts.output,
        metrics=tuple(task.metrics),
        ratios=task.ratios,
        loss_reduction=task.loss_reduction,
        padding=padding,
        defaults=task.defaults,
        graphs=Graphs(**{name: describe(data) for name, data in graphs.items()}),
        golden=describe(golden),
        vocabulary=None if words is None else describe(words),
        opset=OPSET,
        quantization=quantized,
    )
    _verify(task, manifest, functions, graphs, facts)
    blobs = [*graphs.values(), golden, manifest.encode()]
    if words is not None:
        blobs.append(words)
    return CompiledPlan(
        manifest=manifest,
        blobs={describe(blob).sha256: blob for blob in blobs},
        initial_weights={
            weight.tensor.name: facts.initial_weights[weight.tensor.name]
            for weight in manifest.weights
        },
    )


def _verify(
    task: Task,
    manifest: PlanManifest,
    functions: Mapping[str, PureFunction],
    graphs: Mapping[str, bytes],
    facts: Inspection,
) -> None:
    complete = complete_model(manifest, graphs["infer"], facts.initial_weights)
    verification.verify_structure(graphs["train"], functions["train"])
    verification.verify_structure(graphs["eval"], functions["eval"])
    verification.verify_inference(graphs["infer"], complete, manifest.infer_names)
    verification.verify_training(task, manifest, graphs["train"])
    model = task.new_model()
    stored = as_stored(manifest, facts.initial_weights)
    with torch.no_grad():
        for name, tensor in weights_of(model).items():
            # A copy, since torch may not write to numpy's memory and warns where it could.
            tensor.copy_(torch.from_numpy(np.array(stored[name])))
    verification.verify_evaluation(task, model, manifest, graphs["eval"], complete)


def _interface(
    task: Task, facts: Inspection, example: Mapping[str, torch.Tensor]
) -> dict[str, TensorSpec]:
    """A specification for each graph input, and for `output`."""
    specs = {"output": facts.output}
    for name, tensor in example.items():
        shape = tuple(tensor.shape)
        if name in ("input", "target", "mask"):
            shape = (BATCH, *shape[1:])
        specs[name] = TensorSpec.model_validate(
            {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": shape}
        )
    return specs


def _output_spec(name: str, specs: Mapping[str, TensorSpec]) -> TensorSpec:
    """`next.x` is like `x`; the loss and the metrics are float32 scalars."""
    if name == "output":
        return specs[name]
    if name.startswith("next."):
        return specs[name.removeprefix("next.")].of(name)
    return TensorSpec(name=name, dtype="float32", shape=())
