"""The keyboards of `keyboard.py` and how they learn, in one process and without a broker.

What trains, adds up and decides is the product's own: the compiled plan, the agent's training loop
and engine, the coordinator's mean and its server optimizer. What is left out is the network. A pass
over the data is as many windows as there are: in central training each of them once, in federated
training each device in as many rounds as its windows last. Both are counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedge.coordinator.aggregation import WeightedMean, Weighting
from fedge.coordinator.compiler import CompiledPlan
from fedge.coordinator.server_optimizer import ServerOptimizer, ServerOptimizerConfig
from fedge.edge_agent.data.examples import Examples
from fedge.edge_agent.engines import EngineName, open_engine
from fedge.edge_agent.training import TrainingResult, train
from fedge.edge_agent.training_settings import TrainingSettings
from fedge.schemas.tensors import Array, Tensors
from fedge.schemas.words import WordEncoder, normalised

EVALUATION_BATCH = 64
TEST_SHARE = 0.2
VALIDATION_SHARE = 0.1
PATIENCE = 2


@dataclass(frozen=True, slots=True)
class Typist:
    """One person's texts in the order in which they were typed, cut by time."""

    name: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Device:
    """A typist's windows, in the words of the plan.

    `measured`: of what a number is taken, the test part or the validation part. `fresh`: those of
    its texts that nobody typed before in the training part.
    """

    name: str
    train: Examples
    validation: Examples
    measured: Examples
    fresh: Examples


@dataclass(frozen=True, slots=True)
class Local:
    """How a device trains, or the one place that has everything. `steps`: at most, of a turn."""

    learning_rate: float
    batch_size: int
    epochs: int = 1
    steps: int | None = None


def cut_by_time(name: str, texts: Sequence[str]) -> Typist:
    """The last fifth to test on, the tenth before it to choose by, the rest to train on.

    Of each part at least one text. Raises `ValueError` for fewer than three.
    """
    if len(texts) < 3:
        raise ValueError(f"{name} typed {len(texts)} texts; three parts need as many")
    test = max(1, round(len(texts) * TEST_SHARE))
    validation = max(1, round(len(texts) * VALIDATION_SHARE))
    until = len(texts) - test
    return Typist(
        name,
        tuple(texts[: until - validation]),
        tuple(texts[until - validation : until]),
        tuple(texts[until:]),
    )


def fresh_of(
    typists: Sequence[Typist], measured: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Of each typist's measured texts those that are in nobody's training part.

    Much of what people send they were sent themselves: greetings, jokes. Nobody types these.
    """
    seen = {normalised(text) for one in typists for text in one.train}
    return {
        name: [text for text in texts if normalised(text) not in seen]
        for name, texts in measured.items()
    }


def device_of(
    encoder: WordEncoder, typist: Typist, measured: Sequence[str], fresh: Sequence[str]
) -> Device:
    """The typist's texts as windows; each part counts as many examples as it has texts."""
    parts = (typist.train, typist.validation, measured, fresh)
    return Device(typist.name, *(_windows(encoder, texts) for texts in parts))


def _windows(encoder: WordEncoder, texts: Sequence[str]) -> Examples:
    inputs, targets = encoder.windows(texts)
    return Examples(inputs, targets, texts=len(texts))


def pooled(parts: Iterable[Examples]) -> Examples:
    """What all of them have, in one place."""
    every = list(parts)
    return Examples(
        np.concatenate([one.raw_inputs for one in every]),
        np.concatenate([one.raw_targets for one in every]),
        texts=sum(one.examples for one in every),
    )


class Trainer:
    """One engine for all devices, one after the other: weights go in, weights come out.

    `windows_trained`: how many windows were seen so far, each as often as it was.
    """

    def __init__(self, plan: CompiledPlan, *, threads: int = 1) -> None:
        self.manifest = plan.manifest
        graphs = plan.manifest.graphs
        self._engine = open_engine(
            EngineName.ONNX,
            plan.manifest,
            plan.blobs[graphs.train.sha256],
            plan.blobs[graphs.eval.sha256],
            threads=threads,
        )
        self.windows_trained = 0

    def update(self, weights: Tensors, examples: Examples, how: Local, seed: int) -> TrainingResult:
        """A device's part of a round: the difference that its epochs made."""
        settings = TrainingSettings(
            seed=seed,
            batch_size=how.batch_size,
            learning_rate=how.learning_rate,
            local_epochs=how.epochs,
            local_steps=how.steps,
        )
        result = train(self._engine, self.manifest, weights, examples, settings)
        assert isinstance(result, TrainingResult)  # nobody told it to stop
        # Batches are full, but for the last one of an epoch.
        every = len(examples) * how.epochs
        self.windows_trained += min(every, result.steps * how.batch_size)
        return result

    def trained(
        self, weights: Tensors, examples: Examples, how: Local, seed: int
    ) -> dict[str, Array]:
        """The weights after these epochs. A central pass is one epoch over what is pooled."""
        delta = self.update(weights, examples, how, seed).delta
        return {
            name: value + delta[name] if name in delta else value for name, value in weights.items()
        }

    def sums(self, weights: Tensors, examples: Examples) -> dict[str, float]:
        """The plan's metrics over all windows, as sums, which add up over devices."""
        self._engine.load(weights)
        found = dict.fromkeys(self.manifest.metrics, 0.0)
        for start in range(0, len(examples), EVALUATION_BATCH):
            rows = slice(start, start + EVALUATION_BATCH)
            inputs = self.manifest.features.encode(examples.raw_inputs[rows])
            targets = self.manifest.target.encode(examples.raw_targets[rows])
            batch = self._engine.evaluate(inputs, targets, np.ones(len(inputs), np.float32))
            for name, value in batch.metrics.items():
                found[name] += value
        return found


@dataclass(frozen=True, slots=True)
class Server:
    """The coordinator's part: how many take part in a round, and what becomes of their mean."""

    cohort: int
    optimizer: ServerOptimizer
    seed: int = 0


def decay(number: int, of: int, last: float, steady: int = 1) -> float:
    """Of a learning rate in pass `number` of so many.

    It is 1 for `steady` passes, and then falls by equal factors down to `last`.
    """
    return last ** ((number - steady) / (of - steady)) if number > steady else 1.0


def slowed(config: ServerOptimizerConfig, share: float) -> ServerOptimizerConfig:
    """The same optimizer with `share` of its learning rate."""
    return config.model_copy(update={"learning_rate": config.learning_rate * share})


def turns_of(windows: int, how: Local) -> list[int]:
    """How often a device takes part in one pass, and the steps of each time.

    Together they see as many windows as the device has, less what fills no batch: never more.
    """
    if how.steps is None or windows <= how.batch_size:
        return [-(-windows // how.batch_size)]
    full = windows // how.batch_size
    return [min(how.steps, full - done) for done in range(0, full, how.steps)]


def cohorts_of(
    turns: Mapping[str, Sequence[int]], size: int, rng: np.random.Generator
) -> Iterator[dict[str, int]]:
    """The cohorts of one pass: devices and the steps of each. Every turn comes once.

    Each device is as likely as it has turns left, and is in a cohort once. The last cohorts may be
    smaller than `size`.
    """
    order = [name for name, steps in turns.items() for _ in steps]
    rng.shuffle(order)
    left = {name: list(steps) for name, steps in turns.items()}
    while order:
        cohort: dict[str, int] = {}
        later = []
        for at, name in enumerate(order):
            if len(cohort) == size:
                later += order[at:]
                break
            if name in cohort:
                later.append(name)
            else:
                cohort[name] = left[name].pop(0)
        order = later
        yield dict(sorted(cohort.items()))


def federated_pass(
    trainer: Trainer,
    weights: Tensors,
    state: Tensors,
    devices: Mapping[str, Examples],
    how: Local,
    server: Server,
    number: int,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Weights and optimizer state after pass `number`: cohorts, until all windows had a turn.

    With `how.steps` every turn counts the same, for a device with more texts has more of them;
    without, each device has one turn, and counts by its texts (McMahan et al. 2017).
    """
    rng = np.random.default_rng([server.seed, number])
    moved, moments = dict(weights), dict(state)
    mean = WeightedMean(tuple(trainer.manifest.update_specs))
    weighting = Weighting.EXAMPLES if how.steps is None else Weighting.UNIFORM
    turns = {name: turns_of(len(own), how) for name, own in devices.items()}
    for cohort in cohorts_of(turns, server.cohort, rng):
        sums = mean.init()
        for name, steps in cohort.items():
            seed = int(rng.integers(2**31))
            result = trainer.update(moved, devices[name], replace(how, steps=steps), seed)
            weight = weighting.weight(result.examples)
            sums = mean.accumulate(sums, result.delta.items(), weight)
        moved, moments = server.optimizer.apply(moved, mean.finish(sums), moments)
    return moved, moments


@dataclass(frozen=True, slots=True)
class Personal:
    """What became of one device's own copy.

    `epochs`: of its own training, after which it was best on the validation part; 0 where what
    everybody has was best. `before`, `after`: sums of the federated weights, and of those that the
    device keeps. `fresh`: of the latter, over the fresh texts.
    """

    epochs: int
    before: dict[str, float]
    after: dict[str, float]
    fresh: dict[str, float]


def personalise(trainer: Trainer, weights: Tensors, device: Device, how: Local) -> Personal:
    """Trains a copy on the device's own texts; the epoch that is best on validation is kept.

    Better is what finds the words that were typed more probable. It ends after `how.epochs`
    epochs, or after `PATIENCE` that were no better.
    """
    kept, copy, epochs = weights, weights, 0
    best = trainer.sums(weights, device.validation)["log_loss"]
    for epoch in range(1, how.epochs + 1):
        copy = trainer.trained(copy, device.train, replace(how, epochs=1), epoch)
        loss = trainer.sums(copy, device.validation)["log_loss"]
        if loss < best:
            kept, best, epochs = copy, loss, epoch
        elif epoch - epochs >= PATIENCE:
            break
    before = trainer.sums(weights, device.measured)
    after = before if epochs == 0 else trainer.sums(kept, device.measured)
    return Personal(epochs, before, after, trainer.sums(kept, device.fresh))
