"""The schemes by which one data set becomes several devices': their names and numbers.

A simulation names one; `fedge.edge_agent.data.partition` carries it out. Both programs read the
same words, so that a wrong one is refused before anything is started.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedge.schemas.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Iid:
    """Random parts whose sizes differ by at most one."""

    def __str__(self) -> str:
        return "iid"


@dataclass(frozen=True, slots=True)
class Ordered:
    """Equal runs in the order of the data, sizes differing by at most one."""

    def __str__(self) -> str:
        return "ordered"


@dataclass(frozen=True, slots=True)
class Shards:
    """Sorted by label, cut into `per_part` shards for each part, dealt at random."""

    per_part: int = 2

    def __str__(self) -> str:
        return "shards"


@dataclass(frozen=True, slots=True)
class Dirichlet:
    """Parts of even size, each with its own mixture of classes.

    A mixture is drawn from a Dirichlet distribution with concentration `alpha * classes * p`, `p`
    being the frequencies of the classes in the whole: for equally frequent classes, `alpha` each.
    (Hsu et al. write `alpha * p`; later work counts `alpha` for each class, as here.) Small means
    few classes a part. A class that runs out is left out of later parts' mixtures.
    """

    alpha: float

    def __str__(self) -> str:
        return f"dirichlet:{self.alpha:g}"


@dataclass(frozen=True, slots=True)
class Weighted:
    """Random parts whose sizes are as `weights` to each other; no part is empty."""

    weights: tuple[float, ...]

    def __str__(self) -> str:
        return "weighted:" + ",".join(f"{weight:g}" for weight in self.weights)


Scheme = Iid | Ordered | Shards | Dirichlet | Weighted


def parse_scheme(text: str) -> Scheme:
    """`iid`, `ordered`, `shards`, `dirichlet:ALPHA` or `weighted:W0,W1,…` as a scheme.

    Raises `ConfigError` for any other text, or a number that is not positive and finite.
    """
    kind, separator, argument = text.strip().partition(":")
    match kind, bool(separator):
        case "iid", False:
            return Iid()
        case "ordered", False:
            return Ordered()
        case "shards", False:
            return Shards()
        case "dirichlet", True:
            return Dirichlet(_positive(argument, text))
        case "weighted", True:
            return Weighted(tuple(_positive(part, text) for part in argument.split(",")))
        case _:
            raise ConfigError(
                f"partition scheme {text!r}: use iid, ordered, shards, dirichlet:0.3 or "
                "weighted:0.6,0.3,0.1"
            )


def _positive(text: str, scheme: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise ConfigError(f"partition scheme {scheme!r}: {text!r} is not a number") from error
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"partition scheme {scheme!r}: {text!r} must be positive and finite")
    return value
