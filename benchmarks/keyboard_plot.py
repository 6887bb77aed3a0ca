"""The picture of `keyboard.py`: how recall grew, where it ended, and what each device gained.

Colours are those of Okabe and Ito ("Color Universal Design", 2008), as in the demonstration.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator, PercentFormatter

COLOURS = {
    "ngram": "#000000", "own_ngram": "#999999", "central": "#D55E00", "central_sgd": "#E69F00",
    "federated": "#0072B2", "personal": "#009E73",
}  # fmt: skip
NAMES = {
    "ngram": "n-gram, central", "own_ngram": "n-gram, own texts", "central": "central, Adam",
    "central_sgd": "central, SGD", "federated": "federated", "personal": "federated + personal",
}  # fmt: skip


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Writes three panels, as the name says: .svg or .png. The same report, the same bytes."""
    methods = report["methods"]
    style = {"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "fedge"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(12.6, 3.9), dpi=110, layout="constrained")
        learned, ended, gained = figure.subplots(1, 3, width_ratios=(1.2, 1, 1.1))
        _learned(learned, methods)
        _ended(ended, methods, report["measured_on"])
        _gained(gained, methods)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _learned(axes: Axes, methods: Mapping[str, Any]) -> None:
    for method, marker in (("central", "s"), ("central_sgd", "^"), ("federated", "o")):
        if method in methods:
            curve = methods[method]["curve"]
            passes = [point["passes"] for point in curve]
            for name, line in (("top3", "-"), ("top1", "--")):
                axes.plot(
                    passes, [point[name] for point in curve], line, color=COLOURS[method],
                    marker=marker, markersize=3.5, label=f"{NAMES[method]}, {name[:3]}-{name[3:]}",
                )  # fmt: skip
    if "ngram" in methods:
        best = methods["ngram"]["by_order"]
        order = next(one for one in best if str(one) == str(methods["ngram"]["order"]))
        for name, line in (("top3", "-"), ("top1", "--")):
            axes.axhline(
                best[order][name], color=COLOURS["ngram"], linestyle=line, linewidth=0.9,
                label=f"n-gram, {name[:3]}-{name[3:]}",
            )  # fmt: skip
    axes.set_title("Recall on validation texts")
    axes.set_xlabel("passes over the data")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.yaxis.set_major_locator(MultipleLocator(0.02))
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, loc="lower right")


def _ended(axes: Axes, methods: Mapping[str, Any], part: str) -> None:
    width = 0.8 / len(methods)
    for at, (method, one) in enumerate(methods.items()):
        places = [group + (at - (len(methods) - 1) / 2) * width for group in (0, 1)]
        bars = axes.bar(
            places, [one["top1"], one["top3"]], width * 0.92, color=COLOURS[method],
            label=NAMES[method],
        )  # fmt: skip
        axes.bar_label(
            bars, [f"{100 * one[name]:.1f}" for name in ("top1", "top3")], fontsize=7.5, padding=1
        )
    axes.set_title(f"Recall on {part} texts, all devices")
    axes.set_xticks([0, 1], ["top-1", "top-3"])
    axes.yaxis.set_major_locator(MultipleLocator(0.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(visible=False, axis="x")
    axes.legend(fontsize=7.5, loc="upper left")


def _gained(axes: Axes, methods: Mapping[str, Any]) -> None:
    axes.set_title("A device's gain by its own copy, top-3")
    axes.axhline(0, color="#000000", linewidth=0.9)
    axes.set_xlabel("words that the device is tested on")
    axes.set_ylabel("points of recall, personal - federated")
    if "personal" not in methods:
        return
    devices = methods["personal"]["devices"]
    gains = [100 * (one["after"]["top3"] - one["before"]["top3"]) for one in devices]
    colours = [_colour(gain) for gain in gains]
    axes.scatter([one["words"] for one in devices], gains, s=16, c=colours, alpha=0.8)
    axes.set_xscale("log")


def _colour(gain: float) -> str:
    if gain == 0:
        return COLOURS["own_ngram"]
    return COLOURS["personal" if gain > 0 else "central"]
