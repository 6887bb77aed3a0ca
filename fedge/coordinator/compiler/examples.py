"""Random examples of a task, through its own features: for tracing, verification and golden inputs.

Seeded, so that a task compiles to the same plan each time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedge.coordinator.task import Task
from fedge.schemas.errors import ConfigError
from fedge.schemas.features import (
    ClassTarget,
    FeatureSpec,
    ImageFeatures,
    NextWordTarget,
    TabularFeatures,
    ValueTarget,
    WordFeatures,
)
from fedge.schemas.tensors import Array
from fedge.schemas.words import PADDING, UNKNOWN

MAX_GOLDEN_EXAMPLES = 8
MAX_GOLDEN_BYTES = 256 * 1024


def random_inputs(task: Task, count: int, generator: np.random.Generator) -> Array:
    """`count` examples as the graph's input. Raises `ConfigError` if `task.sample` is wrong."""
    if task.sample is None:
        return task.features.encode(_raw_inputs(task.features, count, generator))
    raw = task.sample(generator, count)
    if getattr(raw, "shape", ())[:1] != (count,):
        raise ConfigError(
            f"sample of task {task.name!r} must return a numpy array of {count} examples when "
            f"asked for {count}"
        )
    return task.features.encode(raw)


def random_targets(task: Task, count: int, generator: np.random.Generator) -> Array:
    """`count` targets as the graph's `target`."""
    match task.target:
        case ClassTarget(classes=classes):
            return task.target.encode(generator.integers(0, classes, count))
        case ValueTarget(width=width):
            return task.target.encode(generator.standard_normal((count, width)))
        case NextWordTarget(words=words, window=window):
            return task.target.encode(_windows(words, window, count, generator))


def random_batch(task: Task, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(input, target) tensors of `count` examples."""
    generator = np.random.default_rng(seed)
    inputs = random_inputs(task, count, generator)
    return torch.from_numpy(inputs), torch.from_numpy(random_targets(task, count, generator))


def golden_inputs(task: Task, seed: int) -> Array:
    """At most 8 examples and 256 KiB for the parity check, but at least one example."""
    inputs = random_inputs(task, MAX_GOLDEN_EXAMPLES, np.random.default_rng(seed))
    count = max(1, MAX_GOLDEN_BYTES // inputs[0].nbytes)
    return inputs[:count]


def _windows(words: int, window: int, count: int, generator: np.random.Generator) -> Array:
    """Any numbers, and `PADDING` on the right."""
    numbers = generator.integers(UNKNOWN, words, (count, window))
    lengths = generator.integers(1, window + 1, (count, 1))
    return np.where(np.arange(window) < lengths, numbers, PADDING)


def _raw_inputs(features: FeatureSpec, count: int, generator: np.random.Generator) -> Array:
    match features:
        case ImageFeatures(height=height, width=width, channels=channels, raw_max=raw_max):
            return generator.uniform(0.0, raw_max, (count, height, width, channels))
        case TabularFeatures(columns=columns, mean=mean, std=std):
            raw = generator.standard_normal((count, columns))
            return raw * (1.0 if std is None else std) + (0.0 if mean is None else mean)
        case WordFeatures(words=words, window=window):
            return _windows(words, window, count, generator)
