"""What stands between a downloaded version and the file that applications open."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedge.edge_agent.activation import activate, build_model
from fedge.schemas.errors import ParityFailed, PeerError, PlanRefused
from fedge.schemas.ids import sha256
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
