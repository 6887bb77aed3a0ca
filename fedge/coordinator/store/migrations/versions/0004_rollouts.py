"""Rollouts of versions, and what became of each on each device."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Adds the two tables."""
    op.create_table(
        "rollouts",
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("version", sa.BigInteger, sa.ForeignKey("versions.number"), nullable=False),
        sa.Column("stable", sa.BigInteger, sa.ForeignKey("versions.number"), nullable=False),
        sa.Column("policy", sa.Text, nullable=False),
        sa.Column("phase", sa.String(20), nullable=False),
        sa.Column("wish", sa.String(20), nullable=False),
        sa.Column("stage", sa.BigInteger, nullable=False),
        sa.Column("share", sa.Double, nullable=False),
        sa.Column("reached", sa.BigInteger, nullable=False),
        sa.Column("soaked_s", sa.Double, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("started_at", sa.Double, nullable=False),
        sa.Column("ended_at", sa.Double),
        sa.CheckConstraint(
            "(phase IN ('running', 'paused')) = (ended_at IS NULL)", name="ended_has_a_time"
        ),
    )
    op.create_index("rollouts_by_ended_at", "rollouts", ["ended_at"])
    op.create_table(
        "trials",
        sa.Column("rollout", sa.BigInteger, sa.ForeignKey("rollouts.number"), nullable=False),
        sa.Column("device", sa.String(63), nullable=False),
        sa.Column("outcome", sa.String(20), nullable=False),
        sa.Column("reason", sa.String(20)),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Column("latency_ms", sa.Double),
        sa.Column("loss_ratio", sa.Double),
        sa.Column("hold_out", sa.BigInteger),
        sa.Column("at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("rollout", "device"),
        sa.CheckConstraint(
            "(outcome = 'rolled_back') = (reason IS NOT NULL)", name="rolled_back_has_a_reason"
        ),
    )
