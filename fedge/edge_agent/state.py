"""What a device remembers across restarts, in one SQLite file.

The boot number, the outbox (updates without a receipt) and the participation ledger. Every call is
one durable transaction: a power cut leaves the state before or after it. The newest version's
announcement is kept too, so that a device without a network knows what it holds.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from fedge.schemas.errors import StoreError
from fedge.schemas.messages import Offer, ReceiptStatus, VersionAnnouncement

_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS outbox (
    round INTEGER PRIMARY KEY,
    sha256 TEXT NOT NULL,
    offer TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS ledger (
    round INTEGER PRIMARY KEY,
    base INTEGER NOT NULL,
    examples INTEGER NOT NULL,
    training_s REAL NOT NULL,
    upload_bytes INTEGER NOT NULL,
    status TEXT NOT NULL,
    reason TEXT
) STRICT;
"""


@dataclass(frozen=True, slots=True)
class Participation:
    """One line of the ledger. `status`: offered, accepted or rejected."""

    round: int
    base: int
    examples: int
    training_s: float
    upload_bytes: int
    status: str
    reason: str | None


class AgentState:
    """The file at `path`, created when absent. Raises `StoreError` if it cannot be used."""

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"cannot use the device's state in {path}: {error}") from error

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    def next_boot(self) -> int:
        """Counts this start of the agent: 1 on the first, and one more on each later one."""
        return int(
            self._one(
                "INSERT INTO facts VALUES ('boot', '1') "
                "ON CONFLICT (name) DO UPDATE SET value = CAST(value AS INTEGER) + 1 "
                "RETURNING value"
            )
        )

    def keep_announcement(self, announcement: VersionAnnouncement) -> None:
        """Remembers the newest version whose blobs are all here."""
        self._run(
            "INSERT OR REPLACE INTO facts VALUES ('announcement', ?)",
            announcement.model_dump_json(),
        )

    def announcement(self) -> VersionAnnouncement | None:
        """What `keep_announcement` was last told."""
        with closing(self._run("SELECT value FROM facts WHERE name = 'announcement'")) as rows:
            row = rows.fetchone()
        return None if row is None else VersionAnnouncement.model_validate_json(row[0])

    def put_in_outbox(self, offer: Offer) -> None:
        """Keeps an offer until its receipt, and opens its line in the ledger."""
        self._run("BEGIN IMMEDIATE")
        try:
            self._run(
                "INSERT OR REPLACE INTO outbox VALUES (?, ?, ?)",
                offer.round,
                offer.update.sha256,
                offer.model_dump_json(),
            )
            self._run(
                "INSERT OR REPLACE INTO ledger VALUES (?, ?, ?, ?, ?, 'offered', NULL)",
                offer.round,
                offer.base,
                offer.examples,
                offer.training_s,
                offer.update.size_bytes,
            )
        except StoreError:
            self._run("ROLLBACK")
            raise
        self._run("COMMIT")

    def outbox(self) -> dict[int, Offer]:
        """The offers without a receipt, by round."""
        with closing(self._run("SELECT round, offer FROM outbox ORDER BY round")) as rows:
            return {number: Offer.model_validate_json(text) for number, text in rows}

    def settle(self, number: int, status: ReceiptStatus, reason: str | None) -> None:
        """Removes a round from the outbox and writes its end into the ledger."""
        self._run("BEGIN IMMEDIATE")
        try:
            self._run("DELETE FROM outbox WHERE round = ?", number)
            self._run(
                "UPDATE ledger SET status = ?, reason = ? WHERE round = ?",
                status.value,
                reason,
                number,
            )
        except StoreError:
            self._run("ROLLBACK")
            raise
        self._run("COMMIT")

    def ledger(self) -> list[Participation]:
        """Every round this device trained for, oldest first."""
        with closing(self._run("SELECT * FROM ledger ORDER BY round")) as rows:
            return [Participation(*row) for row in rows]

    def _one(self, statement: str, *values: object) -> str:
        with closing(self._run(statement, *values)) as rows:
            row = rows.fetchone()
        return str(row[0])

    def _run(self, statement: str, *values: object) -> sqlite3.Cursor:
        try:
            return self._db.execute(statement, values)
        except sqlite3.Error as error:
            raise StoreError(f"the device's state cannot be written: {error}") from error
