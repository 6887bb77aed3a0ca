"""Whole plans: every kind of layer compiles, verifies, is small, plain and reproducible."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from compiler_models import ZOO, mlp, task_of
from onnx import numpy_helper
from torch import nn

from fedge.coordinator.compiler import CompiledPlan, compile_task
from fedge.coordinator.compiler.diagnosis import ModelTracker
from fedge.coordinator.compiler.inspection import inspect_model
from fedge.coordinator.compiler.step import train_function
from fedge.coordinator.compiler.verification import (
    verify_evaluation,
    verify_structure,
    verify_training,
)
from fedge.coordinator.task import Task, accuracy, cross_entropy, load_task
from fedge.schemas.errors import ParityFailed, PlanError, PlanRefused
from fedge.schemas.features import ClassTarget, TabularFeatures, ValueTarget
from fedge.schemas.onnx_wire import check_graph, embed_weights, inspect_graph
from fedge.schemas.plan import Padding, PlanManifest, TrainingDefaults
from fedge.schemas.tensor_spec import TensorSpec
from fedge.schemas.tensors import read_tensors

PlanOf = Callable[[str], CompiledPlan]


def completed(plan: CompiledPlan) -> bytes:
    """The model file of version 0."""
    return embed_weights(
        plan.blobs[plan.manifest.graphs.infer.sha256],
        {spec.graph_name: plan.initial_weights[spec.tensor.name] for spec in plan.manifest.weights},
    )


@pytest.mark.parametrize("name", ZOO)
def test_every_kind_of_model_compiles_to_a_plan_that_obeys_the_contract(
    plan_of: PlanOf, name: str
) -> None:
    """`compile_task` ran twenty steps against torch; this is the form of what came out."""
    plan = plan_of(name)
    manifest = PlanManifest.decode(plan.blobs[plan.manifest.digest])
    assert manifest == plan.manifest
    for digest, blob in plan.blobs.items():
        assert hashlib.sha256(blob).hexdigest() == digest
    graphs = manifest.graphs
    assert set(plan.blobs) == {
        manifest.digest,
        manifest.golden.sha256,
        *(ref.sha256 for ref in (graphs.train, graphs.eval, graphs.infer)),
    }
    weights = [spec.graph_name for spec in manifest.weights]
    trained = [w.tensor.name for w in manifest.weights if w.role == "parameter"]
    buffers = [w.tensor.name for w in manifest.weights if w.role == "buffer"]
    state = [spec.tensor.name for spec in manifest.state]
    check_graph(
        plan.blobs[graphs.train.sha256],
        inputs=[
            *weights,
            *(f"state.{name}" for name in state),
            *(f"global.{name}" for name in trained),
            *("input", "target", "mask", "lr", "mu", "seed"),
        ],
        outputs=[
            *(f"next.param.{name}" for name in trained),
            *(f"next.buffer.{name}" for name in buffers),
            *(f"next.state.{name}" for name in state),
            "loss",
            "metric.accuracy",
        ],
    )
    check_graph(
        plan.blobs[graphs.eval.sha256],
        inputs=[*weights, "input", "target", "mask"],
        outputs=["loss", "metric.accuracy"],
    )
    infer = plan.blobs[graphs.infer.sha256]
    found = check_graph(infer, inputs=["input"], outputs=["output"], open_names=weights)
    assert found.open_names
    assert list(plan.initial_weights) == [spec.tensor.name for spec in manifest.weights]
    assert (
        TensorSpec(
            name="output", dtype=found.outputs[0].dtype, shape=(-1, *found.outputs[0].shape[1:])
        )
        == manifest.output
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [("lstm", nn.LSTM), ("transformer", nn.TransformerEncoderLayer), ("mobilenet", nn.Conv2d)],
)
def test_the_completed_model_predicts_as_torch_does(
    plan_of: PlanOf, name: str, kind: type[nn.Module], tmp_path: Path
) -> None:
    plan, task = plan_of(name), ZOO[name]()
    model = task.new_model().eval()
    assert any(isinstance(module, kind) for module in model.modules())
    path = tmp_path / "golden.safetensors"
    path.write_bytes(plan.blobs[plan.manifest.golden.sha256])
    golden = read_tensors(path)["input"]
    assert golden.shape[1:] == task.features.tensor.shape[1:]
    assert 1 <= len(golden) <= 8
    data = completed(plan)
    onnx.checker.check_model(data, full_check=True)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"input": golden})
    with torch.no_grad():
        expected = model(torch.from_numpy(golden)).numpy()
    np.testing.assert_allclose(output, expected, atol=plan.manifest.parity_tolerance)


def test_unrolled_recurrent_graphs_stay_small(plan_of: PlanOf) -> None:
    """Three steps of an LSTM with gradients: some hundreds of nodes, not thousands."""
    train = plan_of("lstm").blobs[plan_of("lstm").manifest.graphs.train.sha256]
    assert len(onnx.ModelProto.FromString(train).graph.node) < 400
    assert len(train) < 20_000


@pytest.mark.parametrize("name", ["mlp", "lstm"])
def test_a_plan_has_no_trace_of_where_it_was_made(plan_of: PlanOf, name: str) -> None:
    for blob in plan_of(name).blobs.values():
        for word in (b"site-packages", b"/home", b"torch", b"pkg.", str(Path.cwd()).encode()):
            assert word not in blob


def test_compiling_in_another_process_gives_the_same_plan(plan_of: PlanOf) -> None:
    program = (
        "from compiler_models import ZOO\n"
        "from fedge.coordinator.compiler import compile_task\n"
        "plan = compile_task(ZOO['batch-norm']())\n"
        "print(plan.manifest.digest)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        env={"PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == plan_of("batch-norm").manifest.digest


def test_the_digest_changes_with_the_task_and_not_with_its_initial_weights() -> None:
    first = compile_task(task_of(mlp))
    again = compile_task(task_of(mlp, seed=7))
    other = compile_task(task_of(mlp, learning_rate=0.06))
    assert again.manifest.digest == first.manifest.digest
    assert not np.array_equal(again.initial_weights["0.weight"], first.initial_weights["0.weight"])
    assert other.manifest.digest != first.manifest.digest


def changed_constant(graph: onnx.GraphProto, before: float, after: float) -> None:
    for tensor in graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.shape == () and value.dtype == np.float32 and value == np.float32(before):
            tensor.CopyFrom(numpy_helper.from_array(np.float32(after), tensor.name))
            return
    raise AssertionError(f"no constant {before}")


def swapped(graph: onnx.GraphProto, output: str, operator: str) -> None:
    (node,) = [node for node in graph.node if output in node.output]
    node.op_type = operator


def without_proximal_term(graph: onnx.GraphProto) -> None:
    (node,) = [node for node in graph.node if "global.0.bias" in node.input]
    node.input[1] = node.input[0]


@pytest.mark.parametrize(
    ("name", "mutate"),
    [
        ("momentum", lambda graph: changed_constant(graph, 0.9, 0.89)),
        ("momentum", lambda graph: changed_constant(graph, 0.01, 0.011)),
        ("adam", lambda graph: changed_constant(graph, 0.999, 0.998)),
        ("adam", lambda graph: changed_constant(graph, 1e-8, 1e-3)),
        ("mlp", lambda graph: swapped(graph, "next.param.2.bias", "Add")),
        ("mlp", without_proximal_term),
        ("mlp", lambda graph: swapped(graph, "metric.accuracy", "ReduceMax")),
    ],
)
def test_verification_finds_a_graph_that_computes_something_else(
    plan_of: PlanOf, name: str, mutate: Callable[[onnx.GraphProto], None]
) -> None:
    plan = plan_of(name)
    train = plan.blobs[plan.manifest.graphs.train.sha256]
    verify_training(ZOO[name](), plan.manifest, train)
    model = onnx.ModelProto.FromString(train)
    mutate(model.graph)
    with pytest.raises(ParityFailed):
        verify_training(ZOO[name](), plan.manifest, model.SerializeToString())


def test_a_right_graph_is_not_refused_for_one_value_on_a_kink() -> None:
    # With these weights a max pool of the verification's first examples has two values within a
    # rounding error of each other, and torch and onnxruntime take different ones.
    task = dataclasses.replace(load_task("mnist-cnn"), seed=2)
    assert compile_task(task).manifest.task == "mnist-cnn"


def test_verification_finds_wrong_evaluation_and_wrong_prediction(plan_of: PlanOf) -> None:
    plan, task = plan_of("mlp"), ZOO["mlp"]()
    evaluate = plan.blobs[plan.manifest.graphs.eval.sha256]
    model = onnx.ModelProto.FromString(evaluate)
    swapped(model.graph, "loss", "ReduceMean")
    with pytest.raises(ParityFailed, match="eval loss"):
        verify_evaluation(
            task, task.new_model(), plan.manifest, model.SerializeToString(), completed(plan)
        )
    other = dict(plan.initial_weights)
    other["0.bias"] = other["0.bias"] + np.float32(0.01)
    wrong = embed_weights(
        plan.blobs[plan.manifest.graphs.infer.sha256],
        {spec.graph_name: other[spec.tensor.name] for spec in plan.manifest.weights},
    )
    with pytest.raises(ParityFailed, match="infer output"):
        verify_evaluation(task, task.new_model(), plan.manifest, evaluate, wrong)


def test_verification_refuses_another_interface_and_invalid_graphs(plan_of: PlanOf) -> None:
    plan, task = plan_of("mlp"), ZOO["mlp"]()
    model = task.new_model()
    facts = inspect_model(task, model, ModelTracker(model))
    function = train_function(task, model, facts.layout)
    train = plan.blobs[plan.manifest.graphs.train.sha256]
    verify_structure(train, function)
    without_seed = onnx.ModelProto.FromString(train)
    del without_seed.graph.input[-1]
    with pytest.raises(PlanRefused, match=r"missing \['seed'\]"):
        verify_structure(without_seed.SerializeToString(), function)
    undefined = onnx.ModelProto.FromString(train)
    undefined.graph.node[0].input[0] = "nothing"
    with pytest.raises((PlanError, PlanRefused)):
        verify_structure(undefined.SerializeToString(), function)


def test_fifteen_lines_of_one_s_own_are_a_task() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.out = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.relu(self.hidden(x)))

    task = Task(
        name="iris",
        model=Net,
        loss=cross_entropy,
        features=TabularFeatures(columns=4, mean=(5.8, 3.1, 3.8, 1.2), std=(0.8, 0.4, 1.8, 0.8)),
        target=ClassTarget(classes=3),
        metrics={"accuracy": accuracy},
    )
    plan = compile_task(task)
    assert [spec.tensor.name for spec in plan.manifest.weights] == [
        "hidden.weight",
        "hidden.bias",
        "out.weight",
        "out.bias",
    ]
    assert plan.manifest.padding is Padding.MASK


def test_a_regression_with_a_summed_loss_and_no_metric_compiles() -> None:
    plan = compile_task(
        Task(
            name="regression",
            model=lambda: nn.Linear(3, 2),
            loss=lambda output, target: (output - target).abs().sum(dim=1),
            features=TabularFeatures(columns=3),
            target=ValueTarget(width=2),
            loss_reduction="sum",
            defaults=TrainingDefaults(learning_rate=0.01),
        )
    )
    operators = {
        operator
        for _, operator in inspect_graph(plan.blobs[plan.manifest.graphs.train.sha256]).operators
    }
    assert "Div" not in operators, "a sum needs no count"
    assert plan.manifest.metrics == ()
