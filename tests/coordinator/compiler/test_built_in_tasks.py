"""The tasks that come with Fedge: sizes as published, compiled, verified, and able to learn."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fedge.coordinator.compiler import CompiledPlan, compile_task
from fedge.coordinator.compiler.verification import session
from fedge.coordinator.task import Task, load_task
from fedge.coordinator.tasks import BUILT_IN_TASKS
from fedge.schemas.plan import Padding

PARAMETERS = {
    "digits": 6_090,
    "hospitals": 6_090,
    "mnist-2nn": 199_210,
    "mnist-cnn": 431_080,
    "mnist-fedavg-cnn": 1_663_370,
    "mnist-mlp": 535_818,
    "next-word": 139_536,
    "toy-linear": 3,
}


@cache
def compiled(name: str) -> CompiledPlan:
    return compile_task(load_task(name))


def test_the_table_and_the_tasks_agree() -> None:
    assert PARAMETERS.keys() == BUILT_IN_TASKS.keys()
    for name in BUILT_IN_TASKS:
        assert load_task(name).name == name


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_model_has_its_published_number_of_parameters(name: str) -> None:
    model = load_task(name).new_model()
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_task_compiles_and_is_verified_over_twenty_steps(name: str) -> None:
    plan = compiled(name)
    manifest = plan.manifest
    assert sum(array.size for array in plan.initial_weights.values()) == PARAMETERS[name]
    assert manifest.padding is Padding.MASK
    # A recurrent net is unrolled over its window.
    assert manifest.graphs.train.size_bytes < (65_536 if name == "next-word" else 16_384)


def trained(task: Task, plan: CompiledPlan, steps: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """The last loss of the train graph over `steps` of raw examples."""
    manifest = plan.manifest
    graph = session(plan.blobs[manifest.graphs.train.sha256])
    feeds = {spec.graph_name: plan.initial_weights[spec.tensor.name] for spec in manifest.weights}
    feeds |= {f"global.{name}": array for name, array in plan.initial_weights.items()}
    for state in manifest.state:
        feeds[f"state.{state.tensor.name}"] = np.zeros(state.tensor.shape, np.float32)
    names = [output.name for output in graph.get_outputs()]
    loss = float("nan")
    for index, (raw, target) in enumerate(steps):
        feeds |= {
            "input": task.features.encode(raw),
            "target": task.target.encode(target),
            "mask": np.ones(len(raw), np.float32),
            "lr": np.array(task.defaults.learning_rate, np.float32),
            "mu": np.array(0.0, np.float32),
            "seed": np.array(index),
        }
        results = dict(zip(names, graph.run(None, feeds), strict=True))
        loss = float(results["loss"])
        feeds |= {
            name.removeprefix("next."): value
            for name, value in results.items()
            if name.startswith("next.")
        }
    return loss


def test_toy_linear_falls_from_about_one_to_about_two_thousandths() -> None:
    """Twenty visits to each of two devices in turn, as the classic example prints it."""
    task = load_task("toy-linear")
    examples = task.simulation.examples
    raw = np.array([inputs for inputs, _ in examples])
    target = np.array([value for _, value in examples])
    with torch.no_grad():
        start = task.loss(
            task.new_model()(torch.from_numpy(task.features.encode(raw))),
            torch.from_numpy(task.target.encode(target)),
        ).sum()
    assert 0.8 < float(start) < 1.2
    tours = task.simulation.rounds // task.simulation.devices  # a cyclic round is one visit
    assert tours == 20
    visits = [(raw[:2], target[:2]), (raw[2:], target[2:])] * tours
    # The step after the last one tells the loss over all four points, before it changes them.
    assert 0.001 < trained(task, compiled("toy-linear"), [*visits, (raw, target)]) < 0.003


@pytest.mark.parametrize("name", ["digits", "hospitals"])
def test_the_digits_net_learns_digits(name: str) -> None:
    digits = load_digits()
    task = load_task(name)
    order = np.random.default_rng(0).permutation(1280)
    size = task.defaults.batch_size
    steps = [
        (digits.images[order[start : start + size]], digits.target[order[start : start + size]])
        for _ in range(4)
        for start in range(0, len(order), size)
    ]
    final = trained(task, compiled(name), [*steps, (digits.images[1300:], digits.target[1300:])])
    assert final < 0.5, "chance is ln 10 = 2.3"


def test_the_digits_normalisation_is_the_data_set_s() -> None:
    task = load_task("digits")
    images = task.features.encode(load_digits().images)
    assert abs(float(images.mean())) < 1e-3
    assert abs(float(images.std()) - 1) < 1e-3


def test_the_hospitals_sizes_fit_their_devices() -> None:
    simulation = load_task("hospitals").simulation
    assert len(simulation.split.partition(":")[2].split(",")) == simulation.devices


def test_a_task_can_be_varied_without_touching_the_original() -> None:
    task = load_task("digits")
    varied = replace(task, defaults=task.defaults.model_copy(update={"batch_size": 4}))
    assert varied.defaults.batch_size == 4
    assert load_task("digits").defaults.batch_size == task.defaults.batch_size
