"""The onnxruntime engine against the same training in numpy float64."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from fedge.edge_agent.batching import Batch, batches
from fedge.edge_agent.engines import EngineName, open_engine
from fedge.edge_agent.engines.onnx_engine import OnnxEngine
from fedge.schemas.errors import PeerError, PlanRefused, TrainingFailed
from fedge.schemas.plan import Padding
from tests.edge_agent.plans import (
    NumpyReference,
    examples,
    initial_weights,
    linear_plan,
    train_graph,
)

LR, MU = 0.05, 0.3


def engine(**options):
    plan = linear_plan(**options)
    return OnnxEngine(plan.manifest, plan.train, plan.eval)


def schedule(n: int, padding: Padding = Padding.MASK) -> list[Batch]:
    return list(batches(n, batch_size=8, local_epochs=100, local_steps=20, seed=3, padding=padding))


def run(trained, x, y, batch: Batch, *, lr: float = LR, mu: float = MU, seed: int = 0):
    return trained.step(x[batch.rows], y[batch.rows], batch.mask, lr=lr, mu=mu, seed=seed)


def test_twenty_steps_equal_the_textbooks_sgd_with_momentum_and_proximal_term():
    x, y = examples(30)  # 30 = 3 * 8 + 6: the padded batch comes five times in twenty steps
    trained, reference = engine(), NumpyReference(initial_weights())
    trained.load(initial_weights())
    for batch in schedule(30):
        real = batch.rows[: batch.count]
        expected = reference.step(x[real], y[real], lr=LR, mu=MU)
        assert run(trained, x, y, batch).loss == pytest.approx(expected, rel=1e-5)
    found = trained.weights()
    np.testing.assert_allclose(found["w"], reference.w, rtol=1e-5)
    np.testing.assert_allclose(found["b"], reference.b, rtol=1e-5)
    np.testing.assert_allclose(found["input_sum"], reference.input_sum, rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing():
    x, y = examples(30)
    results = []
    for padding in Padding:
        trained = engine(padding=padding)
        trained.load(initial_weights())
        for batch in schedule(30, padding):
            run(trained, x, y, batch)
        results.append(trained.weights())
    for name in results[0]:
        np.testing.assert_allclose(results[0][name], results[1][name], rtol=1e-5, atol=1e-6)


def test_a_masked_row_of_garbage_changes_nothing():
    x, y = examples(8)
    batch = schedule(6)[0]
    results = []
    for garbage in (0.0, 1e6):
        trained = engine()
        trained.load(initial_weights())
        inputs, target = x[batch.rows].copy(), y[batch.rows].copy()
        inputs[batch.count :], target[batch.count :] = garbage, garbage
        results.append(trained.step(inputs, target, batch.mask, lr=LR, mu=0, seed=0))
        results.append(trained.weights()["w"].tolist())
    assert results[:2] == results[2:]


def test_load_forgets_momentum_and_moves_the_proximal_centre():
    x, y = examples(30)
    used, fresh = engine(), engine()
    used.load(initial_weights(seed=9))
    for batch in schedule(30)[:7]:
        run(used, x, y, batch)
    for one in (used, fresh):
        one.load(initial_weights())
        for batch in schedule(30):
            run(one, x, y, batch)
    for name, array in fresh.weights().items():
        np.testing.assert_array_equal(used.weights()[name], array)


def test_weights_that_were_handed_out_stay_as_they_are():
    x, y = examples(16)
    given = initial_weights()
    trained = engine()
    trained.load(given)
    before = trained.weights()
    for batch in schedule(16)[:3]:
        run(trained, x, y, batch)
    for name, array in initial_weights().items():
        np.testing.assert_array_equal(before[name], array)
        np.testing.assert_array_equal(given[name], array)
    assert not np.array_equal(trained.weights()["w"], before["w"])


def test_the_seed_reaches_the_graph_whole():
    x, y = examples(8)
    trained = engine()
    trained.load(initial_weights())
    run(trained, x, y, schedule(8)[0], seed=2**32 - 1)
    assert trained.weights()["last_seed"] == 2**32 - 1


def test_evaluation_sums_over_unmasked_rows_and_changes_nothing():
    x, y = examples(30)
    trained, reference = engine(), NumpyReference(initial_weights())
    trained.load(initial_weights())
    loss_sum = 0.0
    for batch in schedule(30)[:4]:
        found = trained.evaluate(x[batch.rows], y[batch.rows], batch.mask)
        loss_sum += found.loss_sum
    assert loss_sum == pytest.approx(30 * reference.loss(x, y), rel=1e-5)
    np.testing.assert_array_equal(trained.weights()["w"], initial_weights()["w"])


def test_metrics_are_sums_over_unmasked_rows():
    x, y = examples(6)
    trained, reference = engine(), NumpyReference(initial_weights())
    trained.load(initial_weights())
    result = run(trained, x, y, schedule(6)[0])
    errors = (x * reference.scale) @ reference.w + reference.b - y
    assert result.metrics == {"absolute_error": pytest.approx(np.abs(errors).sum(), rel=1e-5)}


def test_weights_of_a_wrong_shape_are_refused():
    with pytest.raises(PeerError, match="wrong_shape"):
        engine().load(initial_weights() | {"b": np.zeros(2, np.float32)})


def test_inputs_of_a_wrong_width_fail_with_the_runtimes_words():
    trained = engine()
    trained.load(initial_weights())
    with pytest.raises(TrainingFailed, match="input"):
        trained.step(
            np.zeros((2, 7), np.float32), np.zeros((2, 1), np.float32), np.ones(2, np.float32),
            lr=LR, mu=0, seed=0,
        )  # fmt: skip


def test_a_graph_with_a_foreign_operator_never_reaches_the_runtime():
    print_node = helper.make_node("RandomNormal", [], ["noise"], shape=[1])
    plan = linear_plan(train=train_graph(print_node))
    with pytest.raises(PlanRefused, match="RandomNormal"):
        open_engine(EngineName.ONNX, plan.manifest, plan.train)


def test_a_graph_that_the_manifest_does_not_name_is_refused():
    plan = linear_plan()
    other = train_graph(helper.make_node("Identity", ["loss"], ["unused"]))
    with pytest.raises(PlanRefused, match="digest"):
        open_engine(EngineName.ONNX, plan.manifest, other)


def test_a_graph_without_an_output_of_the_plan_is_refused():
    plan = linear_plan(train=linear_plan().eval)
    with pytest.raises(PlanRefused, match=r"inputs are not the plan's"):
        open_engine(EngineName.ONNX, plan.manifest, plan.train)
