"""The torch engine against numpy on a plan written by hand, and what it refuses."""

from __future__ import annotations

import contextlib
import logging

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from fedge.edge_agent.batching import batches
from fedge.edge_agent.engines import EngineName, open_engine
from fedge.edge_agent.engines.onnx_engine import OnnxEngine
from fedge.edge_agent.engines.torch_engine import TorchEngine
from fedge.schemas.errors import ConfigError, PeerError, PlanRefused, TrainingFailed
from fedge.schemas.onnx_wire import check_graph
from fedge.schemas.plan import Padding
from tests.edge_agent.plans import (
    COLUMNS,
    NumpyReference,
    examples,
    initial_weights,
    linear_plan,
    train_graph,
)

LR, MU = 0.05, 0.3
WHOLE = train_graph()
_GRAPH = onnx.load_model_from_string(WHOLE).graph
WHOLE_INPUTS = [one.name for one in _GRAPH.input]
WHOLE_OUTPUTS = [one.name for one in _GRAPH.output]


def engine(**options) -> TorchEngine:
    plan = linear_plan(**options)
    loaded = TorchEngine(plan.manifest, plan.train, plan.eval, device="cpu")
    loaded.load(initial_weights())
    return loaded


def schedule(padding: Padding = Padding.MASK):
    return batches(30, batch_size=8, local_epochs=100, local_steps=20, seed=3, padding=padding)


def run(trained, x, y, batch, **settings):
    settings = {"lr": LR, "mu": MU, "seed": 0, **settings}
    return trained.step(x[batch.rows], y[batch.rows], batch.mask, **settings)


@pytest.mark.parametrize("padding", list(Padding))
def test_twenty_steps_equal_the_textbooks_sgd_with_momentum_and_proximal_term(padding):
    x, y = examples(30)
    trained, reference = engine(padding=padding), NumpyReference(initial_weights())
    for batch in schedule(padding):
        real = batch.rows[: batch.count]
        expected = reference.step(x[real], y[real], lr=LR, mu=MU)
        assert run(trained, x, y, batch).loss == pytest.approx(expected, rel=1e-5)
    found = trained.weights()
    np.testing.assert_allclose(found["w"], reference.w, rtol=1e-5)
    np.testing.assert_allclose(found["b"], reference.b, rtol=1e-5)
    np.testing.assert_allclose(found["input_sum"], reference.input_sum, rtol=1e-4, atol=1e-5)


def test_the_open_engine_function_gives_a_torch_engine():
    plan = linear_plan()
    opened = open_engine(EngineName.TORCH, plan.manifest, plan.train, plan.eval)
    assert isinstance(opened, TorchEngine)


def test_evaluation_equals_onnxruntime_s_and_changes_nothing():
    x, y = examples(8)
    mask = np.array([1, 1, 1, 1, 1, 0, 0, 0], np.float32)
    plan, mine = linear_plan(), engine()
    theirs = OnnxEngine(plan.manifest, plan.train, plan.eval)
    theirs.load(initial_weights())
    expected, found = theirs.evaluate(x, y, mask), mine.evaluate(x, y, mask)
    assert found.loss_sum == pytest.approx(expected.loss_sum, rel=1e-6)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-6)
    for name, array in mine.weights().items():
        np.testing.assert_array_equal(array, initial_weights()[name])


def test_load_forgets_momentum_and_moves_the_proximal_centre():
    x, y = examples(30)
    trained = engine()
    for batch in schedule():
        run(trained, x, y, batch)
    middle = trained.weights()
    trained.load(middle)
    fresh = engine()
    fresh.load(middle)
    for batch in schedule():
        assert run(trained, x, y, batch) == run(fresh, x, y, batch)
    for name, array in fresh.weights().items():
        np.testing.assert_array_equal(array, trained.weights()[name])


def test_weights_that_were_handed_out_stay_and_those_given_are_not_written():
    x, y = examples(30)
    trained, given = engine(), initial_weights()
    trained.load(given)
    before = trained.weights()
    copies = {name: array.copy() for name, array in before.items()}
    for batch in schedule():
        run(trained, x, y, batch)
    for name, array in before.items():
        np.testing.assert_array_equal(array, copies[name])
        np.testing.assert_array_equal(given[name], initial_weights()[name])
    assert (trained.weights()["w"] != before["w"]).any()


def test_the_seed_reaches_the_graph():
    x, y = examples(30)
    trained = engine()
    run(trained, x, y, next(iter(schedule())), seed=2**32 - 1)
    assert trained.weights()["last_seed"] == 2**32 - 1


def test_read_only_examples_train_without_a_warning(recwarn):
    x, y = examples(30)
    x.flags.writeable = False
    batch = next(iter(schedule()))
    engine().step(x[:8], y[:8], batch.mask, lr=LR, mu=MU, seed=0)
    assert not recwarn.list


def test_where_a_step_cannot_be_recorded_training_goes_on_without(caplog):
    if torch.cuda.is_available():
        pytest.skip("this host can record steps")
    x, y = examples(30)
    plain, recording = engine(), engine()
    recording._may_capture = True  # as on a CUDA device whose driver refuses
    with caplog.at_level(logging.WARNING):
        for batch in schedule():
            assert run(recording, x, y, batch) == run(plain, x, y, batch)
    assert caplog.text.count("cuda_capture_failed") == 1
    assert not recording.records_steps


def test_a_step_before_load_says_so():
    plan = linear_plan()
    x, y = examples(8)
    unloaded = TorchEngine(plan.manifest, plan.train, None, device="cpu")
    with pytest.raises(TrainingFailed, match="no weights are loaded"):
        unloaded.step(x, y, np.ones(8, np.float32), lr=LR, mu=0, seed=0)


def test_evaluation_without_its_graph_says_so():
    plan = linear_plan()
    x, y = examples(8)
    blind = TorchEngine(plan.manifest, plan.train, None, device="cpu")
    blind.load(initial_weights())
    with pytest.raises(TrainingFailed, match="without the plan's eval graph"):
        blind.evaluate(x, y, np.ones(8, np.float32))


def test_weights_of_another_plan_are_refused():
    weights = initial_weights()
    weights["w"] = weights["w"].T
    with pytest.raises(PeerError, match="wrong_shape"):
        engine().load(weights)


def test_a_batch_that_does_not_fit_fails_by_the_operator_s_name():
    x, y = examples(8)
    with pytest.raises(TrainingFailed, match=r"Mul \(scaled\) failed in torch"):
        engine().step(x[:, :2].copy(), y, np.ones(8, np.float32), lr=LR, mu=0, seed=0)


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "meta"])
def test_a_device_that_is_not_there_is_a_wrong_setting(device):
    plan = linear_plan()
    with pytest.raises(ConfigError, match=device):
        TorchEngine(plan.manifest, plan.train, None, device=device)


def changed_graph(output: str, operator: str, **attributes) -> bytes:
    """The train graph with one more operator before `output`."""
    model = onnx.load_model_from_string(train_graph())
    for node in model.graph.node:
        for place, name in enumerate(node.output):
            if name == output:
                node.output[place] = "before"
    model.graph.node.append(helper.make_node(operator, ["before"], [output], **attributes))
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("output", "operator", "attributes", "complaint"),
    [
        (
            "next.param.w",
            "Transpose",
            {"perm": [1, 0]},
            rf"\[{COLUMNS}, 1\] into .*\[1, {COLUMNS}\]",
        ),
        ("next.param.w", "Cast", {"to": onnx.TensorProto.DOUBLE}, "float32 .* into torch.float64"),
        ("next.param.w", "Loop", {}, "no operator Loop"),
    ],
)
def test_a_graph_that_breaks_its_own_interface_is_refused(output, operator, attributes, complaint):
    x, y = examples(8)
    plan = linear_plan(train=changed_graph(output, operator, **attributes))

    def train() -> None:
        trained = TorchEngine(plan.manifest, plan.train, None, device="cpu")
        trained.load(initial_weights())
        trained.step(x, y, np.ones(8, np.float32), lr=LR, mu=0, seed=0)

    with pytest.raises(PlanRefused, match=complaint):
        train()


def test_a_loss_of_many_elements_is_refused():
    model = onnx.load_model_from_string(train_graph())
    for node in model.graph.node:
        if "loss" in node.output:
            node.input[0] = "squares"
    plan = linear_plan(train=model.SerializeToString())
    x, y = examples(8)
    trained = TorchEngine(plan.manifest, plan.train, None, device="cpu")
    trained.load(initial_weights())
    with pytest.raises(PlanRefused, match=r"loss has the shape \[8, 1\]"):
        trained.step(x, y, np.ones(8, np.float32), lr=LR, mu=0, seed=0)
    assert (trained.weights()["w"] == initial_weights()["w"]).all()


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_graph_trains_or_raises_only_our_errors(changes):
    data = bytearray(WHOLE)
    for place, byte in changes:
        data[place % len(data)] = byte
    plan = linear_plan()
    x, y = examples(8)
    with contextlib.suppress(PlanRefused, TrainingFailed):
        check_graph(bytes(data), inputs=WHOLE_INPUTS, outputs=WHOLE_OUTPUTS)
        trained = TorchEngine(plan.manifest, bytes(data), None, device="cpu")
        trained.load(initial_weights())
        trained.step(x, y, np.ones(8, np.float32), lr=LR, mu=0, seed=0)


@pytest.mark.parametrize("data", [b"", b"\xff" * 40, b"\x08\x0a"])
def test_bytes_that_are_no_graph_are_refused(data):
    plan = linear_plan()
    with pytest.raises(PlanRefused):
        TorchEngine(plan.manifest, data, None, device="cpu")
