"""The end of a demonstration as text: versions, bytes, predictions, and where everything lies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedge.coordinator.demo.summary import Summary
from fedge.schemas.measures import measure_text

TYPED_CHARACTERS = 40
"""Of what was typed, the end that a table shows."""


def show(summary: Summary, console: Console) -> None:
    """Prints the summary."""
    console.print()
    console.print(_versions(summary))
    if summary.central_epochs is not None:
        console.print(
            "(central): the same model trained in one place, with as many passes over all examples"
        )
    console.print()
    console.print(_traffic(summary))
    console.print()
    console.print(_predictions(summary))
    right = [answer.right for answer in summary.predictions if answer.right is not None]
    if right:
        console.print(f"{sum(right)} of {len(right)} predictions are right")
    console.print()
    console.print(_places(summary))
    console.print(f"\n{_closing(summary)} (all of it took {summary.duration_s:.1f} s)")
    if summary.notice is not None:
        console.print(summary.notice)


def _versions(summary: Summary) -> Table:
    # Eight columns are what a narrow terminal shows.
    names = [*summary.measures, "loss"][:3]
    with_central = summary.central_epochs is not None
    table = _table()
    table.add_column("version", justify="right")
    table.add_column("passes", justify="right")
    for name in names:
        table.add_column(f"test {name}", justify="right")
        if with_central:
            table.add_column("(central)", justify="right")
    for line in summary.versions:
        cells = [str(line.version), f"{line.passes:.4g}"]
        for name in names:
            cells.append(_number(line.metrics, name))
            if with_central:
                cells.append(_number(line.central, name))
        table.add_row(*cells)
    return table


def _traffic(summary: Summary) -> Table:
    traffic = summary.traffic
    table = _table()
    for column in ("bytes", "", ""):
        table.add_column(column, justify="right" if column == "" else "left")
    rows = [
        ("up: updates that the coordinator accepted", traffic.updates_up),
        ("down: graphs and weights that reached the devices", traffic.fetched_down),
        ("published once by the coordinator for all devices", traffic.published),
    ]
    if traffic.broker is not None:
        rows += [
            ("received by the broker, protocol and all", traffic.broker.received),
            ("sent by the broker, protocol and all", traffic.broker.sent),
        ]
    for what, count in rows:
        table.add_row(what, f"{count:,}", f"{count / 1e6:.2f} MB")
    return table


def _predictions(summary: Summary) -> Table:
    table = _table()
    for column in ("predicted on", "version", "example", "truth", "prediction", "probability"):
        table.add_column(column)
    for answer in summary.predictions:
        wrong = "" if answer.right in (True, None) else "  (wrong)"
        table.add_row(
            answer.device,
            str(answer.version),
            _shown(answer.question.example),
            answer.question.truth,
            answer.predicted + wrong,
            "-" if answer.probability is None else f"{answer.probability:.1%}",
        )
    return table


def _shown(example: str) -> str:
    if example.endswith(".png"):
        return Path(example).name
    try:
        return ", ".join(f"{float(number):.3g}" for number in example.split(","))
    except ValueError:
        # What was typed: the end of it is what the next word follows.
        return f"… {example[-TYPED_CHARACTERS:].strip()}"


def _places(summary: Summary) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("picture", summary.report)
    table.add_row("model", f"{summary.model.path}  ({summary.model.size_bytes:,} bytes of ONNX)")
    table.add_row("logs", summary.logs)
    return table


def _closing(summary: Summary) -> str:
    last, name = summary.versions[-1], summary.metric or "loss"
    federated = f"{len(summary.devices)} devices reached {_number(last.metrics, name)} test {name}"
    if last.central is not None:
        return f"{federated}, one computer with all the data {_number(last.central, name)}"
    return federated


def _number(metrics: Mapping[str, float] | None, name: str) -> str:
    if metrics is None or name not in metrics:
        return "-"
    return measure_text(name, metrics[name])


def _table() -> Table:
    return Table(box=None, pad_edge=False, header_style="bold")
