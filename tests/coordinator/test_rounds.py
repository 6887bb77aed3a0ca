"""The round machine: the table at its top, as claims; then any order of events, by Hypothesis."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

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
    device_seed,
    open_round,
    quorum_of,
    step,
)
from fedge.schemas.errors import RejectReason

POLICY = RoundPolicy(goal=3, quorum=2, over_selection=1.3, gather_s=10, deadline_s=100, retry_s=7)


@dataclass
class Played:
    """A round and what it commanded, event by event."""

    state: Round
    policy: RoundPolicy = POLICY
    now: float = 0.0

    def feed(self, event: Event) -> list[Command]:
        self.state, commands = step(self.state, event, self.policy, self.now)
        return list(commands)


def gathering(policy: RoundPolicy = POLICY, **changes: object) -> Played:
    return Played(open_round(5, 4, seed=1, policy=policy, now=0.0, **changes), policy)


def training(*names: str, policy: RoundPolicy = POLICY) -> Played:
    played = gathering(policy)
    for name in names:
        played.feed(CheckedIn(name, online=len(names)))
    played.now = policy.gather_s
    played.feed(TimePassed(online=len(names)))
    assert played.state.phase is Phase.TRAINING
    return played


def test_a_round_begins_when_the_over_selected_cohort_is_ready() -> None:
    played = gathering()
    for name in "abc":
        assert played.feed(CheckedIn(name, online=50)) == []
    assert played.feed(CheckedIn("d", online=50)) == [Assign(("a", "b", "c", "d"))]


def test_a_round_begins_when_everybody_who_is_online_is_ready_and_the_goal_can_be_reached() -> None:
    played = gathering()
    played.feed(CheckedIn("a", online=3))
    played.feed(CheckedIn("b", online=3))
    assert played.feed(CheckedIn("c", online=3)) == [Assign(("a", "b", "c"))]


def test_while_devices_are_still_being_found_those_who_are_ready_are_not_everybody() -> None:
    played = gathering()
    for name in "abc":
        assert played.feed(CheckedIn(name, online=None)) == []
    assert played.state.phase is Phase.GATHERING
    assert Assign(("a", "b", "c")) in played.feed(TimePassed(online=3))


def test_a_full_cohort_begins_also_while_devices_are_still_being_found() -> None:
    played = gathering()
    commands = [command for name in "abcd" for command in played.feed(CheckedIn(name, None))]
    assert [type(command) for command in commands] == [Assign]


def test_after_its_time_a_round_begins_with_a_quorum() -> None:
    played = gathering()
    played.feed(CheckedIn("a", online=9))
    played.feed(CheckedIn("b", online=9))
    played.now = 9.9
    assert played.feed(TimePassed(online=9)) == []
    played.now = 10.0
    assert played.feed(TimePassed(online=9)) == [Assign(("a", "b"))]


def test_a_round_without_a_quorum_goes_on_gathering_beyond_its_time() -> None:
    played = gathering()
    played.feed(CheckedIn("a", online=1))
    played.now = 1000.0
    assert played.feed(TimePassed(online=1)) == []
    assert played.feed(CheckedIn("b", online=2)) == [Assign(("a", "b"))]


def test_devices_that_are_not_chosen_get_a_time_to_come_back() -> None:
    played = gathering(RoundPolicy(goal=1, quorum=1, over_selection=1.0, retry_s=7))
    # Two check in before the machine is asked to choose: as after a restart.
    played.state = Round(5, 4, 1, 10.0, ready=frozenset("ab"))
    commands = played.feed(CheckedIn("c", online=3))
    chosen = commands[0]
    assert isinstance(chosen, Assign)
    assert commands[1] == Defer(tuple(sorted(set("abc") - set(chosen.devices))), 7)


def test_whoever_comes_while_others_train_is_deferred() -> None:
    assert training("a", "b", "c").feed(CheckedIn("z", online=4)) == [Defer(("z",), 7)]


def test_a_member_that_checks_in_again_gets_its_assignment_again() -> None:
    played = training("a", "b", "c")
    assert played.feed(CheckedIn("b", online=3)) == [Assign(("b",))]
    played.feed(Failed("c"))
    assert played.feed(CheckedIn("c", online=3)) == [Assign(("c",))]
    assert played.state.failed == frozenset()


def test_the_goal_closes_a_round_and_dismisses_the_rest() -> None:
    played = training(*"abcd")
    assert played.feed(Accepted("a")) == []
    assert played.feed(Accepted("d")) == []
    assert played.feed(Accepted("b")) == [Aggregate(), Dismiss(("c",), RejectReason.NOT_NEEDED)]


def test_a_duplicate_acceptance_is_counted_once() -> None:
    played = training(*"abcd")
    for _ in range(5):
        assert played.feed(Accepted("a")) == []
    assert played.state.accepted == {"a"}


def test_the_deadline_closes_a_round_with_a_quorum() -> None:
    played = training(*"abcd")
    played.feed(Accepted("a"))
    played.feed(Accepted("b"))
    played.now = played.state.until
    assert played.feed(TimePassed(online=4)) == [
        Aggregate(),
        Dismiss(("c", "d"), RejectReason.NOT_NEEDED),
    ]


def test_the_deadline_abandons_a_round_without_a_quorum_and_says_why() -> None:
    played = training(*"abcd")
    played.feed(Accepted("a"))
    played.now = played.state.until
    abandon, dismiss = played.feed(TimePassed(online=4))
    assert abandon == Abandon("the deadline came", needed=2)
    assert dismiss == Dismiss(("b", "c", "d"), RejectReason.ROUND_ABANDONED)


def test_a_round_does_not_wait_for_the_deadline_once_everybody_answered() -> None:
    played = training(*"abcd")
    played.feed(Accepted("a"))
    played.feed(Accepted("b"))
    played.feed(Failed("c"))
    assert played.feed(Failed("d")) == [Aggregate()]


def test_a_round_that_everybody_failed_is_abandoned_at_once() -> None:
    played = training(*"abc")
    played.feed(Failed("a"))
    played.feed(Failed("b"))
    (abandon,) = played.feed(Failed("c"))
    assert isinstance(abandon, Abandon)


def test_a_failure_of_somebody_who_was_not_asked_changes_nothing() -> None:
    played = training(*"abc")
    before = played.state
    assert played.feed(Failed("stranger")) == []
    assert played.state == before


def test_a_rollback_abandons_the_round() -> None:
    played = training(*"abc")
    abandon, _ = played.feed(Superseded(9))
    assert abandon == Abandon("version 9 took the place of its base, version 4")


def test_a_restart_after_the_goal_was_reached_closes_at_once() -> None:
    played = Played(
        Round(5, 4, 1, 100.0, Phase.TRAINING, cohort=frozenset("abc"), accepted=frozenset("abc"))
    )
    assert played.feed(TimePassed(online=0)) == [Aggregate()]


def test_a_cyclic_round_waits_for_the_ring_and_visits_the_next_device() -> None:
    policy = RoundPolicy(goal=3, quorum=2, strategy=Strategy.CYCLIC)
    played = gathering(policy, previous="a")
    assert played.feed(CheckedIn("a", online=3)) == []
    assert played.feed(CheckedIn("c", online=3)) == []
    assert played.feed(CheckedIn("b", online=3)) == [Assign(("b",)), Defer(("a", "c"), 30.0)]
    assert played.feed(Accepted("b")) == [Aggregate()]


def test_the_seed_of_a_device_is_the_same_on_paper() -> None:
    # printf 7/pi-1 | sha256sum
    assert device_seed(7, "pi-1") == 0xA4BCD0EC


def test_the_default_quorum_is_seventy_percent() -> None:
    assert [quorum_of(goal) for goal in (1, 2, 4, 10, 100)] == [1, 2, 3, 7, 70]


@given(st.permutations("abcdefgh"), st.integers(0, 2**32 - 1))
def test_the_cohort_does_not_depend_on_the_order_of_check_ins(order: list[str], seed: int) -> None:
    policy = RoundPolicy(goal=3, quorum=2, over_selection=1.0, gather_s=10)

    def cohort_of(names: list[str]) -> frozenset[str]:
        state = Round(1, 0, seed, until=0.0, ready=frozenset(names[:-1]))
        return step(state, CheckedIn(names[-1], online=8), policy, now=1.0)[0].cohort

    assert cohort_of(order) == cohort_of(sorted(order))


class AnyOrder(RuleBasedStateMachine):
    """Whatever comes in whatever order, the promises of a round hold."""

    names = st.sampled_from("abcdefg")

    def __init__(self) -> None:
        super().__init__()
        self.played = gathering()
        self.ends: list[Command] = []
        self.assigned: set[str] = set()

    def take(self, event: Event) -> None:
        was_open = self.played.state.is_open
        commands = self.played.feed(event)
        for command in commands:
            if isinstance(command, Aggregate | Abandon):
                assert was_open
                self.ends.append(command)
            if isinstance(command, Assign):
                assert was_open
                self.assigned |= set(command.devices)

    @rule(name=names, online=st.integers(0, 7) | st.none())
    def check_in(self, name: str, online: int | None) -> None:
        self.take(CheckedIn(name, online))

    @precondition(lambda self: self.played.state.cohort)
    @rule(data=st.data())
    def accept(self, data: st.DataObject) -> None:
        # The service accepts an update of a member only: that is the store's key.
        self.take(Accepted(data.draw(st.sampled_from(sorted(self.played.state.cohort)))))

    @rule(name=names)
    def fail(self, name: str) -> None:
        self.take(Failed(name))

    @rule(seconds=st.floats(0, 60))
    def wait(self, seconds: float) -> None:
        self.played.now += seconds
        self.take(TimePassed(online=3))

    @rule()
    def roll_back(self) -> None:
        self.take(Superseded(99))

    @invariant()
    def it_ends_at_most_once(self) -> None:
        assert len(self.ends) <= 1
        assert self.played.state.is_open == (not self.ends)

    @invariant()
    def only_assigned_devices_are_in_the_cohort_and_only_they_are_accepted(self) -> None:
        state = self.played.state
        assert state.cohort == self.assigned
        assert state.accepted <= state.cohort
        assert not state.accepted & state.failed

    @invariant()
    def a_version_is_made_only_from_a_quorum(self) -> None:
        if self.ends == [Aggregate()]:
            assert len(self.played.state.accepted) >= POLICY.quorum

    @invariant()
    def no_round_trains_beyond_its_deadline(self) -> None:
        state = self.played.state
        if state.phase is Phase.TRAINING:
            assert state.until <= self.played.now + POLICY.deadline_s


TestAnyOrder = AnyOrder.TestCase
