"""The agent machine: what one device does next, and nothing about how.

Pure: events in, commands out, no clock, file or network. The device keeps three things in mind:
the newest version (fetch it, check it, use it), the newest round (check in once while it gathers)
and its one assignment (train once, offer until there is a receipt). Everything may come twice, late
or in another order; every handler below is harmless when repeated.

    assignment          event                       then
    ------------------  --------------------------  --------------------------------------------
    none                Assigned, base is here      TRAINING: train
    none                Assigned, base is missing   WAITING: the version is being fetched
    WAITING             Fetched, the base           TRAINING: train
    TRAINING            Assigned again              nothing: it is under way
    TRAINING            Trained                     OFFERED: keep in the outbox, offer
    TRAINING            a newer round, or Aborted   none: stop the training, its result is useless
    OFFERED             Assigned again, Connected   offer again: the answer was lost
    OFFERED             the round announced again   offer again: the coordinator was away
    OFFERED             Receipted                   none: forget the update
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from fedge.schemas.messages import (
    Assignment,
    Receipt,
    Retry,
    RoundAnnouncement,
    RoundPhase,
    VersionAnnouncement,
)


class Stage(StrEnum):
    """How far the assignment is."""

    WAITING = "waiting"
    TRAINING = "training"
    OFFERED = "offered"


@dataclass(frozen=True, slots=True)
class Work:
    """The device's one assignment and its stage."""

    assignment: Assignment
    stage: Stage


@dataclass(frozen=True, slots=True)
class Agent:
    """The state. `outbox`: rounds whose update has no receipt yet. `checked_in`: newest round.

    `held`: the newest version whose blobs are all here and verified. `resting`: a `Retry` gave a
    time; until `RetryDue` the device does not check in.
    """

    connected: bool = False
    examples: int | None = None
    announced: VersionAnnouncement | None = None
    held: int | None = None
    active: int | None = None
    round: RoundAnnouncement | None = None
    checked_in: int = 0
    resting: bool = False
    work: Work | None = None
    outbox: frozenset[int] = frozenset()


# ---------------------------------------------------------------- events


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
    """A round announcement arrived."""

    announcement: RoundAnnouncement


@dataclass(frozen=True, slots=True)
class Fetched:
    """Every blob of a version is here and verified."""

    version: int


@dataclass(frozen=True, slots=True)
class FetchFailed:
    """A version cannot be had: its announcement or this device's disk is broken."""

    version: int
    reason: str


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
    """The rest that a `Retry` asked for is over."""


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
class Receipted:
    """The coordinator's durable answer about an update."""

    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Aborted:
    """The coordinator says that nothing of this round will be accepted any more."""

    round: int


Event = (
    Connected
    | Disconnected
    | Counted
    | VersionSeen
    | RoundSeen
    | Fetched
    | FetchFailed
    | Activated
    | Assigned
    | Deferred
    | RetryDue
    | Trained
    | TrainingStopped
    | Receipted
    | Aborted
)


# ---------------------------------------------------------------- commands


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
    """Say that we are ready, after a random part of `spread_s`."""

    round: int
    spread_s: float


@dataclass(frozen=True, slots=True)
class Rest:
    """Wait so long, then feed `RetryDue`."""

    after_s: float


@dataclass(frozen=True, slots=True)
class Train:
    """Train in the child process; then feed `Trained` or `TrainingStopped`."""

    assignment: Assignment


@dataclass(frozen=True, slots=True)
class StopTraining:
    """Stop the child's work on this round; its result is not wanted."""

    round: int


@dataclass(frozen=True, slots=True)
class SendOffer:
    """Offer the update of this round from the outbox."""

    round: int


@dataclass(frozen=True, slots=True)
class Forget:
    """Remove the update of this round from the outbox: it has its receipt."""

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
    | Rest
    | Train
    | StopTraining
    | SendOffer
    | Forget
    | SayTrainingFailed
)

Step = tuple[Agent, Sequence[Command]]


def step(state: Agent, event: Event) -> Step:  # noqa: PLR0911, PLR0912 -- one for each event
    """The next state and what to do."""
    match event:
        case Connected():
            return _say_again(replace(state, connected=True))
        case Disconnected():
            return replace(state, connected=False), ()
        case Counted(examples):
            return _maybe_check_in(replace(state, examples=examples))
        case VersionSeen(announcement):
            return _version_seen(state, announcement)
        case RoundSeen(announcement):
            return _round_seen(state, announcement)
        case Fetched(version):
            return _fetched(state, version)
        case FetchFailed(version, reason):
            return _fetch_failed(state, version, reason)
        case Activated(version):
            return replace(state, active=version), ()
        case Assigned(assignment):
            return _assigned(state, assignment)
        case Deferred(retry):
            if retry.after_s > 0:
                return replace(state, resting=True), (Rest(retry.after_s),)
            return state, ()
        case RetryDue():
            return _maybe_check_in(replace(state, resting=False, checked_in=0))
        case Trained(number):
            state = replace(state, outbox=state.outbox | {number})
            if state.work is not None and state.work.assignment.round == number:
                state = replace(state, work=replace(state.work, stage=Stage.OFFERED))
            return state, (SendOffer(number),)
        case TrainingStopped(number, reason):
            state, _ = _drop_work(state, number)
            return state, (SayTrainingFailed(number, reason),)
        case Receipted(receipt):
            state, commands = _drop_work(state, receipt.round)
            state = replace(state, outbox=state.outbox - {receipt.round})
            return state, (*commands, Forget(receipt.round))
        case Aborted(number):
            # An update that was offered still waits for its receipt, which says how it ended.
            if state.work is not None and state.work.stage is Stage.OFFERED:
                return state, ()
            return _drop_work(state, number)


def _version_seen(state: Agent, announcement: VersionAnnouncement) -> Step:
    newest = state.announced
    if newest is not None and announcement.number < newest.number:
        return state, ()
    state = replace(state, announced=announcement)
    if state.held == announcement.number:
        return state, () if state.active == state.held else (Activate(announcement),)
    if newest is not None and newest.number == announcement.number:
        return state, ()
    return state, (Fetch(announcement),)


def _round_seen(state: Agent, announcement: RoundAnnouncement) -> Step:
    before = state.round
    if before is not None and announcement.round < before.round:
        return state, ()
    state = replace(state, round=announcement)
    if before is not None and (announcement.round, announcement.phase) == (
        before.round,
        before.phase,
    ):
        # The coordinator says nothing new: it was away. What we said meanwhile, nobody heard.
        return _say_again(state)
    commands: Sequence[Command] = ()
    if state.work is not None and state.work.assignment.round < announcement.round:
        # The coordinator has moved on. An offered update keeps waiting for its receipt (in the
        # outbox); training for a round that is over only burns watts.
        state, commands = _drop_work(state, state.work.assignment.round)
    state, more = _maybe_check_in(state)
    return state, (*commands, *more)


def _say_again(state: Agent) -> Step:
    """Whatever has no answer yet: the broker or the coordinator may have lost it."""
    offers = tuple(SendOffer(number) for number in sorted(state.outbox))
    state, more = _maybe_check_in(replace(state, checked_in=0))
    return state, (*offers, *more)


def _maybe_check_in(state: Agent) -> Step:
    announcement = state.round
    if (
        announcement is None
        # While a round trains, a check-in asks for the assignment that a lost session took away.
        or announcement.phase is RoundPhase.CLOSED
        or announcement.round <= state.checked_in
        or not state.connected
        or not state.examples
        or state.resting
        or state.work is not None
    ):
        return state, ()
    state = replace(state, checked_in=announcement.round)
    return state, (CheckIn(announcement.round, announcement.checkin_spread_s),)


def _fetched(state: Agent, version: int) -> Step:
    state = replace(state, held=max(version, state.held if state.held is not None else version))
    commands: list[Command] = []
    work = state.work
    # Training comes first: the coordinator waits for it, and nobody waits for the activation.
    if (
        work is not None
        and work.stage is Stage.WAITING
        and work.assignment.base == version == state.held
    ):
        state = replace(state, work=replace(work, stage=Stage.TRAINING))
        commands.append(Train(work.assignment))
    if state.announced is not None and state.announced.number == version != state.active:
        commands.append(Activate(state.announced))
    return state, commands


def _fetch_failed(state: Agent, version: int, reason: str) -> Step:
    if state.announced is not None and state.announced.number == version:
        # Announced again, it is tried again.
        state = replace(state, announced=None)
    work = state.work
    if work is None or work.stage is not Stage.WAITING or work.assignment.base != version:
        return state, ()
    number = work.assignment.round
    return replace(state, work=None), (SayTrainingFailed(number, reason),)


def _assigned(state: Agent, assignment: Assignment) -> Step:
    number = assignment.round
    if number in state.outbox:
        return state, (SendOffer(number),)
    if state.work is not None and state.work.assignment.round >= number:
        return state, ()
    commands: Sequence[Command] = ()
    if state.work is not None:
        state, commands = _drop_work(state, state.work.assignment.round)
    if state.held == assignment.base:
        state = replace(state, work=Work(assignment, Stage.TRAINING))
        return state, (*commands, Train(assignment))
    if state.announced is not None and state.announced.number > assignment.base:
        return state, commands
    return replace(state, work=Work(assignment, Stage.WAITING)), commands


def _drop_work(state: Agent, number: int) -> Step:
    work = state.work
    if work is None or work.assignment.round != number:
        return state, ()
    stop = (StopTraining(number),) if work.stage is Stage.TRAINING else ()
    return replace(state, work=None), stop
