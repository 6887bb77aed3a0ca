"""The course of rounds: both machines behind one face."""

from __future__ import annotations

import pytest

from fedge.coordinator import rounds
from fedge.coordinator.buffer import Flight
from fedge.coordinator.course import Awaited, Course
from fedge.coordinator.over_selection import OverSelection
from fedge.coordinator.rounds import Mode, Phase, RoundPolicy, Strategy
from fedge.schemas.messages import RoundPhase

SYNC = RoundPolicy(goal=2, quorum=1, over_selection=1.5, deadline_s=100.0, gather_s=10.0)
ASYNC = RoundPolicy(goal=2, quorum=1, deadline_s=100.0, mode=Mode.ASYNC, concurrency=3)


def course(policy: RoundPolicy) -> Course:
    return Course(policy, checkins_per_s=500)


def begun(policy: RoundPolicy, number: int = 1) -> Course:
    made = course(policy)
    made.begin(number, number - 1, seed=1, previous=None, now=0.0)
    return made


def test_before_the_first_round_there_is_nothing_to_announce() -> None:
    assert course(SYNC).announcement(newest=0, online=0) is None
    assert course(SYNC).next_deadline() is None


def test_a_synchronous_round_waits_for_those_it_asked_while_it_trains() -> None:
    here = begun(SYNC)
    assert here.awaited("a", 1) is None
    for name in "abc":
        here.claims(name, 10)
        turn = here.feed(rounds.CheckedIn(name, 3), 1.0)
    assert turn is not None
    assert turn.asked == {"a", "b", "c"}
    assert here.awaited("a", 1) == Awaited(base=0, claim=10)
    assert here.awaited("a", 2) is None
    assert here.waiting_for() == ("a", "b", "c")
    here.feed(rounds.Accepted("a"), 2.0)
    assert here.awaited("a", 1) is None
    assert here.next_deadline() == 101.0


def test_weight_cannot_be_claimed_after_one_was_asked() -> None:
    here = begun(SYNC)
    for name in "abc":
        here.claims(name, 10)
        here.feed(rounds.CheckedIn(name, 3), 1.0)
    here.claims("a", 1_000_000)
    assert here.awaited("a", 1) == Awaited(base=0, claim=10)


def test_work_that_is_under_way_is_awaited_between_two_buffers_and_in_the_next() -> None:
    here = begun(ASYNC)
    for name in "abc":
        here.feed(rounds.CheckedIn(name, 3), 1.0)
    here.feed(rounds.Accepted("a"), 2.0)
    turn = here.feed(rounds.Accepted("b"), 2.0)
    assert turn is not None
    assert turn.state.phase is Phase.CLOSING
    here.end()
    assert here.round is None
    assert here.awaited("c", 1) == Awaited(base=0)
    closed = here.announcement(newest=1, online=3)
    assert closed is not None
    assert (closed.phase, closed.oldest) == (RoundPhase.CLOSED, 1)

    here.begin(2, 1, seed=1, previous=None, now=3.0)
    assert here.awaited("c", 1) == Awaited(base=0)
    announced = here.announcement(newest=1, online=3)
    assert announced is not None
    assert (announced.round, announced.oldest_wanted) == (2, 1)
    assert here.rounds_with_files() == {1, 2}


def test_a_synchronous_announcement_wants_no_older_work() -> None:
    announced = begun(SYNC, 5).announcement(newest=4, online=1)
    assert announced is not None
    assert announced.oldest is None
    assert announced.oldest_wanted == 5


def test_more_are_asked_after_a_round_that_missed_its_goal() -> None:
    here = course(SYNC)
    assert here.devices_to_ask == 3
    here.recover(7, {}, OverSelection(share=1 / 3))
    assert here.last_number == 7
    assert here.devices_to_ask > 3
    here.begin(8, 0, seed=1, previous=None, now=0.0)
    assert here.policy.cohort_size == here.devices_to_ask


def test_a_cyclic_round_teaches_nothing_about_drop_out() -> None:
    policy = RoundPolicy(goal=2, quorum=1, strategy=Strategy.CYCLIC)
    here = begun(policy)
    for name in "ab":
        here.feed(rounds.CheckedIn(name, 2), 1.0)
    here.feed(rounds.Failed("a"), 2.0)
    here.end()
    assert here.devices_to_ask == course(policy).devices_to_ask


def test_at_the_last_version_all_work_is_called_back() -> None:
    here = course(ASYNC)
    here.recover(3, {(3, "a"): Flight(2, 9.0), (2, "b"): Flight(1, 9.0)})
    assert here.call_back_all() == [(2, "b"), (3, "a")]
    assert here.awaited("a", 3) is None


@pytest.mark.parametrize(("now", "due"), [(1.0, 51.0), (60.0, 100.0), (150.0, None)])
def test_a_buffer_wakes_for_its_next_flight_and_for_its_own_deadline(now, due) -> None:
    here = course(ASYNC)
    here.recover(1, {(1, "a"): Flight(0, 51.0)})
    here.begin(2, 1, seed=1, previous=None, now=0.0)
    here.feed(rounds.TimePassed(1), now)
    assert here.next_deadline() == due


def test_a_claim_cannot_be_raised_after_the_asking() -> None:
    here = begun(ASYNC)
    here.claims("a", 100)
    here.feed(rounds.CheckedIn("a", 2), 0.0)
    here.claims("a", 10**9)
    assert here.awaited("a", 1) == Awaited(0, 100)
    # Nor in the next round, in which the device may be asked anew.
    here.end()
    here.begin(2, 1, seed=1, previous=None, now=1.0)
    here.claims("a", 7)
    assert here.awaited("a", 1) == Awaited(0, 100)
    here.feed(rounds.CheckedIn("a", 2), 2.0)
    assert here.awaited("a", 2) == Awaited(1, 7)


def test_a_deadline_that_passed_unnoticed_is_still_due() -> None:
    # The timer may be woken by something else in the very moment of the deadline.
    here = begun(ASYNC)
    here.feed(rounds.CheckedIn("a", 2), 0.0)
    here.feed(rounds.CheckedIn("b", 2), 99.9)
    here.feed(rounds.Failed("a", 1), 100.1)
    assert here.next_deadline() == 100.0


def test_who_fails_between_two_buffers_flies_no_more() -> None:
    here = course(ASYNC)
    here.recover(1, {(1, "a"): Flight(0, 9.0), (1, "b"): Flight(0, 9.0)})
    here.feed(rounds.Failed("a", 1), 1.0)
    assert set(here.flights) == {(1, "b")}


def test_a_rollback_teaches_nothing_about_drop_out() -> None:
    here = begun(SYNC)
    for name in "abc":
        here.feed(rounds.CheckedIn(name, 3), 1.0)
    here.feed(rounds.Superseded(9), 2.0)
    asked = here.devices_to_ask
    here.end()
    assert here.devices_to_ask == asked


def test_a_round_waits_for_devices_when_only_they_can_move_it() -> None:
    here = begun(SYNC)
    assert not here.waits_for_devices(9.0)
    assert here.waits_for_devices(10.0)
    for name in "abc":
        here.feed(rounds.CheckedIn(name, 3), 11.0)
    assert not here.waits_for_devices(12.0)

    here = begun(ASYNC)
    assert here.waits_for_devices(1.0)
    here.feed(rounds.CheckedIn("a", 1), 1.0)
    assert not here.waits_for_devices(1.0)
