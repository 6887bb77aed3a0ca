"""An SQLite file of which nothing is left that was deleted, and which several processes use.

It knows of no table but its own, `facts`. SQLite's `secure_delete` alone does not erase: pages that
were rearranged keep copies of rows, and the log has what was written before. So after a deletion
the file is rewritten (`VACUUM`, in memory) and the log emptied, for which no other process may be
in mid read. That a deletion is not erased yet stands in the file, beside the deletion: whoever
comes next goes on where a power cut, a full disk or a reader that does not let go was in the way.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from fedge.edge_agent.durable import disk
from fedge.edge_agent.sqlite_file import connect, sqlite_errors, transaction
from fedge.schemas.errors import StoreError, StoreUnavailable
from fedge.schemas.logs import EventLog

log = EventLog(__name__)

RETRY_S = 60.0
"""After an erasure in vain, calls that need none do not try again for so long."""

_FACTS = "CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value ANY NOT NULL) STRICT"


class ErasableFile:
    """The file at `path`, made when absent, for this user only. Any thread may call.

    `what`: what it is for, in errors. `schema`: statements that make its tables, run once in the
    life of a file; `version`: of the schema; `facts`: lines that a new file begins with. `busy_s`:
    what a call waits for others' transactions.

    While it is open, nothing else in this process may open the file and close it again: that drops
    the locks of SQLite (https://sqlite.org/howtocorrupt.html, 2.2).

    This and every method raises `StoreUnavailable` if the disk cannot be used now or somebody else
    has locked the file, `StoreError` if the file is damaged or of a newer `version`.
    """

    def __init__(
        self,
        path: Path,
        what: str,
        schema: str,
        *,
        version: int,
        facts: dict[str, object],
        busy_s: float,
    ) -> None:
        self._path = path
        self._what = what
        self._busy_s = busy_s
        self._retry_at_s = 0.0
        self.lock = threading.RLock()
        """Hold it over calls that belong together."""
        self._db = connect(path, what, busy_s=busy_s, private=True, any_thread=True)
        try:
            # On by itself in some builds only.
            self.run("PRAGMA secure_delete = ON")
            # VACUUM copies everything: not into a temporary file, which nobody would overwrite.
            self.run("PRAGMA temp_store = MEMORY")
            self.run("PRAGMA wal_autocheckpoint = 256")
            self.run("PRAGMA journal_size_limit = 1048576")
            self._make(schema, version, facts)
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Closes the file."""
        with self.lock:
            self._db.close()

    def size_bytes(self) -> int:
        """Of the file and its log, on the disk."""
        return sum(file.stat().st_size for file in _files(self._path) if file.exists())

    # ------------------------------------------------------------ SQL

    def run(self, statement: str, *values: object) -> sqlite3.Cursor:
        """Executes one statement."""
        with self.lock, sqlite_errors(self._what):
            return self._db.execute(statement, values)

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """All of the answer at once: a query that stays open would keep an erasure waiting."""
        with self.lock, sqlite_errors(self._what), closing(self._db.execute(query, values)) as got:
            return got.fetchall()

    def value(self, query: str, *values: object) -> Any:
        """The first column of the first row."""
        return self.rows(query, *values)[0][0]

    def fact(self, name: str) -> Any:
        """The value of a line of `facts`; None if there is none."""
        found = self.rows("SELECT value FROM facts WHERE name = ?", name)
        return found[0][0] if found else None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of the statements inside, or none; nobody else writes meanwhile."""
        with self.lock, transaction(self._db, self._what):
            yield

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Queries that see one moment."""
        with self.lock:
            self.run("BEGIN")
            try:
                yield
            finally:
                self.run("COMMIT")

    @contextmanager
    def condition(self, name: str, holds: Any) -> Iterator[None]:
        """Statements inside may call `holds`, of one argument, as the SQL function `name`."""
        with self.lock, sqlite_errors(self._what):
            self._db.create_function(name, 1, holds, deterministic=True)
            try:
                yield
            finally:
                self._db.create_function(name, 1, None)

    # ------------------------------------------------------------ erasing

    def mark_deleted(self) -> None:
        """Remembers that something was deleted; call it in the same transaction."""
        self.run("UPDATE facts SET value = value + 1 WHERE name = 'deletions'")

    def erased(self) -> bool:
        """Whether nothing is left of what was deleted."""
        return bool(self.fact("erased") == self.fact("deletions"))

    def erase(self, wait_s: float, *, insist: bool = False) -> bool:
        """Erases what was deleted, and returns whether all of it is gone. Raises nothing.

        `wait_s`: for other processes to end what they read. `insist`: also if it was in vain less
        than `RETRY_S` ago; the caller tells who asked, so nothing is logged.
        """
        with self.lock:
            try:
                deletions = self.fact("deletions")
                if self.fact("erased") == deletions:
                    return True
                if not insist and time.monotonic() < self._retry_at_s:
                    return False
                self._retry_at_s = time.monotonic() + RETRY_S
                in_the_way = self._rewrite(wait_s)
                if in_the_way is None:
                    # Another process may have deleted since: that is for the next time.
                    self.run(
                        "UPDATE facts SET value = max(value, ?) WHERE name = 'erased'", deletions
                    )
                    self._retry_at_s = 0.0
            except StoreError as error:
                in_the_way = str(error)
        if in_the_way is not None and not insist:
            log.warning("not_erased", path=str(self._path), reason=in_the_way)
        return in_the_way is None

    def _rewrite(self, wait_s: float) -> str | None:
        """Writes the file anew and empties its log; what was in the way of that, if anything."""
        in_the_way = None
        try:
            self.run("VACUUM")
        except StoreUnavailable as error:
            # No room, perhaps. Emptying the log makes some, and overwrites most of what was there.
            in_the_way = str(error)
        self.run(f"PRAGMA busy_timeout = {int(wait_s * 1000)}")
        try:
            [(busy, _, _)] = self.rows("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            self.run(f"PRAGMA busy_timeout = {int(self._busy_s * 1000)}")
        return "another program is reading the file" if busy else in_the_way

    # ------------------------------------------------------------ making

    def _make(self, schema: str, version: int, facts: dict[str, object]) -> None:
        found = self.value("PRAGMA user_version")
        if found > version:
            raise StoreError(f"cannot {self._what}: the file is of a newer release of Fedge")
        if found == version:
            return
        with self.transaction():
            for statement in (_FACTS, *_statements(schema)):
                self.run(statement)
            for name, value in {"deletions": 0, "erased": 0, **facts}.items():
                self.run("INSERT OR IGNORE INTO facts VALUES (?, ?)", name, value)
            self.run(f"PRAGMA user_version = {version}")


def remove_files(path: Path) -> None:
    """Deletes the file at `path`, unread, with its log. Raises `StoreUnavailable`."""
    with disk(f"delete {path}"):
        for file in _files(path):
            file.unlink(missing_ok=True)


def _files(path: Path) -> tuple[Path, ...]:
    # The log first: it must never be applied to the next file.
    return tuple(path.with_name(path.name + ending) for ending in ("-wal", "-shm", ""))


def _statements(script: str) -> Iterator[str]:
    # One by one: `executescript` would end the transaction.
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
