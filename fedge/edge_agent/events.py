"""What can happen to a device, as the machine hears of it.

Facts and nothing else: no clock, no topic, no file. Each may come twice, late or in another order.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from fedge.schemas.messages import (
    Assignment,
    Receipt,
    Retry,
    RoundAnnouncement,
    VersionAnnouncement,
)


@dataclass(frozen=True, slots=True)
class Recovered:
    """What earlier lives of this agent left. `failures`: trainings that failed in a row."""

    failures: int


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker accepted us. Sessions may have been lost: say again what has no answer."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection is gone; training goes on without it."""


@dataclass(frozen=True, slots=True)
class Counted:
    """The examples on this device were counted."""

    examples: int


@dataclass(frozen=True, slots=True)
class VersionSeen:
    """A version announcement arrived."""

    announcement: VersionAnnouncement


@dataclass(frozen=True, slots=True)
class RoundSeen:
    """A round announcement arrived. `sampled`: it is the device's one in its sampling period."""

    announcement: RoundAnnouncement
    sampled: bool = True


@dataclass(frozen=True, slots=True)
class EligibilityChanged:
    """The rules for training hold, or one does not any more."""

    eligible: bool


@dataclass(frozen=True, slots=True)
class Fetched:
    """Every blob of a version is here and verified."""

    version: int


class Outlook(StrEnum):
    """What becomes of a version that could not be fetched."""

    WHEN_ANNOUNCED_AGAIN = "when_announced_again"
    """It contradicts itself or the disk refused it: the next announcement may be better."""
    NEVER = "never"
    """It does not fit on this device; another version may."""
    UNDER_WAY = "under_way"
    """The disk cannot be written now. The fetch goes on by itself, and may take long."""


@dataclass(frozen=True, slots=True)
class FetchFailed:
    """A version is not to be had now: its announcement or this device's disk is in the way."""

    version: int
    reason: str
    outlook: Outlook = Outlook.WHEN_ANNOUNCED_AGAIN


@dataclass(frozen=True, slots=True)
class Activated:
    """The version's ONNX file passed its checks and is in use."""

    version: int


@dataclass(frozen=True, slots=True)
class Assigned:
    """An assignment arrived."""

    assignment: Assignment


@dataclass(frozen=True, slots=True)
class Deferred:
    """Not chosen this time."""

    retry: Retry


@dataclass(frozen=True, slots=True)
class RetryDue:
    """The rest that was asked for is over."""


@dataclass(frozen=True, slots=True)
class CheckInDue:
    """The moment that `CheckIn` waited for. `drawn`: this device is in the round's share."""

    round: int
    drawn: bool


@dataclass(frozen=True, slots=True)
class Trained:
    """Training ended and the update lies in the outbox, durable."""

    round: int


@dataclass(frozen=True, slots=True)
class TrainingStopped:
    """Training ended without an update; `reason` is for the coordinator's record."""

    round: int
    reason: str


@dataclass(frozen=True, slots=True)
class Overdue:
    """The time of an assignment is over that waits for the device to be eligible."""

    round: int
    reason: str


@dataclass(frozen=True, slots=True)
class UpdateLost:
    """An update in the outbox is no longer what was offered: its file is gone or damaged."""

    round: int
    reason: str


@dataclass(frozen=True, slots=True)
class Receipted:
    """The coordinator's durable answer about an update."""

    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Aborted:
    """The coordinator says that nothing of this round will be accepted any more."""

    round: int


Event = (
    Recovered
    | Connected
    | Disconnected
    | Counted
    | VersionSeen
    | RoundSeen
    | EligibilityChanged
    | Fetched
    | FetchFailed
    | Activated
    | Assigned
    | Deferred
    | RetryDue
    | CheckInDue
    | Trained
    | TrainingStopped
    | Overdue
    | UpdateLost
    | Receipted
    | Aborted
)
