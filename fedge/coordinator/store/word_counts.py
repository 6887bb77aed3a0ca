"""Word counts: requested by a command, opened and closed by the coordinator.

A device counts once in each, because (word count, device) is a key: what comes again changes
nothing, and what comes after the end is refused. What is kept of a device is its noisy word,
and its name until the end: then nobody has to be known again, and the words are nobody's.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace

from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    func,
    insert,
    literal_column,
    select,
    true,
    update,
)

from fedge.coordinator.store.database import Database
from fedge.coordinator.store.tables import word_count_answers, word_counts
from fedge.coordinator.word_estimates import WordReport
from fedge.schemas.errors import PeerError, RejectReason
from fedge.schemas.messages import WordCountAnswer
from fedge.schemas.word_reports import bucket_count


@dataclass(frozen=True, slots=True)
class WordCountRecord:
    """One word count. For the terms see `messages.WordCountAnnouncement`; times as elsewhere here.

    `until`: its deadline, which runs from `opened_at`. `reason`: why it was closed.
    """

    number: int
    campaign: str
    epsilon: float
    least_typed: int
    new_only: bool
    deadline_s: float
    requested_at: float
    opened_at: float | None = None
    until: float | None = None
    closed_at: float | None = None
    reason: str = ""


class WordCounts:
    """The part of the store that keeps word counts."""

    _database: Database

    def request_word_count(
        self, *, epsilon: float, least_typed: int, new_only: bool, deadline_s: float, at: float
    ) -> WordCountRecord:
        """Keeps that devices should be asked, under a campaign that nobody has asked under."""
        with self._database.write() as connection:
            newest = connection.scalar(select(func.max(word_counts.c.number)))
            record = WordCountRecord(
                number=(newest or 0) + 1,
                campaign=secrets.token_hex(16),
                epsilon=epsilon,
                least_typed=least_typed,
                new_only=new_only,
                deadline_s=deadline_s,
                requested_at=at,
            )
            connection.execute(
                insert(word_counts).values(
                    number=record.number,
                    campaign=record.campaign,
                    epsilon=epsilon,
                    least_typed=least_typed,
                    new_only=new_only,
                    deadline_s=deadline_s,
                    requested_at=at,
                    reason="",
                )
            )
        return record

    def open_word_count(self, *, at: float) -> WordCountRecord | None:
        """The oldest one that is not closed, begun if it was not; None if there is none."""
        oldest = (
            select(word_counts)
            .where(word_counts.c.closed_at.is_(None))
            .order_by(word_counts.c.number)
            .limit(1)
        )
        with self._database.read() as connection:
            row = connection.execute(oldest).first()
        if row is None or row.opened_at is not None:
            return None if row is None else WordCountRecord(**row._mapping)
        with self._database.write() as connection:
            # Looked for again: a command may have closed it since.
            row = connection.execute(oldest).first()
            if row is None:
                return None
            record = WordCountRecord(**row._mapping)
            if record.opened_at is None:
                record = replace(record, opened_at=at, until=at + record.deadline_s)
                connection.execute(
                    update(word_counts)
                    .where(word_counts.c.number == record.number)
                    .values(opened_at=record.opened_at, until=record.until)
                )
            return record

    def record_word_report(self, device: str, answer: WordCountAnswer, *, at: float) -> bool:
        """Keeps a device's noisy word: True the first time, False if it had told one before.

        Raises `PeerError`: late if there is no such word count or it is closed, invalid_field if it
        has no such bucket.
        """
        found = select(word_counts).where(word_counts.c.campaign == answer.campaign)
        with self._database.write() as connection:
            row = connection.execute(found).first()
            if row is None or row.closed_at is not None:
                raise PeerError(RejectReason.LATE, "a word for a word count that is not under way")
            if answer.bucket >= bucket_count(row.epsilon):
                raise PeerError(
                    RejectReason.INVALID_FIELD,
                    f"bucket {answer.bucket} of {bucket_count(row.epsilon)}",
                )
            told = select(word_count_answers.c.device).where(
                word_count_answers.c.word_count == row.number,
                word_count_answers.c.device == device,
            )
            # There is one writer at a time: nobody comes in between.
            if connection.execute(told).first() is not None:
                return False
            connection.execute(
                insert(word_count_answers).values(
                    word_count=row.number,
                    device=device,
                    key=answer.key,
                    bucket=answer.bucket,
                    at=at,
                )
            )
        return True

    def close_word_count(self, number: int, reason: str, *, at: float) -> bool:
        """Ends a word count; False, and no change, if it was closed before."""
        with self._database.write() as connection:
            return close_word_counts(connection, reason, at=at, number=number) == 1

    def word_counts(self) -> tuple[tuple[WordCountRecord, int], ...]:
        """Every word count and how many devices have answered it, by number."""
        answered = (
            select(word_count_answers.c.word_count, func.count().label("devices"))
            .group_by(word_count_answers.c.word_count)
            .subquery()
        )
        joined = word_counts.outerjoin(answered, answered.c.word_count == word_counts.c.number)
        statement = (
            select(word_counts, func.coalesce(answered.c.devices, 0).label("devices"))
            .select_from(joined)
            .order_by(word_counts.c.number)
        )
        with self._database.read() as connection:
            found = []
            for row in connection.execute(statement):
                values = dict(row._mapping)
                devices = values.pop("devices")
                found.append((WordCountRecord(**values), devices))
        return tuple(found)

    def word_reports(self, number: int) -> tuple[WordReport, ...]:
        """What the devices have told in a word count, without who told what."""
        statement = select(word_count_answers.c.key, word_count_answers.c.bucket).where(
            word_count_answers.c.word_count == number
        )
        with self._database.read() as connection:
            return tuple(WordReport(*row) for row in connection.execute(statement))


def close_word_counts(
    connection: Connection, reason: str, *, at: float, number: int | None = None
) -> int:
    """Ends those that are open, and forgets who told what in them: how many. `number`: that one."""
    which = and_(
        word_counts.c.closed_at.is_(None),
        true() if number is None else word_counts.c.number == number,
    )
    # When each came goes with the name: the log has the two side by side.
    connection.execute(
        update(word_count_answers)
        .where(word_count_answers.c.word_count.in_(select(word_counts.c.number).where(which)))
        .values(device=_nobody(connection), at=at)
    )
    closes = update(word_counts).where(which).values(closed_at=at, reason=reason)
    return connection.execute(closes).rowcount


def _nobody(connection: Connection) -> ColumnElement[str]:
    """A name for each row that says nothing, and that no other row has: 122 random bits or more."""
    if connection.dialect.name == "postgresql":
        return literal_column("gen_random_uuid()::text")
    return literal_column("lower(hex(randomblob(16)))")
