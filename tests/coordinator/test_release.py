from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from fedge.coordinator.release import MAX_ROUNDING_EFFECT, Releaser, load_weights
from fedge.schemas.blobs import describe
from fedge.schemas.errors import ParityFailed, PlanError, PlanRefused
from fedge.schemas.ids import sha256
from fedge.schemas.model_file import complete_model
from fedge.schemas.onnx_wire import embed_weights
from fedge.schemas.parity import largest_difference
from fedge.schemas.quantization import as_stored
from fedge.schemas.tensors import encode_tensors, read_tensors
from tests.coordinator.plans import plan_named, quantized_plan_named, task_named


def releaser(name, **kwargs):
    plan, task = plan_named(name), task_named(name)
    return Releaser(task.new_model, plan.manifest, plan.blobs, **kwargs)


def linear_weights(first, second, bias):
    return {
        "weight": np.array([[first, second]], np.float32),
        "bias": np.array([bias], np.float32),
    }


def tensors_in(data, tmp_path):
    (tmp_path / "tensors").write_bytes(data)
    return read_tensors(tmp_path / "tensors")


def run_onnx(model, inputs):
    return onnxruntime.InferenceSession(model).run(["output"], {"input": inputs})[0]


def test_the_golden_outputs_of_a_linear_model_worked_by_hand(tmp_path):
    manifest, blobs = plan_named("toy-linear").manifest, plan_named("toy-linear").blobs
    inputs = tensors_in(blobs[manifest.golden.sha256], tmp_path)["input"]
    release = releaser("toy-linear").build(linear_weights(2.0, -1.0, 0.25))
    golden = tensors_in(release.golden, tmp_path)
    assert list(golden) == ["output"]
    expected = 2 * inputs[:, :1] - inputs[:, 1:] + np.float32(0.25)
    np.testing.assert_allclose(golden["output"], expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["toy-linear", "digits", "normalised"])
def test_the_released_file_predicts_what_the_engineers_module_predicts(name):
    plan, task = plan_named(name), task_named(name)
    rng = np.random.default_rng(1)
    weights = {
        key: tensor
        if tensor.dtype.kind != "f"
        else np.abs(tensor + rng.normal(scale=0.1, size=tensor.shape).astype(np.float32))
        for key, tensor in plan.initial_weights.items()
    }
    release = releaser(name).build(weights)
    shape = [7 if size == -1 else size for size in plan.manifest.features.tensor.shape]
    inputs = rng.normal(size=shape).astype(np.float32)
    module = task.new_model().eval()
    module.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    with torch.no_grad():
        expected = module(torch.from_numpy(inputs)).numpy()
    infer = plan.blobs[plan.manifest.graphs.infer.sha256]
    model = complete_model(plan.manifest, infer, weights)
    assert sha256(model) == release.model_sha256
    assert largest_difference(run_onnx(model, inputs), expected) < 1e-5
    assert release.largest_difference < 1e-5


def test_equal_weights_make_equal_files_and_the_device_makes_the_same():
    plan = plan_named("digits")
    first = releaser("digits").build(plan.initial_weights)
    second = releaser("digits").build(dict(reversed(plan.initial_weights.items())))
    assert first == second
    named = {
        spec.graph_name: plan.initial_weights[spec.tensor.name] for spec in plan.manifest.weights
    }
    on_device = embed_weights(plan.blobs[plan.manifest.graphs.infer.sha256], named)
    assert sha256(on_device) == first.model_sha256
    assert len(on_device) == first.model_bytes


def test_a_release_describes_its_files(tmp_path):
    weights = linear_weights(2.0, -1.0, 0.25)
    release = releaser("toy-linear", chunk_bytes=2048).build(weights)
    assert release.weights == encode_tensors(weights)
    assert release.weights_ref == describe(release.weights, 2048)
    assert release.golden_ref == describe(release.golden, 2048)


def test_releases_in_a_row_do_not_remember_one_another():
    maker = releaser("normalised")
    initial = plan_named("normalised").initial_weights
    first = maker.build(initial)
    other = {k: v + 1 if v.dtype.kind == "f" else v for k, v in initial.items()}
    assert maker.build(other).golden != first.golden
    assert maker.build(initial) == first


class OffByATenth(nn.Linear):
    """The right tensors and another function."""

    def forward(self, inputs):
        return super().forward(inputs) + 0.1


def test_a_version_on_which_torch_and_onnxruntime_disagree_is_not_released():
    plan = plan_named("toy-linear")
    maker = Releaser(lambda: OffByATenth(2, 1), plan.manifest, plan.blobs)
    with pytest.raises(ParityFailed) as failed:
        maker.build(linear_weights(0.0, 0.0, 0.0))
    assert failed.value.largest_difference == pytest.approx(0.1, rel=1e-5)
    assert failed.value.tolerance == plan.manifest.parity_tolerance


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (linear_weights(math.nan, 0.0, 0.0), "'weight' holds NaN"),
        ({"weight": np.zeros((1, 2), np.float32)}, r"missing \['bias'\]"),
        (linear_weights(0, 0, 0) | {"bias": np.zeros(2, np.float32)}, "'bias'"),
    ],
)
def test_weights_that_break_the_plan_are_not_released(weights, said):
    with pytest.raises(PlanError, match=said):
        releaser("toy-linear").build(weights)


def test_weights_whose_outputs_overflow_are_not_released():
    with pytest.raises(ParityFailed):
        releaser("toy-linear").build(linear_weights(3e38, 3e38, 3e38))


def test_a_plan_without_its_infer_graph_makes_no_releases():
    plan, task = plan_named("toy-linear"), task_named("toy-linear")
    without = {k: v for k, v in plan.blobs.items() if k != plan.manifest.graphs.infer.sha256}
    with pytest.raises(PlanRefused, match="is not there"):
        Releaser(task.new_model, plan.manifest, without)


def test_a_model_changed_after_compiling_is_told_from_the_plan():
    with pytest.raises(PlanError, match="changed after the plan"):
        load_weights(nn.Linear(3, 1), linear_weights(0, 0, 0))


def test_tied_weights_and_buffers_that_are_not_saved_are_loaded():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(2, 2, bias=False)
            self.second = nn.Linear(2, 2, bias=False)
            self.second.weight = self.first.weight
            self.register_buffer("scale", torch.ones(()), persistent=False)

    model = Tied()
    load_weights(model, {"first.weight": np.eye(2, dtype=np.float32), "scale": np.float32(3.0)})
    assert model.second.weight.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert model.second.weight is model.first.weight
    assert model.scale.item() == 3.0


def test_a_release_is_immutable():
    release = releaser("toy-linear").build(linear_weights(1.0, 1.0, 0.0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        release.weights = b""


# ---------------------------------------------------------------- int8 weights


def quantized_releaser(name):
    plan, task = quantized_plan_named(name), task_named(name)
    return Releaser(task.new_model, plan.manifest, plan.blobs)


def test_a_quantised_release_is_smaller_and_predicts_with_the_rounded_weights():
    plan, task = quantized_plan_named("digits"), task_named("digits")
    release = quantized_releaser("digits").build(plan.initial_weights)
    plain = releaser("digits").build(plan.initial_weights)
    assert release.model_bytes < 0.4 * plain.model_bytes
    assert release.weights == plain.weights, "what travels is float32"
    model = complete_model(
        plan.manifest, plan.blobs[plan.manifest.graphs.infer.sha256], plan.initial_weights
    )
    assert sha256(model) == release.model_sha256
    module = task.new_model().eval()
    stored = as_stored(plan.manifest, plan.initial_weights)
    load_weights(module, stored)
    inputs = np.random.default_rng(1).normal(size=(6, 1, 8, 8)).astype(np.float32)
    with torch.no_grad():
        rounded = module(torch.from_numpy(inputs)).numpy()
        exact = task.new_model().eval()(torch.from_numpy(inputs)).numpy()
    found = run_onnx(model, inputs)
    assert largest_difference(found, rounded) < 1e-5
    assert 1e-5 < largest_difference(found, exact) < 0.02


def test_the_gate_is_as_strict_for_int8_weights_as_for_float32():
    release = quantized_releaser("digits").build(plan_named("digits").initial_weights)
    assert release.largest_difference < 1e-5
    assert 0 <= release.rounding < 0.05
    assert releaser("digits").build(plan_named("digits").initial_weights).rounding == 0.0


def test_a_version_that_rounding_would_spoil_is_not_released():
    """One input of the last layer has weights that leave no step for all the others."""
    plan = quantized_plan_named("digits")
    weights = {name: array.copy() for name, array in plan.initial_weights.items()}
    # It counts for every class alike, so the float32 model hardly sees it.
    weights["7.weight"][:, 0] = 300.0
    with pytest.raises(ParityFailed, match="int8 weights spoil the answers") as failed:
        quantized_releaser("digits").build(weights)
    assert failed.value.largest_difference > MAX_ROUNDING_EFFECT
    releaser("digits").build(weights)


def test_a_plan_that_quantises_nothing_makes_the_file_of_one_that_does_not():
    plan = quantized_plan_named("toy-linear")
    assert plan.manifest.quantization.int8 == ()
    weights = linear_weights(2.0, -1.0, 0.25)
    release = quantized_releaser("toy-linear").build(weights)
    assert release.model_sha256 == releaser("toy-linear").build(weights).model_sha256
