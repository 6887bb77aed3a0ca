"""Federated evaluations: requested by a command, opened and closed by the coordinator.

A device answers an evaluation once, because (evaluation, device) is a key: what comes again changes
nothing, and what comes after the end is refused.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection, func, insert, select, update

from fedge.coordinator.store.database import Database
from fedge.coordinator.store.queries import version_numbered
from fedge.coordinator.store.records import (
    EvaluationAnswer,
    EvaluationRecord,
    EvaluationReport,
)
from fedge.coordinator.store.rows import evaluation_answer_of, evaluation_of
from fedge.coordinator.store.tables import evaluation_answers, evaluations, versions
from fedge.schemas.errors import ConfigError, PeerError, RejectReason
from fedge.schemas.messages import EvaluationResult


class Evaluations:
    """The part of the store that keeps evaluations."""

    _database: Database

    def request_evaluation(
        self, version: int | None, *, wanted: int, deadline_s: float, seed: int, at: float
    ) -> EvaluationRecord:
        """Keeps that a version should be measured by `wanted` devices. None: the newest version.

        Its files are not deleted before the evaluation is closed. Raises `ConfigError` if there is
        no such version, its files were deleted, or it is of another plan than the newest one.
        """
        with self._database.write() as connection:
            newest_version = connection.scalar(select(func.max(versions.c.number)))
            if version is None:
                version = newest_version
            found = None if version is None else version_numbered(connection, version)
            if found is None:
                raise ConfigError(
                    f"there is no version {version}; `fedge version list` shows them"
                    if version is not None
                    else "there is no version yet"
                )
            if not found.files_kept:
                raise ConfigError(
                    f"the files of version {version} were deleted, as [retention] says: devices "
                    "could not fetch it"
                )
            served = version_numbered(connection, newest_version)
            if served is not None and found.plan_sha256 != served.plan_sha256:
                raise ConfigError(
                    f"version {version} is of another plan than the newest, {served.number}: "
                    "devices measure versions of the plan that they train. The plan changes with "
                    "[export] quantization; set that back to measure this one"
                )
            newest = connection.scalar(select(func.max(evaluations.c.number)))
            record = EvaluationRecord(
                number=(newest or 0) + 1,
                version=found.number,
                wanted=wanted,
                deadline_s=deadline_s,
                seed=seed,
                requested_at=at,
            )
            connection.execute(
                insert(evaluations).values(
                    number=record.number,
                    version=record.version,
                    wanted=wanted,
                    deadline_s=deadline_s,
                    seed=seed,
                    requested_at=at,
                    reason="",
                )
            )
        return record

    def oldest_open_evaluation(self) -> EvaluationRecord | None:
        """The one that is not closed and was requested first: it is under way, or it is next."""
        statement = (
            select(evaluations)
            .where(evaluations.c.closed_at.is_(None))
            .order_by(evaluations.c.number)
            .limit(1)
        )
        with self._database.read() as connection:
            row = connection.execute(statement).first()
        return None if row is None else evaluation_of(row)

    def open_evaluation(self, number: int, *, at: float, until: float) -> bool:
        """Keeps that an evaluation has begun; False, and no change, if it had, or was closed."""
        begins = (
            update(evaluations)
            .where(
                evaluations.c.number == number,
                evaluations.c.opened_at.is_(None),
                evaluations.c.closed_at.is_(None),
            )
            .values(opened_at=at, until=until)
        )
        with self._database.write() as connection:
            return connection.execute(begins).rowcount == 1

    def record_evaluation_asked(self, number: int, devices: Iterable[str], *, at: float) -> bool:
        """Keeps that these devices are asked; whoever was before stays as it is.

        False, and no change, if the evaluation is closed.
        """
        asked = [
            {"evaluation": number, "device": device, "asked_at": at, "detail": ""}
            for device in devices
        ]
        statement = self._database.upsert(evaluation_answers).on_conflict_do_nothing()
        is_open = select(evaluations.c.number).where(
            evaluations.c.number == number, evaluations.c.closed_at.is_(None)
        )
        with self._database.write() as connection:
            if connection.execute(is_open).first() is None:
                return False
            if asked:
                connection.execute(statement, asked)
        return True

    def record_evaluation_answer(self, device: str, result: EvaluationResult, *, at: float) -> bool:
        """Keeps a device's answer: True the first time, False if it had answered before.

        Raises `PeerError`: not_in_cohort if it was not asked, late if the evaluation is closed,
        wrong_base if it measured another version.
        """
        number = result.evaluation
        with self._database.write() as connection:
            row = connection.execute(
                select(evaluation_answers.c.status, evaluations.c.version, evaluations.c.closed_at)
                .join(evaluations, evaluations.c.number == evaluation_answers.c.evaluation)
                .where(
                    evaluation_answers.c.evaluation == number,
                    evaluation_answers.c.device == device,
                )
            ).first()
            if row is None:
                raise PeerError(
                    RejectReason.NOT_IN_COHORT, f"{device} was not asked in evaluation {number}"
                )
            if row.version != result.number:
                raise PeerError(
                    RejectReason.WRONG_BASE,
                    f"version {result.number}; evaluation {number} is of version {row.version}",
                )
            if row.status is not None:
                return False
            if row.closed_at is not None:
                raise PeerError(RejectReason.LATE, f"evaluation {number} is closed")
            connection.execute(
                update(evaluation_answers)
                .where(
                    evaluation_answers.c.evaluation == number,
                    evaluation_answers.c.device == device,
                )
                .values(
                    status=result.status.value,
                    answered_at=at,
                    sums=result.sums,
                    personal=result.personal,
                    detail=result.detail,
                )
            )
        return True

    def close_evaluation(self, number: int, reason: str, *, at: float) -> bool:
        """Ends an evaluation; False, and no change, if it was closed before."""
        with self._database.write() as connection:
            return close_evaluations(connection, reason, at=at, number=number) == 1

    def evaluations(self) -> tuple[EvaluationRecord, ...]:
        """Every evaluation, by number."""
        with self._database.read() as connection:
            rows = connection.execute(select(evaluations).order_by(evaluations.c.number)).all()
        return tuple(evaluation_of(row) for row in rows)

    def evaluation_report(self, number: int) -> EvaluationReport | None:
        """Everything kept about one, as of one moment; None if there is no such evaluation."""
        with self._database.read() as connection:
            row = connection.execute(
                select(evaluations).where(evaluations.c.number == number)
            ).first()
            if row is None:
                return None
            return EvaluationReport(evaluation_of(row), answers_in(connection, number))


def answers_in(connection: Connection, number: int) -> tuple[EvaluationAnswer, ...]:
    """The devices of an evaluation, in name order."""
    statement = select(evaluation_answers).where(evaluation_answers.c.evaluation == number)
    found = [evaluation_answer_of(row) for row in connection.execute(statement)]
    # By Python: databases differ in how they order text.
    return tuple(sorted(found, key=lambda one: one.device))


def close_evaluations(
    connection: Connection, reason: str, *, at: float, number: int | None = None
) -> int:
    """Ends those that are open: how many. `number`: that one only."""
    closes = (
        update(evaluations)
        .where(evaluations.c.closed_at.is_(None))
        .values(closed_at=at, reason=reason)
    )
    if number is not None:
        closes = closes.where(evaluations.c.number == number)
    return connection.execute(closes).rowcount
