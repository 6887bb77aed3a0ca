"""The database's tables, as SQLAlchemy Core sees them.

Constraints carry the promises: a device contributes to a round at most once because (round,
device) is a key, and a round makes at most one version because `versions.round` is unique. A change
here needs a migration in `migrations/versions`; a test compares the two.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Dialect,
    Double,
    ForeignKey,
    Index,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    TypeDecorator,
    true,
)

from fedge.schemas.blobs import BlobRef
from fedge.schemas.messages import EvaluationSums, LossCurve


class _Model(TypeDecorator[BaseModel]):
    """A pydantic model, kept as its JSON text."""

    impl = Text
    cache_ok = True

    def __init__(self, kind: type[BaseModel]) -> None:
        super().__init__()
        self.kind = kind

    def process_bind_param(self, value: BaseModel | None, dialect: Dialect) -> str | None:
        return None if value is None else value.model_dump_json()

    def process_result_value(self, value: Any, dialect: Dialect) -> BaseModel | None:
        return None if value is None else self.kind.model_validate_json(value)


def _number(name: str, *constraints: ForeignKey, **kwargs: Any) -> Column[int]:
    return Column(name, BigInteger, *constraints, autoincrement=False, **kwargs)


def _digest(name: str, *constraints: ForeignKey, **kwargs: Any) -> Column[str]:
    return Column(name, String(64), *constraints, **kwargs)


metadata = MetaData()

facts = Table(
    "facts",
    metadata,
    Column("name", String(40), primary_key=True),
    Column("value", Text, nullable=False),
)
"""`population`: whose state this is. `release`: the one that wrote the schema, for an older one.
`schema_version`: for the release 0.1.0, which reads nothing else. `writer`: the
coordinator that serves, and its latest write (PostgreSQL). `over_selection`: what was learned of
who delivers. `blobs_owner`: the mark of this state where its blobs lie."""

plans = Table(
    "plans",
    metadata,
    _digest("sha256", primary_key=True),
    Column("ref", _Model(BlobRef), nullable=False),
    Column("task", String(63), nullable=False),
    Column("task_fingerprint", Text, nullable=False),
    Column("created_at", Double, nullable=False),
)

versions = Table(
    "versions",
    metadata,
    _number("number", primary_key=True),
    _digest("plan_sha256", ForeignKey("plans.sha256"), nullable=False),
    _number("base", nullable=True),
    _number("round", nullable=True, unique=True),
    Column("weights", _Model(BlobRef), nullable=False),
    Column("golden", _Model(BlobRef), nullable=False),
    _digest("model_sha256", nullable=False),
    _number("model_bytes", nullable=False),
    _digest("server_state", nullable=True),
    Column("metrics", JSON, nullable=False),
    Column("note", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("files_kept", Boolean, nullable=False, server_default=true()),
)

rounds = Table(
    "rounds",
    metadata,
    _number("number", primary_key=True),
    _number("base", nullable=False),
    Column("phase", String(20), nullable=False),
    _number("goal", nullable=False),
    _number("quorum", nullable=False),
    _number("seed", nullable=False),
    Column("opened_at", Double, nullable=False),
    Column("gather_until", Double, nullable=False),
    Column("train_until", Double, nullable=True),
    Column("closed_at", Double, nullable=True),
    Column("outcome", String(20), nullable=True),
    Column("reason", Text, nullable=False),
    _number("version", nullable=True),
    Column("mode", String(10), nullable=False, server_default="sync"),
    Column("details_kept", Boolean, nullable=False, server_default=true()),
    CheckConstraint("(phase = 'closed') = (outcome IS NOT NULL)", name="closed_has_an_outcome"),
    Index("rounds_by_outcome", "outcome"),
)

participants = Table(
    "participants",
    metadata,
    _number("round", ForeignKey("rounds.number"), nullable=False),
    Column("device", String(63), nullable=False),
    Column("status", String(20), nullable=False),
    Column("reason", String(40), nullable=True),
    Column("detail", Text, nullable=False, default=""),
    Column("update", _Model(BlobRef), nullable=True),
    _number("examples", nullable=True),
    _number("steps", nullable=True),
    Column("training_s", Double, nullable=True),
    Column("loss", _Model(LossCurve), nullable=True),
    Column("metrics", JSON, nullable=True),
    Column("asked_at", Double, nullable=False),
    Column("offered_at", Double, nullable=True),
    Column("decided_at", Double, nullable=True),
    _number("base", nullable=True),
    Column("until", Double, nullable=True),
    _number("counted_in", nullable=True),
    # Its first column is also the index of a round's participants.
    PrimaryKeyConstraint("round", "device"),
    Index("participants_by_status", "status"),
    Index("participants_by_counted_in", "counted_in"),
)

refusals = Table(
    "refusals",
    metadata,
    # A key treats NULLs as different from one another, so "none" is 0 and the empty name.
    _number("round", nullable=False),
    Column("device", String(63), nullable=False),
    Column("reason", String(40), nullable=False),
    _number("count", nullable=False),
    Column("last_detail", Text, nullable=False),
    Column("last_at", Double, nullable=False),
    PrimaryKeyConstraint("round", "device", "reason"),
)

devices = Table(
    "devices",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("first_seen_at", Double, nullable=False),
    Column("last_seen_at", Double, nullable=False),
    _number("boot", nullable=True),
    Column("online", Boolean, nullable=False),
    _number("examples", nullable=True),
    _number("version", nullable=True),
    Column("agent_version", String(40), nullable=True),
)

retained = Table(
    "retained",
    metadata,
    _digest("sha256", primary_key=True),
    _number("chunk_count", nullable=False),
)
"""What the coordinator has put on the broker and not taken back."""

evaluations = Table(
    "evaluations",
    metadata,
    _number("number", primary_key=True),
    _number("version", ForeignKey("versions.number"), nullable=False),
    _number("wanted", nullable=False),
    Column("deadline_s", Double, nullable=False),
    _number("seed", nullable=False),
    Column("requested_at", Double, nullable=False),
    Column("opened_at", Double, nullable=True),
    Column("until", Double, nullable=True),
    Column("closed_at", Double, nullable=True),
    Column("reason", Text, nullable=False),
    Index("evaluations_by_closed_at", "closed_at"),
)

evaluation_answers = Table(
    "evaluation_answers",
    metadata,
    _number("evaluation", ForeignKey("evaluations.number"), nullable=False),
    Column("device", String(63), nullable=False),
    Column("asked_at", Double, nullable=False),
    Column("status", String(20), nullable=True),
    Column("answered_at", Double, nullable=True),
    Column("sums", _Model(EvaluationSums), nullable=True),
    Column("personal", _Model(EvaluationSums), nullable=True),
    Column("detail", Text, nullable=False),
    # A device answers an evaluation once.
    PrimaryKeyConstraint("evaluation", "device"),
    CheckConstraint(
        "(status IS NOT NULL AND status = 'ok') = (sums IS NOT NULL)", name="ok_has_sums"
    ),
)

rollouts = Table(
    "rollouts",
    metadata,
    _number("number", primary_key=True),
    _number("version", ForeignKey("versions.number"), nullable=False),
    _number("stable", ForeignKey("versions.number"), nullable=False),
    Column("policy", Text, nullable=False),
    Column("phase", String(20), nullable=False),
    Column("wish", String(20), nullable=False),
    _number("stage", nullable=False),
    Column("share", Double, nullable=False),
    _number("reached", nullable=False),
    Column("soaked_s", Double, nullable=False),
    Column("reason", Text, nullable=False),
    Column("started_at", Double, nullable=False),
    Column("ended_at", Double, nullable=True),
    CheckConstraint(
        "(phase IN ('running', 'paused')) = (ended_at IS NULL)", name="ended_has_a_time"
    ),
    Index("rollouts_by_ended_at", "ended_at"),
)
"""`stable`: what those use whom it does not reach. `wish`: written by commands, all else by the
coordinator alone."""

trials = Table(
    "trials",
    metadata,
    _number("rollout", ForeignKey("rollouts.number"), nullable=False),
    Column("device", String(63), nullable=False),
    Column("outcome", String(20), nullable=False),
    Column("reason", String(20), nullable=True),
    Column("detail", Text, nullable=False),
    Column("latency_ms", Double, nullable=True),
    Column("loss_ratio", Double, nullable=True),
    _number("hold_out", nullable=True),
    Column("at", Double, nullable=False),
    # A device counts once in a rollout.
    PrimaryKeyConstraint("rollout", "device"),
    CheckConstraint(
        "(outcome = 'rolled_back') = (reason IS NOT NULL)", name="rolled_back_has_a_reason"
    ),
)

word_counts = Table(
    "word_counts",
    metadata,
    _number("number", primary_key=True),
    # Not the number: a restored state uses that again, and a device answers each campaign once.
    Column("campaign", String(32), nullable=False, unique=True),
    Column("epsilon", Double, nullable=False),
    _number("least_typed", nullable=False),
    Column("new_only", Boolean, nullable=False),
    Column("deadline_s", Double, nullable=False),
    Column("requested_at", Double, nullable=False),
    Column("opened_at", Double, nullable=True),
    Column("until", Double, nullable=True),
    Column("closed_at", Double, nullable=True),
    Column("reason", Text, nullable=False),
)

word_count_answers = Table(
    "word_count_answers",
    metadata,
    _number("word_count", ForeignKey("word_counts.number"), nullable=False),
    Column("device", String(63), nullable=False),
    Column("key", String(48), nullable=False),
    _number("bucket", nullable=False),
    Column("at", Double, nullable=False),
    # A device counts once in a word count.
    PrimaryKeyConstraint("word_count", "device"),
)
