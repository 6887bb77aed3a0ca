"""The evaluation machine: which devices measure a version, and when that is over.

Federated evaluation (Wang et al. 2019, "Federated Evaluation of On-device Personalization"): a
version is measured where the examples are, on those that no training reads, and only sums come
back. Pure, as `rounds` is: no broker, store or clock, and no sums either: what was measured is the
store's, this knows who has answered.

    event                            then
    -------------------------------  -----------------------------------------------------------
    too few are measuring            as many more are asked, at random of those who are here
    … it said: no hold-out           another one takes its place; it is counted apart
    … it went away                   the same, but its answer still counts if it comes back
    … it is silent for long          the same: perhaps it is busy, or may not work now
    … it failed                      nothing: that is an answer, and every other one may fail too
    so long after the last asking    whoever has not answered and is here is asked again
    enough have answered             closed
    all who are here have answered   closed, after a moment if somebody may come back
    the deadline                     closed

A message may be lost on every way, so a request is said again until its answer is here, and nobody
has to confirm anything: a device that has answered says the same again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedge.coordinator.cohort import select_cohort
from fedge.schemas.messages import EvaluationStatus

AGAIN_S = 10.0
"""Between two askings of a device that has not answered."""
ASKED_A_SECOND = 100.0
"""Of a large fleet no more are asked again in a second."""
AWAY_S = 10.0
"""When only devices that went away are waited for, this is how long: a broker that is started again
lets go of everybody for a moment."""
GRACE_S = 15.0
"""What is left at least of a deadline that passed while the coordinator was away."""
PATIENCE_SHARE = 0.25
"""Of the deadline: a device that is silent for longer is not counted on."""

ENOUGH = "as many as were wanted have answered"
NOBODY_LEFT = "everybody who is here has answered"
DEADLINE = "the deadline came"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The state. Times are seconds of the caller's clock.

    `wanted`: answers to come by, those of devices that failed among them. `asked`: everybody who
    ever was. `slow`: those who are not counted on any more. `until`: the deadline. `again_at`: when
    the silent are asked again; `patient_until`: when they are counted as slow. `away_since`: since
    when nobody is waited for but those who went away.
    """

    number: int
    version: int
    wanted: int
    seed: int
    until: float
    again_at: float
    patience_s: float
    patient_until: float
    asked: frozenset[str] = frozenset()
    measured: frozenset[str] = frozenset()
    without: frozenset[str] = frozenset()
    failed: frozenset[str] = frozenset()
    slow: frozenset[str] = frozenset()
    away_since: float | None = None
    closed: bool = False

    @property
    def answered(self) -> frozenset[str]:
        """Whoever has said something, be it that it has nothing to say."""
        return self.measured | self.without | self.failed

    def has_answered(self, device: str) -> bool:
        """Whether it is in `answered`, however many are."""
        return device in self.measured or device in self.without or device in self.failed

    @property
    def missing(self) -> int:
        """Answers that are still wanted."""
        return self.wanted - len(self.measured) - len(self.failed)

    @property
    def waiting(self) -> frozenset[str]:
        """Who was asked and has not answered."""
        return self.asked - self.answered

    @property
    def next_deadline(self) -> float:
        """When `Looked` is due although nothing has happened."""
        times = [self.until, self.again_at, self.patient_until]
        if self.away_since is not None:
            times.append(self.away_since + AWAY_S)
        return min(times)


# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Looked:
    """Time has passed, or somebody came or went. `online`: who is here, None: not known yet."""

    online: frozenset[str] | None


@dataclass(frozen=True, slots=True)
class Answered:
    """Answers are durable, together with which it is looked who is here. `online` as in `Looked`.

    Many at once, because what follows from them takes as long as the fleet is large.
    """

    answers: Mapping[str, EvaluationStatus]
    online: frozenset[str] | None


Event = Looked | Answered


# ---------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True)
class Ask:
    """Record that these are asked, then ask them."""

    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AskAgain:
    """Ask these, who are recorded."""

    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Close:
    """Record that it is over; later answers do not count."""

    reason: str


Command = Ask | AskAgain | Close
Step = tuple[Evaluation, Sequence[Command]]


def opened(
    number: int,
    version: int,
    *,
    wanted: int,
    seed: int,
    deadline_s: float,
    left_s: float,
    now: float,
) -> Evaluation:
    """An evaluation that has asked nobody in this life. `left_s`: of its deadline."""
    patience_s = PATIENCE_SHARE * deadline_s
    return Evaluation(
        number,
        version,
        wanted,
        seed,
        until=now + left_s,
        again_at=now,
        patience_s=patience_s,
        patient_until=now + patience_s,
    )


def left_s(until: float, deadline_s: float, wall_now: float) -> float:
    """What a restart leaves of a deadline. `until`, `wall_now`: seconds since the epoch.

    A clock that was set back does not prolong it.
    """
    return max(min(until - wall_now, deadline_s), min(GRACE_S, deadline_s))


def resumed(state: Evaluation, answers: Mapping[str, EvaluationStatus | None]) -> Evaluation:
    """The same with everybody who was asked in an earlier life; None: no answer yet."""

    def those(*wanted: EvaluationStatus | None) -> frozenset[str]:
        return frozenset(device for device, status in answers.items() if status in wanted)

    return replace(
        state,
        asked=frozenset(answers),
        measured=those(EvaluationStatus.OK),
        without=those(EvaluationStatus.NO_HOLD_OUT),
        failed=those(EvaluationStatus.FAILED),
    )


def given_up(state: Evaluation) -> Evaluation:
    """The same, over before its time: whoever carries it out cannot go on."""
    return replace(state, closed=True)


def step(state: Evaluation, event: Event, now: float) -> Step:
    """The next state and what to do. What comes twice, late or of a stranger changes nothing."""
    if state.closed:
        return state, ()
    if isinstance(event, Answered):
        state = _with_answers(state, event.answers)
    return _go_on(state, event.online, now)


def counts(status: EvaluationStatus) -> bool:
    """Whether such an answer is one of those that are wanted."""
    return status is not EvaluationStatus.NO_HOLD_OUT


def _with_answers(state: Evaluation, answers: Mapping[str, EvaluationStatus]) -> Evaluation:
    def those(wanted: EvaluationStatus) -> frozenset[str]:
        return frozenset(
            device
            for device, status in answers.items()
            if status is wanted and device in state.asked and not state.has_answered(device)
        )

    return replace(
        state,
        measured=state.measured | those(EvaluationStatus.OK),
        without=state.without | those(EvaluationStatus.NO_HOLD_OUT),
        failed=state.failed | those(EvaluationStatus.FAILED),
    )


def _go_on(state: Evaluation, online: frozenset[str] | None, now: float) -> Step:
    if state.missing <= 0:
        return _close(state, ENOUGH)
    if now >= state.until:
        return _close(state, DEADLINE)
    if online is None:
        # Whoever seems to be away may be about to say that it is here.
        put_off = max(now + 1.0, state.again_at)
        patient_until = max(put_off, state.patient_until)
        return replace(state, again_at=put_off, patient_until=patient_until, away_since=None), ()
    here = state.waiting & online
    if now >= state.patient_until:
        state = replace(state, slow=state.slow | here, patient_until=now + state.patience_s)
    state, commands = _ask_more(state, online, now)
    if now >= state.again_at:
        state = replace(state, again_at=now + max(AGAIN_S, len(here) / ASKED_A_SECOND))
        if here:
            commands = (*commands, AskAgain(tuple(sorted(here))))
    state = replace(state, away_since=_away_since(state, online, now))
    if state.away_since is None or (state.waiting and now < state.away_since + AWAY_S):
        return state, commands
    return _close(state, NOBODY_LEFT)


def _away_since(state: Evaluation, online: frozenset[str], now: float) -> float | None:
    """Since when nobody is left who could answer now; None if somebody is, or may still come."""
    if state.waiting & online or not state.answered:
        # While nobody has answered there is nothing to show, so it is waited for until the end.
        return None
    return now if state.away_since is None else state.away_since


def _ask_more(state: Evaluation, online: frozenset[str], now: float) -> Step:
    counted_on = (state.waiting & online) - state.slow
    short = state.missing - len(counted_on)
    if short <= 0:
        return state, ()
    # By the seed and who was asked: the same choice after a restart, and on paper.
    rng = np.random.default_rng([state.seed, len(state.asked)])
    chosen = select_cohort(online - state.asked, short, rng)
    if not chosen:
        return state, ()
    state = replace(
        state, asked=state.asked | frozenset(chosen), patient_until=now + state.patience_s
    )
    return state, (Ask(chosen),)


def _close(state: Evaluation, reason: str) -> Step:
    return replace(state, closed=True), (Close(reason),)
