"""What the store takes and gives back: one frozen record for each kind of row.

Times are seconds since the epoch, from the caller's clock: a deadline has to mean the same after a
restart. `None` is "not known" or "not yet", never "zero".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from fedge.schemas.blobs import BlobRef
from fedge.schemas.errors import RejectReason
from fedge.schemas.messages import EvaluationStatus, EvaluationSums, LossCurve, RoundPhase

SYNC = "sync"
ASYNC = "async"
"""The two values of `RoundRecord.mode`."""


class Outcome(StrEnum):
    """How a round ended."""

    AGGREGATED = "aggregated"
    ABANDONED = "abandoned"


class ParticipantStatus(StrEnum):
    """Where a device of a cohort stands. `ACCEPTED` is final; a refused device may try again."""

    ASKED = "asked"
    """It got its assignment and has said nothing since."""
    OFFERED = "offered"
    """It said that an update lies ready."""
    ACCEPTED = "accepted"
    """Its update is on disk and counts."""
    REJECTED = "rejected"
    """Its update was refused; the reason is kept."""
    FAILED = "failed"
    """It said that it cannot deliver."""
    SILENT = "silent"
    """The round closed without an answer from it."""


@dataclass(frozen=True, slots=True)
class PlanRecord:
    """A plan that this population has used. `ref`: the manifest's bytes.

    `task`: the task's name. `task_fingerprint`: of the code and settings it was compiled from.
    """

    ref: BlobRef
    task: str
    task_fingerprint: str
    created_at: float


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """One version of the weights. Numbers only rise; a rollback is a new number.

    `base`: the version it was made from, `round`: the round that made it, both None for the
    first. `model_sha256`, `model_bytes`: the exported ONNX file. `server_state`: the digest of
    the server optimizer's tensors. `metrics`: the evaluation, by name, `loss` among them.
    `files_kept`: False when its files were deleted by the operator's wish (`[retention]`).
    """

    number: int
    plan_sha256: str
    weights: BlobRef
    golden: BlobRef
    model_sha256: str
    model_bytes: int
    created_at: float
    base: int | None = None
    round: int | None = None
    server_state: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    files_kept: bool = True


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One attempt to make a version. `version`: the one it made, if it did.

    `mode`: "sync", or "async". `details_kept`: False when its participants and refusals were
    deleted by the operator's wish (`[retention]`).
    """

    number: int
    base: int
    goal: int
    quorum: int
    seed: int
    opened_at: float
    gather_until: float
    phase: RoundPhase = RoundPhase.GATHERING
    train_until: float | None = None
    closed_at: float | None = None
    outcome: Outcome | None = None
    reason: str = ""
    version: int | None = None
    mode: str = SYNC
    details_kept: bool = True


@dataclass(frozen=True, slots=True)
class Contribution:
    """What a device says about its update in its offer."""

    update: BlobRef
    examples: int
    steps: int
    training_s: float
    loss: LossCurve = field(default_factory=LossCurve)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ParticipantRecord:
    """One device in one round. `contribution`: of its latest offer, or the accepted one.

    `decided_at`: when it was accepted, rejected, failed or found silent. `base`: the version it
    trains from, None where that is its round's. `until`: seconds since the epoch, after which its
    update is not wanted. `counted_in`: the round into whose version its update counts.
    """

    round: int
    device: str
    status: ParticipantStatus
    asked_at: float
    contribution: Contribution | None = None
    reason: RejectReason | None = None
    detail: str = ""
    offered_at: float | None = None
    decided_at: float | None = None
    base: int | None = None
    until: float | None = None
    counted_in: int | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something from a peer that was refused. `device`, `round`: None where it named none."""

    reason: RejectReason
    detail: str
    at: float
    round: int | None = None
    device: str | None = None


@dataclass(frozen=True, slots=True)
class RefusalRecord:
    """How often one device was refused for one reason in one round, and the latest detail."""

    reason: RejectReason
    round: int | None
    device: str | None
    count: int
    last_detail: str
    last_at: float


@dataclass(frozen=True, slots=True)
class DeviceSighting:
    """What became known of a device. None leaves what was known before."""

    name: str
    at: float
    boot: int | None = None
    online: bool | None = None
    examples: int | None = None
    version: int | None = None
    agent_version: str | None = None


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """A device that was ever seen. `version`: the newest that it said it holds."""

    name: str
    first_seen_at: float
    last_seen_at: float
    boot: int | None
    online: bool
    examples: int | None
    version: int | None
    agent_version: str | None


@dataclass(frozen=True, slots=True)
class RoundReport:
    """Everything kept about one round.

    `participants`: who was asked in it, by name. `counted`: whose updates count in its version; in
    asynchronous mode some of them were asked in earlier rounds, and some who were asked are not
    among them.
    """

    round: RoundRecord
    participants: tuple[ParticipantRecord, ...]
    counted: tuple[ParticipantRecord, ...]
    refusals: tuple[RefusalRecord, ...]
    version: VersionRecord | None


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """One measuring of a version by devices. `wanted`: answers to come by.

    `requested_at`: when an operator asked for it; `opened_at`: when the coordinator began, which is
    when its deadline began to run; `until`: that deadline. `reason`: why it was closed.
    """

    number: int
    version: int
    wanted: int
    deadline_s: float
    seed: int
    requested_at: float
    opened_at: float | None = None
    until: float | None = None
    closed_at: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class EvaluationAnswer:
    """One device in one evaluation. `status`: None while it has not answered.

    `sums`: what it measured, if the status is `ok`; `personal`: the same for its own copy.
    """

    evaluation: int
    device: str
    asked_at: float
    status: EvaluationStatus | None = None
    answered_at: float | None = None
    sums: EvaluationSums | None = None
    personal: EvaluationSums | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Everything kept about one evaluation. `answers`: of all who were asked, by name."""

    evaluation: EvaluationRecord
    answers: tuple[EvaluationAnswer, ...]


@dataclass(frozen=True, slots=True)
class Retention:
    """What the operator wants kept; None keeps all.

    `versions`: the newest so many keep their files, at least 2. `rounds`: the newest so many closed
    ones keep their participants and refusals. `devices_unseen_days`: devices that are offline and
    were not seen for longer are forgotten. `evaluations`, `rollouts`, `word_counts`: the newest so
    many closed ones are kept.
    """

    versions: int | None = None
    rounds: int | None = None
    devices_unseen_days: float | None = None
    evaluations: int | None = None
    rollouts: int | None = None
    word_counts: int | None = None


@dataclass(frozen=True, slots=True)
class Collected:
    """What `collect` has deleted, or would delete.

    `versions`: those that lost their files; `rounds`: those that lost their details; `blobs`:
    files, leftovers of a crash among them; `bytes_freed`: of the blobs. `postponed`: True if the
    files were left where they are, because a backup is being made.
    """

    versions: int = 0
    rounds: int = 0
    devices: int = 0
    blobs: int = 0
    bytes_freed: int = 0
    postponed: bool = False
    evaluations: int = 0
    rollouts: int = 0
    word_counts: int = 0
