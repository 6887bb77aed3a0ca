"""What only SQLite knows: write-ahead log, durable commits, its error codes.

In write-ahead mode other processes read while the coordinator writes (https://sqlite.org/wal.html).
`synchronous=FULL` syncs the log at each commit, so a power cut after a call returned loses nothing.
The log is emptied when it has grown, which SQLite by itself never does while readers overlap.
"""

from __future__ import annotations

import contextlib
import fcntl
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sqlalchemy import URL, Connection, Engine, event, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from fedge.schemas.errors import StoreError, StoreUnavailable

BUSY_TIMEOUT_MS = 10_000
"""How long a writer waits for another process's transaction before it gives up."""
WAL_LIMIT_BYTES = 16 * 1024 * 1024
"""A log above this is emptied after the next commit, if no reader needs it."""
WAL_WAIT_MS = 50
"""How long emptying the log waits for readers that still need it. Readers that overlap may keep it
waiting however long that is; after another commit the next attempt finds them elsewhere."""
WAL_ATTEMPTS = 5
WAL_PAUSE_S = 10.0
"""After so many attempts in vain, one reader does not let go: the log grows for so long."""

_PASSING = frozenset(
    {
        *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM),
        *(sqlite3.SQLITE_READONLY, sqlite3.SQLITE_INTERRUPT, sqlite3.SQLITE_IOERR),
        *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL),
    }
)
"""https://sqlite.org/rescode.html: what may be otherwise when it is tried again."""


class Sqlite:
    """A file. `url`: names it."""

    def __init__(self, url: URL) -> None:
        self.engine_options: dict[str, object] = {}
        self._wal = Path(f"{url.database}-wal")
        # The kernel drops this lock when its process ends, however it ends.
        self._backup_lock = Path(f"{url.database}-backup.lock")
        self._attempts = 0
        self._empty_again_at = 0.0
        self._emptying = threading.Lock()

    def prepare(self, engine: Engine) -> None:
        """Has each new connection set up, and lets `write` choose how its transaction begins."""
        event.listen(engine, "connect", _set_up)
        event.listen(engine, "begin", _begin)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turns the driver's errors into `StoreError` or `StoreUnavailable`."""
        try:
            yield
        except DBAPIError as error:
            raise told(error.orig, "the coordinator's database") from error
        except PoolTimeout as error:
            raise StoreUnavailable(f"the coordinator's database: {error}") from error
        except SQLAlchemyError as error:
            raise StoreError(f"the coordinator's database: {error}") from error
        except sqlite3.Error as error:
            raise told(error, "the coordinator's database") from error

    @contextmanager
    def read(self, engine: Engine) -> Iterator[Connection]:
        """A transaction that sees one state."""
        with engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self, engine: Engine) -> Iterator[Connection]:
        """A transaction beside which there is no other writer; durable when the block ends."""
        with engine.connect() as connection:
            # A deferred transaction that reads first can fail at its first write; this cannot.
            writer = connection.execution_options(fedge_begin="BEGIN IMMEDIATE")
            with writer.begin():
                yield writer
            self._empty_log(writer)

    def serve(self, engine: Engine) -> None:
        """Nothing: the lock of the state folder says who serves."""

    def begin_term(self, engine: Engine) -> None:
        """Nothing: the kernel holds that lock for as long as the process lives."""

    @contextmanager
    def collecting(self, engine: Engine) -> Iterator[bool]:
        """Whether files may be deleted now; no backup begins meanwhile."""
        with self._open_backup_lock() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    @contextmanager
    def backing_up(self, engine: Engine) -> Iterator[None]:
        """No file is deleted meanwhile."""
        with self._open_backup_lock() as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            yield

    def close(self) -> None:
        """Nothing was taken."""

    def _open_backup_lock(self) -> IO[str]:
        try:
            return self._backup_lock.open("a", encoding="ascii")
        except OSError as error:
            raise StoreUnavailable(f"cannot open {self._backup_lock}: {error.strerror}") from error

    def _empty_log(self, connection: Connection) -> None:
        try:
            size_bytes = self._wal.stat().st_size
        except OSError:
            return
        if size_bytes <= WAL_LIMIT_BYTES or time.monotonic() < self._empty_again_at:
            return
        if not self._emptying.acquire(blocking=False):
            return
        try:
            with contextlib.suppress(sqlite3.Error):
                driver: Any = connection.connection.driver_connection
                driver.execute(f"PRAGMA busy_timeout={WAL_WAIT_MS}")
                try:
                    busy = driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
                finally:
                    # The connection goes back to the others, and its next writer has to wait.
                    driver.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
                self._attempts = self._attempts + 1 if busy else 0
                if self._attempts == WAL_ATTEMPTS:
                    self._attempts, self._empty_again_at = 0, time.monotonic() + WAL_PAUSE_S
        finally:
            self._emptying.release()


def told(error: BaseException | None, what: str) -> StoreError:
    """What to raise for a driver's error: `StoreUnavailable` if it may pass. `what`: says where."""
    # Extended codes carry the plain one in their lowest byte.
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    kind = StoreUnavailable if code in _PASSING else StoreError
    return kind(f"{what}: {error}")


def _set_up(connection: sqlite3.Connection, _record: object) -> None:
    # The driver must not begin transactions by itself: `_begin` below chooses the kind.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin(connection: Connection) -> None:
    statement = connection.get_execution_options().get("fedge_begin", "BEGIN")
    connection.execute(text(statement))
