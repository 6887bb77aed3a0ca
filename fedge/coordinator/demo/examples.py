"""The examples of a demonstration: loaded once, written where each program looks for its own.

The training set goes to a file that `fedge-agent data split` divides among the devices, the test
set to the coordinator and to nobody else.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from fedge.coordinator.datasets import Examples, load_dataset
from fedge.coordinator.demo.experiment import Experiment
from fedge.coordinator.demo.texts import Typist, typists, windows_of
from fedge.coordinator.task import Task
from fedge.coordinator.testset import load_test_set
from fedge.schemas.errors import ConfigError
from fedge.schemas.features import WordFeatures
from fedge.schemas.words import WordEncoder

TRAIN_FILE, TEST_FILE = "train.npz", "test.npz"
_HELD_OUT = 0.2


def load_examples(experiment: Experiment) -> tuple[Examples, Examples]:
    """The training and the test examples. Raises `ConfigError` saying what is missing or wrong."""
    if experiment.source == "files":
        train, test = _from_files(experiment)
    elif experiment.source == "texts":
        people, encoder = typists_of(experiment), encoder_of(experiment.task)
        train = windows_of(encoder, (text for one in people for text in one.train))
        test = windows_of(encoder, (text for one in people for text in one.test))
    else:
        train, test = load_dataset(
            experiment.source,
            experiment.data or default_data_dir(),
            experiment.task.simulation.examples,
        )
    return train.first(experiment.train_examples), test.first(experiment.test_examples)


def typists_of(experiment: Experiment) -> list[Typist]:
    """Who types on which device, in the order of the devices. Raises `ConfigError`."""
    return typists(experiment.data, len(experiment.devices))


def encoder_of(task: Task) -> WordEncoder:
    """What makes examples of text for a task of words. Raises `ConfigError` for another."""
    if task.vocabulary is None or not isinstance(task.features, WordFeatures):
        raise ConfigError(f"the task {task.name!r} is not about words")
    return WordEncoder(task.vocabulary, task.features.window)


def default_data_dir() -> Path:
    """Where data sets are looked for and fetched to: `FEDGE_DATA`, else the user's cache."""
    named = os.environ.get("FEDGE_DATA")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "fedge"


def write_examples(examples: Examples, path: Path) -> None:
    """Writes arrays `x` and `y`. Raises `ConfigError` if the disk refuses."""
    try:
        with path.open("wb") as file:
            np.savez(file, x=examples.x, y=examples.y)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def _from_files(experiment: Experiment) -> tuple[Examples, Examples]:
    path = experiment.data
    if path is None:
        raise ConfigError("no data was named")
    if path.is_dir():
        return load_test_set(path / TRAIN_FILE), load_test_set(path / TEST_FILE)
    return hold_out(load_test_set(path), experiment.seed)


def hold_out(examples: Examples, seed: int) -> tuple[Examples, Examples]:
    """A random four fifths for training and a fifth for the test.

    Raises `ConfigError` if there are fewer than two examples.
    """
    if len(examples) < 2:
        raise ConfigError("one example cannot be both trained on and tested on: give more")
    order = np.random.default_rng(seed).permutation(len(examples))
    test, train = np.split(order, [max(1, round(len(examples) * _HELD_OUT))])
    return (
        Examples(examples.x[train], examples.y[train]),
        Examples(examples.x[test], examples.y[test]),
    )
