"""Whether this device fine-tunes the version in use for itself now, and if not, why.

Pure: the operator's settings, what there is to learn from, what was done before and the clock come
in; one decision goes out. A personal training is nobody's hurry: it waits until a version has
stayed for a while, until nothing is done for a round, and until the rules for training hold; what
was done for a version is not done again unless the examples are others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from fedge.edge_agent.layers import Layers
from fedge.edge_agent.personal_models import PersonalRecord
from fedge.edge_agent.training_settings import TrainingSettings
from fedge.schemas.ids import sha256
from fedge.schemas.plan import TrainingDefaults

LONGEST_REST_S = 3600.0
"""Between two attempts for one version that came to nothing."""


class PersonalisationSettings(BaseModel):
    """`[personalisation]`: a model of this device's own, from each version.

    `layers`: `"all"`, the last so many, or patterns of tensor names, see `fedge.edge_agent.layers`.
    `epochs`, `learning_rate`, `proximal_mu`: of the personal training; the learning rate is the
    plan's unless it is set. `min_examples`, `min_hold_out`: with fewer to train or to compare on,
    nothing is done. `settle_s`: a version must have been in use for so long. `again_after`: for the
    same version it is done again when so large a share of the examples has come or gone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: Layers = "all"
    epochs: Annotated[int, Field(ge=1, le=1000)] = 3
    learning_rate: Annotated[float, Field(gt=0, le=1e3, allow_inf_nan=False)] | None = None
    proximal_mu: Annotated[float, Field(ge=0, le=1e3, allow_inf_nan=False)] = 0.0
    min_examples: Annotated[int, Field(ge=1)] = 20
    min_hold_out: Annotated[int, Field(ge=1)] = 10
    settle_s: Annotated[float, Field(ge=0, le=86400, allow_inf_nan=False)] = 60.0
    again_after: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] = 0.2

    @property
    def digest(self) -> str:
        """Of what decides how a personal model is made, and not when."""
        made_by = {"layers", "epochs", "learning_rate", "proximal_mu"}
        return sha256(self.model_dump_json(include=made_by).encode())

    def training(self, defaults: TrainingDefaults, seed: int) -> TrainingSettings:
        """How to train, with what the plan's author chose."""
        return TrainingSettings(
            seed=seed,
            batch_size=defaults.batch_size,
            learning_rate=self.learning_rate or defaults.learning_rate,
            local_epochs=self.epochs,
            proximal_mu=self.proximal_mu,
        )


def seed_for(population: str, device: str, version: int) -> int:
    """The same for the same version of the same device."""
    return int(sha256(f"personal/{population}/{device}/{version}".encode())[:8], 16)


@dataclass(frozen=True, slots=True)
class Material:
    """What there is to learn from. `generation`: of the example store, None for other data."""

    training: int
    hold_out: int
    generation: int | None = None

    @property
    def examples(self) -> int:
        """On both sides."""
        return self.training + self.hold_out


@dataclass(frozen=True, slots=True)
class Situation:
    """What the decision depends on. Times are of one clock, in seconds.

    `version`: in use, its blobs here, and none newer on its way; None: not so. `since_s`: when that
    began. `eligible`: the rules for training hold. `busy`: something is done for a round.
    `material`: None while it is not counted. `record`: of the last personal training. `attempts`:
    for this version that came to nothing, the last of them at `attempt_s`.
    """

    version: int | None
    since_s: float
    eligible: bool
    busy: bool
    material: Material | None
    record: PersonalRecord | None = None
    attempts: int = 0
    attempt_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Begin:
    """Train for this version now, from what there is."""

    version: int
    material: Material


@dataclass(frozen=True, slots=True)
class Wait:
    """Not now. `until_s`: look again then at the latest; None: when something changes.

    `passing`: what is in the way comes and goes by itself, with every version and round.
    """

    reason: str
    until_s: float | None = None
    passing: bool = False


def decide(  # noqa: PLR0911 -- one for each thing that may be in the way
    settings: PersonalisationSettings, now: Situation, now_s: float
) -> Begin | Wait:
    """What to do now."""
    if now.version is None:
        return Wait("no version is in use, or a newer one is on its way", passing=True)
    if now.material is None:
        return Wait("the examples are not counted")
    if now.material.training < settings.min_examples:
        return Wait(f"min_examples: {now.material.training} here, {settings.min_examples} wanted")
    if now.material.hold_out < settings.min_hold_out:
        return Wait(
            f"min_hold_out: {now.material.hold_out} held out, {settings.min_hold_out} wanted"
        )
    if now.record is not None and is_up_to_date(settings, now.record, now.version, now.material):
        return Wait("it is done for this version and these examples")
    begin_s = now.since_s + settings.settle_s
    if now.attempts:
        begin_s = max(begin_s, now.attempt_s + rest_after(now.attempts, settings.settle_s))
    if now_s < begin_s:
        why = "the version has not stayed for settle_s, or an attempt was cut off"
        return Wait(why, begin_s, passing=True)
    if now.busy:
        return Wait("something is done for a round", passing=True)
    if not now.eligible:
        return Wait("the rules for training do not hold")
    return Begin(now.version, now.material)


def is_up_to_date(
    settings: PersonalisationSettings, record: PersonalRecord, version: int, material: Material
) -> bool:
    """Whether what `record` says still holds: the same version, settings, and much the same data.

    A forget makes all of it void, however little was forgotten.
    """
    if (record.version, record.settings_sha256) != (version, settings.digest):
        return False
    if record.generation != material.generation:
        return False
    before = record.training + record.hold_out
    return abs(material.examples - before) < settings.again_after * max(before, 1)


def rest_after(attempts: int, settle_s: float) -> float:
    """Seconds until the next attempt after so many in vain: doubling, an hour at the most."""
    return min(max(settle_s, 1.0) * 2.0 ** min(attempts - 1, 16), LONGEST_REST_S)
