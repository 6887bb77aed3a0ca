"""The buffer machine: asynchronous rounds, each rule by itself and all of them at random."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.coordinator.buffer import Buffer, Flight, open_buffer, staleness_weight, step
from fedge.coordinator.rounds import (
    Abandon,
    Accepted,
    Aggregate,
    Assign,
    CheckedIn,
    Dismiss,
    Failed,
    Mode,
    Phase,
    RoundPolicy,
    Superseded,
    TimePassed,
)
from fedge.schemas.errors import RejectReason

POLICY = RoundPolicy(
    goal=2, quorum=1, deadline_s=100.0, mode=Mode.ASYNC, concurrency=3, max_staleness=2
)


def opened(number=1, base=0, flights=None, now=0.0):
    state, commands = open_buffer(number, base, seed=7, policy=POLICY, now=now, flights=flights)
    return state, commands


def after(state, *events, now=1.0):
    commands = []
    for event in events:
        state, more = step(state, event, POLICY, now)
        commands += more
    return state, commands


def test_a_device_that_is_ready_is_asked_at_once():
    state, commands = after(opened()[0], CheckedIn("a", 1))
    assert commands == [Assign(("a",))]
    assert state.flights == {(1, "a"): Flight(base=0, until=101.0)}


def test_no_more_devices_fly_than_the_operator_allows_and_the_first_in_line_is_next():
    state, commands = after(opened()[0], *(CheckedIn(name, 5) for name in "abcde"))
    assert commands == [Assign(("a",)), Assign(("b",)), Assign(("c",))]
    assert state.waiting == ("d", "e")
    state, commands = after(state, Failed("b"))
    assert commands == [Assign(("d",))]
    assert set(state.flights) == {(1, "a"), (1, "c"), (1, "d")}


def test_the_goal_closes_the_buffer_and_the_others_go_on_flying():
    state, _ = after(opened()[0], *(CheckedIn(name, 3) for name in "abc"))
    state, commands = after(state, Accepted("a"), Accepted("b"))
    assert commands == [Aggregate()]
    assert state.phase is Phase.CLOSING
    assert set(state.flights) == {(1, "c")}

    following, commands = opened(2, 1, state.flights)
    assert not commands
    assert following.oldest == 1
    following, commands = after(following, Accepted("c", 1), CheckedIn("a", 3), Accepted("a"))
    assert following.accepted == {(1, "c"), (2, "a")}
    assert Aggregate() in commands


def test_a_device_is_asked_once_in_a_round():
    state, _ = after(opened()[0], CheckedIn("a", 1), Accepted("a"))
    state, commands = after(state, CheckedIn("a", 1))
    assert not commands
    assert not state.waiting


def test_a_device_that_lost_its_assignment_gets_it_again():
    state, _ = after(opened()[0], CheckedIn("a", 1))
    again, commands = after(state, CheckedIn("a", 1))
    assert commands == [Assign(("a",))]
    assert again == state


def test_a_device_that_restarted_is_asked_anew_and_takes_no_second_place():
    flights = {(1, "a"): Flight(0, 50.0), (1, "b"): Flight(0, 50.0)}
    state, _ = opened(2, 1, flights)
    state, commands = after(state, CheckedIn("a", 2), CheckedIn("c", 2))
    assert commands == [Assign(("a",)), Assign(("c",))]
    # What it made in its earlier life still counts, if it comes.
    assert (1, "a") in state.flights


def test_a_device_that_comes_back_does_not_give_its_place_to_another():
    state, _ = opened(2, 1, {(1, "a"): Flight(0, 90.0)})
    state, _ = after(state, *(CheckedIn(name, 4) for name in "bcd"))
    assert state.waiting == ("d",)
    state, commands = after(state, CheckedIn("a", 4))
    assert commands == [Assign(("a",))]
    assert state.waiting == ("d",)


def test_a_flight_ends_at_its_own_deadline_and_frees_its_place():
    state, _ = opened(2, 1, {(1, name): Flight(0, 50.0) for name in "abc"})
    state, _ = after(state, CheckedIn("d", 4))
    state, commands = step(state, TimePassed(4), POLICY, 50.0)
    assert commands == (Dismiss(("a", "b", "c"), RejectReason.LATE, 1), Assign(("d",)))
    assert state.flights == {(2, "d"): Flight(1, 150.0)}


def test_at_the_deadline_a_quorum_is_enough_and_without_one_it_waits():
    state, _ = after(opened()[0], CheckedIn("a", 1))
    state, _ = after(state, CheckedIn("b", 1), now=60.0)
    state, commands = step(state, TimePassed(1), POLICY, 101.0)
    assert commands == (Dismiss(("a",), RejectReason.LATE, 1),)
    assert state.is_open
    state, commands = step(state, Accepted("b"), POLICY, 101.5)
    assert commands == (Aggregate(),)


def test_the_deadline_counts_from_the_first_asking():
    state, _ = opened(2, 1, {(1, "x"): Flight(0, 500.0)})
    assert state.until == 100.0
    state, _ = step(state, CheckedIn("a", 1), POLICY, 70.0)
    state, _ = step(state, CheckedIn("b", 1), POLICY, 80.0)
    assert state.until == 170.0


def test_at_the_deadline_the_places_of_the_silent_go_to_those_who_wait():
    state, _ = after(opened()[0], *(CheckedIn(name, 4) for name in "abcd"), now=0.0)
    state, commands = step(state, TimePassed(4), POLICY, 100.0)
    assert commands == (Dismiss(("a", "b", "c"), RejectReason.LATE, 1), Assign(("d",)))
    state, commands = step(state, Accepted("d"), POLICY, 150.0)
    assert commands == (Aggregate(),)


def test_a_buffer_ends_whoever_is_silent():
    # Else devices that say they are ready, and then nothing, could hold up a version for ever.
    state, _ = after(opened()[0], CheckedIn("a", 2), now=0.0)
    state, _ = after(state, CheckedIn("b", 2), TimePassed(2), now=150.0)
    assert set(state.flights) == {(1, "b")}
    state, commands = after(state, CheckedIn("c", 3), now=210.0)
    assert not commands
    state, commands = after(state, TimePassed(3), now=250.0)
    assert [type(command) for command in commands] == [Dismiss, Abandon]


def test_when_nobody_is_at_work_any_more_the_round_ends_so_that_all_can_be_asked_again():
    state, _ = after(opened()[0], CheckedIn("a", 2), CheckedIn("b", 2), Failed("a"))
    assert state.is_open
    state, commands = step(state, TimePassed(2), POLICY, 101.0)
    assert commands[0] == Dismiss(("b",), RejectReason.LATE, 1)
    assert isinstance(commands[1], Abandon)
    assert commands[1] == Abandon("the deadline came", needed=POLICY.quorum)


def test_a_round_that_nobody_came_to_waits_for_somebody():
    state, commands = step(opened()[0], TimePassed(0), POLICY, 1000.0)
    assert not commands
    state, commands = step(state, CheckedIn("a", 1), POLICY, 1001.0)
    assert commands == (Assign(("a",)),)


def test_a_flight_that_would_be_too_stale_is_called_back_when_the_next_round_opens():
    flights = {(1, "a"): Flight(0, 999.0), (2, "b"): Flight(1, 999.0)}
    state, commands = opened(4, 3, flights)
    assert commands == [Dismiss(("a",), RejectReason.STALE, 1)]
    assert set(state.flights) == {(2, "b")}


def test_a_rollback_abandons_the_buffer_and_calls_everybody_back():
    state, _ = after(opened(2, 1, {(1, "x"): Flight(0, 99.0)})[0], CheckedIn("a", 1))
    state, commands = after(state, Superseded(5))
    assert isinstance(commands[0], Abandon)
    assert commands[1:] == [
        Dismiss(("x",), RejectReason.ROUND_ABANDONED, 1),
        Dismiss(("a",), RejectReason.ROUND_ABANDONED, 2),
    ]
    assert not state.flights


def test_staleness_counts_as_the_inverse_square_root():
    assert staleness_weight(0) == 1.0
    assert staleness_weight(3) == 0.5
    assert staleness_weight(8) == 1 / 3


names = st.sampled_from("abcdef")
events = st.one_of(
    st.builds(CheckedIn, names, st.just(6)),
    st.builds(Accepted, names, st.sampled_from([None, 1])),
    st.builds(Failed, names, st.sampled_from([None, 1])),
    st.builds(TimePassed, st.just(6)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(events, st.floats(0, 60)), max_size=60))
def test_whatever_happens_a_buffer_closes_once_and_never_overfills_its_places(steps):
    state: Buffer
    state, _ = opened(2, 1, {(1, "a"): Flight(0, 30.0)})
    now, endings, asked, first_asked_at = 0.0, 0, [], None
    for event, waited in steps:
        now += waited
        if isinstance(event, Accepted):
            # The intake lets through only what is in flight.
            key = (2 if event.asked_in is None else event.asked_in, event.device)
            if key not in state.flights:
                continue
        before = state
        state, commands = step(state, event, POLICY, now)
        endings += sum(isinstance(command, Aggregate) for command in commands)
        new = state.asked - before.asked
        if new:
            first_asked_at = now if first_asked_at is None else first_asked_at
            assert now < first_asked_at + 2 * POLICY.deadline_s
        if isinstance(event, TimePassed) and first_asked_at is not None:
            assert not state.is_open or now < first_asked_at + 3 * POLICY.deadline_s
        asked += sorted(new)
        told = {d for c in commands if isinstance(c, Assign) for d in c.devices}
        assert new <= told
        assert len({device for _, device in state.flights}) <= POLICY.concurrency
        if any(isinstance(command, Aggregate) for command in commands):
            assert len(state.accepted) >= POLICY.quorum
        if not before.is_open:
            assert not new
            assert state.phase is before.phase
    assert endings <= 1
    assert len(asked) == len(set(asked))
