"""The training loop on the hand-made plan: sums, curves, differences and refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.edge_agent.batching import batches
from fedge.edge_agent.data.examples import Examples
from fedge.edge_agent.engines.onnx_engine import OnnxEngine
from fedge.edge_agent.training import Curve, no_training, train
from fedge.edge_agent.training_settings import TrainingSettings
from fedge.schemas.errors import PeerError, TrainingFailed
from fedge.schemas.messages import Assignment
from fedge.schemas.plan import Padding
from tests.edge_agent.plans import NumpyReference, examples, initial_weights, linear_plan

SETTINGS = TrainingSettings(
    seed=11, batch_size=8, learning_rate=0.05, local_epochs=3, proximal_mu=0.1
)


def trained(n=30, settings=SETTINGS, *, plan=None, data=None, weights=None, **options):
    plan = plan or linear_plan()
    engine = OnnxEngine(plan.manifest, plan.train, None)
    return train(
        engine,
        plan.manifest,
        weights or initial_weights(),
        Examples(*examples(n)) if data is None else data,
        settings,
        **options,
    )


def textbook(n: int, settings: TrainingSettings):
    """The same round by hand: (reference, losses by batch, sizes of the batches, epochs)."""
    x, y = examples(n)
    reference = NumpyReference(initial_weights())
    losses, sizes, epochs = [], [], []
    for batch in batches(
        n, batch_size=settings.batch_size, local_epochs=settings.local_epochs,
        seed=settings.seed, padding=Padding.EXACT,
    ):  # fmt: skip
        rows = batch.rows
        losses.append(reference.step(x[rows], y[rows], lr=settings.learning_rate, mu=0.1))
        sizes.append(len(rows))
        epochs.append(batch.epoch)
    return reference, np.array(losses), np.array(sizes), np.array(epochs)


@pytest.mark.parametrize("padding", Padding)
def test_a_round_equals_the_textbook(padding):
    reference, losses, sizes, epochs = textbook(30, SETTINGS)
    result = trained(30, plan=linear_plan(padding=padding))
    base = initial_weights()
    np.testing.assert_allclose(result.delta["w"], reference.w - base["w"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(result.delta["b"], reference.b - base["b"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(result.loss.by_batch, losses, rtol=1e-4)
    by_epoch = [
        np.average(losses[epochs == epoch], weights=sizes[epochs == epoch]) for epoch in range(3)
    ]
    np.testing.assert_allclose(result.loss.by_epoch, by_epoch, rtol=1e-4)
    assert (result.examples, result.steps) == (30, 12)


def test_an_update_has_the_float_tensors_that_are_not_frozen_and_no_others():
    assert set(trained().delta) == {"w", "b", "input_sum"}


def test_metrics_are_means_over_the_examples_as_they_were_trained_on():
    settings = SETTINGS.model_copy(update={"learning_rate": 1e-30, "local_epochs": 2})
    x, y = examples(30)
    reference = NumpyReference(initial_weights())
    errors = np.abs((x * reference.scale) @ reference.w + reference.b - y)
    assert trained(30, settings).metrics == {
        "absolute_error": pytest.approx(errors.mean(), rel=1e-5)
    }


def test_local_steps_end_the_training_within_an_epoch():
    settings = SETTINGS.model_copy(update={"local_steps": 5})
    result = trained(30, settings)
    assert result.steps == 5
    assert len(result.loss.by_batch) == 5
    assert len(result.loss.by_epoch) == 2
    np.testing.assert_allclose(
        result.loss.by_batch, trained(30).loss.by_batch[:5]
    )  # the same first five


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not():
    other = SETTINGS.model_copy(update={"seed": 12})
    first, again, different = trained(), trained(), trained(settings=other)
    np.testing.assert_array_equal(first.delta["w"], again.delta["w"])
    assert not np.array_equal(first.delta["w"], different.delta["w"])


def test_a_summed_loss_is_reported_for_each_example_too():
    plan = linear_plan()
    summed = plan.manifest.model_copy(update={"loss_reduction": "sum"})
    engine = OnnxEngine(plan.manifest, plan.train, None)
    settings = SETTINGS.model_copy(update={"batch_size": 5, "local_epochs": 1})
    data, weights = Examples(*examples(10)), initial_weights()
    mean = train(engine, plan.manifest, weights, data, settings).loss.by_batch
    by_sum = train(engine, summed, weights, data, settings).loss.by_batch
    np.testing.assert_allclose(by_sum, np.array(mean) / 5, rtol=1e-6)


def test_a_loss_that_explodes_is_refused_and_names_the_step():
    settings = SETTINGS.model_copy(update={"learning_rate": 1000.0, "local_epochs": 50})
    with pytest.raises(TrainingFailed, match=r"loss became (inf|nan) at step \d+ of 200.*lower"):
        trained(30, settings)


def test_an_example_that_is_not_a_number_is_refused():
    x, y = examples(30)
    x[3, 0] = np.nan
    with pytest.raises(TrainingFailed, match="loss became nan"):
        trained(data=Examples(x, y))


def test_weights_that_explode_in_the_last_step_are_refused():
    settings = SETTINGS.model_copy(update={"local_steps": 1, "learning_rate": 1000.0})
    x, y = examples(8)
    with pytest.raises(TrainingFailed, match="'w' holds NaN or infinity"):
        trained(settings=settings, data=Examples(x * 1e18, y))


def test_a_device_without_examples_does_not_train():
    empty = Examples(np.zeros((0, 3), np.float32), np.zeros((0, 1), np.float32))
    with pytest.raises(TrainingFailed, match="no examples"):
        trained(data=empty)
    with pytest.raises(TrainingFailed, match="no examples"):
        no_training(linear_plan().manifest, 0)


def test_examples_of_a_wrong_width_are_refused():
    with pytest.raises(TrainingFailed, match="2 columns, the task has 3"):
        trained(data=Examples(np.zeros((4, 2), np.float32), np.zeros((4, 1), np.float32)))


def test_weights_that_break_the_manifest_are_refused():
    with pytest.raises(PeerError, match="wrong_tensors"):
        trained(weights={"w": np.zeros((3, 1), np.float32)})


def test_no_training_gives_zero_differences_of_the_right_kind():
    result = no_training(linear_plan().manifest, 5)
    assert {name: (d.dtype.name, d.shape, d.any()) for name, d in result.delta.items()} == {
        "w": ("float32", (3, 1), False),
        "b": ("float32", (1,), False),
        "input_sum": ("float32", (3,), False),
    }
    assert (result.examples, result.steps) == (5, 0)


def test_progress_counts_to_the_last_step():
    seen = []
    trained(30, on_step=seen.append)
    assert [p.step for p in seen] == list(range(1, 13))
    assert {p.steps for p in seen} == {12}
    assert [p.epoch for p in seen] == [0] * 4 + [1] * 4 + [2] * 4


def test_training_time_is_read_from_the_clock():
    assert trained(clock=itertools.count(0.0, 2.5).__next__).training_s == 2.5


def test_settings_are_those_of_the_assignment():
    assignment = Assignment(
        round=3, base=2, plan_sha256="0" * 64, deadline_s=60, seed=5, batch_size=4,
        learning_rate=0.2, local_epochs=2, local_steps=9, proximal_mu=0.5,
    )  # fmt: skip
    assert TrainingSettings.of(assignment) == TrainingSettings(
        seed=5, batch_size=4, learning_rate=0.2, local_epochs=2, local_steps=9, proximal_mu=0.5
    )


@given(st.lists(st.tuples(st.floats(-10, 10), st.integers(1, 9)), max_size=200))
def test_a_curve_keeps_its_size_and_its_weighted_mean(entries):
    curve = Curve(points=8)
    for total, weight in entries:
        curve.add(total, weight)
    means = curve.means()
    group = 1
    while -(-len(entries) // group) > 8:
        group *= 2
    expected = [
        sum(t for t, _ in entries[i : i + group]) / sum(w for _, w in entries[i : i + group])
        for i in range(0, len(entries), group)
    ]
    np.testing.assert_allclose(means, expected, rtol=1e-9, atol=1e-9)
