"""What a demonstration runs: the user's wishes over the task's own defaults, checked and fixed.

Pure but for loading the task. The numbers that the coordinator, the devices and the central
training are given all come from here, so that they are about the same experiment.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedge.coordinator.rounds import Strategy
from fedge.coordinator.task import SimulationDefaults, Task, load_task
from fedge.schemas.errors import ConfigError
from fedge.schemas.features import WordFeatures
from fedge.schemas.split_schemes import parse_scheme


@dataclass(frozen=True, slots=True)
class Wishes:
    """What was asked for; None leaves the choice to the task."""

    task: str = "digits"
    data: Path | None = None
    devices: int | None = None
    rounds: int | None = None
    split: str | None = None
    strategy: Strategy | None = None
    train_examples: int | None = None
    local_epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    seed: int = 0
    central: bool = True


Source = Literal["sklearn-digits", "mnist", "inline", "files", "texts"]
USERS = "users"
"""How texts are divided: by who typed them."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """One run, every choice made. `reference`: how another process finds the same task.

    `train_examples`, `test_examples`: the first so many; None is all.
    """

    reference: str
    task: Task
    source: Source
    data: Path | None
    devices: tuple[str, ...]
    rounds: int
    split: str
    strategy: Strategy
    train_examples: int | None
    test_examples: int | None
    local_epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    central: bool

    def passes(self, version: int) -> float:
        """How often all examples together had been trained on when this version was made.

        A round of FedAvg shows every device's examples to the model, one of the cyclic strategy
        those of one device.
        """
        visits = version if self.strategy is Strategy.FEDAVG else version / len(self.devices)
        return visits * self.local_epochs

    @property
    def central_epochs(self) -> int:
        """Passes of the central training: as many as the last version has had, rounded up."""
        whole, rest = divmod(self.passes(self.rounds), 1)
        return max(1, int(whole) + (1 if rest > 1e-9 else 0))


def resolve(wishes: Wishes) -> Experiment:
    """The experiment. Raises `ConfigError` if the task is not found or has no data."""
    reference = _absolute(wishes.task)
    task = load_task(reference)
    simulation, defaults = task.simulation, task.defaults
    source = _source(task, wishes)
    if source == "files" and wishes.data is None:
        raise ConfigError(
            f"the task {task.name!r} names no data: give --data, a folder with train.npz and "
            "test.npz or one .npz file, each with arrays x and y"
        )
    count = wishes.devices or simulation.devices
    epochs = defaults.local_epochs if wishes.local_epochs is None else wishes.local_epochs
    if epochs < 1:
        raise ConfigError("local_epochs is 0: then nothing is learned; give --local-epochs 1")
    return Experiment(
        reference=reference,
        task=task,
        source=source,
        data=wishes.data,
        devices=device_names(count),
        rounds=wishes.rounds or simulation.rounds,
        split=USERS if source == "texts" else _split(wishes, simulation, count),
        strategy=wishes.strategy or Strategy(simulation.strategy),
        train_examples=wishes.train_examples or simulation.train_examples,
        test_examples=simulation.test_examples,
        local_epochs=epochs,
        batch_size=wishes.batch_size or defaults.batch_size,
        learning_rate=wishes.learning_rate or defaults.learning_rate,
        seed=wishes.seed,
        central=wishes.central,
    )


def device_names(count: int) -> tuple[str, ...]:
    """`device-1`, `device-2`, …, with leading zeros so that their order is that of the numbers."""
    width = len(str(count))
    return tuple(f"device-{number:0{width}}" for number in range(1, count + 1))


def _source(task: Task, wishes: Wishes) -> Source:
    named = task.simulation.data
    if isinstance(task.features, WordFeatures):
        if named != "python-topics" and wishes.data is None:
            raise ConfigError(
                f"the task {task.name!r} names no texts: give --data, a .jsonl file of "
                '{"user": …, "text": …} lines'
            )
        if wishes.split is not None:
            raise ConfigError("texts are divided by who typed them: --split does not apply")
        return "texts"
    if named is None or named == "python-topics" or (wishes.data is not None and named != "mnist"):
        return "files"
    return named


def _split(wishes: Wishes, simulation: SimulationDefaults, count: int) -> str:
    own, own_devices = simulation.split, simulation.devices
    if wishes.split is not None:
        return str(parse_scheme(wishes.split))
    if own.startswith("weighted:") and count != own_devices:
        raise ConfigError(
            f"the task splits its data by {own}, which is for {own_devices} devices: give --split "
            f"for {count}"
        )
    return own


def _absolute(reference: str) -> str:
    place, colon, attribute = reference.rpartition(":")
    if colon and place.endswith(".py"):
        return f"{Path(place).absolute()}:{attribute}"
    return reference
