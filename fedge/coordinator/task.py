"""A task: what is learned, said in the engineer's own torch code.

A task is a model, a loss, how examples become tensors, and defaults. It knows nothing of devices,
rounds or graphs: `fedge.coordinator.compiler` turns it into a plan, once, and everything after
works on the plan. Fifteen lines of a user's own are enough:

    task = Task(
        name="iris",
        model=lambda: nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)),
        loss=cross_entropy,
        features=TabularFeatures(columns=4),
        target=ClassTarget(classes=3),
        metrics={"accuracy": accuracy},
    )
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedge.coordinator.tasks import BUILT_IN_TASKS
from fedge.schemas.errors import ConfigError
from fedge.schemas.features import FeatureSpec, TargetSpec, WordFeatures
from fedge.schemas.measures import RatioSpec
from fedge.schemas.plan import TrainingDefaults
from fedge.schemas.quantization import Scheme
from fedge.schemas.tensors import Array
from fedge.schemas.words import Vocabulary

PerExample = Callable[[Tensor, Tensor], Tensor]
"""`(output, target) -> [batch]`: one number for each example."""

Infer = Callable[[nn.Module, Tensor], Tensor]
"""`(model, input) -> output`: what a model answers an application."""

_TASK_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
_METRIC_NAME = re.compile(r"[a-z0-9_]{1,40}")


@dataclass(frozen=True, slots=True)
class SGD:
    """Stochastic gradient descent as `torch.optim.SGD` does it, without dampening."""

    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"SGD momentum is {self.momentum}; it must be in [0, 1)")
        if self.weight_decay < 0:
            raise ConfigError(f"SGD weight_decay is {self.weight_decay}; it must not be negative")
        if self.nesterov and self.momentum == 0:
            raise ConfigError("SGD nesterov needs a momentum above 0")


@dataclass(frozen=True, slots=True)
class Adam:
    """Adam as `torch.optim.Adam` does it (Kingma and Ba 2015, Algorithm 1)."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"Adam betas are {self.betas}; each must be in [0, 1)")
        if self.eps <= 0:
            raise ConfigError(f"Adam eps is {self.eps}; it must be above 0")
        if self.weight_decay < 0:
            raise ConfigError(f"Adam weight_decay is {self.weight_decay}; it must not be negative")


@dataclass(frozen=True, slots=True)
class SimulationDefaults:
    """How a demonstration of the task runs unless told otherwise. No real fleet reads this.

    `data`: where the examples come from. `examples`: with `inline` data, (inputs, target) pairs.
    `train_examples`, `test_examples`: the first so many of a data set; None is all of it.
    `split`: `iid`, `shards` (two label-sorted shards a device: McMahan et al. 2017, section 3),
    `dirichlet:ALPHA` (label skew: Hsu et al. 2019), `weighted:W1,W2,…` (random, sizes by weight),
    `ordered` (equal runs in the order of the data).
    `data`: `python-topics` is text that ships with Python, `split` then `users`: one each.
    `strategy`: `fedavg` averages a cohort; `cyclic` passes the model from device to device, a round
    being one visit.
    """

    data: Literal["sklearn-digits", "mnist", "inline", "python-topics"] | None = None
    devices: int = 4
    rounds: int = 10
    split: str = "iid"
    strategy: Literal["fedavg", "cyclic"] = "fedavg"
    train_examples: int | None = None
    test_examples: int | None = None
    examples: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...] = ()


def forward(model: nn.Module, inputs: Tensor) -> Tensor:
    """The model's own output."""
    output: Tensor = model(inputs)
    return output


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is learned.

    `model`: a zero-argument factory, usually the class. `forward` takes the features' tensor and
    returns one tensor whose first dimension is the batch.
    `loss`: `(output, target) -> [batch]`, one loss for each example, not reduced.
    `metrics`: name → `(output, target) -> [batch]`; devices report their sums. `ratios`: measures
    that are ratios of two metrics' sums, told in their place (`perplexity`, a mean over words).
    `infer`: what applications get, where that is not what the loss needs: a function of the model
    and the features' tensor, usually a method (`NextWord.suggest`). Without it, `forward`.
    `vocabulary`: the words of word features, which all devices share.
    `quantization`: of the file that devices predict with, unless the operator says otherwise.
    `loss_reduction`: how a batch's losses become the objective: their mean or their sum.
    `seed`: of the initial weights.
    `sample`: `(generator, n) -> raw examples`, as devices store them, for a model that not every
    input suits (token numbers, say); without it, random ones of the features' kind are used. They
    serve for tracing and for the parity check, never for training.

    Raises `ConfigError` for a name or a metric name that could not stand in a plan.
    """

    name: str
    model: Callable[[], nn.Module]
    loss: PerExample
    features: FeatureSpec
    target: TargetSpec
    metrics: Mapping[str, PerExample] = field(default_factory=dict)
    ratios: tuple[RatioSpec, ...] = ()
    infer: Infer = forward
    vocabulary: Vocabulary | None = None
    optimizer: SGD | Adam = field(default_factory=SGD)
    defaults: TrainingDefaults = field(default_factory=TrainingDefaults)
    loss_reduction: Literal["mean", "sum"] = "mean"
    quantization: Scheme = Scheme.NONE
    seed: int = 0
    sample: Callable[[np.random.Generator, int], Array] | None = None
    simulation: SimulationDefaults = field(default_factory=SimulationDefaults)

    def __post_init__(self) -> None:
        if isinstance(self.features, WordFeatures):
            words = None if self.vocabulary is None else len(self.vocabulary)
            if words != self.features.words:
                raise ConfigError(
                    f"the features of task {self.name!r} are of {self.features.words} word "
                    f"numbers, its vocabulary has {words}"
                )
        if not _TASK_NAME.fullmatch(self.name):
            raise ConfigError(
                f"the task name {self.name!r} must be 1 to 63 lower-case letters, digits, "
                "'.', '_' or '-', starting with a letter or digit"
            )
        for name in self.metrics:
            if not _METRIC_NAME.fullmatch(name):
                raise ConfigError(
                    f"the metric name {name!r} of task {self.name!r} must be 1 to 40 lower-case "
                    "letters, digits or '_'"
                )

    def new_model(self) -> nn.Module:
        """A model with the task's initial weights: the same at each call, on the CPU.

        Raises `ConfigError` if the factory returns something else than a module.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = self.model()
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"the model of task {self.name!r} returned {type(model).__name__}; it must be a "
                "function or class that takes no argument and returns an nn.Module"
            )
        return model


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """1 where the largest of `output` `[batch, classes]` is at `target` `[batch]`, else 0."""
    return (output.argmax(dim=1) == target).to(torch.float32)


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of logits `[batch, classes]` against class numbers `[batch]`, `[batch]`."""
    return functional.cross_entropy(output, target, reduction="none")


def negative_log_likelihood(output: Tensor, target: Tensor) -> Tensor:
    """The loss of a model that ends in a log-softmax: `[batch]`."""
    return functional.nll_loss(output, target, reduction="none")


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared differences summed over everything but the batch: `[batch]`."""
    return (output - target).square().flatten(1).sum(dim=1)


def load_task(reference: str) -> Task:
    """The task that `reference` names.

    A built-in name (`digits`), a file and an attribute (`path/to/file.py:task`), or a module and
    an attribute (`package.module:task`). The attribute is a `Task`, or a function that takes
    nothing and returns one. Loading runs the user's code: only the coordinator does it, and only
    for a reference that its operator typed.

    Raises `ConfigError` saying what was not found and what to do.
    """
    if ":" not in reference:
        if reference not in BUILT_IN_TASKS:
            raise ConfigError(_unknown_task(reference))
        reference = BUILT_IN_TASKS[reference]
    place, _, attribute = reference.rpartition(":")
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    if not hasattr(module, attribute):
        tasks = [name for name, value in vars(module).items() if isinstance(value, Task)]
        hint = f"; it defines {', '.join(tasks)}" if tasks else ""
        raise ConfigError(f"{place} has no attribute {attribute!r}{hint}")
    found = getattr(module, attribute)
    if not isinstance(found, Task) and callable(found):
        found = found()
    if not isinstance(found, Task):
        raise ConfigError(
            f"{reference} is of type {type(found).__name__}; it must be a Task, or a function "
            "without arguments that returns one"
        )
    return found


def _unknown_task(name: str) -> str:
    near = difflib.get_close_matches(name, BUILT_IN_TASKS, n=1)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    if name.endswith(".py"):
        guess = f" For a task in a file, name the attribute too: {name}:task."
    return (
        f"there is no built-in task {name!r}.{guess} "
        f"Built in: {', '.join(sorted(BUILT_IN_TASKS))}. "
        "Your own: path/to/file.py:attribute or package.module:attribute"
    )


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"the task file {path} does not exist")
    # Two files of the same name in two folders must not be taken for one module.
    name = f"fedge_task_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"the task file {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their annotations up in it, so they need the module to be registered.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"the task file {path} failed to load: {error!r}") from error
    return module


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"the module {name!r} cannot be imported: {error}. Is it installed, or is its folder "
            "on PYTHONPATH? For a file, write its path with .py"
        ) from error
