"""Statements that several of the store's transactions share; each runs inside its caller's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from sqlalchemy import Connection, Row, Select, Text, select, type_coerce, update

from fedge.coordinator.store.records import (
    ASYNC,
    Outcome,
    ParticipantRecord,
    ParticipantStatus,
    RefusalRecord,
    VersionRecord,
)
from fedge.coordinator.store.rows import AnyRow, participant_of, refusal_of, version_of
from fedge.coordinator.store.tables import facts, participants, refusals, rounds, versions
from fedge.schemas.errors import PeerError, RejectReason, StoreError
from fedge.schemas.ids import Digest
from fedge.schemas.messages import RoundPhase

UNANSWERED = (ParticipantStatus.ASKED.value, ParticipantStatus.OFFERED.value)

NAMES_A_STATEMENT = 500
"""Databases limit how many values one statement may hold."""


def population_of(connection: Connection) -> str | None:
    """Whose state this is."""
    return fact_named(connection, "population")


def fact_named(connection: Connection, name: str) -> str | None:
    """The text under that name, None if there is none."""
    return connection.scalar(select(facts.c.value).where(facts.c.name == name))


def version_numbered(connection: Connection, number: int) -> VersionRecord | None:
    """The version of that number."""
    row = connection.execute(select(versions).where(versions.c.number == number)).first()
    return None if row is None else version_of(row)


def files_of_versions() -> Select[*tuple[Any, ...]]:
    """The number of each version, and what `digests_of` needs."""
    # The digest is read out of the text: a table of many versions is not parsed field by field.
    return select(
        versions.c.number,
        type_coerce(versions.c.weights, Text).label("weights"),
        type_coerce(versions.c.golden, Text).label("golden"),
        versions.c.server_state,
    )


def digests_of(row: AnyRow) -> Iterator[tuple[str, Digest]]:
    """The files of a row of `files_of_versions`: what each is, for people, and its digest."""
    yield "weights", json.loads(row.weights)["sha256"]
    yield "golden outputs", json.loads(row.golden)["sha256"]
    if row.server_state is not None:
        yield "server optimizer's state", row.server_state


def participants_in(connection: Connection, round_number: int) -> tuple[ParticipantRecord, ...]:
    """The devices of a round, in name order."""
    statement = select(participants).where(participants.c.round == round_number)
    found = [participant_of(row) for row in connection.execute(statement)]
    # By Python: databases differ in how they order text.
    return tuple(sorted(found, key=lambda one: one.device))


def counted_in(connection: Connection, round_number: int) -> tuple[ParticipantRecord, ...]:
    """Whose updates count in the version of a round, by device, then by asking round."""
    statement = select(participants).where(
        participants.c.counted_in == round_number,
        participants.c.status == ParticipantStatus.ACCEPTED,
    )
    found = [participant_of(row) for row in connection.execute(statement)]
    # By Python, since databases differ in how they order text, and sums in how they round.
    return tuple(sorted(found, key=lambda one: (one.device, one.round)))


def participant_row(connection: Connection, round_number: int, device: str) -> Row[Any] | None:
    """The row of one device in one round."""
    return connection.execute(
        select(participants).where(
            participants.c.round == round_number, participants.c.device == device
        )
    ).first()


def refusals_in(connection: Connection, round_number: int) -> tuple[RefusalRecord, ...]:
    """The refusals counted for a round, by device and reason."""
    statement = select(refusals).where(refusals.c.round == round_number)
    found = [refusal_of(row) for row in connection.execute(statement)]
    return tuple(sorted(found, key=lambda one: (one.device or "", one.reason.value)))


def train(connection: Connection, round_number: int, **values: Any) -> None:
    """Puts a round into its training phase, with `values`. Raises `StoreError` if it is closed."""
    trains = (
        update(rounds)
        .where(rounds.c.number == round_number, rounds.c.outcome.is_(None))
        .values(phase=RoundPhase.TRAINING.value, **values)
    )
    if connection.execute(trains).rowcount != 1:
        raise StoreError(f"round {round_number} is not open")


def close_round(
    connection: Connection,
    round_number: int,
    outcome: Outcome,
    *,
    at: float,
    reason: str = "",
    version: int | None = None,
) -> None:
    """Gives a round its outcome.

    Who has not answered becomes silent, but not in asynchronous mode: there an update may still
    come and count in a later round. Raises `StoreError` if the round is not open.
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
    mode = connection.scalar(select(rounds.c.mode).where(rounds.c.number == round_number))
    if mode != ASYNC:
        become_silent(connection, round_number, at=at)


def become_silent(
    connection: Connection,
    round_number: int,
    *,
    at: float,
    devices: Iterable[str] | None = None,
) -> None:
    """Whoever has not answered in a round is waited for no longer: all, or those of `devices`."""
    silenced = (
        update(participants)
        .where(participants.c.round == round_number, participants.c.status.in_(UNANSWERED))
        .values(status=ParticipantStatus.SILENT.value, decided_at=at)
    )
    if devices is None:
        connection.execute(silenced)
        return
    names = iter(devices)
    while some := list(islice(names, NAMES_A_STATEMENT)):
        connection.execute(silenced.where(participants.c.device.in_(some)))


def decide(
    connection: Connection,
    round_number: int,
    device: str,
    status: ParticipantStatus,
    values: Mapping[str, Any],
    *,
    only_while_open: int | None = None,
) -> bool:
    """Gives a participant a status and `values`; False, and no change, if it was accepted before.

    Raises `PeerError`: not_in_cohort, or late if the round numbered `only_while_open` is not open.
    """
    row = participant_row(connection, round_number, device)
    if row is None:
        raise PeerError(
            RejectReason.NOT_IN_COHORT, f"{device} was not asked in round {round_number}"
        )
    if row.status == ParticipantStatus.ACCEPTED.value:
        return False
    if only_while_open is not None:
        open_round = connection.execute(
            select(rounds.c.outcome).where(rounds.c.number == only_while_open)
        ).first()
        if open_round is None or open_round.outcome is not None:
            ended = "does not exist" if open_round is None else f"was {open_round.outcome} before"
            raise PeerError(RejectReason.LATE, f"round {only_while_open} {ended}")
    connection.execute(
        update(participants)
        .where(participants.c.round == round_number, participants.c.device == device)
        .values(status=status.value, **values)
    )
    return True
