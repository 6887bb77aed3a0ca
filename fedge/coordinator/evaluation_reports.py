"""What the commands about evaluations print: figures for people, JSON for scripts."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from fedge.coordinator.fleet_measures import (
    BEYOND_REASON,
    QUANTILES,
    FleetMeasures,
    Gain,
    Measure,
)
from fedge.coordinator.reports import console, plain_table, print_json, utc_time
from fedge.coordinator.store import EvaluationRecord, EvaluationReport
from fedge.schemas.measures import measure_text
from fedge.schemas.messages import EvaluationStatus

WORST = 5
"""Devices that are shown by name."""
BAR = 40
"""Characters of the longest bar."""

_HEADINGS = {"p10": "10%", "p25": "25%", "p75": "75%", "p90": "90%"}


def show_evaluations(evaluations: Sequence[EvaluationRecord], *, as_json: bool) -> None:
    """A line an evaluation."""
    if as_json:
        print_json(evaluations)
        return
    table = plain_table("evaluation", "version", "wanted", "requested", "state", "took", "ended")
    for record in evaluations:
        table.add_row(
            str(record.number),
            str(record.version),
            str(record.wanted),
            utc_time(record.requested_at),
            _state(record),
            _took(record),
            record.reason,
        )
    console.print(table)


def show_evaluation(report: EvaluationReport, measures: FleetMeasures, *, as_json: bool) -> None:
    """One evaluation: who answered, what it is worth, how the devices differ."""
    record = report.evaluation
    if as_json:
        found = dataclasses.asdict(measures) | {"counts": _counts(report)}
        print_json({"evaluation": record, **found, "answers": report.answers})
        return
    ended = f" in {_took(record)}: {record.reason}" if record.closed_at is not None else ""
    console.print(
        f"evaluation {record.number} of version {record.version}: {_state(record)}{ended}"
    )
    console.print(progress_of(report))
    if measures.devices:
        console.print()
        _show_measures(measures)
        for measure in measures.measures:
            console.print()
            _show_histogram(measure)
        console.print()
        _show_worst(measures)
    if measures.gains:
        console.print()
        _show_gains(measures.gains)
    if measures.beyond_reason:
        console.print()
        console.print(
            f"left out: measures of {measures.beyond_reason} devices beyond {BEYOND_REASON:g}, "
            "which nobody can have found"
        )
    _show_silent(report)


def progress_of(report: EvaluationReport) -> str:
    """Who was asked and what they have said so far, in one line."""
    record, counts = report.evaluation, _counts(report)
    if record.opened_at is None and record.closed_at is None:
        return "waiting for the coordinator to begin"
    return (
        f"asked {counts['asked']}: measured {counts['ok']} of {record.wanted}, "
        f"no hold-out {counts['no_hold_out']}, failed {counts['failed']}, "
        f"no answer {counts['no_answer']}"
    )


def _counts(report: EvaluationReport) -> dict[str, int]:
    said = Counter(one.status for one in report.answers)
    return {
        "asked": len(report.answers),
        **{status.value: said[status] for status in EvaluationStatus},
        "no_answer": said[None],
    }


def _show_measures(found: FleetMeasures) -> None:
    console.print(f"{found.devices} devices, {found.examples:,} examples held out")
    headings = [_HEADINGS.get(name, name) for name in QUANTILES]
    table = plain_table("measure", "all examples", "mean device", *headings)
    for one in found.measures:
        table.add_row(
            one.name,
            "-" if one.mean is None else measure_text(one.name, one.mean),
            measure_text(one.name, one.device_mean),
            *(measure_text(one.name, value) for value in one.quantiles.values()),
        )
    console.print(table)


def _show_histogram(measure: Measure) -> None:
    histogram = measure.histogram
    console.print(f"devices by {measure.name}")
    width = (histogram.high - histogram.low) / len(histogram.counts)
    edges = [histogram.low + width * index for index in range(len(histogram.counts))]
    edges = [*edges, histogram.high]
    most = max(histogram.counts)
    for low, high, count in zip(edges, edges[1:], histogram.counts, strict=False):
        bar = "#" * max(round(BAR * count / most), 1 if count else 0)
        span = f"{measure_text(measure.name, low)} to {measure_text(measure.name, high)}"
        console.print(f"{span:>24}  {bar} {count or ''}".rstrip())


def _show_worst(found: FleetMeasures) -> None:
    names = [one.name for one in found.measures]
    shown = found.by_device[:WORST]
    console.print("the worst by loss")
    table = plain_table("device", "examples", *names)
    for one in shown:
        cells = (
            measure_text(name, one.measures[name]) if name in one.measures else "-"
            for name in names
        )
        table.add_row(one.device, str(one.examples), *cells)
    console.print(table)


def _show_gains(gains: Sequence[Gain]) -> None:
    console.print("personal copies against the version, each device on its own hold-out")
    table = plain_table("measure", "devices", "mean difference", "better on")
    for gain in gains:
        sign = "+" if gain.mean_difference >= 0 else "-"
        size = measure_text(gain.name, abs(gain.mean_difference))
        table.add_row(gain.name, str(gain.devices), f"{sign}{size}", f"{gain.better:.0%}")
    console.print(table)
    console.print("copies are kept for winning on the same hold-out: their gain looks too large")


def _show_silent(report: EvaluationReport) -> None:
    """Whoever did not measure, and why; of those that keep no hold-out the number is enough."""
    rest = [
        one
        for one in report.answers
        if one.status not in (EvaluationStatus.OK, EvaluationStatus.NO_HOLD_OUT)
    ]
    if not rest:
        return
    console.print()
    table = plain_table("did not measure", "answer", "why")
    for one in rest:
        said = "no answer" if one.status is None else one.status.value
        table.add_row(one.device, said, one.detail)
    console.print(table)


def _state(record: EvaluationRecord) -> str:
    if record.closed_at is not None:
        return "closed"
    return "waiting" if record.opened_at is None else "under way"


def _took(record: EvaluationRecord) -> str:
    if record.opened_at is None or record.closed_at is None:
        return "-"
    return f"{record.closed_at - record.opened_at:.1f} s"
