"""What the machine asks of the agent around it: each is one act, and says what is fed back."""

from __future__ import annotations

from dataclasses import dataclass

from fedge.schemas.messages import Assignment, VersionAnnouncement


@dataclass(frozen=True, slots=True)
class Fetch:
    """Fetch every blob of the version that is not here; a fetch of an older one is given up."""

    version: VersionAnnouncement


@dataclass(frozen=True, slots=True)
class Activate:
    """Make the ONNX file of the version, check it, and swap it in."""

    version: VersionAnnouncement


@dataclass(frozen=True, slots=True)
class CheckIn:
    """Wait for this device's moment, then feed `CheckInDue`; it takes the place of an earlier one.

    With probability `share` the moment is a random one within `spread_s`, else one after that.
    """

    round: int
    spread_s: float
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class SendCheckIn:
    """Say that we are ready."""

    round: int


@dataclass(frozen=True, slots=True)
class Rest:
    """Wait `after_s` and a random part of `spread_s`, then feed `RetryDue`.

    It never shortens a rest that is under way.
    """

    after_s: float
    spread_s: float = 0.0


@dataclass(frozen=True, slots=True)
class KeepFailures:
    """Remember across restarts how many trainings failed in a row."""

    failures: int


@dataclass(frozen=True, slots=True)
class Train:
    """Train in the child process; then feed `Trained` or `TrainingStopped`.

    A training of this round that was suspended goes on where it was.
    """

    assignment: Assignment


@dataclass(frozen=True, slots=True)
class Suspend:
    """Stop the training, if it runs, and keep how far it is; at its deadline feed `Overdue`."""

    assignment: Assignment


@dataclass(frozen=True, slots=True)
class StopTraining:
    """Stop the child's work on this round; its result is not wanted, nor what was kept of it."""

    round: int


@dataclass(frozen=True, slots=True)
class SendOffer:
    """Offer the update of this round from the outbox."""

    round: int


@dataclass(frozen=True, slots=True)
class Forget:
    """Remove the update of this round from the outbox: it has its receipt, or is lost."""

    round: int


@dataclass(frozen=True, slots=True)
class SayTrainingFailed:
    """Tell the coordinator that no update will come."""

    round: int
    reason: str


Command = (
    Fetch
    | Activate
    | CheckIn
    | SendCheckIn
    | Rest
    | KeepFailures
    | Train
    | Suspend
    | StopTraining
    | SendOffer
    | Forget
    | SayTrainingFailed
)
