"""The agent machine: what one device does next, and nothing about how.

Pure: events in, commands out, no clock, generator, file or network. The device keeps three things
in mind: the newest version (fetch it, check it, use it), the newest round (check in once while it
gathers) and its one assignment (train once, offer until there is a receipt). Everything may come
twice, late or in another order; every handler below is harmless when repeated.

    assignment          event                       then
    ------------------  --------------------------  --------------------------------------------
    none                Assigned, base is here      TRAINING: train
    none                Assigned, base is missing   WAITING: the version is being fetched
    none                Assigned, round not wanted  nothing: the coordinator has moved on
    none                Assigned, was answered      say that no other update will come
    WAITING             Fetched, the base           TRAINING: train
    WAITING             FetchFailed, the base       none: say that no update will come
    TRAINING            Assigned again              nothing: it is under way
    TRAINING            Trained                     OFFERED: keep in the outbox, offer
    TRAINING            TrainingStopped             none: say so, and rest before the next check-in
    TRAINING            a rule breaks               SUSPENDED: stop, and keep how far it is
    (to TRAINING)       while a rule is broken      SUSPENDED instead, and the same as from there
    SUSPENDED           all rules hold again        TRAINING: train, from where it was
    SUSPENDED           Overdue                     none: say so; it is no failure, and no rest
    SUSPENDED           Fetched, a newer version    none: its base is not here any more; say so
    SUSPENDED           Trained                     OFFERED: it was done before it could be stopped
    OFFERED             Assigned again, Connected   offer again: the answer was lost
    OFFERED             the round announced again   offer again: the coordinator was away
    OFFERED             Receipted                   none: forget the update; check in again
    OFFERED             UpdateLost                  none: forget it, and say that it will not come
    any                 a round that no longer      none: stop the training, its result is useless;
                        wants the work, or Aborted  what was offered still waits for its receipt
    any                 a round that still wants    nothing: the update counts in a later round
                        the work

Which work a round wants is in its announcement (`oldest_wanted`). In synchronous mode that is the
round's own work alone, so each new round ends the work for the one before. In asynchronous mode
(Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation") older work is
wanted too: a slow device goes on while rounds pass, and checks in again when its answer is there.
A device that was assigned in a round never checks in for that round again.

A device that is not eligible (a rule of its host's state is broken, or a day's limit is used up)
does not check in, nor does one for which the round is not: it is too near to the last one that it
made an update for, or not the one in its sampling period. An assignment that comes all the same, or
was there before, waits for the rules until its time is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from fedge.edge_agent.commands import (
    Activate,
    CheckIn,
    Command,
    Fetch,
    Forget,
    KeepFailures,
    Rest,
    SayTrainingFailed,
    SendCheckIn,
    SendOffer,
    StopTraining,
    Suspend,
    Train,
)
from fedge.edge_agent.events import (
    Aborted,
    Activated,
    Assigned,
    CheckInDue,
    Connected,
    Counted,
    Deferred,
    Disconnected,
    EligibilityChanged,
    Event,
    Fetched,
    FetchFailed,
    Outlook,
    Overdue,
    Receipted,
    Recovered,
    RetryDue,
    RoundSeen,
    Trained,
    TrainingStopped,
    UpdateLost,
    VersionSeen,
)
from fedge.edge_agent.participation import first_round_after
from fedge.schemas.messages import Assignment, RoundAnnouncement, RoundPhase, VersionAnnouncement

LONGEST_REST_S = 900.0
"""What a device rests at the most after trainings that failed: somebody may have mended it."""


class Stage(StrEnum):
    """How far the assignment is."""

    WAITING = "waiting"
    SUSPENDED = "suspended"
    TRAINING = "training"
    OFFERED = "offered"


@dataclass(frozen=True, slots=True)
class Work:
    """The device's one assignment and its stage."""

    assignment: Assignment
    stage: Stage


@dataclass(frozen=True, slots=True)
class Agent:
    """The state.

    `held`: the newest version whose blobs are all here and verified. `missing`: the newest version
    that was not to be had, and why. `outbox`: rounds whose update has no receipt yet.
    `checked_in`: newest round that a check-in was decided for. `assigned`: newest round with an
    assignment. `resting`: until `RetryDue` the device does not check in. `failures`: trainings that
    failed since the last one that did not. `eligible`: the rules for training hold. `took_part`:
    newest round with an update of this device, 0: none; `every_rounds`: the least distance of two.
    `sampled`: of `round`, see `RoundSeen`.
    """

    connected: bool = False
    eligible: bool = True
    every_rounds: int = 1
    examples: int | None = None
    announced: VersionAnnouncement | None = None
    held: int | None = None
    active: int | None = None
    missing: FetchFailed | None = None
    round: RoundAnnouncement | None = None
    sampled: bool = True
    took_part: int = 0
    checked_in: int = 0
    assigned: int = 0
    resting: bool = False
    failures: int = 0
    work: Work | None = None
    outbox: frozenset[int] = frozenset()


Step = tuple[Agent, Sequence[Command]]


def rest_after(failures: int) -> Rest:
    """How long a device rests after so many trainings failed in a row: 2 s, 4 s, … 15 minutes."""
    after_s = min(2.0 ** min(failures, 16), LONGEST_REST_S)
    return Rest(after_s, after_s / 4)


def trains(state: Agent, number: int) -> bool:
    """Whether the device is to train for this round now."""
    work = state.work
    return work is not None and (work.assignment.round, work.stage) == (number, Stage.TRAINING)


def is_idle(state: Agent) -> bool:
    """Whether the device may work, and no round waits for what it is at."""
    newest, missing, work = state.announced, state.missing, state.work
    given_up = (
        newest is not None
        and missing is not None
        and missing.version == newest.number
        and missing.outlook is not Outlook.UNDER_WAY
    )
    fetches = newest is not None and newest.number != state.held and not given_up
    return state.eligible and not fetches and (work is None or work.stage is Stage.OFFERED)


def step(state: Agent, event: Event) -> Step:  # noqa: PLR0911, PLR0912 -- one for each event
    """The next state and what to do."""
    match event:
        case Recovered(failures):
            if failures == 0:
                return state, ()
            # How long this agent was away is not known: only the wall clock could say.
            return replace(state, failures=failures, resting=True), (rest_after(failures),)
        case Connected():
            return _say_again(replace(state, connected=True))
        case Disconnected():
            return replace(state, connected=False), ()
        case Counted(examples):
            return _maybe_check_in(replace(state, examples=examples))
        case VersionSeen(announcement):
            return _version_seen(state, announcement)
        case RoundSeen(announcement, sampled):
            return _round_seen(state, announcement, sampled=sampled)
        case EligibilityChanged(eligible):
            return _eligibility_changed(state, eligible=eligible)
        case Fetched(version):
            return _fetched(state, version)
        case FetchFailed():
            return _fetch_failed(state, event)
        case Activated(version):
            return replace(state, active=version), ()
        case Assigned(assignment):
            return _assigned(state, assignment)
        case Deferred(retry):
            if retry.after_s > 0 or retry.spread_s > 0:
                return replace(state, resting=True), (Rest(retry.after_s, retry.spread_s),)
            return state, ()
        case RetryDue():
            return _maybe_check_in(replace(state, resting=False, checked_in=0))
        case CheckInDue(number, drawn):
            return _check_in_due(state, number, drawn=drawn)
        case Trained(number):
            return _trained(state, number)
        case TrainingStopped(number, reason):
            state, _ = _drop_work(state, number)
            failures = state.failures + 1
            state = replace(state, failures=failures, resting=True)
            said = SayTrainingFailed(number, reason)
            return state, (said, KeepFailures(failures), rest_after(failures))
        case Overdue(number, reason):
            return _overdue(state, number, reason)
        case UpdateLost(number, reason):
            if number not in state.outbox:
                return state, ()
            return _settled(state, number, (Forget(number), SayTrainingFailed(number, reason)))
        case Receipted(receipt):
            return _settled(state, receipt.round, (Forget(receipt.round),))
        case Aborted(number):
            # An update that was offered still waits for its receipt, which says how it ended.
            if state.work is not None and state.work.stage is Stage.OFFERED:
                return state, ()
            state, stop = _drop_work(state, number)
            state, more = _maybe_check_in(state)
            return state, (*stop, *more)


# ---------------------------------------------------------------- versions


def _version_seen(state: Agent, announcement: VersionAnnouncement) -> Step:
    newest = state.announced
    if newest is not None and announcement.number < newest.number:
        return state, ()
    state = replace(state, announced=announcement)
    if state.held == announcement.number:
        # In stages, a rollout says what is put into use, and when.
        is_due = state.active != state.held and not announcement.staged
        return state, (Activate(announcement),) if is_due else ()
    if newest is not None and newest.number == announcement.number:
        return state, ()
    state, said = _give_up_replaced(state)
    if not said:
        return state, (Fetch(announcement),)
    state, more = _maybe_check_in(state)
    return state, (Fetch(announcement), *said, *more)


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
        state, begun = _begin(state, work.assignment)
        commands.extend(begun)
    elif work is not None and work.stage is Stage.SUSPENDED and work.assignment.base != state.held:
        # Not before: until now the device could have gone on.
        state, said = _overdue(state, work.assignment.round, f"version {version} replaced its base")
        commands.extend(said)
    newest = state.announced
    if newest is not None and newest.number == version != state.active and not newest.staged:
        commands.append(Activate(newest))
    if state.missing is not None and state.missing.version <= version:
        # Without it the device did not check in.
        state, more = _maybe_check_in(replace(state, missing=None))
        commands.extend(more)
    return state, commands


def _fetch_failed(state: Agent, failed: FetchFailed) -> Step:
    state = replace(state, missing=failed)
    is_newest = state.announced is not None and state.announced.number == failed.version
    if failed.outlook is Outlook.WHEN_ANNOUNCED_AGAIN and is_newest:
        state = replace(state, announced=None)
    work = state.work
    if work is None or work.stage is not Stage.WAITING or work.assignment.base != failed.version:
        return state, ()
    # Said at once, also where the fetch goes on: the coordinator need not wait for this disk.
    return replace(state, work=None), (SayTrainingFailed(work.assignment.round, failed.reason),)


# ---------------------------------------------------------------- rounds


def _round_seen(state: Agent, announcement: RoundAnnouncement, *, sampled: bool) -> Step:
    before = state.round
    if before is not None and announcement.round < before.round:
        return state, ()
    state = replace(state, round=announcement, sampled=sampled)
    commands: Sequence[Command] = ()
    if state.work is not None and state.work.assignment.round < announcement.oldest_wanted:
        # The coordinator has moved on. An offered update keeps waiting for its receipt (in the
        # outbox); training for a round that is over only burns watts.
        state, commands = _drop_work(state, state.work.assignment.round)
    else:
        state, commands = _give_up_replaced(state)
    if before is not None and (announcement.round, announcement.phase) == (
        before.round,
        before.phase,
    ):
        # The coordinator says nothing new: it was away, or wants more devices than came. What we
        # said meanwhile, perhaps nobody heard.
        state, more = _say_again(state)
    else:
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
        or announcement.round <= max(state.checked_in, state.assigned)
        or not _is_ready(state, announcement)
    ):
        return state, ()
    state = replace(state, checked_in=announcement.round)
    return state, (
        CheckIn(announcement.round, announcement.checkin_spread_s, announcement.checkin_share),
    )


def _check_in_due(state: Agent, number: int, *, drawn: bool) -> Step:
    announcement = state.round
    if announcement is None or announcement.round != number or number <= state.assigned:
        return state, ()
    gathering = announcement.phase is RoundPhase.GATHERING
    if announcement.phase is RoundPhase.CLOSED or not (drawn or gathering):
        return state, ()
    if not _is_ready(state, announcement):
        # Whatever is in the way now: once it is gone, the check-in is decided anew.
        return replace(state, checked_in=0), ()
    return state, (SendCheckIn(number),)


def _is_ready(state: Agent, announcement: RoundAnnouncement) -> bool:
    base_is_missing = (
        state.missing is not None
        and state.missing.version >= announcement.base
        and state.held != announcement.base
    )
    first = first_round_after(state.took_part, state.every_rounds)
    may_take_part = state.eligible and state.sampled and announcement.round >= first
    is_free = not state.resting and state.work is None
    has_all = bool(state.examples) and not base_is_missing
    return state.connected and may_take_part and is_free and has_all


# ---------------------------------------------------------------- the assignment


def _assigned(state: Agent, assignment: Assignment) -> Step:
    number = assignment.round
    if number in state.outbox:
        return replace(state, assigned=max(number, state.assigned)), (SendOffer(number),)
    if state.work is not None and state.work.assignment.round >= number:
        return state, ()
    if state.round is not None and number < state.round.oldest_wanted:
        return state, ()
    if number <= state.assigned:
        # It was answered, or given up: one contribution to a round, whoever asks again.
        return state, (SayTrainingFailed(number, "this device has answered in this round before"),)
    commands: list[Command] = []
    if state.work is not None:
        before = state.work.assignment.round
        if state.work.stage is not Stage.OFFERED and _is_asynchronous(state):
            commands.append(SayTrainingFailed(before, f"round {number} took its place here"))
        state, stop = _drop_work(state, before)
        commands.extend(stop)
    state, more = _taken_on(state, assignment)
    return state, (*commands, *more)


def _taken_on(state: Agent, assignment: Assignment) -> Step:
    number, base = assignment.round, assignment.base
    known = replace(state, assigned=max(number, state.assigned))
    if state.held == base:
        return _begin(known, assignment)
    if state.missing is not None and state.missing.version == base:
        return known, (SayTrainingFailed(number, state.missing.reason),)
    if state.announced is not None and state.announced.number > base:
        if not _is_asynchronous(state):
            # Its round is over.
            return state, ()
        return known, (SayTrainingFailed(number, _replaced(base, state.announced)),)
    return replace(known, work=Work(assignment, Stage.WAITING)), ()


def _give_up_replaced(state: Agent) -> Step:
    """Asynchronous mode: ends work whose base will not come, because a newer version is fetched."""
    work, newest = state.work, state.announced
    if (
        work is None
        or work.stage is not Stage.WAITING
        or newest is None
        or newest.number <= work.assignment.base
        or not _is_asynchronous(state)
    ):
        return state, ()
    reason = _replaced(work.assignment.base, newest)
    return replace(state, work=None), (SayTrainingFailed(work.assignment.round, reason),)


def _begin(state: Agent, assignment: Assignment) -> Step:
    """The base is here: trains, or waits until the device may."""
    if not state.eligible:
        return replace(state, work=Work(assignment, Stage.SUSPENDED)), (Suspend(assignment),)
    return replace(state, work=Work(assignment, Stage.TRAINING)), (Train(assignment),)


def _eligibility_changed(state: Agent, *, eligible: bool) -> Step:
    state = replace(state, eligible=eligible)
    work = state.work
    if work is None:
        return _maybe_check_in(state)
    in_the_wrong_stage = Stage.SUSPENDED if eligible else Stage.TRAINING
    if work.stage is not in_the_wrong_stage:
        return state, ()
    return _begin(state, work.assignment)


def _overdue(state: Agent, number: int, reason: str) -> Step:
    work = state.work
    if work is None or work.assignment.round != number or work.stage is not Stage.SUSPENDED:
        return state, ()
    state, stop = _drop_work(state, number)
    state, more = _maybe_check_in(state)
    return state, (*stop, SayTrainingFailed(number, reason), *more)


def _trained(state: Agent, number: int) -> Step:
    state = replace(state, outbox=state.outbox | {number}, took_part=max(number, state.took_part))
    if state.work is not None and state.work.assignment.round == number:
        state = replace(state, work=replace(state.work, stage=Stage.OFFERED))
    if state.failures == 0:
        return state, (SendOffer(number),)
    return replace(state, failures=0), (SendOffer(number), KeepFailures(0))


def _settled(state: Agent, number: int, then: Sequence[Command]) -> Step:
    """The end of an update: the device is free again, in asynchronous mode amid a later round."""
    state, stop = _drop_work(state, number)
    state, more = _maybe_check_in(replace(state, outbox=state.outbox - {number}))
    return state, (*stop, *then, *more)


def _drop_work(state: Agent, number: int) -> Step:
    work = state.work
    if work is None or work.assignment.round != number:
        return state, ()
    begun = work.stage in (Stage.TRAINING, Stage.SUSPENDED)
    stop = (StopTraining(number),) if begun else ()
    return replace(state, work=None), stop


def _is_asynchronous(state: Agent) -> bool:
    return state.round is not None and state.round.oldest is not None


def _replaced(base: int, by: VersionAnnouncement) -> str:
    return f"version {by.number} replaced version {base} before it was here"
