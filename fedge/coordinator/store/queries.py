"""Statements that several of the store's transactions share; each runs inside its caller's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, select, update

from fedge.coordinator.store.records import (
    Outcome,
    ParticipantRecord,
    ParticipantStatus,
    RefusalRecord,
    VersionRecord,
)
from fedge.coordinator.store.rows import participant_of, refusal_of, version_of
from fedge.coordinator.store.tables import facts, participants, refusals, rounds, versions
from fedge.schemas.errors import PeerError, RejectReason, StoreError
from fedge.schemas.messages import RoundPhase


def population_of(connection: Connection) -> str | None:
    """Whose state this is."""
    return connection.scalar(select(facts.c.value).where(facts.c.name == "population"))


def version_numbered(connection: Connection, number: int) -> VersionRecord | None:
    """The version of that number."""
    row = connection.execute(select(versions).where(versions.c.number == number)).first()
    return None if row is None else version_of(row)


def participants_in(connection: Connection, round_number: int) -> tuple[ParticipantRecord, ...]:
    """The devices of a round, in name order."""
    statement = (
        select(participants)
        .where(participants.c.round == round_number)
        .order_by(participants.c.device)
    )
    return tuple(participant_of(row) for row in connection.execute(statement))


def refusals_in(connection: Connection, round_number: int) -> tuple[RefusalRecord, ...]:
    """The refusals counted for a round, by device and reason."""
    statement = (
        select(refusals)
        .where(refusals.c.round == round_number)
        .order_by(refusals.c.device, refusals.c.reason)
    )
    return tuple(refusal_of(row) for row in connection.execute(statement))


def close_round(
    connection: Connection,
    round_number: int,
    outcome: Outcome,
    *,
    at: float,
    reason: str = "",
    version: int | None = None,
) -> None:
    """Gives a round its outcome; who has not answered becomes silent.

    Raises `StoreError` if the round is not open.
    """
    closes = (
        update(rounds)
        .where(rounds.c.number == round_number, rounds.c.outcome.is_(None))
        .values(
            phase=RoundPhase.CLOSED.value,
            outcome=outcome.value,
            closed_at=at,
            reason=reason,
            version=version,
        )
    )
    if connection.execute(closes).rowcount != 1:
        raise StoreError(f"round {round_number} is not open")
    unanswered = (ParticipantStatus.ASKED.value, ParticipantStatus.OFFERED.value)
    connection.execute(
        update(participants)
        .where(participants.c.round == round_number, participants.c.status.in_(unanswered))
        .values(status=ParticipantStatus.SILENT.value, decided_at=at)
    )


def decide(
    connection: Connection,
    round_number: int,
    device: str,
    status: ParticipantStatus,
    values: Mapping[str, Any],
    *,
    only_while_open: bool = False,
) -> bool:
    """Gives a participant a status and `values`; False, and no change, if it was accepted before.

    Raises `PeerError`: not_in_cohort, or late if the round has closed and `only_while_open`.
    """
    row = connection.execute(
        select(participants.c.status, rounds.c.outcome)
        .join(rounds, rounds.c.number == participants.c.round)
        .where(participants.c.round == round_number, participants.c.device == device)
    ).first()
    if row is None:
        raise PeerError(
            RejectReason.NOT_IN_COHORT, f"{device} was not asked in round {round_number}"
        )
    if row.status == ParticipantStatus.ACCEPTED.value:
        return False
    if only_while_open and row.outcome is not None:
        raise PeerError(RejectReason.LATE, f"round {round_number} was {row.outcome} before")
    connection.execute(
        update(participants)
        .where(participants.c.round == round_number, participants.c.device == device)
        .values(status=status.value, **values)
    )
    return True
