"""The database behind the store: how it is opened, how a transaction is made durable.

SQLite in write-ahead mode lets other processes read while the coordinator writes
(https://sqlite.org/wal.html); `synchronous=FULL` syncs the log at each commit, so a power cut after
a call returned loses nothing. Another database may be named by a SQLAlchemy URL; this module is the
only one that knows the difference. It knows no rounds and no versions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, select, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.schema import Table

from fedge.coordinator.store.tables import SCHEMA_VERSION, facts, metadata
from fedge.schemas.errors import ConfigError, StoreError

BUSY_TIMEOUT_MS = 10_000
"""How long a writer waits for another process's transaction before it gives up."""

DATABASE_FILE = "fedge.sqlite"


class Database:
    """Transactions on the tables. Each has its own connection; writers wait for one another.

    `url`: as SQLAlchemy reads it. Raises `ConfigError` for a URL that cannot be used, a database
    of another schema version, or one that does not exist while `create` is False.
    """

    def __init__(self, url: str, *, create: bool) -> None:
        backend = _parse(url).get_backend_name()
        if backend not in ("sqlite", "postgresql"):
            raise ConfigError(f"a {backend} database; use sqlite or postgresql")
        try:
            self.engine = create_engine(url)
        except (NoSuchModuleError, ModuleNotFoundError) as error:
            raise ConfigError(f"the database's driver is not installed: {error}") from error
        if backend == "sqlite":
            _prepare_sqlite(self.engine)
        if create:
            self._create()
        self._check_schema()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database. Raises `StoreError`."""
        with _as_store_error(), self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that is durable when the block ends, or undone if the block raises.

        Raises `StoreError` if the database refused.
        """
        with _as_store_error(), self.engine.connect() as connection:
            # A deferred transaction that reads first can fail at its first write; this cannot.
            writer = connection.execution_options(fedge_begin="BEGIN IMMEDIATE")
            with writer.begin():
                yield writer

    def upsert(self, table: Table) -> sqlite.Insert | postgresql.Insert:
        """An INSERT into `table` that has `on_conflict_do_update` and `on_conflict_do_nothing`."""
        if self.engine.dialect.name == "sqlite":
            return sqlite.insert(table)
        return postgresql.insert(table)

    def close(self) -> None:
        """Closes every connection."""
        self.engine.dispose()

    def _create(self) -> None:
        with self.write() as connection:
            metadata.create_all(connection)
            connection.execute(
                self.upsert(facts)
                .values(name="schema_version", value=str(SCHEMA_VERSION))
                .on_conflict_do_nothing()
            )

    def _check_schema(self) -> None:
        with self.read() as connection:
            if not self.engine.dialect.has_table(connection, facts.name):
                raise ConfigError(f"{self.engine.url!r} holds no coordinator state")
            found = connection.scalar(select(facts.c.value).where(facts.c.name == "schema_version"))
        if found != str(SCHEMA_VERSION):
            raise ConfigError(
                f"{self.engine.url!r} has schema version {found}, this program reads "
                f"{SCHEMA_VERSION}; use the release that wrote it"
            )


def sqlite_url(state_dir: Path) -> str:
    """The URL of the database inside a state folder."""
    return f"sqlite:///{(state_dir / DATABASE_FILE).resolve()}"


def sqlite_file(url: str) -> Path | None:
    """The file that a SQLite URL names, None for another database. Raises `ConfigError`."""
    parsed = _parse(url)
    if parsed.get_backend_name() != "sqlite":
        return None
    if not parsed.database or parsed.database == ":memory:":
        raise ConfigError("a database in memory forgets; name a file")
    return Path(parsed.database)


def _parse(url: str) -> URL:
    try:
        return make_url(url)
    except ArgumentError as error:
        raise ConfigError(f"the database URL cannot be read: {error}") from error


def _prepare_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, _record: Any) -> None:
        # The driver must not begin transactions by itself: `_begin` below chooses the kind.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        statement = connection.get_execution_options().get("fedge_begin", "BEGIN")
        connection.execute(text(statement))


@contextmanager
def _as_store_error() -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        raise StoreError(f"the coordinator's database: {error}") from error
