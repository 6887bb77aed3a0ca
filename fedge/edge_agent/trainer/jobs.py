"""What the agent asks of its training process, and what it answers: one JSON object a line.

Bulk never passes through the pipe: a job names files, an answer names the file that was written.
The two ends are one program on one device, but the agent still parses what comes back: a process
that ran a foreign plan is not to be trusted more than the plan.
"""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.engines import EngineName
from fedge.edge_agent.example_limits import ExampleLimits
from fedge.edge_agent.layers import Layers
from fedge.edge_agent.personal_models import HeldOutSums
from fedge.edge_agent.training_settings import TrainingSettings
from fedge.schemas.blobs import (
    DEFAULT_CHUNK_BYTES,
    MAX_CHUNK_BYTES,
    MIN_CHUNK_BYTES,
    BlobRef,
)
from fedge.schemas.errors import (
    ConfigError,
    FedgeError,
    ParityFailed,
    PeerError,
    PlanRefused,
    RejectReason,
    StoreError,
    StoreUnavailable,
    TrainingFailed,
)
from fedge.schemas.ids import Digest
from fedge.schemas.messages import LossCurve

MAX_LINE_BYTES = 256 * 1024
"""Of a job or an answer. The largest honest one has 2,048 points of loss and 2,048 chunks."""


Answer_co = TypeVar("Answer_co", covariant=True)


class JobFor(Protocol[Answer_co]):
    """A job whose answer is an `Answer_co`, if it does not fail."""

    @property
    def answer_type(self) -> type[Answer_co]:
        """What to expect."""
        ...

    def encode(self) -> bytes:
        """The line, its end included."""
        ...


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def encode(self) -> bytes:
        """The line, its end included."""
        return self.model_dump_json(exclude_none=True).encode() + b"\n"


# ---------------------------------------------------------------- trainer → agent


class Progressed(_Line):
    """So far: `step` of `steps` are done."""

    answer: Literal["progress"] = "progress"
    epoch: int
    step: int
    steps: int
    loss: float


class Trained(_Line):
    """The update is at the job's `output`. `engine`: which one ran; none if no step was asked.

    `first_step`: where it began, above 0 if it went on from a checkpoint. `peak_rss_bytes`: of the
    process since its start. `generation`: of the example store that was read, if it was one.
    """

    answer: Literal["trained"] = "trained"
    update: BlobRef
    examples: int
    steps: int
    first_step: int = 0
    loss: LossCurve
    metrics: dict[str, float]
    training_s: float
    engine: EngineName | None = None
    peak_rss_bytes: int
    generation: int | None = None


class Interrupted(_Line):
    """The training was told to stop, and did so after `step` of `steps`.

    `kept`: its checkpoint is at the job's `checkpoint`; a personal training leaves none.
    """

    answer: Literal["interrupted"] = "interrupted"
    step: int
    steps: int
    kept: bool


class Activated(_Line):
    """The model is at the job's `output`. See `activation.Activation`."""

    answer: Literal["activated"] = "activated"
    latency_ms: float
    largest_difference: float
    beside_ms: float | None = None


class Evaluated(_Line):
    """What a version is worth here: sums. See `evaluation.MeasuredSums`.

    `generation`: as in `Trained`.
    """

    answer: Literal["evaluated"] = "evaluated"
    examples: int
    rows: int
    loss_sum: float
    metrics: dict[str, float]
    evaluation_s: float
    generation: int | None = None


class Personalised(_Line):
    """What a personal training came to.

    `common`, `personal`: the version's weights and the new ones, on the same examples held out.
    `weights_sha256`: of the file at the job's `weights_output`, with its model at `model_output`;
    None if the version is as good or better: then nothing was written. The rest as in `Trained`.
    """

    answer: Literal["personalised"] = "personalised"
    examples: int
    steps: int
    training_s: float
    evaluation_s: float
    common: HeldOutSums
    personal: HeldOutSums
    weights_sha256: Digest | None = None
    peak_rss_bytes: int
    generation: int | None = None


class Counted(_Line):
    """The device's examples: those to train on, and those held out."""

    answer: Literal["counted"] = "counted"
    examples: int
    hold_out: int


class FailureKind(StrEnum):
    """Which exception a failure stands for."""

    CONFIG = "config"
    PARITY_FAILED = "parity_failed"
    PEER = "peer"
    PLAN_REFUSED = "plan_refused"
    STORE = "store"
    STORE_UNAVAILABLE = "store_unavailable"
    TRAINING_FAILED = "training_failed"


_PLAIN: dict[FailureKind, type[FedgeError]] = {
    # Those that are all said by their text; the more special before its parent.
    FailureKind.CONFIG: ConfigError,
    FailureKind.PLAN_REFUSED: PlanRefused,
    FailureKind.STORE_UNAVAILABLE: StoreUnavailable,
    FailureKind.STORE: StoreError,
    FailureKind.TRAINING_FAILED: TrainingFailed,
}


class Failed(_Line):
    """The job failed. The fields that its kind has are set."""

    answer: Literal["failed"] = "failed"
    kind: FailureKind
    detail: Annotated[str, Field(max_length=4000)]
    reason: RejectReason | None = None
    largest_difference: float | None = None
    tolerance: float | None = None

    @classmethod
    def of(cls, error: FedgeError) -> Failed:
        """The answer that stands for `error`."""
        match error:
            case ParityFailed():
                return cls(
                    kind=FailureKind.PARITY_FAILED,
                    detail=error.where[:4000],
                    largest_difference=error.largest_difference,
                    tolerance=error.tolerance,
                )
            case PeerError():
                detail = error.detail[:4000]
                return cls(kind=FailureKind.PEER, detail=detail, reason=error.reason)
            case _:
                found = (kind for kind, plain in _PLAIN.items() if isinstance(error, plain))
                kind = next(found, FailureKind.TRAINING_FAILED)
                return cls(kind=kind, detail=str(error)[:4000])

    def error(self) -> FedgeError:
        """The exception that this stands for."""
        if self.kind is FailureKind.PARITY_FAILED:
            # JSON has no infinity: it arrives as nothing.
            largest = math.inf if self.largest_difference is None else self.largest_difference
            return ParityFailed(self.detail, largest, self.tolerance or 0.0)
        if self.kind is FailureKind.PEER:
            return PeerError(self.reason or RejectReason.MALFORMED, self.detail)
        return _PLAIN[self.kind](self.detail)


Answer = (
    Progressed | Trained | Interrupted | Activated | Evaluated | Personalised | Counted | Failed
)
_ANSWERS: TypeAdapter[Answer] = TypeAdapter(Annotated[Answer, Field(discriminator="answer")])


def decode_answer(line: bytes) -> Answer:
    """Parses an answer. Raises `pydantic.ValidationError`."""
    return _ANSWERS.validate_json(line)


# ---------------------------------------------------------------- agent → trainer


STOP_LINE = b'{"job":"stop"}\n'
"""Tells the process to stop the training that it was asked for last, leaving a checkpoint. There is
no answer but that training's own."""


class TrainJob(_Line):
    """Train from `weights` and write the update, a safetensors file, to `output`.

    `manifest`, `train_graph`, `weights`, `vocabulary`: paths of verified blobs. `limits`: of an
    example store. `checkpoint`: where it is left when it is told to stop, and looked for at the
    beginning; None: no such thing.
    """

    job: Literal["train"] = "train"
    manifest: Path
    train_graph: Path
    weights: Path
    vocabulary: Path | None = None
    data: DataConfig
    limits: ExampleLimits | None = None
    settings: TrainingSettings
    output: Path
    checkpoint: Path | None = None
    engine: EngineName = EngineName.AUTO
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    chunk_bytes: Annotated[int, Field(ge=MIN_CHUNK_BYTES, le=MAX_CHUNK_BYTES)] = DEFAULT_CHUNK_BYTES

    @property
    def answer_type(self) -> type[Trained]:
        """What to expect."""
        return Trained


class ActivateJob(_Line):
    """Make a version's model from `infer_graph` and `weights`, check it, put it at `output`.

    `golden_inputs`, `golden_outputs`: safetensors with `input` and with `output`. `beside`: the
    model in use, if its latency is to be told beside.
    """

    job: Literal["activate"] = "activate"
    manifest: Path
    infer_graph: Path
    weights: Path
    golden_inputs: Path
    golden_outputs: Path
    model_sha256: Digest
    output: Path
    beside: Path | None = None

    @property
    def answer_type(self) -> type[Activated]:
        """What to expect."""
        return Activated


class EvaluateJob(_Line):
    """Measure `weights` on the device's examples that are held out.

    The paths are of verified blobs, or of a file that this device made.
    """

    job: Literal["evaluate"] = "evaluate"
    manifest: Path
    eval_graph: Path
    weights: Path
    vocabulary: Path | None = None
    data: DataConfig
    limits: ExampleLimits | None = None
    threads: Annotated[int, Field(ge=1, le=256)] = 1

    @property
    def answer_type(self) -> type[Evaluated]:
        """What to expect."""
        return Evaluated


class PersonaliseJob(_Line):
    """Fine-tune a version for this device alone, and keep what is better on what is held out.

    Written only if it is better: the weights to `weights_output`, a safetensors file, and their
    ONNX file to `model_output`; neither is put into any place. `layers`: what is trained. The rest
    as in `TrainJob`, `EvaluateJob` and `ActivateJob`. There is no checkpoint.
    """

    job: Literal["personalise"] = "personalise"
    manifest: Path
    train_graph: Path
    eval_graph: Path
    infer_graph: Path
    weights: Path
    golden_inputs: Path
    vocabulary: Path | None = None
    data: DataConfig
    limits: ExampleLimits | None = None
    settings: TrainingSettings
    layers: Layers
    weights_output: Path
    model_output: Path
    threads: Annotated[int, Field(ge=1, le=256)] = 1

    @property
    def answer_type(self) -> type[Personalised]:
        """What to expect."""
        return Personalised


class CountJob(_Line):
    """Count the device's examples."""

    job: Literal["count"] = "count"
    data: DataConfig

    @property
    def answer_type(self) -> type[Counted]:
        """What to expect."""
        return Counted


Job = TrainJob | ActivateJob | EvaluateJob | PersonaliseJob | CountJob
_JOBS: TypeAdapter[Job] = TypeAdapter(Annotated[Job, Field(discriminator="job")])


def decode_job(line: bytes) -> Job:
    """Parses a job. Raises `pydantic.ValidationError`."""
    return _JOBS.validate_json(line)
