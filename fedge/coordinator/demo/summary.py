"""What came out of a demonstration: one record, for JSON, for the tables and for the picture.

It is put together from what is durable: the coordinator's store, the devices' files, and the
answers they gave.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedge.coordinator.demo.counters import BrokerBytes
from fedge.coordinator.demo.experiment import Experiment
from fedge.coordinator.demo.predictions import Answer
from fedge.coordinator.store import Contribution, ParticipantStatus, Store

SUM_OF_LOSSES = "sum of losses"


@dataclass(frozen=True, slots=True)
class VersionLine:
    """One version beside the central training after as many passes, where that is a whole number.

    `metrics`: on the test set, by name: means of an example, `loss` among them, and
    `SUM_OF_LOSSES` if that is what the task minimises. `passes`: over all examples.
    """

    version: int
    passes: float
    metrics: Mapping[str, float]
    central: Mapping[str, float] | None


@dataclass(frozen=True, slots=True)
class DeviceCurve:
    """One device's training loss. `by_round`: of the last local epoch of each of its rounds.

    `by_epoch`, `by_batch`: over all rounds, in order. `steps`: batches trained on; `by_batch` has
    fewer points if a round had more batches than a message carries.
    """

    by_round: Mapping[int, float]
    by_epoch: Sequence[float]
    by_batch: Sequence[float]
    examples: int
    steps: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of payload, and what the broker counted in all (None if it does not count).

    `updates_up`: accepted updates, received by the coordinator. `published`: chunks of graphs and
    weights that the coordinator gave to the broker, once for all devices. `fetched_down`: chunks
    that arrived at the devices, all of them together.
    """

    updates_up: int
    published: int
    fetched_down: int
    broker: BrokerBytes | None


@dataclass(frozen=True, slots=True)
class ModelFile:
    """The last version as an ONNX file, as devices made it."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Summary:
    """All of it."""

    task: str
    strategy: str
    split: str
    seed: int
    rounds: int
    local_epochs: int
    batch_size: int
    learning_rate: float
    train_examples: int
    test_examples: int
    broker: str
    duration_s: float
    versions: tuple[VersionLine, ...]
    central_epochs: int | None
    central: tuple[Mapping[str, float], ...]
    devices: Mapping[str, DeviceCurve]
    traffic: Traffic
    model: ModelFile
    predictions: tuple[Answer, ...]
    report: str
    logs: str
    rounds_abandoned: int = 0
    notice: str | None = field(default=None)

    @property
    def measures(self) -> list[str]:
        """What was measured beside the loss, accuracy first."""
        names = [name for name in self.versions[-1].metrics if name != "loss"]
        return sorted(names, key=lambda name: name != "accuracy")

    @property
    def metric(self) -> str | None:
        """The one to show first, None without one."""
        return next(iter(self.measures), None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the loss by batch, which is long, stays in the coordinator's store."""
        whole = dataclasses.asdict(self)
        for curve in whole["devices"].values():
            del curve["by_batch"]
        for answer, made in zip(whole["predictions"], self.predictions, strict=True):
            answer["right"] = made.right
        return whole


def version_lines(
    store: Store,
    experiment: Experiment,
    central: Sequence[Mapping[str, float]],
    test_examples: int,
) -> tuple[VersionLine, ...]:
    """A line for each version in the store. Both trainings start from version 0."""

    def shown(means: Mapping[str, float]) -> dict[str, float]:
        if experiment.task.loss_reduction == "mean" or "loss" not in means:
            return dict(means)
        return {SUM_OF_LOSSES: means["loss"] * test_examples, **means}

    lines = []
    for record in store.versions():
        passes = experiment.passes(record.number)
        beside = None
        if central and passes == 0:
            beside = shown(record.metrics)
        elif passes in range(1, len(central) + 1):
            beside = shown(central[int(passes) - 1])
        lines.append(VersionLine(record.number, passes, shown(record.metrics), beside))
    return tuple(lines)


def device_curves(store: Store, devices: Sequence[str]) -> dict[str, DeviceCurve]:
    """What the devices said about their training in the updates that were accepted."""
    made: dict[str, list[tuple[int, Contribution]]] = {device: [] for device in devices}
    for record in store.rounds():
        for found in store.participants(record.number):
            accepted = found.status is ParticipantStatus.ACCEPTED
            if accepted and found.contribution is not None and found.device in made:
                made[found.device].append((record.number, found.contribution))
    return {device: _curve(own) for device, own in made.items()}


def _curve(made: Sequence[tuple[int, Contribution]]) -> DeviceCurve:
    return DeviceCurve(
        by_round={number: one.loss.by_epoch[-1] for number, one in made if one.loss.by_epoch},
        by_epoch=[loss for _, one in made for loss in one.loss.by_epoch],
        by_batch=[loss for _, one in made for loss in one.loss.by_batch],
        examples=made[-1][1].examples if made else 0,
        steps=sum(one.steps for _, one in made),
    )


def bytes_up(store: Store) -> int:
    """Of all updates that were accepted."""
    return sum(
        found.contribution.update.size_bytes
        for record in store.rounds()
        for found in store.participants(record.number)
        if found.status is ParticipantStatus.ACCEPTED and found.contribution is not None
    )


def pictures(summary: Summary) -> list[tuple[Path, Answer]]:
    """The predictions that were about image files."""
    return [
        (Path(answer.question.example), answer)
        for answer in summary.predictions
        if answer.question.example.endswith(".png")
    ]
