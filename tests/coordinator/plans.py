"""Plans compiled once for all tests that need a real one."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from fedge.coordinator.compiler import CompiledPlan, compile_task
from fedge.coordinator.compiler.quantized_graph import quantizable, quantize_graph
from fedge.coordinator.task import Task, load_task, squared_error
from fedge.schemas.blobs import describe
from fedge.schemas.features import TabularFeatures, ValueTarget
from fedge.schemas.plan import Quantization


def normalised_net() -> nn.Module:
    """A net with statistics, an integer counter and a layer that is not trained."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    net[0].weight.requires_grad_(False)
    return net


def normalised() -> Task:
    return Task(
        name="normalised",
        model=normalised_net,
        loss=squared_error,
        features=TabularFeatures(columns=3),
        target=ValueTarget(),
    )


@cache
def task_named(name: str) -> Task:
    """A built-in task, or `normalised`."""
    torch.set_num_threads(1)
    return normalised() if name == "normalised" else load_task(name)


@cache
def plan_named(name: str) -> CompiledPlan:
    """Its plan."""
    return compile_task(task_named(name))


@cache
def quantized_plan_named(name: str) -> CompiledPlan:
    """The same plan with int8 weights in its inference file, without compiling it again."""
    plan = plan_named(name)
    manifest, infer = plan.manifest, plan.blobs[plan.manifest.graphs.infer.sha256]
    parameters = {name for name, _ in task_named(name).new_model().named_parameters()}
    chosen = quantizable(infer, manifest.weights, parameters)
    graph = quantize_graph(infer, chosen)
    changed = manifest.model_copy(
        update={
            "graphs": manifest.graphs.model_copy(update={"infer": describe(graph)}),
            "quantization": Quantization(int8=tuple(one.tensor.name for one in chosen)),
        }
    )
    blobs = [graph, changed.encode()]
    return CompiledPlan(
        manifest=changed,
        blobs={**plan.blobs, **{describe(blob).sha256: blob for blob in blobs}},
        initial_weights=plan.initial_weights,
    )
