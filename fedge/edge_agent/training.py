"""A device's part of a round: some epochs on its own examples, and the difference they made.

The client update of FedAvg (McMahan et al. 2017, Algorithm 1), with the proximal term of FedProx
(Li et al. 2020, section 3.2) inside the plan's graph. The loop knows no runtime, file or message:
an engine takes the steps, the plan's specifications turn raw examples into tensors one batch at a
time, so the memory of a data set is that of its raw form.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from fedge.edge_agent.batching import Batch, batches, step_count, step_seed
from fedge.edge_agent.data.examples import Examples, in_task_scale
from fedge.edge_agent.engines.protocol import Engine, StepResult
from fedge.edge_agent.training_settings import TrainingSettings
from fedge.schemas.errors import TrainingFailed
from fedge.schemas.messages import LossCurve
from fedge.schemas.plan import PlanManifest
from fedge.schemas.tensors import Tensors

MAX_CURVE_POINTS = 2048
"""Of `LossCurve.by_batch`: what a message carries."""


@dataclass(frozen=True, slots=True)
class Progress:
    """After a step: `step` of `steps` are done, the last one in `epoch` (from 0)."""

    epoch: int
    step: int
    steps: int
    loss: float


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What training made.

    `delta`: new - base for each of the manifest's `update_specs`, in its dtype.
    `examples`: the device's examples, n_k of the FedAvg paper, whatever `local_steps` left out; of
    text, how many texts.
    `loss`: means over the examples of each epoch and batch. Of more than `MAX_CURVE_POINTS`
    batches, neighbours are averaged.
    `metrics`: the plan's measures over all examples as they were trained on; empty if there was no
    step.
    `training_s`: wall time of the steps and their batches.
    """

    delta: Mapping[str, npt.NDArray[np.floating]]
    examples: int
    steps: int
    loss: LossCurve
    metrics: Mapping[str, float]
    training_s: float


@dataclass(frozen=True, slots=True)
class CurveSums:
    """A `Curve` as it is: see there."""

    sums: tuple[float, ...]
    weights: tuple[float, ...]
    entries_a_point: int
    entries: int


@dataclass(frozen=True, slots=True)
class Paused:
    """A training that was told to stop after `step` of `steps`, with what it measured until then.

    The weights and the optimizer's state are in the engine. `training_s`: as `TrainingResult`'s.
    """

    step: int
    steps: int
    training_s: float
    curve: CurveSums
    epoch_sums: tuple[float, ...]
    epoch_examples: tuple[int, ...]
    metric_sums: dict[str, float]


def train(
    engine: Engine,
    manifest: PlanManifest,
    weights: Tensors,
    examples: Examples,
    settings: TrainingSettings,
    *,
    on_step: Callable[[Progress], None] = lambda progress: None,
    clock: Callable[[], float] = time.perf_counter,
    stop: Callable[[], bool] = lambda: False,
    earlier: Paused | None = None,
    put_back: Callable[[], None] = lambda: None,
) -> TrainingResult | Paused:
    """Trains from `weights` (the tensors of a version) on `examples`.

    `stop`: asked after each step whether to stop there; what is returned then is `Paused`.
    `earlier`: what a call with equal arguments returned so, to go on from there; `put_back` is
    called once the engine has its weights, and brings it to where it was. The result is that of a
    training which was never stopped.

    Raises `TrainingFailed` if there are no examples, they do not fit the plan, the runtime fails,
    or the loss or a weight becomes NaN or infinite; `PeerError` if `weights` break the manifest.
    """
    if len(examples) == 0:
        raise TrainingFailed("this device has no examples to train on")
    steps = step_count(
        len(examples),
        batch_size=settings.batch_size,
        local_epochs=settings.local_epochs,
        local_steps=settings.local_steps,
    )
    engine.load(weights)
    put_back()
    record = _Record(per_example=manifest.loss_reduction == "mean", earlier=earlier)
    started = clock() - (0.0 if earlier is None else earlier.training_s)
    every = batches(
        len(examples),
        batch_size=settings.batch_size,
        local_epochs=settings.local_epochs,
        local_steps=settings.local_steps,
        seed=settings.seed,
        padding=manifest.padding,
    )
    for batch in islice(every, 0 if earlier is None else earlier.step, None):
        result = engine.step(
            manifest.features.encode(in_task_scale(examples, batch.rows, manifest.features)),
            manifest.target.encode(examples.raw_targets[batch.rows]),
            batch.mask,
            lr=settings.learning_rate,
            mu=settings.proximal_mu,
            seed=step_seed(settings.seed, batch.step),
        )
        if not math.isfinite(result.loss):
            raise TrainingFailed(
                f"the loss became {result.loss} at step {batch.step + 1} of {steps} (epoch "
                f"{batch.epoch + 1}): lower learning_rate, now {settings.learning_rate:g}"
            )
        record.add(batch, result)
        on_step(Progress(batch.epoch, batch.step + 1, steps, result.loss))
        if batch.step + 1 < steps and stop():
            return record.paused(batch.step + 1, steps, clock() - started)
    delta = difference(manifest, engine.weights(), weights)
    training_s = clock() - started
    return TrainingResult(
        delta, examples.examples, steps, record.curve(), record.measures(manifest), training_s
    )


def no_training(manifest: PlanManifest, examples: int) -> TrainingResult:
    """The result of zero steps: zero differences. It measures what a round costs by itself.

    Raises `TrainingFailed` if there are no examples: such a device has no part in a round.
    """
    if examples == 0:
        raise TrainingFailed("this device has no examples to train on")
    delta = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in manifest.update_specs}
    return TrainingResult(delta, examples, 0, LossCurve(), {}, 0.0)


def difference(
    manifest: PlanManifest, new: Tensors, base: Tensors
) -> dict[str, npt.NDArray[np.floating]]:
    """`new - base` for each tensor of an update, written over the arrays of `new`.

    Raises `TrainingFailed` if a difference is not finite.
    """
    delta: dict[str, npt.NDArray[np.floating]] = {}
    for spec in manifest.update_specs:
        with np.errstate(invalid="ignore", over="ignore"):  # infinities are refused below
            # In place: at this moment a device holds the weights more often than at any other.
            made = np.subtract(new[spec.name], base[spec.name], out=new[spec.name])
        if not np.isfinite(made).all():
            raise TrainingFailed(
                f"the trained tensor {spec.name!r} holds NaN or infinity: lower learning_rate"
            )
        delta[spec.name] = made
    return delta


class Curve:
    """The means of a stream of (sum, weight) pairs in at most `points` points, in fixed memory.

    When it is full, neighbours are joined and each point stands for twice as many entries.
    `points` is even.
    """

    def __init__(self, points: int = MAX_CURVE_POINTS, earlier: CurveSums | None = None) -> None:
        self._points = points
        earlier = earlier or CurveSums((), (), 1, 0)
        self._sums = list(earlier.sums)
        self._weights = list(earlier.weights)
        self._entries_a_point = earlier.entries_a_point
        self._entries = earlier.entries

    def add(self, total: float, weight: float) -> None:
        """Takes one entry: a sum over `weight` examples."""
        if self._entries % self._entries_a_point == 0:
            if len(self._sums) == self._points:
                self._join_neighbours()
            self._sums.append(0.0)
            self._weights.append(0.0)
        self._sums[-1] += total
        self._weights[-1] += weight
        self._entries += 1

    def means(self) -> tuple[float, ...]:
        """One mean a point, in order."""
        return tuple(s / w for s, w in zip(self._sums, self._weights, strict=True))

    def as_it_is(self) -> CurveSums:
        """What another one goes on from."""
        return CurveSums(
            tuple(self._sums), tuple(self._weights), self._entries_a_point, self._entries
        )

    def _join_neighbours(self) -> None:
        self._sums = [sum(self._sums[i : i + 2]) for i in range(0, self._points, 2)]
        self._weights = [sum(self._weights[i : i + 2]) for i in range(0, self._points, 2)]
        self._entries_a_point *= 2


class _Record:
    """What the steps measured, as sums."""

    def __init__(self, *, per_example: bool, earlier: Paused | None) -> None:
        self._per_example = per_example
        self._batches = Curve(earlier=None if earlier is None else earlier.curve)
        self._epoch_sums = [] if earlier is None else list(earlier.epoch_sums)
        self._epoch_examples = [] if earlier is None else list(earlier.epoch_examples)
        self._metric_sums = {} if earlier is None else dict(earlier.metric_sums)

    def add(self, batch: Batch, result: StepResult) -> None:
        loss_sum = result.loss * batch.count if self._per_example else result.loss
        self._batches.add(loss_sum, batch.count)
        if batch.epoch == len(self._epoch_sums):
            self._epoch_sums.append(0.0)
            self._epoch_examples.append(0)
        self._epoch_sums[-1] += loss_sum
        self._epoch_examples[-1] += batch.count
        for name, value in result.metrics.items():
            self._metric_sums[name] = self._metric_sums.get(name, 0.0) + value

    def paused(self, step: int, steps: int, training_s: float) -> Paused:
        return Paused(
            step=step,
            steps=steps,
            training_s=training_s,
            curve=self._batches.as_it_is(),
            epoch_sums=tuple(self._epoch_sums),
            epoch_examples=tuple(self._epoch_examples),
            metric_sums=dict(self._metric_sums),
        )

    def curve(self) -> LossCurve:
        epochs = zip(self._epoch_sums, self._epoch_examples, strict=True)
        return LossCurve(by_epoch=tuple(s / n for s, n in epochs), by_batch=self._batches.means())

    def measures(self, manifest: PlanManifest) -> dict[str, float]:
        # Without those that are not a number: one would make the whole offer unsendable.
        return manifest.measured(self._metric_sums, sum(self._epoch_examples))
