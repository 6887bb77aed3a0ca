"""What stands between a downloaded version and the file that applications open."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.numpy

from fedge.coordinator.release import Releaser
from fedge.edge_agent.activation import activate, build_model
from fedge.schemas.blobs import describe
from fedge.schemas.errors import ParityFailed, PeerError, PlanRefused
from fedge.schemas.ids import sha256
from fedge.schemas.onnx_wire import embed_weights
from fedge.schemas.parity import largest_difference
from fedge.schemas.quantization import quantized
from tests.coordinator.plans import plan_named, quantized_plan_named, task_named
from tests.edge_agent.plans import NumpyReference, infer_graph, initial_weights, linear_plan

PLAN = linear_plan()
MODEL = PLAN.model(initial_weights())
INPUTS = np.random.default_rng(2).normal(size=(8, 3)).astype(np.float32)


def outputs() -> np.ndarray:
    reference = NumpyReference(initial_weights())
    return ((INPUTS * reference.scale) @ reference.w + reference.b).astype(np.float32)


def tried(tmp_path, golden_outputs, inputs=INPUTS, **options):
    return activate(
        PLAN.manifest, MODEL, {"input": inputs}, {"output": golden_outputs},
        tmp_path / "model.onnx", **options,
    )  # fmt: skip


def test_the_device_builds_the_announced_bytes():
    built = build_model(PLAN.manifest, PLAN.infer, initial_weights(), sha256(MODEL))
    assert built == MODEL


def test_other_weights_make_another_file_and_are_refused():
    with pytest.raises(PeerError, match="digest_mismatch"):
        build_model(PLAN.manifest, PLAN.infer, initial_weights(seed=1), sha256(MODEL))


def test_an_infer_graph_that_the_manifest_does_not_name_is_refused():
    other = linear_plan(infer=infer_graph()[:-2])
    with pytest.raises(PlanRefused, match="digest"):
        build_model(PLAN.manifest, other.infer, initial_weights(), sha256(MODEL))


def test_outputs_within_the_tolerance_activate_the_file(tmp_path):
    theirs = outputs()
    theirs[3] += PLAN.manifest.parity_tolerance / 2
    activation = tried(tmp_path, theirs)
    assert activation.largest_difference <= PLAN.manifest.parity_tolerance
    assert (tmp_path / "model.onnx").read_bytes() == MODEL


@pytest.mark.parametrize("difference", [0.01, float("nan"), float("inf")])
def test_one_output_that_differs_keeps_the_old_file(tmp_path, difference):
    (tmp_path / "model.onnx").write_bytes(b"the version before")
    theirs = outputs()
    theirs[3] += difference
    with pytest.raises(ParityFailed):
        tried(tmp_path, theirs)
    assert (tmp_path / "model.onnx").read_bytes() == b"the version before"


def test_golden_tensors_that_break_the_plan_are_refused(tmp_path):
    with pytest.raises(PeerError, match="wrong_shape"):
        tried(tmp_path, outputs()[:, 0])
    with pytest.raises(PeerError, match="wrong_dtype"):
        tried(tmp_path, outputs(), INPUTS.astype(np.float64))


def test_fewer_golden_outputs_than_inputs_are_no_parity(tmp_path):
    with pytest.raises(ParityFailed):
        tried(tmp_path, outputs()[:4])


def test_the_latency_is_the_median_of_single_examples(tmp_path):
    times = itertools.accumulate([0.0, 0.010, 0, 0.030, 0, 0.020, 0, 0.500, 0, 0.001])
    assert tried(tmp_path, outputs(), clock=times.__next__).latency_ms == pytest.approx(20)


# ---------------------------------------------------------------- int8 weights


QUANTIZED = quantized_plan_named("digits")
RELEASED = QUANTIZED.initial_weights


def quantized_file(change=lambda named: None):
    """The version's file, after something went wrong with the tensors in it."""
    named = {}
    for spec in QUANTIZED.manifest.weights:
        weight = RELEASED[spec.tensor.name]
        if spec.tensor.name in QUANTIZED.manifest.quantization.int8:
            int8, scales = quantized(weight)
            named |= {f"int8.{spec.graph_name}": int8, f"scale.{spec.graph_name}": scales}
        else:
            named[spec.graph_name] = weight.copy()
    change(named)
    return embed_weights(QUANTIZED.blobs[QUANTIZED.manifest.graphs.infer.sha256], named)


@pytest.fixture(scope="module")
def golden():
    """(inputs, outputs) as the coordinator publishes them."""
    release = Releaser(task_named("digits").new_model, QUANTIZED.manifest, QUANTIZED.blobs).build(
        RELEASED
    )
    inputs = QUANTIZED.blobs[QUANTIZED.manifest.golden.sha256]
    return safetensors.numpy.load(inputs), safetensors.numpy.load(release.golden)


def test_the_device_rounds_the_weights_to_the_announced_bytes():
    infer = QUANTIZED.blobs[QUANTIZED.manifest.graphs.infer.sha256]
    built = build_model(QUANTIZED.manifest, infer, RELEASED, sha256(quantized_file()))
    assert built == quantized_file()


def test_a_quantised_file_passes_the_same_gate(tmp_path, golden):
    done = activate(QUANTIZED.manifest, quantized_file(), *golden, tmp_path / "model.onnx")
    assert done.largest_difference < 1e-5


@pytest.mark.parametrize("kept", ["0", "1"])
def test_other_ways_to_run_int8_weights_pass_it_too(golden, kept):
    """There is no int8 arithmetic in the file, of which processors have several kinds."""
    options = onnxruntime.SessionOptions()
    # "1": made float32 once, when the file is loaded.
    options.add_session_config_entry("session.disable_quant_qdq", kept)
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"):
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        session = onnxruntime.InferenceSession(quantized_file(), options)
        ours = session.run(["output"], golden[0])[0]
        assert largest_difference(ours, golden[1]["output"]) < 1e-5


def swap_rows(named):
    named["int8.param.7.weight"][[0, 1]] = named["int8.param.7.weight"][[1, 0]]


def swap_scales(named):
    named["scale.param.7.weight"][[0, 1]] = named["scale.param.7.weight"][[1, 0]]


def one_scale_a_hundredth_off(named):
    named["scale.param.7.weight"][3] *= 1.01


def one_filter_s_scale_a_tenth_off(named):
    named["scale.param.3.weight"][5] *= 1.1


def no_weights(named):
    named["int8.param.7.weight"][:] = 0


def another_bias(named):
    named["param.7.bias"][0] += 0.01


@pytest.mark.parametrize(
    "wrong",
    [
        swap_rows, swap_scales, one_scale_a_hundredth_off, one_filter_s_scale_a_tenth_off,
        no_weights, another_bias,
    ],
)  # fmt: skip
def test_a_file_with_a_wrong_tensor_is_not_used(tmp_path, golden, wrong):
    (tmp_path / "model.onnx").write_bytes(b"the version before")
    with pytest.raises(ParityFailed):
        activate(QUANTIZED.manifest, quantized_file(wrong), *golden, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == b"the version before"


def test_a_quantised_file_of_the_float32_model_is_told_from_the_rounded_one(tmp_path, golden):
    """The gate is narrower than what rounding does."""
    plain = embed_weights(
        plan_named("digits").blobs[plan_named("digits").manifest.graphs.infer.sha256],
        {spec.graph_name: RELEASED[spec.tensor.name] for spec in QUANTIZED.manifest.weights},
    )
    with pytest.raises(ParityFailed):
        activate(QUANTIZED.manifest, plain, *golden, tmp_path / "model.onnx")


def test_a_graph_with_int8_arithmetic_is_refused():
    """Its results would depend on the processor."""
    infer = onnx.load_from_string(QUANTIZED.blobs[QUANTIZED.manifest.graphs.infer.sha256])
    infer.graph.node.add(op_type="MatMulInteger", input=["int8.param.7.weight"] * 2, output=["x"])
    data = infer.SerializeToString()
    graphs = QUANTIZED.manifest.graphs.model_copy(update={"infer": describe(data)})
    manifest = QUANTIZED.manifest.model_copy(update={"graphs": graphs})
    with pytest.raises(PlanRefused, match="MatMulInteger is not allowed"):
        build_model(manifest, data, RELEASED, "0" * 64)
