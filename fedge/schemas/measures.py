"""Measures: what is told of sums over examples.

A graph gives sums, one a metric, because sums of devices can be added and means cannot. What people
read are means over the examples, or ratios of two sums: a recall over words, a perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MetricName = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,40}$")]

_LARGEST_EXPONENT = 700.0
"""Of e, that a float holds."""


_ROUNDING = 1e-5
"""How far float32 sums may be from what they are sums of, relatively."""


class RatioSpec(BaseModel):
    """A measure that is one metric's sum over another's, e to the power of it if `exponential`.

    What it is a ratio to is a count.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: MetricName
    numerator: MetricName
    denominator: MetricName
    exponential: bool = False


def measure_names(metrics: Sequence[str], ratios: Sequence[RatioSpec]) -> tuple[str, ...]:
    """The names under which something is told: metrics that are in no ratio, then ratios."""
    parts = {part for ratio in ratios for part in (ratio.numerator, ratio.denominator)}
    return (*(name for name in metrics if name not in parts), *(ratio.name for ratio in ratios))


def measured(
    sums: Mapping[str, float], examples: int, metrics: Sequence[str], ratios: Sequence[RatioSpec]
) -> dict[str, float]:
    """Sums of the metrics over so many examples → each measure by its name.

    What is not finite is left out, as is a ratio to nothing.
    """
    by_name = {ratio.name: ratio for ratio in ratios}
    found: dict[str, float] = {}
    for name in measure_names(metrics, ratios):
        ratio = by_name.get(name)
        total = sums.get(name if ratio is None else ratio.numerator, math.nan)
        over = float(examples) if ratio is None else sums.get(ratio.denominator, 0.0)
        value = total / over if over else math.nan
        if ratio is not None and ratio.exponential:
            value = math.exp(value) if value < _LARGEST_EXPONENT else math.inf
        if math.isfinite(value):
            found[name] = value
    return found


def impossible(
    sums: Mapping[str, float], examples: int, metrics: Sequence[str], ratios: Sequence[RatioSpec]
) -> str | None:
    """Why nobody can have found these sums over so many examples; None if somebody may have.

    A count is 0, or 1 and more, and a share is from 0 to 1. Of other measures nothing is known.
    """
    for ratio in ratios:
        count = sums.get(ratio.denominator, 0.0)
        if count < 0 or 0 < count < 1 - _ROUNDING:
            return f"{ratio.denominator} is {count:g}, which is no count"
    shares = {
        ratio.name: (sums.get(ratio.numerator, 0.0), sums.get(ratio.denominator, 0.0))
        for ratio in ratios
        if not ratio.exponential
    }
    alone = set(measure_names(metrics, ratios)) - {ratio.name for ratio in ratios}
    shares |= {name: (sums.get(name, 0.0), float(examples)) for name in alone}
    for name, (part, whole) in sorted(shares.items()):
        if not is_share(name):
            continue
        if not -_ROUNDING * whole <= part <= (1 + _ROUNDING) * whole:
            return f"{name} is {part:g} of {whole:g}, which is no share"
    return None


def is_share(name: str) -> bool:
    """Whether a measure of this name is a share, from 0 to 1."""
    return name == "accuracy" or name.endswith("_recall")


def measure_text(name: str, value: float) -> str:
    """A measure for people: a share in percent."""
    return f"{value:.2%}" if is_share(name) else f"{value:.4f}"
