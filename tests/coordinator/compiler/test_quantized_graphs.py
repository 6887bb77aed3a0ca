"""Inference graphs with int8 weights: the same function as with the float32 they stand for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
from compiler_models import ZOO
from onnx import TensorProto, helper

from fedge.coordinator.compiler import CompiledPlan, compile_task
from fedge.coordinator.compiler import quantized_graph as subject
from fedge.coordinator.compiler.quantized_graph import quantizable, quantize_graph
from fedge.coordinator.compiler.verification import verify_inference
from fedge.coordinator.task import load_task
from fedge.schemas.model_file import complete_model
from fedge.schemas.onnx_wire import embed_weights, inspect_graph
from fedge.schemas.parity import largest_difference
from fedge.schemas.plan import PlanManifest, Quantization, WeightSpec
from fedge.schemas.quantization import Scheme, as_stored, dequantized, quantized
from fedge.schemas.tensor_spec import TensorSpec
from tests.coordinator.plans import plan_named

PlanOf = Callable[[str], CompiledPlan]


def run(model: bytes, inputs: np.ndarray, level: str = "ORT_ENABLE_ALL") -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    output: np.ndarray = session.run(["output"], {"input": inputs})[0]
    return output


def parameters_of(manifest: PlanManifest) -> set[str]:
    return {weight.tensor.name for weight in manifest.weights if weight.role != "buffer"}


@pytest.fixture
def everything_is_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models of the zoo are small."""
    monkeypatch.setattr(subject, "MIN_ELEMENTS", 4)
    monkeypatch.setattr(subject, "MIN_ROW_ELEMENTS", 1)


@pytest.mark.usefixtures("everything_is_large_enough")
@pytest.mark.parametrize("name", [*ZOO])
def test_every_kind_of_model_computes_what_its_rounded_weights_say(
    plan_of: PlanOf, name: str
) -> None:
    """Optimised by onnxruntime or not: a phone's may be older than ours."""
    plan = plan_of(name)
    manifest, infer = plan.manifest, plan.blobs[plan.manifest.graphs.infer.sha256]
    chosen = quantizable(infer, manifest.weights, parameters_of(manifest))
    assert chosen
    graph = quantize_graph(infer, chosen)
    assert graph == quantize_graph(infer, chosen)
    quantization = Quantization(int8=tuple(weight.tensor.name for weight in chosen))
    changed = manifest.model_copy(update={"quantization": quantization})
    model = complete_model(changed, graph, plan.initial_weights)
    verify_inference(graph, model, changed.infer_names)
    stored = as_stored(changed, plan.initial_weights)
    plain = embed_weights(
        infer, {spec.graph_name: stored[spec.tensor.name] for spec in manifest.weights}
    )
    rng = np.random.default_rng(7)
    shape = (5, *manifest.features.tensor.shape[1:])
    tokens = name == "tied"
    inputs = rng.integers(0, 12, shape) if tokens else rng.normal(size=shape)
    expected = run(plain, inputs.astype(np.float32))
    for level in ("ORT_ENABLE_ALL", "ORT_DISABLE_ALL"):
        assert largest_difference(run(model, inputs.astype(np.float32), level), expected) < 1e-5


ROWS, WIDTH = 300, 16
TABLE = WeightSpec(
    tensor=TensorSpec(name="table", dtype="float32", shape=(ROWS, WIDTH)), role="parameter"
)
MATRIX = WeightSpec(
    tensor=TensorSpec(name="matrix", dtype="float32", shape=(64, 64)), role="parameter"
)


def graph_of(
    nodes: list[onnx.NodeProto], inputs: onnx.ValueInfoProto, *constants: onnx.TensorProto
) -> bytes:
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [inputs], [output], list(constants))
    opsets = [helper.make_opsetid("", 18)]
    data: bytes = helper.make_model(graph, ir_version=10, opset_imports=opsets).SerializeToString()
    return data


def tied() -> bytes:
    """Numbers of rows → how like each row of the table they are, as language models do it."""
    return graph_of(
        [
            helper.make_node("Gather", ["param.table", "input"], ["looked_up"], axis=0),
            helper.make_node("Transpose", ["param.table"], ["across"], perm=[1, 0]),
            helper.make_node("MatMul", ["looked_up", "across"], ["output"]),
        ],
        helper.make_tensor_value_info("input", TensorProto.INT64, ["batch", 3]),
    )


def tied_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    # Rows of very different size: one scale for all would lose the small ones.
    sizes = np.exp(rng.normal(scale=3.0, size=(ROWS, 1)))
    return {"table": (rng.normal(size=(ROWS, WIDTH)) * sizes).astype(np.float32)}


def test_a_table_that_is_looked_up_and_multiplied_with_is_stored_once_in_a_quarter() -> None:
    weights = tied_weights()
    values, scales = quantized(weights["table"])
    named = {"int8.param.table": values, "scale.param.table": scales}
    model = embed_weights(quantize_graph(tied(), [TABLE]), named)
    stored = onnx.load_from_string(model).graph.initializer
    assert sorted(tensor.name for tensor in stored if len(tensor.raw_data) > 100) == sorted(named)
    assert len(model) < ROWS * WIDTH + 4 * ROWS + 1000
    rows = np.array([[0, 1, 299], [7, 7, 150]])
    table = dequantized(values, scales)
    expected = table[rows] @ table.T
    assert largest_difference(run(model, rows), expected) < 1e-5


def test_only_the_rows_that_are_looked_up_become_float32() -> None:
    """A table of words that is not tied would otherwise be made float32 at every keystroke."""
    lookup = graph_of(
        [helper.make_node("Gather", ["param.table", "input"], ["output"], axis=0)],
        helper.make_tensor_value_info("input", TensorProto.INT64, ["batch", 3]),
    )
    graph = quantize_graph(lookup, [TABLE])
    assert ("", "DequantizeLinear") not in inspect_graph(graph).operators
    weights = tied_weights()
    values, scales = quantized(weights["table"])
    model = embed_weights(graph, {"int8.param.table": values, "scale.param.table": scales})
    rows = np.array([[0, 1, 299]])
    np.testing.assert_array_equal(run(model, rows), dequantized(values, scales)[rows])


def test_the_runtime_makes_the_same_float32_of_int8_to_the_bit() -> None:
    """So that torch can be given exactly the weights that the file has."""
    graph = graph_of(
        [helper.make_node("Add", ["param.matrix", "input"], ["output"])],
        helper.make_tensor_value_info("input", TensorProto.FLOAT, [64, 64]),
    )
    rng = np.random.default_rng(5)
    weight = (rng.normal(size=(64, 64)) * np.exp(rng.normal(scale=9, size=(64, 1)))).astype(
        np.float32
    )
    values, scales = quantized(weight)
    model = embed_weights(
        quantize_graph(graph, [MATRIX]),
        {"int8.param.matrix": values, "scale.param.matrix": scales},
    )
    assert ("", "DequantizeLinear") in inspect_graph(model).operators
    zeros = np.zeros((64, 64), np.float32)
    np.testing.assert_array_equal(run(model, zeros), dequantized(values, scales))


def test_a_weight_with_many_readers_is_made_float32_once_and_not_for_each(tmp_path) -> None:
    """onnxruntime repeats a DequantizeLinear for each reader: 16 steps, 16 times the work."""
    steps, last = [], "input"
    for step in range(16):
        after = "output" if step == 15 else f"h{step}"
        steps.append(helper.make_node("MatMul", [last, "param.matrix"], [f"p{step}"]))
        steps.append(helper.make_node("Tanh", [f"p{step}"], [after]))
        last = after
    inputs = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 64])
    weight = np.random.default_rng(6).normal(scale=0.2, size=(64, 64)).astype(np.float32)
    values, scales = quantized(weight)
    model = embed_weights(
        quantize_graph(graph_of(steps, inputs), [MATRIX]),
        {"int8.param.matrix": values, "scale.param.matrix": scales},
    )
    assert len(model) < 64 * 64 + 4 * 64 + 3000
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert len(kinds) == 32, kinds
    x = np.random.default_rng(7).normal(size=(2, 64)).astype(np.float32)
    expected = x
    for _ in range(16):
        expected = np.tanh(expected @ dequantized(values, scales))
    assert largest_difference(run(model, x), expected) < 1e-5


def spec(name: str, shape: tuple[int, ...], dtype: str = "float32") -> WeightSpec:
    return WeightSpec(
        tensor=TensorSpec.model_validate({"name": name, "dtype": dtype, "shape": shape}),
        role="parameter",
    )


def test_what_would_gain_little_or_is_no_parameter_stays_float32() -> None:
    weights = [
        spec("matrix", (32, 32)),
        spec("filters", (16, 8, 3, 3)),
        spec("vector", (4096,)),
        spec("small", (31, 33)),
        spec("thin", (2000, 4)),
        spec("buffer", (64, 64)),
        spec("double", (64, 64), "float64"),
        spec("unread", (64, 64)),
    ]
    read = [weight.graph_name for weight in weights if weight.tensor.name != "unread"]
    graph = graph_of(
        [helper.make_node("Sum", ["input", *read], ["output"])],
        helper.make_tensor_value_info("input", TensorProto.FLOAT, [1]),
    )
    parameters = {weight.tensor.name for weight in weights} - {"buffer"}
    chosen = quantizable(graph, weights, parameters)
    assert [weight.tensor.name for weight in chosen] == ["matrix", "filters"]


@pytest.mark.parametrize(
    ("name", "int8", "float32"),
    [
        ("digits", {"3.weight", "7.weight"}, {"0.weight", "0.bias", "3.bias", "7.bias"}),
        ("toy-linear", set(), {"weight", "bias"}),
    ],
)
def test_a_built_in_task_compiles_with_int8_weights(
    name: str, int8: set[str], float32: set[str]
) -> None:
    """`compile_task` has compared the file with torch; training's graphs are as ever."""
    plain, plan = plan_named(name), compile_task(load_task(name), Scheme.INT8)
    assert plan.manifest.quantization is not None
    assert set(plan.manifest.quantization.int8) == int8
    assert {w.tensor.name for w in plan.manifest.weights} - int8 == float32
    for graph in ("train", "eval"):
        assert getattr(plan.manifest.graphs, graph) == getattr(plain.manifest.graphs, graph)
    assert (plan.manifest.graphs.infer == plain.manifest.graphs.infer) == (not int8)
