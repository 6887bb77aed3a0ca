"""What a device remembers across restarts, in one SQLite file.

The boot number, the trainings that failed in a row, the outbox (updates without a receipt) and the
participation ledger. Every call is one durable transaction: a power cut, or a disk that fills up,
leaves the state before or after it. The newest version's announcement is kept too, so that a device
without a network knows what it holds.
"""

from __future__ import annotations

import sqlite3
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from fedge.edge_agent.durable import disk
from fedge.edge_agent.participation import Usage
from fedge.edge_agent.sqlite_file import connect, sqlite_errors, transaction
from fedge.schemas.errors import ConfigError, StoreError, StoreUnavailable
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import (
    Offer,
    ReceiptStatus,
    TrialOutcome,
    TrialReport,
    VersionAnnouncement,
)

log = EventLog(__name__)

LEDGER_LINES = 10_000
"""Rounds that the ledger remembers: years of them, in about a megabyte."""
TRIALS_KEPT = 64
"""Of the newest rollouts."""
LOST = "lost"
"""In the ledger: the update was gone or damaged before it had a receipt."""

_BUSY_S = 1.0
"""What a write waits for another program that looks into the file."""
_WHAT = "use the device's state"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS outbox (
    round INTEGER PRIMARY KEY,
    sha256 TEXT NOT NULL,
    offer TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS outbox_generations (
    round INTEGER PRIMARY KEY,
    generation INTEGER NOT NULL
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
CREATE TABLE IF NOT EXISTS trials (
    rollout INTEGER NOT NULL,
    version INTEGER NOT NULL,
    begun INTEGER NOT NULL,
    report TEXT,
    counted INTEGER NOT NULL,
    PRIMARY KEY (rollout, version)
) STRICT;
CREATE TABLE IF NOT EXISTS usage (
    id INTEGER PRIMARY KEY,
    at_s REAL NOT NULL,
    training_s REAL NOT NULL,
    upload_bytes INTEGER NOT NULL
) STRICT;
"""


@dataclass(frozen=True, slots=True)
class Participation:
    """One line of the ledger. `status`: offered, accepted, rejected or lost."""

    round: int
    base: int
    examples: int
    training_s: float
    upload_bytes: int
    status: str
    reason: str | None


@dataclass(frozen=True, slots=True)
class Trial:
    """How a candidate ended here. `counted`: the coordinator said that it knows."""

    report: TrialReport
    counted: bool


class AgentState:
    """The file at `path`, created when absent.

    This and every method raises `StoreUnavailable` if the disk cannot be used now, and `StoreError`
    for a file that is damaged.
    """

    def __init__(self, path: Path) -> None:
        what = f"use the device's state in {path}"
        self._db = connect(path, what, busy_s=_BUSY_S)
        try:
            with sqlite_errors(what):
                self._db.executescript(_SCHEMA)
        except StoreError:
            self._db.close()
            raise

    @classmethod
    def open_whole(cls, path: Path) -> Self:
        """The file, checked; a damaged one is moved aside, logged, and another begun.

        For the one program that writes it. Raises `StoreUnavailable`.
        """
        try:
            state = cls(path)
            try:
                state._check()
            except StoreError:
                state.close()
                raise
        except StoreUnavailable:
            raise
        except StoreError as error:
            aside = _move_aside(path)
            log.error("agent_state_damaged", path=str(path), kept=str(aside), reason=str(error))
            return cls(path)
        return state

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    # ------------------------------------------------------------ facts

    def bind_population(self, name: str) -> None:
        """Says whose state this is. Raises `ConfigError` if it is another population's.

        The numbers that it has seen are that population's, and so are its unsent updates.
        """
        bound = self._fact("population")
        if bound is None:
            self._keep_fact("population", name)
        elif bound != name:
            raise ConfigError(
                f"this state belongs to population {bound!r}, not {name!r}: give the device "
                "another state_dir"
            )

    def boot(self) -> int:
        """The boot number of the last start, 0 before the first."""
        return self._count("boot")

    def keep_boot(self, boot: int) -> None:
        """Remembers the boot number of this start."""
        self._keep_fact("boot", str(boot))

    def newest_round(self) -> int:
        """The newest round that this device made an update for, 0 before the first."""
        with closing(self._run("SELECT coalesce(max(round), 0) FROM ledger")) as rows:
            return int(rows.fetchone()[0])

    def failures(self) -> int:
        """The trainings that failed since the last one that did not."""
        return self._count("failures")

    def keep_failures(self, failures: int) -> None:
        """Remembers them."""
        self._keep_fact("failures", str(failures))

    def keep_announcement(self, announcement: VersionAnnouncement) -> None:
        """Remembers the newest version whose blobs are all here."""
        self._keep_fact("announcement", announcement.model_dump_json())

    def announcement(self) -> VersionAnnouncement | None:
        """What `keep_announcement` was last told; None if it was written by another release."""
        text = self._fact("announcement")
        if text is None:
            return None
        try:
            return VersionAnnouncement.model_validate_json(text)
        except ValidationError as error:
            log.error("announcement_unreadable", reason=str(error))
            return None

    # ------------------------------------------------------------ outbox and ledger

    def put_in_outbox(self, offer: Offer, generation: int | None = None) -> None:
        """Keeps an offer until its receipt, and opens its line in the ledger.

        `generation`: of the example store that it was trained on, if it was one.
        """
        with self._transaction():
            if generation is not None:
                self._run(
                    "INSERT OR REPLACE INTO outbox_generations VALUES (?, ?)",
                    offer.round,
                    generation,
                )
            self._run(
                "INSERT OR REPLACE INTO outbox VALUES (?, ?, ?)",
                offer.round,
                offer.update.sha256,
                offer.model_dump_json(),
            )
            self._run(
                # What was accepted or rejected stays so, whatever is offered again.
                "INSERT INTO ledger VALUES (?, ?, ?, ?, ?, 'offered', NULL) "
                "ON CONFLICT (round) DO NOTHING",
                offer.round,
                offer.base,
                offer.examples,
                offer.training_s,
                offer.update.size_bytes,
            )
            self._run(
                "DELETE FROM ledger WHERE round <= "
                "(SELECT round FROM ledger ORDER BY round DESC LIMIT 1 OFFSET ?)",
                LEDGER_LINES,
            )

    def outbox(self) -> dict[int, Offer | None]:
        """The offers without a receipt, by round; None for one that cannot be read."""
        offers: dict[int, Offer | None] = {}
        with closing(self._run("SELECT round, offer FROM outbox ORDER BY round")) as rows:
            for number, text in rows:
                try:
                    offers[number] = Offer.model_validate_json(text)
                except ValidationError:
                    offers[number] = None
        return offers

    def outbox_generations(self) -> dict[int, int]:
        """For the offers that were trained on an example store: its generation, by round."""
        with closing(self._run("SELECT round, generation FROM outbox_generations")) as rows:
            return dict(rows)

    def settle(self, number: int, status: ReceiptStatus, reason: str | None) -> None:
        """Removes a round from the outbox and writes its end into the ledger."""
        self._end(number, status.value, reason)

    def lose(self, number: int, reason: str) -> None:
        """The same for an update that was lost on this device."""
        self._end(number, LOST, reason)

    def ledger(self) -> list[Participation]:
        """The newest `LEDGER_LINES` rounds that this device trained for, oldest first."""
        with closing(self._run("SELECT * FROM ledger ORDER BY round")) as rows:
            return [Participation(*row) for row in rows]

    # ------------------------------------------------------------ trials

    def begin_trial(self, rollout: int, version: int) -> int:
        """Remembers that a rollout's version is tried; how often it was begun, this one too.

        Those that were given up are not counted.
        """
        with self._transaction():
            self._open_trial(rollout, version)
            self._run(
                "UPDATE trials SET begun = begun + 1 WHERE rollout = ? AND version = ?",
                rollout,
                version,
            )
        with closing(
            self._run(
                "SELECT begun FROM trials WHERE rollout = ? AND version = ?", rollout, version
            )
        ) as rows:
            return int(rows.fetchone()[0])

    def give_up_trial(self, rollout: int, version: int) -> None:
        """One that was begun has ended, or was stopped on purpose: it does not count."""
        self._run(
            "UPDATE trials SET begun = max(begun - 1, 0) WHERE rollout = ? AND version = ?",
            rollout,
            version,
        )

    def end_trial(self, report: TrialReport) -> None:
        """Remembers how a trial ended; how it ended first stays, if that can be read."""
        with self._transaction():
            self._open_trial(report.rollout, report.version)
            if self.trial(report.rollout, report.version) is None:
                self._keep_report(report)

    def trial(self, rollout: int, version: int) -> Trial | None:
        """A trial that has ended; None if it has not, or its report cannot be read."""
        with closing(
            self._run(
                "SELECT report, counted FROM trials WHERE rollout = ? AND version = ?",
                rollout,
                version,
            )
        ) as rows:
            row = rows.fetchone()
        if row is None or row[0] is None:
            return None
        try:
            return Trial(TrialReport.model_validate_json(row[0]), counted=bool(row[1]))
        except ValidationError as error:
            log.error("trial_unreadable", rollout=rollout, reason=str(error))
            return None

    def count_trial(self, rollout: int) -> None:
        """Remembers that the coordinator has counted the report."""
        self._run("UPDATE trials SET counted = 1 WHERE rollout = ?", rollout)

    def forget_measures(self) -> None:
        """What trials have measured is said to nobody any more; how they ended stays.

        For what the coordinator has not counted yet.
        """
        with self._transaction():
            with closing(
                self._run("SELECT rollout, version FROM trials WHERE counted = 0")
            ) as rows:
                waiting = rows.fetchall()
            for rollout, version in waiting:
                trial = self.trial(rollout, version)
                if trial is not None:
                    said = {"detail": "", "loss_ratio": None, "hold_out": None}
                    self._keep_report(trial.report.model_copy(update=said))

    def failed_versions(self) -> frozenset[int]:
        """The versions that did not pass their latest trial here."""
        ends: dict[int, bool] = {}
        with closing(
            self._run("SELECT version, report FROM trials WHERE report IS NOT NULL ORDER BY rowid")
        ) as rows:
            for version, text in rows:
                with suppress(ValidationError):
                    outcome = TrialReport.model_validate_json(text).outcome
                    ends[version] = outcome is TrialOutcome.ROLLED_BACK
        return frozenset(version for version, failed in ends.items() if failed)

    # ------------------------------------------------------------ usage

    def add_usage(self, used: Usage, line: int | None) -> int:
        """Adds to a line of the usage and dates it anew, or begins one; its number."""
        values = (used.at_s, used.training_s, used.upload_bytes)
        if line is not None:
            self._run(
                "UPDATE usage SET at_s = ?, training_s = training_s + ?, "
                "upload_bytes = upload_bytes + ? WHERE id = ?",
                *(*values, line),
            )
            return line
        with self._transaction():
            added = self._run(
                "INSERT INTO usage (at_s, training_s, upload_bytes) VALUES (?, ?, ?)", *values
            )
            number = int(added.lastrowid or 0)
            # By number and not by age: a clock that was wrong for an hour forgets nothing.
            self._run("DELETE FROM usage WHERE id <= ?", number - LEDGER_LINES)
        return number

    def usage(self, after_s: float) -> list[Usage]:
        """The lines that are dated after this, of the newest `LEDGER_LINES`, oldest first."""
        wanted = "SELECT at_s, training_s, upload_bytes FROM usage WHERE at_s > ? ORDER BY id"
        with closing(self._run(wanted, after_s)) as rows:
            return [Usage(*row) for row in rows]

    def redate_usage(self, now_s: float) -> None:
        """Dates the lines of the future now."""
        self._run("UPDATE usage SET at_s = ? WHERE at_s > ?", now_s, now_s)

    # ------------------------------------------------------------ SQL

    def _open_trial(self, rollout: int, version: int) -> None:
        self._run("INSERT OR IGNORE INTO trials VALUES (?, ?, 0, NULL, 0)", rollout, version)
        self._run(
            "DELETE FROM trials WHERE rowid NOT IN "
            "(SELECT rowid FROM trials ORDER BY rowid DESC LIMIT ?)",
            TRIALS_KEPT,
        )

    def _keep_report(self, report: TrialReport) -> None:
        self._run(
            "UPDATE trials SET report = ? WHERE rollout = ? AND version = ?",
            report.model_dump_json(),
            report.rollout,
            report.version,
        )

    def _end(self, number: int, status: str, reason: str | None) -> None:
        with self._transaction():
            self._run("DELETE FROM outbox WHERE round = ?", number)
            self._run("DELETE FROM outbox_generations WHERE round = ?", number)
            self._run(
                "UPDATE ledger SET status = ?, reason = ? WHERE round = ?", status, reason, number
            )

    def _fact(self, name: str) -> str | None:
        with closing(self._run("SELECT value FROM facts WHERE name = ?", name)) as rows:
            row = rows.fetchone()
        return None if row is None else str(row[0])

    def _count(self, name: str) -> int:
        text = self._fact(name) or ""
        return int(text) if text.isascii() and text.isdigit() else 0

    def _keep_fact(self, name: str, value: str) -> None:
        self._run("INSERT OR REPLACE INTO facts VALUES (?, ?)", name, value)

    def _check(self) -> None:
        with closing(self._run("PRAGMA quick_check(1)")) as rows:
            (found,) = rows.fetchone()
        if found != "ok":
            raise StoreError(f"the device's state is damaged: {found}")

    def _transaction(self) -> AbstractContextManager[None]:
        return transaction(self._db, _WHAT)

    def _run(self, statement: str, *values: object) -> sqlite3.Cursor:
        with sqlite_errors(_WHAT):
            return self._db.execute(statement, values)


def _move_aside(path: Path) -> Path:
    """Where the damaged file lies now, instead of the one before it. Raises `StoreError`."""
    aside = path.with_name(path.name + ".damaged")
    with disk(f"move {path} aside"):
        # The log first: it must never be applied to the file that is begun.
        for ending in ("-wal", "-shm"):
            path.with_name(path.name + ending).unlink(missing_ok=True)
        path.replace(aside)
    return aside
