"""The rollout machine: whom a version reaches next, when it stops, and nothing about how.

A version goes to a few devices first, then to more, then to all (a canary release). What the
devices found is counted elsewhere, each device once; this machine is told the totals. It knows no
broker, store, device or wall clock: every function is pure.

    phase     what it is told             then
    --------  --------------------------  ------------------------------------------------------
    RUNNING   the fleet is not known yet  nothing: the share stays, time does not count
    RUNNING   too few have answered       the stage gathers; time does not count
    RUNNING   enough have answered        the stage soaks: the time with enough answers counts
    RUNNING   none of them is connected   time does not count: nobody would say that it is bad
    RUNNING   enough, and soaked          the next stage, which begins to gather; after the last
                                          stage DONE: the candidate is the stable version
    RUNNING   too many failed             HALTED: the candidate is withdrawn
    RUNNING   the operator pauses         PAUSED: the share stays, time does not count
    PAUSED    the operator resumes        RUNNING, the same stage; it soaks on from where it was
    PAUSED    too many failed             HALTED: also what is paused is watched
    any open  the operator aborts         ABORTED: the candidate is withdrawn
    ended     anything                    nothing

Too many failed when their part is above the allowed one even if everybody else of the sample should
pass: a candidate that is bad is stopped before the sample is whole. Who falls silent after it
was reached is neither a failure nor an answer, and nobody takes its place: the sample that a stage
asks for shrinks by no more of them than may fail. Soaking is counted by a clock that does not
jump, and only while this program runs: a coordinator that is away hears of no failure. What was
soaked before a restart counts.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from fedge.schemas.rollout_share import reach


class ServingMode(StrEnum):
    """When a version is put into use by apps."""

    EVERY = "every"
    """Each newest version at once, on every device."""
    STAGED = "staged"
    """The newest version in stages; when that is over, the one that is newest then."""
    MANUAL = "manual"
    """What the operator says with `fedge rollout start`."""


class Phase(StrEnum):
    """Where a rollout stands."""

    RUNNING = "running"
    PAUSED = "paused"
    HALTED = "halted"
    """Too many devices rolled it back."""
    DONE = "done"
    ABORTED = "aborted"

    @property
    def is_open(self) -> bool:
        """Whether it can still change."""
        return self in (Phase.RUNNING, Phase.PAUSED)


class Wish(StrEnum):
    """What the operator wants of a rollout."""

    RUN = "run"
    PAUSE = "pause"
    ABORT = "abort"


WISHED = {Wish.RUN: Phase.RUNNING, Wish.PAUSE: Phase.PAUSED, Wish.ABORT: Phase.ABORTED}
"""The phase in which a wish has been carried out."""


@dataclass(frozen=True, slots=True)
class RolloutPolicy:
    """What the operator decided about a rollout.

    `stages`: rising shares of the devices, the last one 1. `soak_s`: how long a stage is watched
    once enough of it have answered. `min_devices`: the least that a stage reaches and that answer,
    where the fleet has them; see `rollout_share.reach`. `min_answered`: this share of the devices
    of a stage must have answered. `max_failure_share`: of those who answered.
    """

    stages: tuple[float, ...] = (0.01, 0.1, 0.5, 1.0)
    soak_s: float = 3600.0
    min_devices: int = 10
    min_answered: float = 0.5
    max_failure_share: float = 0.2


@dataclass(frozen=True, slots=True)
class Rollout:
    """The state. `stage`: from 0. `share`: what is announced; never less than it was.

    `reached`: known devices that the share reached, at the most so far. `known`: all devices;
    `waited_for`: of the reached, those who were seen lately; both None until this life has looked.
    `connected`: of the reached, those who are there now. `soaked_s`: of this stage, up to `since`,
    in the caller's clock; None: it does not soak now.
    """

    phase: Phase = Phase.RUNNING
    stage: int = 0
    share: float = 0.0
    reached: int = 0
    known: int | None = None
    waited_for: int | None = None
    connected: int = 0
    active: int = 0
    failed: int = 0
    soaked_s: float = 0.0
    since: float | None = None
    reason: str = ""

    @property
    def answered(self) -> int:
        """Devices that said how it ended there."""
        return self.active + self.failed


# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Fleet:
    """The devices by their places in this rollout, each rising.

    `known`: everybody, also who is away. `recent`: who was seen lately. `connected`: who is there.
    """

    known: Sequence[float] = ()
    recent: Sequence[float] = ()
    connected: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Looked:
    """The totals and the fleet, as of now. `fleet`: None while not everybody is known again."""

    active: int
    failed: int
    fleet: Fleet | None


@dataclass(frozen=True, slots=True)
class Wished:
    """The operator wants this. `reason`: of an abort."""

    wish: Wish
    reason: str = ""


Event = Looked | Wished


# ---------------------------------------------------------------- questions


def wanted(state: Rollout, policy: RolloutPolicy) -> int:
    """How many devices must have answered before the next stage: at least one.

    Fewer than `min_devices` only where fewer were reached, or there are no more devices, or some
    that were reached are not seen any more: but no more of these than could all have failed
    without stopping the rollout. One device that is lost for good holds up no fleet, and a
    candidate that kills its devices gets no further.
    """
    known = state.reached if state.known is None else state.known
    waited_for = state.reached if state.waited_for is None else state.waited_for
    least = min(policy.min_devices, state.reached, known)
    vanished = max(0, state.reached - waited_for)
    least -= min(vanished, max(0, math.floor(policy.max_failure_share * least) - state.failed))
    return max(1, least, math.ceil(policy.min_answered * waited_for))


def soaks(state: Rollout, policy: RolloutPolicy) -> bool:
    """Whether the time counts now."""
    return (
        state.phase is Phase.RUNNING
        and state.connected > 0
        and state.answered >= wanted(state, policy)
    )


def soaked(state: Rollout, now: float) -> float:
    """Seconds for which the stage has soaked."""
    return state.soaked_s + (0.0 if state.since is None else max(0.0, now - state.since))


def failure_share(state: Rollout, policy: RolloutPolicy) -> float:
    """The failed among those who answered, as if the rest of the sample had passed."""
    return state.failed / max(state.answered, wanted(state, policy))


def next_look(state: Rollout, policy: RolloutPolicy, now: float) -> float | None:
    """When time alone changes something, in the caller's clock; None: never."""
    if not soaks(state, policy):
        return None
    return now + max(0.0, policy.soak_s - soaked(state, now))


def counted(state: Rollout, fleet: Fleet) -> Rollout:
    """The state with the devices of `fleet` that its share reaches."""
    return replace(
        state,
        reached=max(state.reached, bisect_left(fleet.known, state.share)),
        known=len(fleet.known),
        waited_for=bisect_left(fleet.recent, state.share),
        connected=bisect_left(fleet.connected, state.share),
    )


# ---------------------------------------------------------------- the machine


def step(state: Rollout, event: Event, policy: RolloutPolicy, now: float) -> Rollout:
    """The next state. `now`: seconds of a clock that never goes back within a life."""
    if not state.phase.is_open:
        return state
    state = replace(state, soaked_s=soaked(state, now), since=None)
    match event:
        case Wished(wish, reason):
            state = _wished(state, wish, reason)
        case Looked():
            state = _looked(state, event, policy)
    return replace(state, since=now if soaks(state, policy) else None)


def _wished(state: Rollout, wish: Wish, reason: str) -> Rollout:
    return replace(state, phase=WISHED[wish], reason=reason if wish is Wish.ABORT else "")


def _looked(state: Rollout, looked: Looked, policy: RolloutPolicy) -> Rollout:
    fleet = looked.fleet
    state = replace(state, active=looked.active, failed=looked.failed)
    if fleet is not None:
        begins = state.phase is Phase.RUNNING and state.share == 0.0
        state = _reach(state, fleet, policy) if begins else counted(state, fleet)
    if failure_share(state, policy) > policy.max_failure_share:
        reason = (
            f"{state.failed} of {state.answered} devices rolled it back, more than "
            f"{policy.max_failure_share:.0%} of a sample of {wanted(state, policy)}"
        )
        return replace(state, phase=Phase.HALTED, reason=reason)
    if fleet is None or state.phase is not Phase.RUNNING:
        return state
    if soaks(state, policy) and state.soaked_s >= policy.soak_s:
        if state.stage == len(policy.stages) - 1:
            return replace(state, phase=Phase.DONE)
        state = replace(state, stage=state.stage + 1, soaked_s=0.0)
    return _reach(state, fleet, policy)


def _reach(state: Rollout, fleet: Fleet, policy: RolloutPolicy) -> Rollout:
    share = reach(fleet.known, policy.stages, state.stage, policy.min_devices)
    return counted(replace(state, share=max(state.share, share)), fleet)
