"""Rows ↔ records: the only place that knows which column holds which field."""

from __future__ import annotations

from typing import Any

from fedge.coordinator.store.records import (
    Contribution,
    DeviceRecord,
    EvaluationAnswer,
    EvaluationRecord,
    Outcome,
    ParticipantRecord,
    ParticipantStatus,
    PlanRecord,
    RefusalRecord,
    RoundRecord,
    VersionRecord,
)
from fedge.schemas.errors import RejectReason
from fedge.schemas.messages import EvaluationStatus, RoundPhase

# A row's columns are known by name only: what they hold is said in the records.
AnyRow = Any
Values = dict[str, Any]


def plan_values(plan: PlanRecord) -> Values:
    """The columns of a plan."""
    return {
        "sha256": plan.ref.sha256,
        "ref": plan.ref,
        "task": plan.task,
        "task_fingerprint": plan.task_fingerprint,
        "created_at": plan.created_at,
    }


def plan_of(row: AnyRow) -> PlanRecord:
    """The plan in a row."""
    return PlanRecord(row.ref, row.task, row.task_fingerprint, row.created_at)


def version_values(version: VersionRecord) -> Values:
    """The columns of a version."""
    return {
        "number": version.number,
        "plan_sha256": version.plan_sha256,
        "base": version.base,
        "round": version.round,
        "weights": version.weights,
        "golden": version.golden,
        "model_sha256": version.model_sha256,
        "model_bytes": version.model_bytes,
        "server_state": version.server_state,
        "metrics": dict(version.metrics),
        "note": version.note,
        "created_at": version.created_at,
        "files_kept": version.files_kept,
    }


def version_of(row: AnyRow) -> VersionRecord:
    """The version in a row."""
    return VersionRecord(**row._mapping)


def round_values(record: RoundRecord) -> Values:
    """The columns of a round."""
    return {
        "number": record.number,
        "base": record.base,
        "phase": record.phase.value,
        "goal": record.goal,
        "quorum": record.quorum,
        "seed": record.seed,
        "opened_at": record.opened_at,
        "gather_until": record.gather_until,
        "train_until": record.train_until,
        "closed_at": record.closed_at,
        "outcome": None if record.outcome is None else record.outcome.value,
        "reason": record.reason,
        "version": record.version,
        "mode": record.mode,
        "details_kept": record.details_kept,
    }


def round_of(row: AnyRow) -> RoundRecord:
    """The round in a row."""
    values = dict(row._mapping)
    values["phase"] = RoundPhase(values["phase"])
    values["outcome"] = None if values["outcome"] is None else Outcome(values["outcome"])
    return RoundRecord(**values)


def contribution_values(contribution: Contribution) -> Values:
    """The columns of a participant that its contribution fills."""
    return {
        "update": contribution.update,
        "examples": contribution.examples,
        "steps": contribution.steps,
        "training_s": contribution.training_s,
        "loss": contribution.loss,
        "metrics": dict(contribution.metrics),
    }


def participant_of(row: AnyRow) -> ParticipantRecord:
    """The participant in a row."""
    contribution = None
    if row.update is not None:
        contribution = Contribution(
            row.update, row.examples, row.steps, row.training_s, row.loss, row.metrics
        )
    return ParticipantRecord(
        round=row.round,
        device=row.device,
        status=ParticipantStatus(row.status),
        asked_at=row.asked_at,
        contribution=contribution,
        reason=None if row.reason is None else RejectReason(row.reason),
        detail=row.detail,
        offered_at=row.offered_at,
        decided_at=row.decided_at,
        base=row.base,
        until=row.until,
        counted_in=row.counted_in,
    )


def refusal_of(row: AnyRow) -> RefusalRecord:
    """The count in a row."""
    # A row is a tuple: its own `count` is a method, so the column is asked for by its name.
    values = row._mapping
    return RefusalRecord(
        reason=RejectReason(values["reason"]),
        round=values["round"] or None,
        device=values["device"] or None,
        count=values["count"],
        last_detail=values["last_detail"],
        last_at=values["last_at"],
    )


def device_of(row: AnyRow) -> DeviceRecord:
    """The device in a row."""
    return DeviceRecord(**row._mapping)


def evaluation_of(row: AnyRow) -> EvaluationRecord:
    """The evaluation in a row."""
    return EvaluationRecord(**row._mapping)


def evaluation_answer_of(row: AnyRow) -> EvaluationAnswer:
    """The answer in a row."""
    values = dict(row._mapping)
    values["status"] = None if values["status"] is None else EvaluationStatus(values["status"])
    return EvaluationAnswer(**values)
