"""Federated evaluations: what was asked for, and what each device answered."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Adds the two tables."""
    op.create_table(
        "evaluations",
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("version", sa.BigInteger, sa.ForeignKey("versions.number"), nullable=False),
        sa.Column("wanted", sa.BigInteger, nullable=False),
        sa.Column("deadline_s", sa.Double, nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("requested_at", sa.Double, nullable=False),
        sa.Column("opened_at", sa.Double),
        sa.Column("until", sa.Double),
        sa.Column("closed_at", sa.Double),
        sa.Column("reason", sa.Text, nullable=False),
    )
    op.create_index("evaluations_by_closed_at", "evaluations", ["closed_at"])
    op.create_table(
        "evaluation_answers",
        sa.Column("evaluation", sa.BigInteger, sa.ForeignKey("evaluations.number"), nullable=False),
        sa.Column("device", sa.String(63), nullable=False),
        sa.Column("asked_at", sa.Double, nullable=False),
        sa.Column("status", sa.String(20)),
        sa.Column("answered_at", sa.Double),
        sa.Column("sums", sa.Text),
        sa.Column("personal", sa.Text),
        sa.Column("detail", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("evaluation", "device"),
        sa.CheckConstraint(
            "(status IS NOT NULL AND status = 'ok') = (sums IS NOT NULL)", name="ok_has_sums"
        ),
    )
