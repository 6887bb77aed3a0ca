"""The round machine against a slow reference: every event, in every order, under every policy.

The reference is plain sets and sentences, written from the table at the top of
`fedge.coordinator.rounds` and from what `RoundPolicy` says of its fields, not from the code. Both
are fed the same events. Where the table leaves a choice (who is in the cohort), the machine's
choice is checked and taken over. The claims:

1.  A round ends at most once and never opens again: exactly one of `Aggregate` and `Abandon`.
2.  A version is made only from a quorum, or from all of a cohort that is smaller than the quorum.
3.  Only devices that checked in are assigned, never more than the policy asks; later, only members.
4.  Whoever has an assignment and has not answered when the round ends is dismissed, nobody else is.
5.  The deadline bounds the round: it is fixed when training begins, and nothing outlives it.
6.  Every check-in is answered: assigned, deferred, or held until enough are ready.
7.  Equal states and events give equal answers, and no event raises.
8.  Events that mean nothing in a phase change nothing: answers of strangers, answers while the
    round gathers, repeats.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fedge.coordinator.rounds import (
    Abandon,
    Accepted,
    Aggregate,
    Assign,
    CheckedIn,
    Command,
    Defer,
    Dismiss,
    Event,
    Failed,
    Phase,
    Round,
    RoundPolicy,
    Strategy,
    Superseded,
    TimePassed,
    open_round,
    step,
)
from fedge.schemas.errors import RejectReason
from tests.model.profile import search

KNOWN = "abcdefg"
NAMES = st.sampled_from([*KNOWN, "stranger"])
BASE = 4


@st.composite
def policies(draw: st.DrawFn) -> RoundPolicy:
    """What `RoundSettings` lets an operator write, and `Course` adds to it."""
    goal = draw(st.integers(1, 5))
    return RoundPolicy(
        goal=goal,
        quorum=draw(st.integers(1, goal)),
        over_selection=draw(st.sampled_from([1.0, 1.3, 2.0])),
        gather_s=draw(st.sampled_from([0.0, 10.0])),
        deadline_s=draw(st.sampled_from([20.0, 100.0])),
        retry_s=draw(st.sampled_from([0.0, 7.0])),
        strategy=draw(st.sampled_from(Strategy)),
        ask=draw(st.none() | st.integers(goal, 4 * goal)),
    )


@dataclass
class Said:
    """What the machine's commands amount to."""

    assigned: set[str] = field(default_factory=set)
    deferred: set[str] = field(default_factory=set)
    dismissed: set[str] = field(default_factory=set)
    ends: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, commands: list[Command], policy: RoundPolicy) -> Said:
        said = cls()
        for command in commands:
            match command:
                case Assign(devices):
                    assert list(devices) == sorted(set(devices)), "each device once, in name order"
                    said.assigned |= set(devices)
                case Defer(devices, after_s):
                    assert after_s == policy.retry_s
                    said.deferred |= set(devices)
                case Dismiss(devices, reason):
                    assert devices, "a dismissal of nobody"
                    over = reason is RejectReason.ROUND_ABANDONED
                    assert over == any(isinstance(each, Abandon) for each in commands)
                    said.dismissed |= set(devices)
                case Aggregate():
                    said.ends.append("aggregate")
                case Abandon(reason):
                    assert reason, "a round is abandoned with a reason"
                    said.ends.append("abandon")
        return said


class Reference:
    """A round in plain sets. Each method returns what has to be said; `begin` takes a cohort."""

    def __init__(self, policy: RoundPolicy, now: float, previous: str | None) -> None:
        self.policy = policy
        self.previous = previous
        self.phase = "gathering"
        self.gathers_until = now + policy.gather_s
        self.trains_until: float | None = None
        self.ready: set[str] = set()
        self.cohort: set[str] = set()
        self.accepted: set[str] = set()
        self.failed: set[str] = set()

    @property
    def is_open(self) -> bool:
        return self.phase in ("gathering", "training")

    @property
    def asks(self) -> int:
        """How many devices the policy asks."""
        if self.policy.strategy is Strategy.CYCLIC:
            return 1
        if self.policy.ask is not None:
            return self.policy.ask
        asks = self.policy.goal
        # In tenths: 1.3 has no exact binary form.
        while 10 * asks < self.policy.goal * round(10 * self.policy.over_selection):
            asks += 1
        return asks

    @property
    def needed(self) -> int:
        """Updates that close the round at once: a small cohort cannot do more than all of it."""
        return min(self.policy.goal, len(self.cohort))

    @property
    def least(self) -> int:
        """Updates that make a version if no more come."""
        return min(self.policy.quorum, len(self.cohort))

    def may_begin(self, online: int, now: float) -> bool:
        everybody = len(self.ready) >= online and len(self.ready) >= self.policy.goal
        waited = now >= self.gathers_until and len(self.ready) >= self.policy.quorum
        if self.policy.strategy is Strategy.CYCLIC:
            # The ring has to be complete, or complete enough, before the first visit.
            return everybody or waited
        return everybody or waited or len(self.ready) >= self.asks

    def begins(self, chosen: set[str], now: float) -> Said:
        """`chosen` is the machine's; everything else follows."""
        assert chosen <= self.ready, "somebody is asked who did not check in"
        assert len(chosen) == min(self.asks, len(self.ready))
        if self.policy.strategy is Strategy.CYCLIC:
            later = [name for name in self.ready if self.previous and name > self.previous]
            assert chosen == {min(later or self.ready)}
        self.phase, self.cohort = "training", set(chosen)
        self.trains_until = now + self.policy.deadline_s
        return Said(assigned=chosen, deferred=self.ready - chosen)

    def checked_in(self, device: str) -> Said | None:
        """None: it is in the line, and `may_begin` says whether the round begins with it."""
        if self.phase == "gathering":
            self.ready.add(device)
            return None
        if self.phase == "training" and device in self.cohort - self.accepted:
            # It has lost its assignment, or wants to try again.
            self.failed.discard(device)
            return Said(assigned={device})
        return Said(deferred={device})

    def answered(self, device: str, *, well: bool) -> Said:
        if self.phase != "training" or device not in self.cohort or device in self.accepted:
            return Said()
        (self.accepted if well else self.failed).add(device)
        if well:
            self.failed.discard(device)
        return self.maybe_ends(time_is_up=False)

    def maybe_ends(self, *, time_is_up: bool) -> Said:
        """Goal reached, everybody answered, or the deadline."""
        everybody = self.accepted | self.failed == self.cohort
        if len(self.accepted) >= self.needed:
            return self.ends("aggregate")
        if everybody or time_is_up:
            return self.ends("aggregate" if len(self.accepted) >= self.least else "abandon")
        return Said()

    def ends(self, how: str) -> Said:
        waiting = self.cohort - self.accepted - self.failed
        self.phase = "closing" if how == "aggregate" else "abandoned"
        return Said(dismissed=waiting, ends=[how])


class RoundMachine(RuleBasedStateMachine):
    """The machine and the reference, event by event."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.ends: list[str] = []

    @initialize(
        policy=policies(),
        seed=st.integers(0, 2**32 - 1),
        now=st.sampled_from([0.0, 1e6]),
        previous=st.none() | st.sampled_from(KNOWN),
    )
    def open(self, policy: RoundPolicy, seed: int, now: float, previous: str | None) -> None:
        self.policy, self.now = policy, now
        self.state = open_round(5, BASE, seed=seed, policy=policy, now=now, previous=previous)
        self.reference = Reference(policy, now, previous)

    # ------------------------------------------------------------ both are fed

    def take(self, event: Event) -> Said:
        before = self.state
        self.state, commands = step(before, event, self.policy, self.now)
        assert (self.state, tuple(commands)) == _as_tuples(
            step(before, event, self.policy, self.now)
        ), "the same state and event gave another answer"
        said = Said.of(list(commands), self.policy)
        assert not (said.ends and not before.is_open), "an end after the end"
        self.ends += said.ends
        return said

    def maybe_begins(self, said: Said, online: int) -> Said:
        """What had to be said, if the round may begin now."""
        if not self.reference.may_begin(online, self.now):
            return Said()
        assert said.assigned, "enough are ready, and the round does not begin"
        return self.reference.begins(said.assigned, self.now)

    @rule(device=NAMES, online=st.integers(0, len(KNOWN)))
    def check_in(self, device: str, online: int) -> None:
        expected = self.reference.checked_in(device)
        said = self.take(CheckedIn(device, online))
        assert said == (expected or self.maybe_begins(said, online))

    @rule(online=st.integers(0, len(KNOWN)))
    def everybody_checks_in(self, online: int) -> None:
        for device in KNOWN:
            self.check_in(device, online)

    @rule(device=NAMES, asked_in=st.none() | st.just(5))
    def accept(self, device: str, asked_in: int | None) -> None:
        expected = self.reference.answered(device, well=True)
        assert self.take(Accepted(device, asked_in)) == expected

    @rule(device=NAMES, asked_in=st.none() | st.just(5))
    def fail(self, device: str, asked_in: int | None) -> None:
        expected = self.reference.answered(device, well=False)
        assert self.take(Failed(device, asked_in)) == expected

    @rule(
        seconds=st.sampled_from([0.0, 0.1, 9.9, 10.0, 20.0, 100.0]) | st.floats(0, 1e4),
        online=st.integers(0, len(KNOWN)),
    )
    def let_time_pass(self, seconds: float, online: int) -> None:
        self.now += seconds
        said = self.take(TimePassed(online))
        reference = self.reference
        if reference.phase == "gathering":
            assert said == self.maybe_begins(said, online)
        elif reference.phase == "training":
            assert reference.trains_until is not None
            time_is_up = self.now >= reference.trains_until
            assert said == reference.maybe_ends(time_is_up=time_is_up)
            assert not (time_is_up and self.state.is_open), "the round outlives its deadline"
        else:
            assert said == Said()

    @rule(by=st.integers(BASE + 1, BASE + 3))
    def roll_back(self, by: int) -> None:
        expected = self.reference.ends("abandon") if self.reference.is_open else Said()
        assert self.take(Superseded(by)) == expected

    # ------------------------------------------------------------ and agree

    @invariant()
    def they_agree(self) -> None:
        state, reference = self.state, self.reference
        assert state.phase.value == reference.phase
        assert set(state.cohort) == reference.cohort
        assert set(state.accepted) == reference.accepted
        assert set(state.failed) == reference.failed
        if state.phase is Phase.GATHERING:
            assert set(state.ready) == reference.ready
            assert state.until == reference.gathers_until
        elif reference.trains_until is not None:
            assert state.until == reference.trains_until

    @invariant()
    def it_ends_at_most_once_and_stays_ended(self) -> None:
        assert len(self.ends) <= 1
        assert self.state.is_open == (not self.ends)

    @invariant()
    def a_version_is_made_only_from_enough_updates_of_the_cohort(self) -> None:
        if self.ends == ["aggregate"]:
            accepted = self.state.accepted & self.state.cohort
            assert accepted
            assert len(accepted) >= min(self.policy.quorum, len(self.state.cohort))


def _as_tuples(answer: tuple[Round, object]) -> tuple[Round, tuple[Command, ...]]:
    state, commands = answer
    return state, tuple(commands)  # type: ignore[arg-type] -- a sequence of commands


TestRoundMachine = RoundMachine.TestCase
TestRoundMachine.settings = search(examples=150, steps=30, deep_examples=20_000, deep_steps=60)
