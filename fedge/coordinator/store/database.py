"""The database behind the store: how it is opened, how a transaction is made durable.

SQLite in write-ahead mode or PostgreSQL, by SQLAlchemy URL, with the same promises: one writer at a
time, readers that do not wait for it, and durable when `write` returns. What only one of the two
knows is in `sqlite.py` and `postgresql.py`. This module knows no rounds and no versions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from sqlalchemy import URL, Connection, Engine, create_engine, make_url
from sqlalchemy.dialects import postgresql as postgresql_dialect
from sqlalchemy.dialects import sqlite as sqlite_dialect
from sqlalchemy.exc import ArgumentError, NoSuchModuleError
from sqlalchemy.schema import Table

from fedge.coordinator.store import schema
from fedge.coordinator.store.postgresql import PostgreSql
from fedge.coordinator.store.sqlite import Sqlite
from fedge.schemas.errors import ConfigError

DATABASE_FILE = "fedge.sqlite"


class Backend(Protocol):
    """What one kind of database does in its own way."""

    @property
    def engine_options(self) -> dict[str, object]:
        """What `create_engine` is given."""

    def prepare(self, engine: Engine) -> None:
        """Called once, before the first connection."""

    def errors(self) -> AbstractContextManager[None]:
        """Turns the driver's errors into `StoreError` or `StoreUnavailable`."""

    def read(self, engine: Engine) -> AbstractContextManager[Connection]:
        """A transaction that sees one state."""

    def write(self, engine: Engine) -> AbstractContextManager[Connection]:
        """A transaction beside which there is no other writer; durable when the block ends."""

    def serve(self, engine: Engine) -> None:
        """Becomes the one coordinator of this database, or raises `ConfigError`."""

    def begin_term(self, engine: Engine) -> None:
        """From now on, what another coordinator that served before would write is refused."""

    def collecting(self, engine: Engine) -> AbstractContextManager[bool]:
        """Whether files may be deleted now; no backup begins meanwhile."""

    def backing_up(self, engine: Engine) -> AbstractContextManager[None]:
        """No file is deleted meanwhile."""

    def close(self) -> None:
        """Lets go of what `serve` took."""


class Database:
    """Transactions on the tables. Each has its own connection; writers wait for one another.

    `url`: as SQLAlchemy reads it. `create`: make the tables or bring them to this release's
    schema; without it an older schema is refused. `serve`: be the one coordinator of this database.
    `as_it_is`: whatever schema it has, or none, for who replaces it.
    Raises `ConfigError` for a URL that cannot be used, a database that is not ours, not there or of
    a newer release, or one that another coordinator serves.
    """

    def __init__(
        self, url: str, *, create: bool = False, serve: bool = False, as_it_is: bool = False
    ) -> None:
        parsed = parse_url(url)
        self._backend: Backend = (
            Sqlite(parsed) if parsed.get_backend_name() == "sqlite" else PostgreSql(parsed)
        )
        try:
            self.engine = create_engine(parsed, **self._backend.engine_options)
        except (NoSuchModuleError, ModuleNotFoundError) as error:
            raise ConfigError(
                f"the database's driver is not installed: {error}; for PostgreSQL "
                "pip install 'fedge[coordinator,postgresql]', or in a checkout "
                "pip install '.[postgresql]', and write postgresql+psycopg://…"
            ) from error
        self._backend.prepare(self.engine)
        try:
            if as_it_is:
                self._serve(serve)
            else:
                self._open(create=create, serve=serve)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database.

        Raises `StoreError`, and `StoreUnavailable` if the database cannot be used now.
        """
        with self._backend.errors(), self._backend.read(self.engine) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that is durable when the block ends, or undone if the block raises.

        Raises `StoreError` if the database refused, `StoreUnavailable` if it cannot be used now.
        """
        with self._backend.errors(), self._backend.write(self.engine) as connection:
            yield connection

    def upsert(self, table: Table) -> sqlite_dialect.Insert | postgresql_dialect.Insert:
        """An INSERT into `table` that has `on_conflict_do_update` and `on_conflict_do_nothing`."""
        if self.engine.dialect.name == "sqlite":
            return sqlite_dialect.insert(table)
        return postgresql_dialect.insert(table)

    @contextmanager
    def collecting(self) -> Iterator[bool]:
        """For who deletes files: False if a backup is being made, and none begins meanwhile."""
        with self._backend.errors(), self._backend.collecting(self.engine) as free:
            yield free

    @contextmanager
    def backing_up(self) -> Iterator[None]:
        """For who copies files: waits until nobody deletes, and nobody does meanwhile."""
        with self._backend.errors(), self._backend.backing_up(self.engine):
            yield

    def close(self) -> None:
        """Closes every connection."""
        self._backend.close()
        self.engine.dispose()

    def _open(self, *, create: bool, serve: bool) -> None:
        with self.read() as connection:
            revision = schema.revision_of(connection)
            if revision not in (None, schema.HEAD):
                schema.check_known(connection, revision)
        if revision is None and not create:
            raise ConfigError(
                f"{self.engine.url!r} holds no coordinator state: start `fedge serve` first"
            )
        if revision is not None and revision != schema.HEAD and not create:
            raise ConfigError(
                f"{self.engine.url!r} has schema {revision}, this release reads {schema.HEAD}: "
                "start `fedge serve` once, which brings it up to date"
            )
        self._serve(serve)
        if revision != schema.HEAD:
            with self.write() as connection:
                schema.upgrade(connection)
        if serve:
            with self._backend.errors():
                self._backend.begin_term(self.engine)

    def _serve(self, serve: bool) -> None:
        if serve:
            with self._backend.errors():
                self._backend.serve(self.engine)


def parse_url(url: str) -> URL:
    """The URL's parts. Raises `ConfigError` for one that cannot be used here."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigError(f"the database URL cannot be read: {error}") from error
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise ConfigError(f"a {parsed.get_backend_name()} database; use sqlite or postgresql")
    if parsed.drivername == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    return parsed


def sqlite_url(state_dir: Path) -> str:
    """The URL of the database inside a state folder."""
    return f"sqlite:///{(state_dir / DATABASE_FILE).resolve()}"


def sqlite_file(url: str) -> Path | None:
    """The file that a SQLite URL names, None for another database. Raises `ConfigError`."""
    parsed = parse_url(url)
    if parsed.get_backend_name() != "sqlite":
        return None
    if not parsed.database or parsed.database == ":memory:":
        raise ConfigError("a database in memory forgets; name a file")
    return Path(parsed.database)
