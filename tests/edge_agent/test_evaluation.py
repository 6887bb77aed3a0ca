"""Measuring a version on a device: sums over each example once, all of them numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedge.coordinator.task import load_task
from fedge.edge_agent.data.examples import Examples
from fedge.edge_agent.engines.onnx_evaluator import open_evaluator
from fedge.edge_agent.evaluation import evaluate
from fedge.schemas.errors import PeerError, PlanRefused, TrainingFailed
from tests.edge_agent.compiled_plans import compiled, graphs_of, random_batch


@pytest.fixture(scope="module")
def digits():
    plan = compiled("digits")
    manifest, train_graph, eval_graph = graphs_of(plan)
    inputs, targets = random_batch(manifest, 2 * manifest.defaults.batch_size + 3, seed=5)
    torch.manual_seed(0)
    model = load_task("digits").model()
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    return manifest, train_graph, eval_graph, Examples(inputs, targets), model, weights


def test_the_sums_are_those_of_torch_over_each_example_once(digits):
    manifest, _, graph, examples, model, weights = digits
    found = evaluate(open_evaluator(manifest, graph), manifest, weights, examples)
    with torch.no_grad():
        output = model(torch.tensor(manifest.features.encode(examples.raw_inputs)))
    target = torch.tensor(examples.raw_targets)
    loss = torch.nn.functional.cross_entropy(output, target, reduction="sum").item()
    hits = (output.argmax(dim=1) == target).sum().item()
    assert found.rows == found.examples == len(examples)
    assert found.loss_sum == pytest.approx(loss, rel=1e-5)
    assert found.metrics == {"accuracy": hits}


def test_it_stops_when_it_is_told_to(digits):
    manifest, _, graph, examples, _, weights = digits
    asked = []

    def stop():
        asked.append(1)
        return True

    with pytest.raises(TrainingFailed, match="told to stop"):
        evaluate(open_evaluator(manifest, graph), manifest, weights, examples, stop=stop)
    assert len(asked) == 1


def test_a_measure_that_is_no_number_is_refused(digits):
    manifest, _, graph, examples, _, weights = digits
    broken = {name: np.full_like(array, np.nan) for name, array in weights.items()}
    with pytest.raises(TrainingFailed, match="the sum of loss"):
        evaluate(open_evaluator(manifest, graph), manifest, broken, examples)


def test_weights_of_another_model_are_refused(digits):
    manifest, _, graph, examples, _, weights = digits
    cut = {name: array[..., :-1] for name, array in weights.items()}
    with pytest.raises(PeerError):
        evaluate(open_evaluator(manifest, graph), manifest, cut, examples)


def test_a_device_without_examples_measures_nothing(digits):
    manifest, _, graph, examples, _, weights = digits
    none = Examples(examples.raw_inputs[:0], examples.raw_targets[:0])
    with pytest.raises(TrainingFailed, match="no examples"):
        evaluate(open_evaluator(manifest, graph), manifest, weights, none)


def test_another_graph_than_the_manifests_is_refused(digits):
    manifest, train_graph, *_ = digits
    with pytest.raises(PlanRefused):
        open_evaluator(manifest, train_graph)
