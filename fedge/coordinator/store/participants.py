"""Participants: one device in one round, asked once, counted at most once.

What is accepted is final. In a synchronous round an update counts in the round that asked for it;
in asynchronous mode in the one whose buffer is open when it arrives.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection, func, select

from fedge.coordinator.store.database import Database
from fedge.coordinator.store.queries import (
    UNANSWERED,
    become_silent,
    counted_in,
    decide,
    participant_row,
    participants_in,
    train,
)
from fedge.coordinator.store.records import (
    ASYNC,
    Contribution,
    ParticipantRecord,
    ParticipantStatus,
)
from fedge.coordinator.store.rows import contribution_values, participant_of
from fedge.coordinator.store.tables import participants, rounds
from fedge.schemas.errors import RejectReason


class Participants:
    """The part of the store that keeps who was asked and what became of it."""

    _database: Database

    def record_assignment(
        self, round_number: int, cohort: Iterable[str], *, train_until: float, at: float
    ) -> None:
        """Keeps who was asked, all in one transaction; the round now trains until `train_until`.

        A device that was asked before keeps what is known of it.
        Raises `StoreError` if the round is not open.
        """
        with self._database.write() as connection:
            train(connection, round_number, train_until=train_until)
            self._ask(connection, round_number, cohort, {"asked_at": at, "until": train_until})

    def record_asked(
        self, round_number: int, device: str, *, base: int, until: float, at: float
    ) -> bool:
        """Asks one more device in a round of asynchronous mode, which trains from now on.

        `base`: the version it trains from; `until`: seconds since the epoch. False, and no change,
        if it was asked in this round before. Raises `StoreError` if the round is not open.
        """
        with self._database.write() as connection:
            if participant_row(connection, round_number, device) is not None:
                return False
            train(connection, round_number)
            asked = {"asked_at": at, "base": base, "until": until}
            self._ask(connection, round_number, [device], asked)
            return True

    def record_offer(
        self, round_number: int, device: str, contribution: Contribution, *, at: float
    ) -> None:
        """Keeps what a device of the cohort offered; an accepted update stays as it was.

        Raises `PeerError` (not_in_cohort) for a device that was not asked.
        """
        values = contribution_values(contribution) | {"offered_at": at}
        with self._database.write() as connection:
            decide(connection, round_number, device, ParticipantStatus.OFFERED, values)

    def record_accepted(
        self,
        round_number: int,
        device: str,
        contribution: Contribution,
        *,
        at: float,
        counted_in: int | None = None,
    ) -> bool:
        """Counts a device's update: True the first time, False if one was accepted before.

        `round_number`: the round that asked for it; `counted_in`: the one whose version it goes
        into, None where they are the same. The update's file must be durable before this is called;
        a receipt may follow it.
        Raises `PeerError`: not_in_cohort, or late if the round it would count in is not open.
        """
        goes_into = round_number if counted_in is None else counted_in
        values = contribution_values(contribution) | {
            "decided_at": at,
            "reason": None,
            "detail": "",
            "counted_in": goes_into,
        }
        status = ParticipantStatus.ACCEPTED
        with self._database.write() as connection:
            return decide(
                connection, round_number, device, status, values, only_while_open=goes_into
            )

    def record_rejected(
        self, round_number: int, device: str, reason: RejectReason, detail: str, *, at: float
    ) -> bool:
        """Keeps why a device's update was refused; False, and no change, if one was accepted.

        Raises `PeerError` (not_in_cohort) for a device that was not asked.
        """
        values = {"reason": reason.value, "detail": detail, "decided_at": at}
        with self._database.write() as connection:
            return decide(connection, round_number, device, ParticipantStatus.REJECTED, values)

    def record_failed(self, round_number: int, device: str, detail: str, *, at: float) -> bool:
        """Keeps that a device cannot deliver; False, and no change, if an update was accepted.

        Raises `PeerError` (not_in_cohort) for a device that was not asked.
        """
        values = {"reason": None, "detail": detail, "decided_at": at}
        with self._database.write() as connection:
            return decide(connection, round_number, device, ParticipantStatus.FAILED, values)

    def silence(self, round_number: int, devices: Iterable[str], *, at: float) -> None:
        """Those of `devices` that have not answered in that round are waited for no longer."""
        with self._database.write() as connection:
            become_silent(connection, round_number, at=at, devices=devices)

    def participants(self, round_number: int) -> tuple[ParticipantRecord, ...]:
        """The devices of a round, in name order."""
        with self._database.read() as connection:
            return participants_in(connection, round_number)

    def participant(self, round_number: int, device: str) -> ParticipantRecord | None:
        """What is known of one device in one round; None if it was not asked."""
        with self._database.read() as connection:
            row = participant_row(connection, round_number, device)
        return None if row is None else participant_of(row)

    def last_participant_before(self, round_number: int) -> str | None:
        """The device that the newest earlier round asked, the first by name; None if none did."""
        newest = (
            select(func.max(participants.c.round))
            .where(participants.c.round < round_number)
            .scalar_subquery()
        )
        statement = select(participants.c.device).where(participants.c.round == newest)
        with self._database.read() as connection:
            # By Python, since databases differ in how they order text.
            return min(connection.scalars(statement), default=None)

    def accepted_in(self, round_number: int) -> tuple[ParticipantRecord, ...]:
        """Whose updates count in the version of that round, by device, then by asking round."""
        with self._database.read() as connection:
            return counted_in(connection, round_number)

    def in_flight(self) -> tuple[ParticipantRecord, ...]:
        """Who was asked in asynchronous rounds and has not answered, by round, then by device."""
        statement = (
            select(participants)
            .join(rounds, rounds.c.number == participants.c.round)
            .where(rounds.c.mode == ASYNC, participants.c.status.in_(UNANSWERED))
        )
        with self._database.read() as connection:
            found = [participant_of(row) for row in connection.execute(statement)]
        return tuple(sorted(found, key=lambda one: (one.round, one.device)))

    def _ask(
        self,
        connection: Connection,
        round_number: int,
        cohort: Iterable[str],
        values: dict[str, Any],
    ) -> None:
        asked = [
            values
            | {
                "round": round_number,
                "device": device,
                "status": ParticipantStatus.ASKED.value,
                "detail": "",
            }
            for device in cohort
        ]
        if asked:
            statement = self._database.upsert(participants).on_conflict_do_nothing()
            connection.execute(statement, asked)
