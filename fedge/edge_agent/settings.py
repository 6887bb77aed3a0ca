"""The agent's configuration: one TOML file, parsed once, every key known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedge.edge_agent.apps.settings import AppsSettings
from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.eligibility import EligibilitySettings
from fedge.edge_agent.engines import EngineName
from fedge.edge_agent.example_limits import ExampleLimits
from fedge.edge_agent.participation import ParticipationSettings
from fedge.edge_agent.personalisation import PersonalisationSettings
from fedge.edge_agent.trainer.process import TrainerLimits
from fedge.edge_agent.word_counts import WordCountSettings
from fedge.schemas.ids import DeviceName, PopulationName
from fedge.schemas.link.broker import BrokerSettings
from fedge.schemas.toml_settings import read_toml


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TrainerSettings(_Table):
    """`[trainer]`: what the training process may take. See `TrainerLimits`."""

    threads: Annotated[int, Field(ge=1, le=256)] = 1
    memory_limit_bytes: Annotated[int, Field(ge=64 * 1024 * 1024)] | None = None
    time_limit_s: Annotated[float, Field(gt=0)] = 3600.0
    keep_warm_s: Annotated[float, Field(ge=0)] = 60.0
    nice: Annotated[int, Field(ge=0, le=19)] = 10

    @property
    def limits(self) -> TrainerLimits:
        """What the training process is started with."""
        return TrainerLimits(
            memory_limit_bytes=self.memory_limit_bytes,
            time_limit_s=self.time_limit_s,
            keep_warm_s=self.keep_warm_s,
            nice=self.nice,
        )


class StorageSettings(_Table):
    """`[storage]`: what the state folder may hold.

    `cache_limit_bytes`: of all blobs of versions together, None: no limit. The version in hand and
    the one that is fetched must fit; see `fedge.edge_agent.cache`.
    """

    cache_limit_bytes: Annotated[int, Field(ge=1)] | None = None


class ExampleSettings(_Table):
    """`[examples]`: what is kept of what is typed on this device. See `ExampleLimits`."""

    keep_days: Annotated[float, Field(gt=0, le=36500)] = 30.0
    limit_bytes: Annotated[int, Field(ge=65536)] = 16 * 1024 * 1024
    hold_out: Annotated[float, Field(ge=0, lt=1)] = 0.1

    @property
    def limits(self) -> ExampleLimits:
        """What the store is opened with."""
        return ExampleLimits(
            keep_days=self.keep_days, limit_bytes=self.limit_bytes, hold_out=self.hold_out
        )


class Settings(_Table):
    """The file. `device`: this device's name, unique in its population. `data`: its examples.

    Without `data` the device only follows the versions and predicts. Without `eligibility` no rule
    of the host's state applies: it may train at any time.
    """

    population: PopulationName
    device: DeviceName
    state_dir: Path
    engine: EngineName = EngineName.AUTO
    log_format: Literal["text", "json"] = "text"
    broker: BrokerSettings = BrokerSettings()
    data: DataConfig | None = None
    trainer: TrainerSettings = TrainerSettings()
    storage: StorageSettings = StorageSettings()
    eligibility: EligibilitySettings | None = None
    participation: ParticipationSettings = ParticipationSettings()
    examples: ExampleSettings = ExampleSettings()
    personalisation: PersonalisationSettings | None = None
    apps: AppsSettings = AppsSettings()
    word_counts: WordCountSettings = WordCountSettings()


def load(path: Path) -> Settings:
    """The settings in `path`, relative paths taken from its folder. Raises `ConfigError`."""
    settings = read_toml(path, Settings)
    folder = path.parent
    return settings.model_copy(
        update={
            "state_dir": folder / settings.state_dir,
            "broker": settings.broker.relative_to(folder),
            "data": None if settings.data is None else settings.data.relative_to(folder),
            "eligibility": (
                None if settings.eligibility is None else settings.eligibility.relative_to(folder)
            ),
        }
    )
