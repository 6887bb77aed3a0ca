"""The round machine: what a round does next, and nothing about how.

A round is one attempt to make version n+1 from version n. It gathers devices that are ready,
chooses a cohort, waits for updates, and closes at its goal, or at its deadline with a quorum; else
it is abandoned with the reason kept (Bonawitz et al. 2019, "Towards Federated Learning at Scale:
System Design", section 2.2). This module knows no broker, store, model or clock: every function
is pure, and the service acts on what it returns.

    phase      event                          next
    ---------  -----------------------------  ------------------------------------------------
    GATHERING  enough devices are ready       TRAINING: the chosen get assignments, the others
                                              a time to come back
    GATHERING  time is up, quorum is ready    TRAINING, with those who came
    GATHERING  time is up, too few are ready  GATHERING: a round without devices costs nothing
    TRAINING   goal reached                   CLOSING
    TRAINING   everybody answered             CLOSING with a quorum, else ABANDONED
    TRAINING   deadline                       CLOSING with a quorum, else ABANDONED
    any open   superseded                     ABANDONED: the base is no longer the newest version
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np

from fedge.coordinator.cohort import cyclic_next, over_selected, select_cohort
from fedge.schemas.errors import RejectReason


class Mode(StrEnum):
    """Whether a round waits for its cohort."""

    SYNC = "sync"
    """A cohort is asked together; the round closes at its goal or its deadline."""
    ASYNC = "async"
    """Devices are asked one by one; see `buffer`."""


class Strategy(StrEnum):
    """How the next version is made."""

    FEDAVG = "fedavg"
    """A cohort trains side by side from the same version; differences are averaged."""
    CYCLIC = "cyclic"
    """The model visits the devices one after another, in the order of their names."""


class Phase(StrEnum):
    """Where a round stands."""

    GATHERING = "gathering"
    TRAINING = "training"
    CLOSING = "closing"
    ABANDONED = "abandoned"


@dataclass(frozen=True, slots=True)
class RoundPolicy:
    """What the operator decided about rounds.

    `goal`: updates that close a round at once. `quorum`: fewest updates that make a version at the
    deadline. `gather_s`: after this, a quorum of ready devices is enough to begin.
    `deadline_s`: for training and upload. `retry_s`: when devices not chosen come back.
    `ask`: devices to ask at a time, None: `goal * over_selection`.
    `concurrency` and `max_staleness` (in versions) are for asynchronous mode.
    """

    goal: int
    quorum: int
    over_selection: float = 1.3
    gather_s: float = 30.0
    deadline_s: float = 600.0
    retry_s: float = 30.0
    strategy: Strategy = Strategy.FEDAVG
    mode: Mode = Mode.SYNC
    concurrency: int = 1
    max_staleness: int = 20
    ask: int | None = None

    @property
    def cohort_size(self) -> int:
        """Devices to ask so that the goal is reached although some drop out."""
        if self.strategy is Strategy.CYCLIC:
            return 1
        return self.ask or over_selected(self.goal, self.over_selection)


@dataclass(frozen=True, slots=True)
class Round:
    """The state. `until`: when the present phase ends by itself, in the caller's clock.

    `previous`: the device that the last cyclic round visited.
    """

    number: int
    base: int
    seed: int
    until: float
    phase: Phase = Phase.GATHERING
    ready: frozenset[str] = frozenset()
    cohort: frozenset[str] = frozenset()
    accepted: frozenset[str] = frozenset()
    failed: frozenset[str] = field(default_factory=frozenset)
    previous: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether devices can still do something for this round."""
        return self.phase in (Phase.GATHERING, Phase.TRAINING)


# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class CheckedIn:
    """A device is ready.

    `online`: how many devices are connected now; None while it is being found out.
    """

    device: str
    online: int | None


@dataclass(frozen=True, slots=True)
class Accepted:
    """A device's update is durable and counts.

    `asked_in`: the round that asked for it, None for this one.
    """

    device: str
    asked_in: int | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """A device will not deliver: it said so, or its update was refused. `asked_in` as above."""

    device: str
    asked_in: int | None = None


@dataclass(frozen=True, slots=True)
class TimePassed:
    """The clock moved; `online` as in `CheckedIn`."""

    online: int | None


@dataclass(frozen=True, slots=True)
class Superseded:
    """Another version became the newest (a rollback)."""

    by: int


Event = CheckedIn | Accepted | Failed | TimePassed | Superseded


# ---------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True)
class Assign:
    """Send each device its assignment."""

    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Defer:
    """Tell each device to come back after so long."""

    devices: tuple[str, ...]
    after_s: float


@dataclass(frozen=True, slots=True)
class Dismiss:
    """Tell devices that still work for a round to stop: `asked_in`, or this one if it is None."""

    devices: tuple[str, ...]
    reason: RejectReason
    asked_in: int | None = None


@dataclass(frozen=True, slots=True)
class Aggregate:
    """Make the next version from the updates that the store has accepted."""


@dataclass(frozen=True, slots=True)
class Abandon:
    """Record that no version comes from this round.

    `needed`: with so many updates one is made all the same, if the record has them: one may have
    been accepted in this very moment. None if nothing can help.
    """

    reason: str
    needed: int | None = None


Command = Assign | Defer | Dismiss | Aggregate | Abandon


def open_round(
    number: int,
    base: int,
    *,
    seed: int,
    policy: RoundPolicy,
    now: float,
    previous: str | None = None,
) -> Round:
    """A round that gathers. `now`: seconds of the caller's clock."""
    return Round(number, base, seed, until=now + policy.gather_s, previous=previous)


def device_seed(round_seed: int, device: str) -> int:
    """The seed of one device in one round, 32 bits: the same after a restart, and on paper."""
    digest = hashlib.sha256(f"{round_seed}/{device}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def step(  # noqa: PLR0911 -- one return for each event
    state: Round, event: Event, policy: RoundPolicy, now: float
) -> tuple[Round, Sequence[Command]]:
    """The next state and what to do. Events that mean nothing in a phase change nothing."""
    if not state.is_open:
        return _after_the_end(state, event, policy)
    match event:
        case CheckedIn(device, online):
            return _checked_in(state, device, online, policy, now)
        case TimePassed(online):
            return _time_passed(state, online, policy, now)
        case Accepted(device, _):
            if device not in state.cohort:
                return state, ()
            state = replace(
                state, accepted=state.accepted | {device}, failed=state.failed - {device}
            )
            return _maybe_close(state, policy)
        case Failed(device, _):
            if device not in state.cohort or device in state.accepted:
                return state, ()
            return _maybe_close(replace(state, failed=state.failed | {device}), policy)
        case Superseded(by):
            return _abandon(state, f"version {by} took the place of its base, version {state.base}")


def _after_the_end(
    state: Round, event: Event, policy: RoundPolicy
) -> tuple[Round, Sequence[Command]]:
    if isinstance(event, CheckedIn):
        return state, (Defer((event.device,), policy.retry_s),)
    return state, ()


def _checked_in(
    state: Round, device: str, online: int | None, policy: RoundPolicy, now: float
) -> tuple[Round, Sequence[Command]]:
    if state.phase is Phase.TRAINING:
        # A member that checks in again has lost its assignment on the way: it gets it again.
        if device in state.cohort - state.accepted:
            return replace(state, failed=state.failed - {device}), (Assign((device,)),)
        return state, (Defer((device,), policy.retry_s),)
    return _maybe_begin(replace(state, ready=state.ready | {device}), online, policy, now)


def _time_passed(
    state: Round, online: int | None, policy: RoundPolicy, now: float
) -> tuple[Round, Sequence[Command]]:
    if state.phase is Phase.GATHERING:
        return _maybe_begin(state, online, policy, now)
    closed, commands = _maybe_close(state, policy)
    if commands or now < state.until:
        return closed, commands
    if len(state.accepted) >= policy.quorum:
        return _close(state)
    return _abandon(state, "the deadline came", needed=policy.quorum)


def _maybe_begin(
    state: Round, online: int | None, policy: RoundPolicy, now: float
) -> tuple[Round, Sequence[Command]]:
    ready = len(state.ready)
    everybody_is_here = online is not None and ready >= max(online, policy.goal)
    time_is_up = now >= state.until and ready >= policy.quorum
    if not (ready >= policy.cohort_size or everybody_is_here or time_is_up):
        return state, ()
    if policy.strategy is Strategy.CYCLIC:
        # The ring is every device that is here, so it is complete before the first visit.
        if not (everybody_is_here or time_is_up):
            return state, ()
        chosen: tuple[str, ...] = (cyclic_next(sorted(state.ready), state.previous),)
    else:
        rng = np.random.default_rng(state.seed)
        chosen = select_cohort(sorted(state.ready), min(policy.cohort_size, ready), rng)
    rest = tuple(sorted(state.ready - set(chosen)))
    state = replace(
        state, phase=Phase.TRAINING, cohort=frozenset(chosen), until=now + policy.deadline_s
    )
    commands: list[Command] = [Assign(chosen)]
    if rest:
        commands.append(Defer(rest, policy.retry_s))
    return state, commands


def _maybe_close(state: Round, policy: RoundPolicy) -> tuple[Round, Sequence[Command]]:
    goal = min(policy.goal, len(state.cohort))
    if len(state.accepted) >= goal:
        return _close(state)
    if state.accepted | state.failed >= state.cohort:
        if len(state.accepted) >= min(policy.quorum, goal):
            return _close(state)
        why = f"all {len(state.cohort)} devices answered"
        return _abandon(state, why, needed=min(policy.quorum, goal))
    return state, ()


def _close(state: Round) -> tuple[Round, Sequence[Command]]:
    commands: list[Command] = [Aggregate()]
    commands += _dismissals(state, RejectReason.NOT_NEEDED)
    return replace(state, phase=Phase.CLOSING), commands


def _abandon(
    state: Round, reason: str, *, needed: int | None = None
) -> tuple[Round, Sequence[Command]]:
    commands: list[Command] = [Abandon(reason, needed)]
    commands += _dismissals(state, RejectReason.ROUND_ABANDONED)
    return replace(state, phase=Phase.ABANDONED), commands


def _dismissals(state: Round, reason: RejectReason) -> list[Command]:
    waiting = tuple(sorted(state.cohort - state.accepted - state.failed))
    return [Dismiss(waiting, reason)] if waiting else []


def quorum_of(goal: int) -> int:
    """The quorum where the operator set none: 70% of the goal, and at least one."""
    return max(1, math.ceil(goal * 0.7))
