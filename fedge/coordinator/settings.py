"""The coordinator's configuration: one TOML file, parsed once, every key known.

Paths are taken from the folder of the file. An unknown key is an error that names the nearest
known one, since a misspelt `deadline_s` that is silently ignored costs a night.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fedge.coordinator.aggregation import Weighting
from fedge.coordinator.rollouts import ServingMode
from fedge.coordinator.rounds import Mode, RoundPolicy, Strategy, quorum_of
from fedge.coordinator.server_optimizer import ServerOptimizerConfig, SgdConfig
from fedge.coordinator.store import Retention, Terms
from fedge.coordinator.uploads import SAFE_QUEUE_MESSAGES
from fedge.schemas.blobs import DEFAULT_CHUNK_BYTES, MAX_CHUNK_BYTES, MIN_CHUNK_BYTES
from fedge.schemas.ids import PopulationName, Seed
from fedge.schemas.link.broker import BrokerSettings
from fedge.schemas.messages import TrialChecks
from fedge.schemas.plan import TrainingDefaults
from fedge.schemas.quantization import Scheme
from fedge.schemas.toml_settings import read_toml

CONCURRENCY_FACTOR = 4
"""Devices that train at a time for each update of the goal, in asynchronous mode."""


Share = Annotated[float, Field(gt=0, le=1)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RoundSettings(_Table):
    """`[round]`: see `RoundPolicy`. `versions`: stop after this many; without it, go on.

    `concurrency`: in asynchronous mode, devices that train at a time; without it 4 for each update
    of the goal. `checkins_per_s`: a large fleet is spread so that no more come.
    `max_update_norm`: L2 in weight units; a larger update is refused. The default only stops
    absurd numbers: set it near what honest devices send.
    `weighting`: `examples` as in FedAvg, or `uniform`, so that no device gains weight by its claim.
    """

    goal: Annotated[int, Field(ge=1, le=100_000)] = 1
    quorum: Annotated[int, Field(ge=1)] | None = None
    over_selection: Annotated[float, Field(ge=1, le=10)] = 1.3
    gather_s: Annotated[float, Field(ge=0)] = 30.0
    deadline_s: Annotated[float, Field(gt=0)] = 600.0
    retry_s: Annotated[float, Field(ge=0)] = 0.0
    checkin_spread_s: Annotated[float, Field(ge=0)] = 0.0
    mode: Mode = Mode.SYNC
    strategy: Strategy = Strategy.FEDAVG
    concurrency: Annotated[int, Field(ge=1, le=100_000)] | None = None
    max_staleness: Annotated[int, Field(ge=0, le=10_000)] = 20
    checkins_per_s: Annotated[float, Field(gt=0)] = 500.0
    max_devices: Annotated[int, Field(ge=1)] = 100_000
    weighting: Weighting = Weighting.EXAMPLES
    versions: Annotated[int, Field(ge=1)] | None = None
    max_update_norm: Annotated[float, Field(gt=0)] = 1e4

    @model_validator(mode="after")
    def _quorum_within_goal(self) -> RoundSettings:
        if self.quorum is not None and self.quorum > self.goal:
            raise ValueError(f"quorum {self.quorum} is above the goal {self.goal}")
        return self

    @model_validator(mode="after")
    def _asynchronous_settings(self) -> RoundSettings:
        if self.mode is Mode.ASYNC and self.strategy is Strategy.CYCLIC:
            raise ValueError("strategy 'cyclic' is one device after another: it needs mode 'sync'")
        if self.concurrency is not None and self.concurrency < self.goal:
            raise ValueError(f"concurrency {self.concurrency} is below the goal {self.goal}")
        return self

    @property
    def policy(self) -> RoundPolicy:
        """What the round machine is given."""
        return RoundPolicy(
            goal=self.goal,
            quorum=self.quorum or quorum_of(self.goal),
            over_selection=self.over_selection,
            gather_s=self.gather_s,
            deadline_s=self.deadline_s,
            retry_s=self.retry_s,
            strategy=self.strategy,
            mode=self.mode,
            concurrency=self.concurrency or CONCURRENCY_FACTOR * self.goal,
            max_staleness=self.max_staleness,
        )


class TrainingSettings(_Table):
    """`[training]`: what assignments say; what is left out comes from the task's defaults."""

    batch_size: Annotated[int, Field(ge=1, le=65536)] | None = None
    learning_rate: Annotated[float, Field(gt=0, le=1e3)] | None = None
    local_epochs: Annotated[int, Field(ge=0, le=1000)] | None = None
    local_steps: Annotated[int, Field(ge=0)] | None = None
    proximal_mu: Annotated[float, Field(ge=0, le=1e3)] | None = None

    def over(self, defaults: TrainingDefaults) -> ResolvedTraining:
        """These settings where they are set, the plan's defaults elsewhere."""
        chosen = defaults.model_dump() | self.model_dump(exclude_none=True)
        return ResolvedTraining(**chosen)


class ResolvedTraining(_Table):
    """What goes into each assignment."""

    batch_size: int
    learning_rate: float
    local_epochs: int
    local_steps: int | None = None
    proximal_mu: float


class UploadSettings(_Table):
    """`[uploads]`: credit. `slots * window` stays below the broker's queue limit."""

    slots: Annotated[int, Field(ge=1, le=500)] = 16
    window: Annotated[int, Field(ge=1, le=500)] = 32
    silence_s: Annotated[float, Field(gt=0)] = 15.0

    @model_validator(mode="after")
    def _below_the_queue(self) -> UploadSettings:
        if self.slots * self.window >= SAFE_QUEUE_MESSAGES:
            raise ValueError(
                f"slots * window is {self.slots * self.window}; keep it below "
                f"{SAFE_QUEUE_MESSAGES}, the queue of a broker with default settings"
            )
        return self


class EvaluationSettings(_Table):
    """`[evaluation]`: a test set on the coordinator. `path`: an .npz file with `x` and `y`.

    `every`: measure only versions whose number this divides.
    """

    path: Path
    every: Annotated[int, Field(ge=1)] = 1
    threads: Annotated[int, Field(ge=1, le=64)] = 1


class ExportSettings(_Table):
    """`[export]`: the file that devices predict with. `quantization`: without it what the task
    says, and for a population that has versions what its plan says.
    """

    quantization: Scheme | None = None


class StoreSettings(_Table):
    """`[store]`: where the state lies, if not all of it in `state_dir`.

    `database`: the URL of a PostgreSQL database. `blobs`: an fsspec URL, such as `s3://…`.
    """

    database: str | None = None
    blobs: str | None = None

    @field_validator("database", "blobs")
    @classmethod
    def _no_password(cls, url: str | None) -> str | None:
        # A password in a configuration is read by whoever reads the file, and is in every copy.
        if url is not None and (urlsplit(url).password or "password=" in urlsplit(url).query):
            raise ValueError(
                "a password never stands in a configuration: for PostgreSQL put it into ~/.pgpass "
                "or the file that PGPASSFILE names, for other places as their driver says"
            )
        return url

    @field_validator("database")
    @classmethod
    def _is_postgresql(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("postgresql:", "postgresql+psycopg:")):
            raise ValueError(
                "write postgresql+psycopg://user@host/database; without this key the database is "
                "an SQLite file in state_dir"
            )
        return url

    @field_validator("blobs")
    @classmethod
    def _is_a_url(cls, url: str | None) -> str | None:
        if url is not None and "://" not in url:
            raise ValueError(
                "write a URL, such as s3://bucket/folder or file:///mnt/folder; without this key "
                "the blobs are files in state_dir"
            )
        return url


class RolloutSettings(_Table):
    """`[rollout]`: see `RolloutPolicy`, `ServingMode` and `TrialChecks`.

    `max_loss_increase`: on a device's own hold-out, relative to the version in use there.
    """

    mode: ServingMode = ServingMode.EVERY
    stages: Annotated[tuple[Share, ...], Field(min_length=1, max_length=20)] = (0.01, 0.1, 0.5, 1.0)
    soak_s: Annotated[float, Field(ge=0, le=30 * 86400)] = 3600.0
    min_devices: Annotated[int, Field(ge=1, le=100_000)] = 10
    min_answered: Annotated[float, Field(gt=0, le=1)] = 0.5
    max_failure_share: Annotated[float, Field(ge=0, lt=1)] = 0.2
    max_loss_increase: Annotated[float, Field(ge=0, le=1e6)] = 0.1
    min_hold_out: Annotated[int, Field(ge=1)] = 20
    max_latency_ms: Annotated[float, Field(gt=0)] | None = None
    max_latency_ratio: Annotated[float, Field(ge=1)] | None = None

    @field_validator("stages")
    @classmethod
    def _rise_to_all(cls, stages: tuple[float, ...]) -> tuple[float, ...]:
        if list(stages) != sorted(set(stages)) or stages[-1] != 1:
            raise ValueError(
                "each stage is above the one before and the last is 1.0, all devices: for "
                "instance [0.01, 0.1, 0.5, 1.0]"
            )
        return stages

    def terms(self, *, straight: bool = False) -> Terms:
        """What a rollout begins with. `straight`: to all devices at once, watched all the same."""
        return Terms(
            stages=(1.0,) if straight else self.stages,
            soak_s=self.soak_s,
            min_devices=self.min_devices,
            min_answered=self.min_answered,
            max_failure_share=self.max_failure_share,
            checks=TrialChecks(
                max_loss_increase=self.max_loss_increase,
                min_hold_out=self.min_hold_out,
                max_latency_ms=self.max_latency_ms,
                max_latency_ratio=self.max_latency_ratio,
            ),
        )


class RetentionSettings(_Table):
    """`[retention]`: see `Retention`; what is left out is kept for good."""

    versions: Annotated[int, Field(ge=2)] | None = None
    rounds: Annotated[int, Field(ge=1)] | None = None
    devices_unseen_days: Annotated[float, Field(gt=0)] | None = None
    evaluations: Annotated[int, Field(ge=1)] | None = None
    rollouts: Annotated[int, Field(ge=1)] | None = None
    word_counts: Annotated[int, Field(ge=1)] | None = None

    @property
    def wish(self) -> Retention:
        """What the store is given."""
        return Retention(**self.model_dump())


class Settings(_Table):
    """The file. `task`: a built-in name, `file.py:attribute` or `package.module:attribute`."""

    population: PopulationName
    task: str
    state_dir: Path
    seed: Seed = 0
    chunk_bytes: Annotated[int, Field(ge=MIN_CHUNK_BYTES, le=MAX_CHUNK_BYTES)] = DEFAULT_CHUNK_BYTES
    log_format: Literal["text", "json"] = "text"
    broker: BrokerSettings = BrokerSettings()
    round: RoundSettings = RoundSettings()
    training: TrainingSettings = TrainingSettings()
    uploads: UploadSettings = UploadSettings()
    server_optimizer: ServerOptimizerConfig = SgdConfig()
    evaluation: EvaluationSettings | None = None
    export: ExportSettings = ExportSettings()
    store: StoreSettings = StoreSettings()
    rollout: RolloutSettings = RolloutSettings()
    retention: RetentionSettings = RetentionSettings()


def load(path: Path) -> Settings:
    """The settings in `path`. Raises `ConfigError` naming the key, the problem and the way out."""
    settings = read_toml(path, Settings)
    return _relative_to(settings, path.parent)


def _relative_to(settings: Settings, folder: Path) -> Settings:
    changes: dict[str, object] = {
        "state_dir": folder / settings.state_dir,
        "broker": settings.broker.relative_to(folder),
    }
    file, _, attribute = settings.task.rpartition(":")
    if file.endswith(".py"):
        changes["task"] = f"{folder / file}:{attribute}"
    if settings.evaluation is not None:
        moved = {"path": folder / settings.evaluation.path}
        changes["evaluation"] = settings.evaluation.model_copy(update=moved)
    return settings.model_copy(update=changes)
