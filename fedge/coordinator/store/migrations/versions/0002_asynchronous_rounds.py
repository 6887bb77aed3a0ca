"""Asynchronous rounds, what is retained on the broker, and what retention has deleted."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Adds the columns, the table and the indexes; an accepted update counts in its own round."""
    op.add_column("rounds", sa.Column("mode", sa.String(10), nullable=False, server_default="sync"))
    op.add_column(
        "rounds",
        sa.Column("details_kept", sa.Boolean, nullable=False, server_default=sa.true()),
    )
    op.add_column(
        "versions", sa.Column("files_kept", sa.Boolean, nullable=False, server_default=sa.true())
    )
    op.add_column("participants", sa.Column("base", sa.BigInteger))
    op.add_column("participants", sa.Column("until", sa.Double))
    op.add_column("participants", sa.Column("counted_in", sa.BigInteger))
    op.create_table(
        "retained",
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("chunk_count", sa.BigInteger, nullable=False),
    )
    op.create_index("rounds_by_outcome", "rounds", ["outcome"])
    op.create_index("participants_by_status", "participants", ["status"])
    op.create_index("participants_by_counted_in", "participants", ["counted_in"])
    op.execute("UPDATE participants SET counted_in = round WHERE status = 'accepted'")
    # The release 0.1.0 reads this row and nothing else; with another number it refuses to open
    # what it would not understand.
    op.execute("UPDATE facts SET value = '2' WHERE name = 'schema_version'")
