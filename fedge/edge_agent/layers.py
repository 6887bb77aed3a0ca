"""Which layers of a plan's model a personal training changes: chosen by names, without model code.

A layer is the tensors whose names are the same up to the last dot, as PyTorch names the parameters
and buffers of one module; layers stand in the order in which the plan lists their parameters, which
is that of the model's definition. What is frozen in the plan belongs to no layer: nobody trains it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import Field

from fedge.schemas.errors import ConfigError
from fedge.schemas.plan import PlanManifest, WeightSpec

Layers = (
    Literal["all"]
    | Annotated[int, Field(ge=1, le=4096, strict=True)]
    | Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=256)], ...], Field(min_length=1)
    ]
)
"""All of them, the last so many, or patterns of tensor names such as `head.*`."""


@dataclass(frozen=True, slots=True)
class Layer:
    """`name`: what its tensors' names begin with, empty for tensors without a module."""

    name: str
    weights: tuple[WeightSpec, ...]

    @property
    def parameter_count(self) -> int:
        """Numbers that training changes."""
        return sum(w.tensor.element_count for w in self.weights if w.role == "parameter")


def layers_of(manifest: PlanManifest) -> list[Layer]:
    """The layers that have parameters, in order, with their buffers."""
    found: dict[str, list[WeightSpec]] = {
        _layer_name(weight): [] for weight in manifest.weights if weight.role == "parameter"
    }
    for weight in manifest.weights:
        if weight.role != "frozen" and _layer_name(weight) in found:
            found[_layer_name(weight)].append(weight)
    return [Layer(name, tuple(weights)) for name, weights in found.items()]


def fixed_weights(manifest: PlanManifest, layers: Layers) -> frozenset[str]:
    """The tensors, by name, that stay as they are when `layers` are trained.

    Raises `ConfigError` if no parameter would be trained, naming those there are.
    """
    moving = [weight for weight in manifest.weights if weight.role != "frozen"]
    if layers == "all":
        return frozenset()
    if isinstance(layers, int):
        trained = [weight for layer in layers_of(manifest)[-layers:] for weight in layer.weights]
        if layers >= len(layers_of(manifest)):
            return frozenset()
    else:
        trained = [weight for weight in moving if _matches(weight, layers)]
    if not any(weight.role == "parameter" for weight in trained):
        names = ", ".join(weight.tensor.name for weight in moving if weight.role == "parameter")
        raise ConfigError(
            f"layers = {list(layers) if isinstance(layers, tuple) else layers} in "
            f"[personalisation] matches no parameter of the plan: it has {names[:500]}"
        )
    names_trained = {weight.tensor.name for weight in trained}
    return frozenset(w.tensor.name for w in moving if w.tensor.name not in names_trained)


def _layer_name(weight: WeightSpec) -> str:
    return weight.tensor.name.rpartition(".")[0]


def _matches(weight: WeightSpec, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(weight.tensor.name, pattern) for pattern in patterns)
