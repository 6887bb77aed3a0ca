"""The control messages: small JSON objects that any MQTT tool can show.

Every one has a protocol version, an id and the sender's time. They are parsed once, here, with
unknown fields forbidden and every size bounded; afterwards the types are trusted. Bulk data
(weights, graphs, updates) never travels in these: a message carries a `BlobRef` to it.
"""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedge.schemas.blobs import BlobRef
from fedge.schemas.errors import PeerError, RejectReason
from fedge.schemas.ids import (
    Digest,
    EvaluationNumber,
    MessageId,
    RolloutNumber,
    RoundNumber,
    Seed,
    VersionNumber,
    new_message_id,
)
from fedge.schemas.word_reports import Epsilon, HashKey

PROTOCOL_VERSION = 1
MAX_MESSAGE_BYTES = 124 * 1024
"""A control message above this is refused unread. Within AWS IoT's 128 KiB; the largest honest one
is an offer of 2,048 chunks with a full loss curve."""


def _without_nul(text: str) -> str:
    return text.replace("\0", "\ufffd")


Said = AfterValidator(_without_nul)
"""Text that a peer made up: PostgreSQL keeps no NUL in a text, and nobody needs one."""
Detail = Annotated[str, Field(max_length=500), Said]
Seconds = Annotated[float, Field(ge=0, le=30 * 86400)]
Count = Annotated[int, Field(ge=0, le=2**40)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Sum = Annotated[float, Field(allow_inf_nan=False, ge=-1e15, le=1e15)]
"""Over one device's examples: so bounded that the sums of a fleet stay finite."""
MeasureName = Annotated[str, Field(max_length=40, pattern=r"^[^\x00]*$")]
Bitmap = Annotated[str, Field(max_length=512)]


class Message(BaseModel):
    """What every control message has. `ts`: the sender's clock in seconds, for people only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    v: Literal[1] = 1
    id: MessageId = Field(default_factory=new_message_id)
    ts: Annotated[float, Field(ge=0, le=1e12)] = Field(default_factory=time.time)


# ---------------------------------------------------------------- coordinator → all, retained


class PublishedVersion(Message):
    """Everything that a device must fetch to use a version or to train from it.

    `model_sha256`, `model_bytes`: the ONNX file that a device makes from the plan's `infer` graph
    and `weights`. `golden`: the outputs it must give for the plan's golden inputs.
    """

    number: VersionNumber
    plan: BlobRef
    weights: BlobRef
    golden: BlobRef
    model_sha256: Digest
    model_bytes: Count


class VersionAnnouncement(PublishedVersion):
    """The newest version.

    `staged`: it is what devices train from; what apps use is said by `StableAnnouncement` and
    `CandidateAnnouncement`. Without it, each newest version is put into use at once.
    """

    staged: Literal[True] | None = None


class StableAnnouncement(PublishedVersion):
    """The version that apps use on every device that no rollout reaches."""


class CandidatePhase(StrEnum):
    """What devices do with the candidate of a rollout."""

    RUNNING = "running"
    """Who is in the share tries it; who passed uses it."""
    PAUSED = "paused"
    """Nobody begins to try it; who passed uses it."""
    DONE = "done"
    """It is the stable version now. Who was away tries it still, before using it."""
    WITHDRAWN = "withdrawn"
    """Nobody uses it: back to the last good version, or to the stable one."""


class TrialChecks(BaseModel):
    """What a device asks of a candidate, beside its digest and parity. None: not asked.

    `max_loss_increase`: on the device's own hold-out, relative to the version that it uses now.
    `min_hold_out`: with fewer examples there the loss says nothing, and is not asked.
    `max_latency_ms`: of one example. `max_latency_ratio`: to the version in use.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_loss_increase: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    min_hold_out: Annotated[int, Field(ge=1, le=10**9)] = 1
    max_latency_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_latency_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None


class CandidateAnnouncement(PublishedVersion):
    """The version of the newest rollout, and whom it reaches. `rollout` 0: there was none yet.

    `share`: devices whose place (`rollout_share.place_of`) is below it are in.
    """

    rollout: RolloutNumber
    phase: CandidatePhase
    share: Annotated[float, Field(ge=0, le=1)] = 0.0
    checks: TrialChecks = TrialChecks()


class RoundPhase(StrEnum):
    """What a round wants from devices now."""

    GATHERING = "gathering"
    TRAINING = "training"
    CLOSED = "closed"


class RoundAnnouncement(Message):
    """The state of the newest round. Devices that are ready check in while it gathers.

    `checkin_spread_s`: a device waits a random part of this before it checks in. `checkin_share`:
    each device checks in with this probability; the others only if the round still wants devices
    after the spread. Both are pace steering (Bonawitz et al. 2019, section 2.3).
    `oldest`: work for this round and later ones is still wanted, None: for `round` alone. In
    asynchronous mode updates count in later rounds than the one they were asked for in.
    """

    round: RoundNumber
    base: VersionNumber
    phase: RoundPhase
    checkin_spread_s: Seconds = 0.0
    checkin_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    oldest: RoundNumber | None = None

    @property
    def oldest_wanted(self) -> int:
        """The oldest round whose updates can still count."""
        return self.round if self.oldest is None else min(self.oldest, self.round)


class RollCall(Message):
    """Who is there? Every device says its birth again, at a random moment within `spread_s`.

    Not retained: it is for those who are connected now.
    """

    spread_s: Seconds = 0.0


class WordCountAnnouncement(Message):
    """Each device that agreed to it should tell one noisy word: see `word_reports`.

    `campaign`: drawn for this word count, so that no other has it, also after a restore. `epsilon`:
    what an answer costs of the device's limit. `least_typed`: words typed less often are not drawn.
    `new_only`: only words that the plan's vocabulary lacks are drawn. A device waits a random part
    of `spread_s` first.
    """

    campaign: MessageId
    epsilon: Epsilon
    least_typed: Annotated[int, Field(ge=1, le=1000)]
    new_only: bool = False
    spread_s: Seconds = 0.0


# ---------------------------------------------------------------- coordinator → one device


class Assignment(Message):
    """You are in the cohort: train from `base` and offer the difference before the deadline.

    `seed` fixes the order of examples and the randomness of the plan on this device.
    `local_steps`: stop after so many batches, whatever `local_epochs` says.
    """

    round: RoundNumber
    base: VersionNumber
    plan_sha256: Digest
    deadline_s: Seconds
    seed: Seed
    batch_size: Annotated[int, Field(ge=1, le=65536)]
    learning_rate: Annotated[float, Field(gt=0, le=1e3, allow_inf_nan=False)]
    local_epochs: Annotated[int, Field(ge=0, le=1000)]
    local_steps: Annotated[int, Field(ge=0, le=10**9)] | None = None
    proximal_mu: Annotated[float, Field(ge=0, le=1e3, allow_inf_nan=False)] = 0.0


class Retry(Message):
    """You are not in this round's cohort: check in again after `after_s` to `after_s + spread_s`.

    The device draws the moment at random, so those that were deferred together come back apart.
    """

    round: RoundNumber
    after_s: Seconds
    spread_s: Seconds = 0.0


class Grant(Message):
    """Send the chunks that `held` lacks, at most `window` of them ahead of the next `have`."""

    round: RoundNumber
    sha256: Digest
    window: Annotated[int, Field(ge=1, le=1000)]
    held: Bitmap


class Have(Message):
    """These chunks of your upload arrived and were verified."""

    round: RoundNumber
    sha256: Digest
    held: Bitmap


class ReceiptStatus(StrEnum):
    """The two ends of an offer."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"


class Receipt(Message):
    """The durable answer about one update; the device may forget the update now."""

    round: RoundNumber
    sha256: Digest
    status: ReceiptStatus
    reason: RejectReason | None = None
    detail: Detail = ""


class Abort(Message):
    """Stop working on this round; nothing of it will be accepted."""

    round: RoundNumber
    reason: RejectReason


class EvaluationRequest(Message):
    """Measure version `number` on the examples that you never train on, and say the sums.

    It is said again until there is an answer or the time is over. `weights`: of that version, which
    may be older than the newest one; `plan`: the manifest, which names the graph. `deadline_s`:
    from now on; an answer after that is not wanted.
    """

    evaluation: EvaluationNumber
    number: VersionNumber
    plan: BlobRef
    weights: BlobRef
    deadline_s: Seconds


class TrialCounted(Message):
    """The device's report about a rollout is kept: it need not be said again."""

    rollout: RolloutNumber


class WordCountHeard(Message):
    """The device's answer is kept, or not wanted any more: it need not be said again."""

    campaign: MessageId


# ---------------------------------------------------------------- device → coordinator


class Checkin(Message):
    """Ready to train in `round`. `version`: the newest version held in full, if any."""

    round: RoundNumber
    version: VersionNumber | None = None
    examples: Count
    boot: Count


class LossCurve(BaseModel):
    """How the loss went on a device: means by epoch, and by batch in order, as trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    by_epoch: Annotated[tuple[Finite, ...], Field(max_length=1000)] = ()
    by_batch: Annotated[tuple[Finite, ...], Field(max_length=2048)] = ()


class Offer(Message):
    """An update lies ready: here is what it is and what it was made from.

    `metrics`: means over the examples as they were trained on, in the plan's metric names.
    `training_s`: wall time of the training alone.
    """

    round: RoundNumber
    base: VersionNumber
    update: BlobRef
    codec: Literal["f32"] = "f32"
    examples: Annotated[int, Field(ge=1, le=2**40)]
    steps: Count
    training_s: Seconds
    loss: LossCurve
    metrics: Annotated[dict[MeasureName, Finite], Field(max_length=16)]


class Need(Message):
    """These retained chunks did not come from the broker: publish them again."""

    sha256: Digest
    missing: Bitmap
    chunk_count: Annotated[int, Field(ge=1, le=2048)]


class ReportKind(StrEnum):
    """What became of a version or an assignment on a device."""

    ACTIVATED = "activated"
    ACTIVATION_FAILED = "activation_failed"
    TRAINING_FAILED = "training_failed"
    VERSION_IGNORED = "version_ignored"
    """The version that is published is older than `version`, which the device has seen."""


class Report(Message):
    """News from a device that asks for no answer."""

    kind: ReportKind
    version: VersionNumber | None = None
    round: RoundNumber | None = None
    detail: Detail = ""


class EvaluationStatus(StrEnum):
    """How a device answers an evaluation."""

    OK = "ok"
    """It measured the version: here are the sums."""
    NO_HOLD_OUT = "no_hold_out"
    """It keeps no examples apart, or fewer than it tells anything about."""
    FAILED = "failed"
    """It could not measure the version; the detail says why."""


class EvaluationSums(BaseModel):
    """What was measured on a device, as sums over its hold-out: never of a single example.

    `rows`: what the loss is summed over; `examples`: how many these are for people, texts for one,
    of which a row is a window. `metrics`: by the plan's names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    examples: Annotated[int, Field(ge=1, le=2**40)]
    rows: Annotated[int, Field(ge=1, le=2**40)]
    loss_sum: Sum
    metrics: Annotated[dict[MeasureName, Sum], Field(max_length=16)]


class EvaluationResult(Message):
    """The answer to an evaluation: sums if it is `ok`, else none.

    `personal`: what the device's own copy of exactly this version gives on the same examples, where
    it keeps one. `detail`: for the operator; it says nothing of what the examples hold.
    """

    evaluation: EvaluationNumber
    number: VersionNumber
    status: EvaluationStatus
    sums: EvaluationSums | None = None
    personal: EvaluationSums | None = None
    detail: Detail = ""

    @model_validator(mode="after")
    def _sums_if_it_is_ok(self) -> EvaluationResult:
        measured = self.status is EvaluationStatus.OK
        if measured != (self.sums is not None) or (self.personal is not None and not measured):
            raise ValueError("sums go with the status ok, and with no other")
        return self


class TrialOutcome(StrEnum):
    """The two ends of a candidate on a device."""

    ACTIVE = "active"
    """It passed, and apps use it."""
    ROLLED_BACK = "rolled_back"
    """It did not, and apps use what they used before."""


class TrialReason(StrEnum):
    """The check that a candidate did not pass on a device."""

    FETCH = "fetch"
    """It cannot be had here: it does not fit, or contradicts itself."""
    BUILD = "build"
    """Its file is not the announced one, breaks the rules for plans, or does not run here."""
    PARITY = "parity"
    """It gives other outputs here than at the coordinator."""
    LATENCY = "latency"
    HOLD_OUT = "hold_out"
    """It is worse on the device's own hold-out, or cannot be measured there."""
    INTERRUPTED = "interrupted"
    """The agent or its training process was killed in the midst, again and again."""


MOST_MEASURED = 1e9
"""What a trial measures is said within this either way: sums and medians stay finite."""


def _within_measure(value: float) -> float:
    return max(-MOST_MEASURED, min(MOST_MEASURED, value))


Measured = Annotated[float, Field(allow_inf_nan=False), AfterValidator(_within_measure)]


class TrialReport(Message):
    """What became of a candidate on a device. Said again until it is counted.

    `reason`: if it was rolled back, else None. `latency_ms`: of one example. `loss_ratio`: its loss
    over that of the version before, None if it was not measured; `detail` says why, or what was
    found. Either number is said no larger than `MOST_MEASURED`: a version that has gone to pieces
    must be reported, too.
    """

    rollout: RolloutNumber
    version: VersionNumber
    outcome: TrialOutcome
    reason: TrialReason | None = None
    detail: Detail = ""
    latency_ms: Annotated[Measured, Field(ge=0)] | None = None
    loss_ratio: Measured | None = None
    hold_out: Count | None = None

    @model_validator(mode="after")
    def _reason_if_it_was_rolled_back(self) -> TrialReport:
        if (self.outcome is TrialOutcome.ROLLED_BACK) != (self.reason is not None):
            raise ValueError("a reason goes with the outcome rolled_back, and with no other")
        return self


class WordCountAnswer(Message):
    """The noisy word. A device says the same of a campaign however often, `id` and `ts` included.

    `key`: of the hash function that it has drawn. `bucket`: the one that it names.
    """

    campaign: MessageId
    key: HashKey
    bucket: Annotated[int, Field(ge=0, le=2**16)]


# ---------------------------------------------------------------- presence


class Presence(Message):
    """Birth (online) and will (offline) of a device, each with the boot it belongs to.

    A death of an older boot than the newest birth is ignored.
    """

    boot: Count
    online: bool
    agent_version: Annotated[str, Field(max_length=40), Said] = ""


M = TypeVar("M", bound=Message)

_REASONS = {
    "extra_forbidden": RejectReason.UNKNOWN_FIELD,
    "literal_error": RejectReason.INVALID_FIELD,
}


def encode(message: Message) -> bytes:
    """The message as compact JSON. Raises `ValueError` if it is above `MAX_MESSAGE_BYTES`."""
    data = message.model_dump_json(exclude_none=True).encode()
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a {type(message).__name__} of {len(data)} bytes: {MAX_MESSAGE_BYTES=}")
    return data


def decode(kind: type[M], data: bytes) -> M:
    """Parses a message of the given kind.

    Raises `PeerError`: oversized, truncated or malformed (not JSON), unknown_version,
    unknown_field, invalid_field. An unknown version is told before anything else in the message.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise PeerError(RejectReason.OVERSIZED, f"{len(data)} bytes, at most {MAX_MESSAGE_BYTES}")
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise _refusal(kind.__name__, error) from error


def _refusal(kind: str, error: ValidationError) -> PeerError:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    if problems[0]["type"] == "json_invalid":
        # The parser says EOF where the bytes were right as far as they went.
        cut = "EOF while parsing" in problems[0]["msg"]
        reason = RejectReason.TRUNCATED if cut else RejectReason.MALFORMED
        return PeerError(reason, f"{kind}: {problems[0]['msg']}"[:300])
    for problem in problems:
        if problem["loc"] == ("v",):
            return PeerError(
                RejectReason.UNKNOWN_VERSION, f"{kind}: protocol {PROTOCOL_VERSION} is spoken here"
            )
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"])[:100]
    reason = _REASONS.get(first["type"], RejectReason.INVALID_FIELD)
    return PeerError(reason, f"{kind}.{where}: {first['msg']}"[:300])
