"""What a restart makes of the store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedge.coordinator.buffer import Flight
from fedge.coordinator.recovery import (
    GRACE_S,
    flights_of,
    resumed_buffer,
    resumed_round,
)
from fedge.coordinator.rounds import Mode, Phase, RoundPolicy
from fedge.coordinator.store import ParticipantStatus, RoundRecord, Store
from tests.coordinator.states import put_plan, put_version

SYNC = RoundPolicy(goal=2, quorum=1, deadline_s=100.0, gather_s=10.0)
ASYNC = RoundPolicy(
    goal=2, quorum=1, deadline_s=100.0, mode=Mode.ASYNC, concurrency=3, max_staleness=2
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "state", create=True) as opened:
        yield opened


def opened(store: Store, number: int, *, base: int = 0, mode: str = "sync", at: float = 1000.0):
    record = RoundRecord(
        number=number,
        base=base,
        goal=2,
        quorum=1,
        seed=1,
        opened_at=at,
        gather_until=at + 10,
        mode=mode,
    )
    store.open_round(record)
    return record


def test_a_round_goes_on_with_the_time_that_is_left(store: Store) -> None:
    opened(store, 1)
    store.record_assignment(1, ["a", "b"], train_until=1100.0, at=1000.0)
    (record,) = store.open_rounds()
    state = resumed_round(store, record, SYNC, now=5.0, wall_now=1060.0, previous=None)
    assert state.phase is Phase.TRAINING
    assert state.cohort == {"a", "b"}
    assert state.until == 45.0


def test_a_round_that_gathered_gathers_anew(store: Store) -> None:
    opened(store, 1)
    (record,) = store.open_rounds()
    state = resumed_round(store, record, SYNC, now=7.0, wall_now=1009.0, previous=None)
    assert state.phase is Phase.GATHERING
    assert state.until == 7.0 + SYNC.gather_s


@pytest.mark.parametrize("set_back_s", [3600.0, 10 * 365 * 86400.0])
def test_a_clock_that_was_set_back_prolongs_no_deadline(store: Store, set_back_s: float) -> None:
    opened(store, 1, at=1e9)
    store.record_assignment(1, ["a"], train_until=1e9 + 100, at=1e9)
    (record,) = store.open_rounds()
    wall_now = 1e9 - set_back_s
    state = resumed_round(store, record, SYNC, now=0.0, wall_now=wall_now, previous=None)
    assert state.until == SYNC.deadline_s


def test_a_deadline_that_passed_meanwhile_leaves_a_moment_to_deliver(store: Store) -> None:
    opened(store, 1)
    store.record_assignment(1, ["a"], train_until=1100.0, at=1000.0)
    (record,) = store.open_rounds()
    state = resumed_round(store, record, SYNC, now=7.0, wall_now=9e9, previous=None)
    assert state.until == 7.0 + GRACE_S
    assert state.is_open


def test_flights_go_on_unless_they_are_too_late_or_too_stale(store: Store) -> None:
    opened(store, 1, base=0, mode="async")
    store.record_asked(1, "stale", base=0, until=2000.0, at=1000.0)
    store.record_asked(1, "good", base=1, until=2000.0, at=1000.0)
    store.record_asked(1, "late", base=1, until=1400.0, at=1000.0)
    flights = flights_of(store, 3, ASYNC, now=10.0, wall_now=1950.0)
    assert flights == {(1, "good"): Flight(base=1, until=60.0)}
    status = {p.device: p.status for p in store.participants(1)}
    assert status["good"] is ParticipantStatus.ASKED
    assert status["stale"] is status["late"] is ParticipantStatus.SILENT


def test_work_on_a_version_that_was_taken_back_meanwhile_is_let_go(store: Store) -> None:
    plan = put_plan(store)
    put_version(store, plan, 0)
    opened(store, 1, base=0, mode="async")
    store.record_asked(1, "a", base=0, until=2000.0, at=1000.0)
    put_version(store, plan, 1, round=1)
    opened(store, 2, base=1, mode="async")
    store.record_asked(2, "b", base=1, until=2000.0, at=1000.0)
    assert set(flights_of(store, 1, ASYNC, now=10.0, wall_now=1001.0)) == {(1, "a"), (2, "b")}

    put_version(store, plan, 2, note="rolled back to version 0")
    store.abandon_round(2, "version 2 took the place of its base", at=1002.0)
    opened(store, 3, base=2, mode="async")
    store.record_asked(3, "c", base=2, until=2000.0, at=1003.0)
    assert set(flights_of(store, 2, ASYNC, now=10.0, wall_now=1004.0)) == {(3, "c")}
    assert [p.device for p in store.in_flight()] == ["c"]


def test_a_coordinator_that_became_synchronous_lets_all_flights_go(store: Store) -> None:
    opened(store, 1, mode="async")
    store.record_asked(1, "a", base=0, until=2000.0, at=1000.0)
    assert flights_of(store, 0, SYNC, now=0.0, wall_now=1001.0) == {}
    assert store.in_flight() == ()


def test_a_buffer_goes_on_with_what_is_in_it(store: Store) -> None:
    record = opened(store, 4, base=3, mode="async")
    store.record_asked(4, "a", base=3, until=1100.0, at=1000.0)
    store.record_asked(4, "b", base=3, until=1120.0, at=1020.0)
    flights = {(4, "a"): Flight(3, 50.0)}
    state = resumed_buffer(store, record, ASYNC, flights, now=10.0, wall_now=1030.0)
    assert state.asked == {"a", "b"}
    assert state.flights == flights
    assert state.until == 80.0
