"""The database as one SQLite file, as of one moment, and back into either kind of database.

A snapshot has the same tables whatever it was taken from, so that a state may move from SQLite to
PostgreSQL or back. Knows the tables as lists of rows, and nothing of what they mean.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, insert, select

from fedge.coordinator.store.database import Database
from fedge.coordinator.store.sqlite import told
from fedge.coordinator.store.tables import facts, metadata
from fedge.schemas.errors import StoreUnavailable

ROWS_AT_A_TIME = 1000

OF_THE_INSTANCE = ("writer",)
"""Facts about who serves a database now: they are not part of the state."""


def take(database: Database, path: Path) -> None:
    """Writes the state of `database` as of now to a new SQLite file, beside running writers.

    Raises `StoreError` if the file cannot be written or the database cannot be read, and
    `StoreUnavailable` if that may pass.
    """
    if database.engine.dialect.name == "sqlite":
        _copy_pages(database, path)
    else:
        copy = Database(file_url(path), create=True)
        try:
            with database.read() as source, copy.write() as target:
                copy_rows(source, target)
        finally:
            copy.close()
    seal(path)


def copy_rows(source: Connection, target: Connection) -> None:
    """Replaces every row of `target` by those of `source`; both have this release's tables."""
    for table in reversed(metadata.sorted_tables):
        target.execute(table.delete())
    for table in metadata.sorted_tables:
        rows = source.execution_options(yield_per=ROWS_AT_A_TIME).execute(select(table))
        for some in rows.partitions():
            target.execute(insert(table), [dict(row._mapping) for row in some])
    target.execute(facts.delete().where(facts.c.name.in_(OF_THE_INSTANCE)))


def seal(path: Path) -> None:
    """Folds the log of a SQLite file into the file itself.

    Raises `StoreUnavailable` while anybody has it open, `StoreError` if it is damaged.
    """
    with _sqlite_may_fail(f"write {path}"), closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
    with path.open("rb") as file:
        os.fsync(file.fileno())
    for suffix in ("-wal", "-shm", "-backup.lock"):
        with suppress(FileNotFoundError):
            Path(f"{path}{suffix}").unlink()


def damages(path: Path) -> Sequence[str]:
    """What SQLite finds wrong in a file, in its own words.

    Raises `StoreUnavailable` if the file cannot be read now.
    """
    # Nobody writes it, and reading must not: the folder may be read-only.
    uri = f"{path.resolve().as_uri()}?mode=ro&immutable=1"
    with _sqlite_may_fail(f"read {path}"), closing(sqlite3.connect(uri, uri=True)) as connection:
        try:
            found = [row[0] for row in connection.execute("PRAGMA integrity_check")]
        except sqlite3.DatabaseError as error:
            if isinstance(told(error, ""), StoreUnavailable):
                raise
            return [str(error)]
    return [each for each in found if each != "ok"]


def file_url(path: Path) -> str:
    """The URL of a SQLite file."""
    return f"sqlite:///{path.resolve()}"


def _copy_pages(database: Database, path: Path) -> None:
    # SQLite's online backup: one step of all pages, so that no writer makes it begin again.
    with database.read() as connection, closing(sqlite3.connect(path)) as target:
        driver: Any = connection.connection.driver_connection
        with _sqlite_may_fail(f"write {path}"):
            driver.backup(target)
            target.execute("DELETE FROM facts WHERE name = ?", OF_THE_INSTANCE)
            target.commit()


@contextmanager
def _sqlite_may_fail(what: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise told(error, f"cannot {what}") from error
