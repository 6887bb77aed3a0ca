"""Rounds: opened once, closed once, with a version or with a reason."""

from __future__ import annotations

from sqlalchemy import insert, select

from fedge.coordinator.store.database import Database
from fedge.coordinator.store.queries import (
    close_round,
    counted_in,
    participants_in,
    refusals_in,
    version_numbered,
)
from fedge.coordinator.store.records import (
    Outcome,
    ParticipantStatus,
    RoundRecord,
    RoundReport,
)
from fedge.coordinator.store.rows import round_of, round_values
from fedge.coordinator.store.tables import rounds

_FAILED = (ParticipantStatus.FAILED.value, ParticipantStatus.REJECTED.value)


class Rounds:
    """The part of the store that keeps rounds."""

    _database: Database

    def open_round(self, record: RoundRecord) -> None:
        """Keeps a new round. Raises `StoreError` if the number is taken."""
        with self._database.write() as connection:
            connection.execute(insert(rounds).values(round_values(record)))

    def abandon_round(self, round_number: int, reason: str, *, at: float) -> None:
        """Closes a round without a version. Raises `StoreError` if it is not open."""
        with self._database.write() as connection:
            close_round(connection, round_number, Outcome.ABANDONED, at=at, reason=reason)

    def newest_round(self) -> RoundRecord | None:
        """The round with the highest number."""
        with self._database.read() as connection:
            statement = select(rounds).order_by(rounds.c.number.desc()).limit(1)
            row = connection.execute(statement).first()
        return None if row is None else round_of(row)

    def rounds(self) -> tuple[RoundRecord, ...]:
        """Every round, by number."""
        with self._database.read() as connection:
            rows = connection.execute(select(rounds).order_by(rounds.c.number)).all()
        return tuple(round_of(row) for row in rows)

    def open_rounds(self) -> tuple[RoundRecord, ...]:
        """The rounds without an outcome, by number: what a restart takes up again."""
        with self._database.read() as connection:
            unfinished = select(rounds).where(rounds.c.outcome.is_(None)).order_by(rounds.c.number)
            return tuple(round_of(row) for row in connection.execute(unfinished))

    def round_report(self, round_number: int) -> RoundReport | None:
        """Everything kept about a round, as of one moment; None if there is no such round."""
        with self._database.read() as connection:
            row = connection.execute(select(rounds).where(rounds.c.number == round_number)).first()
            if row is None:
                return None
            record = round_of(row)
            made = None if record.version is None else version_numbered(connection, record.version)
            return RoundReport(
                round=record,
                participants=participants_in(connection, round_number),
                counted=counted_in(connection, round_number),
                refusals=refusals_in(connection, round_number),
                version=made,
            )
