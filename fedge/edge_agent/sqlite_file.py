"""An SQLite file that survives power cuts and tells a full disk from a damaged file.

Knows nothing of tables. In write-ahead mode other processes read while one writes
(https://sqlite.org/wal.html), and `synchronous=FULL` syncs the log at each commit, so that nothing
is lost that a call has answered.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from fedge.edge_agent.durable import disk
from fedge.schemas.errors import StoreError, StoreUnavailable

_PASSING = frozenset(
    {
        *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_BUSY),
        *(sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN),
        *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PROTOCOL),
    }
)
"""https://sqlite.org/rescode.html: what may be otherwise when it is tried again."""
_OPEN_PAUSE_S = 0.02


def connect(
    path: Path, what: str, *, busy_s: float, private: bool = False, any_thread: bool = False
) -> sqlite3.Connection:
    """The file at `path`, made when absent, its folder too; each statement commits by itself.

    `what`: what it is for, in errors. `busy_s`: how long a statement waits for other connections.
    `private`: a new file, and with it its log, is for this user alone. `any_thread`: the caller
    sees to it that one thread at a time uses it.

    Raises `StoreUnavailable` if the disk cannot be used now, `StoreError` for a file that is no
    database.
    """
    with disk(what):
        path.parent.mkdir(parents=True, exist_ok=True)
        if private:
            _create_for_this_user(path)
    with sqlite_errors(what):
        db = sqlite3.connect(
            path, isolation_level=None, timeout=busy_s, check_same_thread=not any_thread
        )
        try:
            _write_ahead(db, busy_s)
            db.execute("PRAGMA synchronous=FULL")
        except BaseException:
            db.close()
            raise
    return db


@contextlib.contextmanager
def transaction(db: sqlite3.Connection, what: str) -> Iterator[None]:
    """All of the statements inside, or none. Raises as `sqlite_errors` does, and what they raise.

    The right to write is taken at the beginning, so nothing changes between a look and a write.
    """
    with sqlite_errors(what):
        db.execute("BEGIN IMMEDIATE")
    try:
        yield
        with sqlite_errors(what):
            db.execute("COMMIT")
    except BaseException:
        # SQLite has rolled back by itself after some errors, and not after others.
        if db.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                db.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def sqlite_errors(what: str) -> Iterator[None]:
    """Turns an error of SQLite into `StoreUnavailable`, or `StoreError` if it will not pass.

    `what`: what could not be done, for the message.
    """
    try:
        yield
    except sqlite3.Error as error:
        # The low byte of an extended code is the code that it refines; misuse has none.
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        kind = StoreUnavailable if code in _PASSING else StoreError
        raise kind(f"cannot {what}: {error}") from error


def _create_for_this_user(path: Path) -> None:
    # A file that is there must not be opened: closing it again would drop the locks that other
    # connections of this process have on it (https://sqlite.org/howtocorrupt.html, 2.2).
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def _write_ahead(db: sqlite3.Connection, busy_s: float) -> None:
    # The change to this mode, once in the life of a file, fails at once if another connection
    # makes the same change: here alone SQLite does not wait for its busy timeout.
    until = time.monotonic() + busy_s
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() >= until:
                raise
            time.sleep(_OPEN_PAUSE_S)
        else:
            return
