"""Plans compiled once for all tests that need a real one."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from fedge.coordinator.compiler import CompiledPlan, compile_task
from fedge.coordinator.task import Task, load_task, squared_error
from fedge.schemas.features import TabularFeatures, ValueTarget


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
