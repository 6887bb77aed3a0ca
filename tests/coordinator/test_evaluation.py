from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from fedge.coordinator.centralized import train_centrally
from fedge.coordinator.datasets import Examples, load_dataset
from fedge.coordinator.evaluation import Evaluation, Evaluator
from fedge.schemas.errors import ConfigError, PlanError, PlanRefused, TrainingFailed
from fedge.schemas.model_file import complete_model
from tests.coordinator.plans import plan_named, task_named

UNIT_SQUARE = task_named("toy-linear").simulation.examples


def evaluator(name, test_set, **kwargs):
    plan = plan_named(name)
    return Evaluator(
        plan.manifest, plan.blobs[plan.manifest.graphs.eval.sha256], test_set, **kwargs
    )


def corners():
    return load_dataset("inline", Path(), UNIT_SQUARE)[1]


def linear_weights(first, second, bias):
    return {
        "weight": np.array([[first, second]], np.float32),
        "bias": np.array([bias], np.float32),
    }


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_the_loss_of_a_linear_model_on_four_points_worked_by_hand(batch_size):
    # Targets 1, 1, 0, 0 at (1,1), (0,1), (1,0), (0,0); outputs x1/2 + 1/4 = 3/4, 1/4, 3/4, 1/4.
    found = evaluator("toy-linear", corners(), batch_size=batch_size).evaluate(
        linear_weights(0.5, 0.0, 0.25)
    )
    assert found.examples == 4
    assert found.loss == pytest.approx((1 / 16 + 9 / 16 + 9 / 16 + 1 / 16) / 4)
    assert found.metrics == {}


def test_accuracy_is_the_share_of_images_whose_largest_output_is_the_label():
    _, test_set = load_dataset("sklearn-digits", Path())
    plan = plan_named("digits")
    found = evaluator("digits", test_set, batch_size=100).evaluate(plan.initial_weights)
    infer = plan.blobs[plan.manifest.graphs.infer.sha256]
    model = complete_model(plan.manifest, infer, plan.initial_weights)
    logits = onnxruntime.InferenceSession(model).run(
        None, {"input": plan.manifest.features.encode(test_set.x)}
    )[0]
    right = int((logits.argmax(axis=1) == test_set.y).sum())
    assert found.metrics == {"accuracy": pytest.approx(right / 360)}
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    assert found.loss == pytest.approx(-log_softmax[np.arange(360), test_set.y].mean(), rel=1e-5)


def test_an_evaluator_measures_many_versions():
    measure = evaluator("toy-linear", corners())
    good = measure.evaluate(linear_weights(0.0, 1.0, 0.0))
    bad = measure.evaluate(linear_weights(1.0, 0.0, 0.0))
    assert (good.loss, bad.loss) == (0.0, 0.5)
    assert measure.evaluate(linear_weights(0.0, 1.0, 0.0)) == good


def test_statistics_are_used_and_not_changed_by_an_evaluation():
    rng = np.random.default_rng(0)
    test_set = Examples(rng.normal(size=(10, 3)), rng.normal(size=10))
    measure = evaluator("normalised", test_set, batch_size=4)
    plan = plan_named("normalised")
    statistics = next(s.tensor.name for s in plan.manifest.weights if s.role == "buffer")
    moved = dict(plan.initial_weights)
    moved[statistics] = moved[statistics] + 1
    first = measure.evaluate(plan.initial_weights)
    assert measure.evaluate(moved) != first
    assert measure.evaluate(plan.initial_weights) == first


def test_examples_that_do_not_fit_the_task_are_told():
    test_set = Examples(np.zeros((4, 3), np.float32), np.zeros(4, np.float32))
    with pytest.raises(TrainingFailed, match="3 columns"):
        evaluator("toy-linear", test_set).evaluate(linear_weights(0, 0, 0))


def test_an_evaluation_that_overflows_is_told():
    with pytest.raises(PlanError, match="not finite"):
        evaluator("toy-linear", corners()).evaluate(linear_weights(3e38, 3e38, 0.0))


def test_bytes_that_are_no_graph_are_refused():
    with pytest.raises(PlanRefused, match="cannot load"):
        Evaluator(plan_named("toy-linear").manifest, b"junk", corners())


# ---------------------------------------------------------------- centralized training


def test_one_step_of_central_training_worked_by_hand():
    task = task_named("toy-linear")
    train, test = load_dataset("inline", Path(), UNIT_SQUARE)
    model = task.new_model()
    w, b = model.weight.detach().numpy()[0].astype(float), float(model.bias.detach())
    x, y = train.x.astype(float), train.y[:, 0].astype(float)
    error = x @ w + b - y
    w = w - 0.1 * 2 * error @ x
    b = b - 0.1 * 2 * error.sum()
    (found,) = train_centrally(task, train, test, epochs=1, batch_size=4, learning_rate=0.1, seed=0)
    assert found.loss == pytest.approx(np.square(x @ w + b - y).mean(), rel=1e-5)
    assert found.examples == 4


def test_central_training_measures_what_the_plan_measures():
    """The torch evaluation after an epoch of almost no learning against the plan's graph."""
    task, plan = task_named("digits"), plan_named("digits")
    train, test = load_dataset("sklearn-digits", Path())
    (torch_says,) = train_centrally(
        task, train.first(16), test, epochs=1, batch_size=16, learning_rate=1e-12, seed=0
    )
    graph_says = evaluator("digits", test).evaluate(plan.initial_weights)
    assert torch_says.loss == pytest.approx(graph_says.loss, rel=1e-5)
    assert torch_says.metrics == pytest.approx(graph_says.metrics)


def test_central_training_learns_digits_and_repeats_itself():
    task = task_named("digits")
    train, test = load_dataset("sklearn-digits", Path())

    def run(seed):
        state = torch.random.get_rng_state()
        found = train_centrally(
            task, train, test, epochs=3, batch_size=16, learning_rate=0.02, seed=seed
        )
        assert torch.equal(torch.random.get_rng_state(), state)
        return found

    first = run(seed=1)
    assert [type(epoch) for epoch in first] == [Evaluation] * 3
    assert first[-1].metrics["accuracy"] > 0.9
    assert run(seed=1) == first
    assert run(seed=2) != first


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch_size": 0}, {"learning_rate": 0.0}])
def test_central_training_refuses_settings_that_cannot_work(wrong):
    train, test = load_dataset("inline", Path(), UNIT_SQUARE)
    settings = {"epochs": 1, "batch_size": 4, "learning_rate": 0.1, "seed": 0} | wrong
    with pytest.raises(ConfigError, match="above 0"):
        train_centrally(task_named("toy-linear"), train, test, **settings)
