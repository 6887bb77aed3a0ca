"""The picture of a demonstration: how accuracy and loss went, for all and for each device.

Colours are those of Okabe and Ito ("Color Universal Design", 2008), which colour-blind readers can
tell apart; lines differ in markers too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from fedge.coordinator.demo.summary import DeviceCurve, Summary, pictures
from fedge.schemas.measures import is_share

BLUE, ORANGE = "#0072B2", "#D55E00"
PALETTE = (BLUE, "#E69F00", "#009E73", "#CC79A7", "#56B4E9", ORANGE, "#F0E442", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MAX_LEGEND = 8
COLUMNS = 3
SMOOTHED_POINTS = 60
"""A curve by batch is averaged over neighbours to about this many points."""

Draw = Callable[[Axes, Summary], None]


def draw_report(summary: Summary, path: Path) -> None:
    """Writes the picture as PNG."""
    panels: list[Draw] = [_accuracy] if summary.metric is not None else []
    panels += [_loss, _loss_by_device, _loss_by_epoch, _loss_by_batch]
    if pictures(summary):
        panels.append(_pictures)
    columns = COLUMNS if len(panels) != 4 else 2
    rows = -(-len(panels) // columns)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    with mpl.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(4.6 * columns, 3.5 * rows + 0.5), dpi=110, layout=layout)
        figure.suptitle(_title(summary), fontsize=11)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel, one in zip(panels, axes, strict=False):
            panel(one, summary)
        for unused in axes[len(panels) :]:
            unused.set_axis_off()
        figure.savefig(path)


def _title(summary: Summary) -> str:
    return (
        f"{summary.task}: {len(summary.devices)} devices, split {summary.split}, "
        f"{summary.strategy}, {summary.rounds} rounds of {summary.local_epochs} local "
        f"{'epoch' if summary.local_epochs == 1 else 'epochs'}"
    )


def _accuracy(axes: Axes, summary: Summary) -> None:
    name = summary.metric or "accuracy"
    _by_version(axes, summary, name)
    axes.set_title(f"Test {name} by round")
    if is_share(name):
        axes.set_ylabel(f"test {name} (%)")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=""))
        if name == "accuracy":
            axes.set_ylim(top=1.005)
    else:
        axes.set_ylabel(f"test {name}")
        _log_scale_if_wide(axes, [line.metrics.get(name, 0.0) for line in summary.versions])


def _loss(axes: Axes, summary: Summary) -> None:
    _by_version(axes, summary, "loss")
    axes.set_title("Test loss by round")
    axes.set_ylabel("mean loss of a test example")
    _log_scale_if_wide(axes, [line.metrics.get("loss", 0.0) for line in summary.versions])


def _by_version(axes: Axes, summary: Summary, name: str) -> None:
    lines = [line for line in summary.versions if name in line.metrics]
    axes.plot(
        [line.version for line in lines],
        [line.metrics[name] for line in lines],
        color=BLUE,
        marker="o",
        markersize=4,
        label="federated",
    )
    beside = [line for line in summary.versions if line.central is not None]
    if beside:
        axes.plot(
            [line.version for line in beside],
            [(line.central or {})[name] for line in beside],
            color=ORANGE,
            marker="s",
            markersize=4,
            linestyle="--",
            label="central, same passes over the data",
        )
    axes.set_xlabel("round (0: before training)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()


def _loss_by_device(axes: Axes, summary: Summary) -> None:
    for (name, curve), (colour, marker) in _styled(summary):
        rounds = sorted(curve.by_round)
        losses = [curve.by_round[number] for number in rounds]
        axes.plot(rounds, losses, color=colour, marker=marker, markersize=3.5, label=name)
    axes.set_title("Training loss by device")
    axes.set_xlabel("round")
    axes.set_ylabel("loss of the last local epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _log_scale_if_wide(axes, [v for c in summary.devices.values() for v in c.by_round.values()])
    _legend(axes, summary)


def _loss_by_epoch(axes: Axes, summary: Summary) -> None:
    for (name, curve), (colour, marker) in _styled(summary):
        epochs = range(1, len(curve.by_epoch) + 1)
        axes.plot(epochs, curve.by_epoch, color=colour, marker=marker, markersize=2.5, label=name)
    axes.set_title("Training loss by local epoch")
    axes.set_xlabel("local epoch on the device, all rounds")
    axes.set_ylabel("mean loss of the epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _log_scale_if_wide(axes, [v for c in summary.devices.values() for v in c.by_epoch])
    _legend(axes, summary)


def _loss_by_batch(axes: Axes, summary: Summary) -> None:
    shown = []
    for (name, curve), (colour, _) in _styled(summary):
        steps, losses = smoothed(curve)
        axes.plot(steps, losses, color=colour, linewidth=0.9, label=name)
        shown += losses
    axes.set_title("Training loss by batch")
    axes.set_xlabel("batch on the device, all rounds")
    axes.set_ylabel("loss (mean of neighbouring batches)")
    _log_scale_if_wide(axes, shown)
    _legend(axes, summary)


def smoothed(curve: DeviceCurve) -> tuple[list[float], list[float]]:
    """The curve by batch as (batch numbers, means of neighbours), of `SMOOTHED_POINTS` or fewer."""
    losses = np.asarray(curve.by_batch, np.float64)
    if losses.size == 0:
        return [], []
    pieces = np.array_split(losses, min(SMOOTHED_POINTS, losses.size))
    ends = np.cumsum([piece.size for piece in pieces])
    steps = ends * (curve.steps / losses.size)
    return [float(step) for step in steps], [float(piece.mean()) for piece in pieces]


def _pictures(axes: Axes, summary: Summary) -> None:
    axes.set_axis_off()
    axes.set_title("Predicted by devices that never saw these")
    shown = pictures(summary)
    columns = min(5, len(shown))
    rows = -(-len(shown) // columns)
    for place, (path, answer) in enumerate(shown):
        left, down = place % columns, place // columns
        width, height = 1 / columns, 1 / rows
        inset = axes.inset_axes(
            (left * width + 0.02, 1 - (down + 1) * height + 0.02, width - 0.04, height - 0.16)
        )
        with Image.open(path) as image:
            inset.imshow(np.asarray(image), cmap="gray_r", interpolation="nearest")
        right = answer.right is not False
        sure = "" if answer.probability is None else f" ({answer.probability:.0%})"
        truth = "" if right else f"\nis {answer.question.truth}"
        inset.set_title(
            f"{answer.predicted}{sure}{truth}", fontsize=8, color="black" if right else ORANGE
        )
        inset.set_xticks([])
        inset.set_yticks([])
        inset.grid(visible=False)


def _styled(
    summary: Summary,
) -> list[tuple[tuple[str, DeviceCurve], tuple[str | tuple[float, ...], str]]]:
    devices = list(summary.devices.items())
    if len(devices) <= MAX_LEGEND:
        colours: Sequence[str | tuple[float, ...]] = PALETTE[: len(devices)]
    else:
        shades = mpl.colormaps["viridis"](np.linspace(0, 0.95, len(devices)))
        colours = [tuple(float(part) for part in shade) for shade in shades]
    return list(zip(devices, zip(colours, cycle(MARKERS), strict=False), strict=False))


def _legend(axes: Axes, summary: Summary) -> None:
    if len(summary.devices) <= MAX_LEGEND:
        axes.legend(fontsize=7)


def _log_scale_if_wide(axes: Axes, values: Sequence[float]) -> None:
    positive = [value for value in values if value > 0]
    if positive and len(positive) == len(values) and max(positive) > 20 * min(positive):
        axes.set_yscale("log")
