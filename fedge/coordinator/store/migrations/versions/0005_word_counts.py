"""Word counts, and the one noisy word of each device in each."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Adds the two tables."""
    op.create_table(
        "word_counts",
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("campaign", sa.String(32), nullable=False, unique=True),
        sa.Column("epsilon", sa.Double, nullable=False),
        sa.Column("least_typed", sa.BigInteger, nullable=False),
        sa.Column("new_only", sa.Boolean, nullable=False),
        sa.Column("deadline_s", sa.Double, nullable=False),
        sa.Column("requested_at", sa.Double, nullable=False),
        sa.Column("opened_at", sa.Double),
        sa.Column("until", sa.Double),
        sa.Column("closed_at", sa.Double),
        sa.Column("reason", sa.Text, nullable=False),
    )
    op.create_table(
        "word_count_answers",
        sa.Column("word_count", sa.BigInteger, sa.ForeignKey("word_counts.number"), nullable=False),
        sa.Column("device", sa.String(63), nullable=False),
        sa.Column("key", sa.String(48), nullable=False),
        sa.Column("bucket", sa.BigInteger, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("word_count", "device"),
    )
