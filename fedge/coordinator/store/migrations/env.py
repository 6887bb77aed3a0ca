"""What Alembic runs to apply migrations: on the connection, and in the transaction, it is given."""

from __future__ import annotations

from alembic import context

# SQLite changes its schema within a transaction as PostgreSQL does; Alembic's default is wary of
# drivers that commit by themselves, and `fedge.coordinator.store.database` has told ours not to.
context.configure(connection=context.config.attributes["connection"], transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
