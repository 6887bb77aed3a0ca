"""The stores as they lie on the disk, read by other code than the one that wrote them.

Plain SQL on a few columns, read-only, while the programs run or after they ended. What cannot be
read now (locked, a disk without room for a shared index) is not read now.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """A row of `versions`. `weights`: the digest."""

    number: int
    base: int | None
    round: int | None
    weights: str


@dataclass(frozen=True, slots=True)
class StoredRound:
    """A row of `rounds`."""

    number: int
    base: int
    phase: str
    outcome: str | None
    reason: str
    version: int | None


@dataclass(frozen=True, slots=True)
class StoredContribution:
    """An accepted row of `participants`. `sha256`: of the update.

    `round`: the one that asked. `counted_in`: the one into whose version it goes, which is a later
    one only in asynchronous mode.
    """

    round: int
    device: str
    sha256: str
    examples: int
    counted_in: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The coordinator's database at one moment.

    `statuses`: participants by status. `refusals`: counts by reason. `online`: device names.
    """

    versions: tuple[StoredVersion, ...]
    rounds: tuple[StoredRound, ...]
    accepted: tuple[StoredContribution, ...]
    statuses: dict[str, int]
    refusals: dict[str, int]
    online: frozenset[str] = frozenset()

    @property
    def newest(self) -> int:
        """The highest version number, -1 before the first."""
        return max((version.number for version in self.versions), default=-1)


@dataclass(frozen=True, slots=True)
class LedgerLine:
    """A row of a device's `ledger`."""

    round: int
    status: str
    reason: str | None


def read_coordinator(database: Path) -> Snapshot:
    """The database in one transaction. Raises `sqlite3.Error` if it cannot be read now."""
    with _reading(database) as connection:
        versions = tuple(
            StoredVersion(number, base, round_number, json.loads(weights)["sha256"])
            for number, base, round_number, weights in connection.execute(
                "SELECT number, base, round, weights FROM versions ORDER BY number"
            )
        )
        rounds = tuple(
            StoredRound(*row)
            for row in connection.execute(
                "SELECT number, base, phase, outcome, reason, version FROM rounds ORDER BY number"
            )
        )
        accepted = tuple(
            StoredContribution(number, device, json.loads(update)["sha256"], examples, counted_in)
            for number, device, update, examples, counted_in in connection.execute(
                'SELECT round, device, "update", examples, COALESCE(counted_in, round) '
                "FROM participants WHERE status = 'accepted' ORDER BY round, device"
            )
        )
        statuses = dict(
            connection.execute("SELECT status, COUNT(*) FROM participants GROUP BY status")
        )
        refusals = dict(
            connection.execute("SELECT reason, SUM(count) FROM refusals GROUP BY reason")
        )
        online = frozenset(
            name for (name,) in connection.execute("SELECT name FROM devices WHERE online")
        )
    return Snapshot(versions, rounds, accepted, statuses, refusals, online)


def read_ledger(database: Path) -> tuple[LedgerLine, ...]:
    """A device's ledger. Raises `sqlite3.Error`."""
    with _reading(database) as connection:
        rows = connection.execute("SELECT round, status, reason FROM ledger ORDER BY round")
        return tuple(LedgerLine(*row) for row in rows)


def read_outbox(database: Path) -> tuple[int, ...]:
    """The rounds whose update has no receipt. Raises `sqlite3.Error`."""
    with _reading(database) as connection:
        return tuple(number for (number,) in connection.execute("SELECT round FROM outbox"))


@contextlib.contextmanager
def _reading(database: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=2.0)
    try:
        connection.execute("BEGIN")
        yield connection
    finally:
        connection.close()
