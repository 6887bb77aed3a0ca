"""What a version is worth on a fleet: the mean, and how the devices differ.

A mean over all examples says how good a version is for the examples, not for the people: a few
devices with many examples may hide that it is of no use to a tenth of all. So beside the weighted
mean stand the quantiles over devices, each of which counts once. Pure: sums of devices and the
plan's manifest in, figures out. A device may say what it likes: what is beyond all reason is left
out, so that no figure is infinite or not a number, and it is told of how many devices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedge.coordinator.store import EvaluationAnswer
from fedge.schemas.messages import EvaluationSums
from fedge.schemas.plan import PlanManifest

LOSS = "loss"
QUANTILES = {
    "min": 0.0,
    "p10": 0.1,
    "p25": 0.25,
    "median": 0.5,
    "p75": 0.75,
    "p90": 0.9,
    "max": 1.0,
}
MOST_BINS = 10
BEYOND_REASON = 1e12
"""No device's measure is further from 0. Sums of a million of these, and squares, are finite."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many devices are in each of some bins of equal width, from `low` to `high`."""

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Measure:
    """One measure over the fleet.

    `mean`: of all sums together, so a device counts by its rows; None where that is not a number.
    The rest is over devices, each of which counts once: `device_mean`, `quantiles` by the names of
    `QUANTILES`, `histogram`.
    """

    name: str
    lower_is_better: bool
    devices: int
    mean: float | None
    device_mean: float
    quantiles: Mapping[str, float]
    histogram: Histogram


@dataclass(frozen=True, slots=True)
class DeviceMeasures:
    """What one device measured."""

    device: str
    examples: int
    rows: int
    measures: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Gain:
    """What personal copies of the version gain over the version itself.

    `mean_difference`: personal less common, over the `devices` that have a copy, each of which
    counts once. `better`: the share of them for which the copy is better.
    """

    name: str
    lower_is_better: bool
    devices: int
    mean_difference: float
    better: float


@dataclass(frozen=True, slots=True)
class FleetMeasures:
    """What an evaluation found. `by_device`: the worst first, by their loss.

    `beyond_reason`: of so many devices a measure was left out because it is.
    """

    devices: int
    examples: int
    rows: int
    measures: tuple[Measure, ...]
    by_device: tuple[DeviceMeasures, ...]
    gains: tuple[Gain, ...]
    beyond_reason: int = 0


def fleet_measures(manifest: PlanManifest, answers: Sequence[EvaluationAnswer]) -> FleetMeasures:
    """The figures of all devices that measured. Those that did not are left out."""
    own = {one.device: one.sums for one in answers if one.sums is not None}
    personal_sums = {
        one.device: one.personal
        for one in answers
        if one.personal is not None and one.device in own
    }
    said = {device: _measures(manifest, sums) for device, sums in own.items()}
    said_personal = {device: _measures(manifest, sums) for device, sums in personal_sums.items()}
    found = {device: _within_reason(measures) for device, measures in said.items()}
    personal = {device: _within_reason(measures) for device, measures in said_personal.items()}
    spoilt = {device for device in said if found[device] != said[device]}
    spoilt_personal = {one for one in said_personal if personal[one] != said_personal[one]}
    # What is left out of the devices is left out of their sums, too.
    together = _within_reason(
        _together(manifest, [sums for device, sums in own.items() if device not in spoilt])
    )
    names = (LOSS, *manifest.measures)
    measures = (
        _measure(manifest, name, together, [one[name] for one in found.values() if name in one])
        for name in names
    )
    worst_first = sorted(own, key=lambda device: (-found[device].get(LOSS, math.inf), device))
    gains = (_gain(manifest, name, found, personal) for name in names)
    return FleetMeasures(
        devices=len(own),
        examples=sum(sums.examples for sums in own.values()),
        rows=sum(sums.rows for sums in own.values()),
        measures=tuple(measure for measure in measures if measure is not None),
        by_device=tuple(
            DeviceMeasures(device, own[device].examples, own[device].rows, found[device])
            for device in worst_first
        ),
        gains=tuple(gain for gain in gains if gain is not None),
        beyond_reason=len(spoilt | spoilt_personal),
    )


def lower_is_better(manifest: PlanManifest, name: str) -> bool:
    """Of a loss and of a perplexity; of every other measure more is taken for better."""
    return name == LOSS or any(ratio.exponential for ratio in manifest.ratios if ratio.name == name)


def _measures(manifest: PlanManifest, sums: EvaluationSums) -> dict[str, float]:
    return {LOSS: sums.loss_sum / sums.rows, **manifest.measured(sums.metrics, sums.rows)}


def _within_reason(measures: Mapping[str, float]) -> dict[str, float]:
    # Written so that what is no number is left out as well.
    return {name: value for name, value in measures.items() if abs(value) <= BEYOND_REASON}


def _together(manifest: PlanManifest, every: Sequence[EvaluationSums]) -> dict[str, float]:
    rows = sum(sums.rows for sums in every)
    if rows == 0:
        return {}
    metrics = {
        name: sum(sums.metrics.get(name, 0.0) for sums in every) for name in manifest.metrics
    }
    loss = sum(sums.loss_sum for sums in every) / rows
    return {LOSS: loss, **manifest.measured(metrics, rows)}


def _measure(
    manifest: PlanManifest, name: str, together: Mapping[str, float], values: Sequence[float]
) -> Measure | None:
    if not values:
        return None
    low, high = min(values), max(values)
    # In one bin if they are equal, or as good as: numpy cannot divide what lies between them.
    is_one = high - low <= 1e-9 * max(abs(low), abs(high))
    # Sturges' rule (1926): few devices are not spread over many empty bins.
    bins = 1 if is_one else min(MOST_BINS, math.ceil(math.log2(len(values))) + 1)
    counts = [len(values)] if is_one else np.histogram(values, bins, (low, high))[0].tolist()
    quantiles = np.quantile(values, list(QUANTILES.values()))
    return Measure(
        name=name,
        lower_is_better=lower_is_better(manifest, name),
        devices=len(values),
        mean=together.get(name),
        device_mean=float(np.mean(values)),
        quantiles=dict(zip(QUANTILES, map(float, quantiles), strict=True)),
        histogram=Histogram(low, high, tuple(counts)),
    )


def _gain(
    manifest: PlanManifest,
    name: str,
    common: Mapping[str, Mapping[str, float]],
    personal: Mapping[str, Mapping[str, float]],
) -> Gain | None:
    differences = np.array(
        [
            personal[device][name] - common[device][name]
            for device in personal
            if name in personal[device] and name in common[device]
        ]
    )
    if not differences.size:
        return None
    lower = lower_is_better(manifest, name)
    better = differences < 0 if lower else differences > 0
    return Gain(
        name=name,
        lower_is_better=lower,
        devices=differences.size,
        mean_difference=float(differences.mean()),
        better=float(better.mean()),
    )
