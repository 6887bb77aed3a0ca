"""Which schema a database has, and the steps that bring it to this release's.

The steps are Alembic's (`migrations/`); which were done is one row of its table `alembic_version`.
Loading Alembic takes a tenth of a second, so a database that is current is recognised with plain
SQL, and a restart does not wait for it. Knows no tables but its own and `facts`.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from sqlalchemy import Connection, select, text

from fedge import __version__
from fedge.coordinator.store.tables import facts
from fedge.schemas.errors import ConfigError
from fedge.schemas.logs import EventLog

log = EventLog(__name__)

HEAD = "0005"
"""The newest migration. A test compares it with the files."""
FIRST = "0001"
"""The schema of the release 0.1.0, which did not use Alembic."""

ALEMBIC_TABLE = "alembic_version"

_MIGRATION = re.compile(r"(\d{4})_\w+\.py")


def revision_of(connection: Connection) -> str | None:
    """The database's revision; None for one without coordinator state.

    Raises `ConfigError` for a database of another program.
    """
    has = connection.dialect.has_table
    if has(connection, ALEMBIC_TABLE):
        if not has(connection, facts.name):
            raise ConfigError("this database belongs to another program; name one of its own")
        found = connection.scalar(text("SELECT version_num FROM alembic_version"))
        return None if found is None else str(found)
    if not has(connection, facts.name):
        return None
    first = connection.scalar(select(facts.c.value).where(facts.c.name == "schema_version"))
    if first != "1":
        raise ConfigError(f"this database has the unknown schema version {first}")
    return FIRST


def check_known(connection: Connection, revision: str) -> None:
    """Raises `ConfigError` if a newer release has changed this database."""
    if revision not in _migrations():
        writer = connection.scalar(select(facts.c.value).where(facts.c.name == "release"))
        raise ConfigError(
            f"the database has schema {revision}, which this release ({__version__}) does not "
            f"know: install fedge {writer or 'of the release that wrote it'} or newer"
        )


def upgrade(connection: Connection) -> None:
    """Brings the database to `HEAD`, in the caller's transaction. An empty one gets every table.

    Raises `ConfigError` for a newer database or a foreign one.
    """
    # The caller holds the write lock now: another process may have been here before.
    revision = revision_of(connection)
    if revision == HEAD:
        return
    if revision is not None:
        check_known(connection, revision)
    from alembic import command  # noqa: PLC0415 -- slow to load, and rarely needed: see the top
    from alembic.config import Config  # noqa: PLC0415 -- as above

    config = Config()
    config.set_main_option("script_location", str(_folder()).replace("%", "%%"))
    config.attributes["connection"] = connection
    if revision == FIRST and not connection.dialect.has_table(connection, ALEMBIC_TABLE):
        command.stamp(config, FIRST)
    command.upgrade(config, "head")
    connection.execute(facts.delete().where(facts.c.name == "release"))
    connection.execute(facts.insert().values(name="release", value=__version__))
    if revision is not None:
        log.info("schema_upgraded", before=revision, now=HEAD)


def _migrations() -> frozenset[str]:
    files = (_MIGRATION.fullmatch(path.name) for path in (_folder() / "versions").iterdir())
    return frozenset(found[1] for found in files if found is not None)


def _folder() -> Path:
    return Path(str(resources.files("fedge.coordinator.store") / "migrations"))
