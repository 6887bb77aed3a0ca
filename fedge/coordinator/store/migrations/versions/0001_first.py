"""The schema of the release 0.1.0, exactly."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Makes the tables, and the mark by which 0.1.0 knows them."""
    facts = op.create_table(
        "facts",
        sa.Column("name", sa.String(40), primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )
    op.create_table(
        "plans",
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("ref", sa.Text, nullable=False),
        sa.Column("task", sa.String(63), nullable=False),
        sa.Column("task_fingerprint", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
    )
    op.create_table(
        "versions",
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("plan_sha256", sa.String(64), sa.ForeignKey("plans.sha256"), nullable=False),
        sa.Column("base", sa.BigInteger),
        sa.Column("round", sa.BigInteger, unique=True),
        sa.Column("weights", sa.Text, nullable=False),
        sa.Column("golden", sa.Text, nullable=False),
        sa.Column("model_sha256", sa.String(64), nullable=False),
        sa.Column("model_bytes", sa.BigInteger, nullable=False),
        sa.Column("server_state", sa.String(64)),
        sa.Column("metrics", sa.JSON, nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
    )
    op.create_table(
        "rounds",
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("base", sa.BigInteger, nullable=False),
        sa.Column("phase", sa.String(20), nullable=False),
        sa.Column("goal", sa.BigInteger, nullable=False),
        sa.Column("quorum", sa.BigInteger, nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("opened_at", sa.Double, nullable=False),
        sa.Column("gather_until", sa.Double, nullable=False),
        sa.Column("train_until", sa.Double),
        sa.Column("closed_at", sa.Double),
        sa.Column("outcome", sa.String(20)),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("version", sa.BigInteger),
        sa.CheckConstraint(
            "(phase = 'closed') = (outcome IS NOT NULL)", name="closed_has_an_outcome"
        ),
    )
    op.create_table(
        "participants",
        sa.Column("round", sa.BigInteger, sa.ForeignKey("rounds.number"), nullable=False),
        sa.Column("device", sa.String(63), nullable=False),
        sa.Column("status", sa.String(20), nullable=False),
        sa.Column("reason", sa.String(40)),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Column("update", sa.Text),
        sa.Column("examples", sa.BigInteger),
        sa.Column("steps", sa.BigInteger),
        sa.Column("training_s", sa.Double),
        sa.Column("loss", sa.Text),
        sa.Column("metrics", sa.JSON),
        sa.Column("asked_at", sa.Double, nullable=False),
        sa.Column("offered_at", sa.Double),
        sa.Column("decided_at", sa.Double),
        sa.PrimaryKeyConstraint("round", "device"),
    )
    op.create_table(
        "refusals",
        sa.Column("round", sa.BigInteger, nullable=False),
        sa.Column("device", sa.String(63), nullable=False),
        sa.Column("reason", sa.String(40), nullable=False),
        sa.Column("count", sa.BigInteger, nullable=False),
        sa.Column("last_detail", sa.Text, nullable=False),
        sa.Column("last_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("round", "device", "reason"),
    )
    op.create_table(
        "devices",
        sa.Column("name", sa.String(63), primary_key=True),
        sa.Column("first_seen_at", sa.Double, nullable=False),
        sa.Column("last_seen_at", sa.Double, nullable=False),
        sa.Column("boot", sa.BigInteger),
        sa.Column("online", sa.Boolean, nullable=False),
        sa.Column("examples", sa.BigInteger),
        sa.Column("version", sa.BigInteger),
        sa.Column("agent_version", sa.String(40)),
    )
    op.bulk_insert(facts, [{"name": "schema_version", "value": "1"}])
