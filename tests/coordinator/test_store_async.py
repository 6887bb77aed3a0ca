"""The store in asynchronous mode: an update counts in the round that is open when it arrives."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedge.coordinator.store import (
    DeviceSighting,
    ParticipantStatus,
    Store,
)
from fedge.schemas.blobs import describe
from fedge.schemas.errors import PeerError, RejectReason, StoreError
from fedge.schemas.messages import RoundPhase
from tests.coordinator.test_store import (
    PLAN,
    a_round,
    blob,
    check_any_order,
    contribution,
    version,
)


def asynchronous(number: int, base: int = 0):
    return dataclasses.replace(a_round(number, base), mode="async")


@pytest.fixture
def store(tmp_path, database_url):
    with Store.open(tmp_path / "state", database_url, create=True) as opened:
        opened.record_plan(PLAN)
        opened.record_version(version(0))
        yield opened


@pytest.fixture
def buffering(store):
    store.open_round(asynchronous(1))
    for device in ("pi-2", "pi-1"):
        assert store.record_asked(1, device, base=0, until=640.0, at=40.0)
    return store


def test_a_round_keeps_its_mode(store):
    store.open_round(asynchronous(1))
    assert store.newest_round() == asynchronous(1)
    store.abandon_round(1, "", at=2.0)
    store.open_round(a_round(2))
    assert [r.mode for r in store.rounds()] == ["async", "sync"]


def test_devices_are_asked_one_after_the_other(buffering):
    assert buffering.newest_round().phase is RoundPhase.TRAINING
    assert buffering.record_asked(1, "pi-3", base=0, until=700.0, at=50.0) is True
    assert buffering.record_asked(1, "pi-3", base=0, until=900.0, at=60.0) is False
    asked = buffering.participant(1, "pi-3")
    assert (asked.base, asked.until, asked.asked_at) == (0, 700.0, 50.0)
    assert (asked.status, asked.counted_in) == (ParticipantStatus.ASKED, None)


def test_nobody_is_asked_in_a_closed_round(buffering):
    buffering.abandon_round(1, "superseded", at=50.0)
    with pytest.raises(StoreError, match="not open"):
        buffering.record_asked(1, "pi-3", base=0, until=700.0, at=51.0)
    with pytest.raises(StoreError, match="not open"):
        buffering.record_asked(7, "pi-3", base=0, until=700.0, at=51.0)
    assert buffering.participant(1, "pi-3") is None


def test_an_update_counts_in_the_round_that_is_open_when_it_comes(buffering):
    buffering.record_version(version(1, round_number=1))
    buffering.open_round(asynchronous(2, base=1))
    assert buffering.record_accepted(1, "pi-1", contribution(), at=70.0, counted_in=2) is True
    assert buffering.record_accepted(1, "pi-1", contribution(), at=71.0, counted_in=2) is False
    buffering.record_asked(2, "pi-1", base=1, until=700.0, at=72.0)
    buffering.record_asked(2, "pi-0", base=1, until=700.0, at=72.0)
    for device in ("pi-1", "pi-0"):
        assert buffering.record_accepted(2, device, contribution(device), at=73.0, counted_in=2)
    assert buffering.accepted_in(1) == ()
    counted = buffering.accepted_in(2)
    assert [(p.device, p.round, p.base) for p in counted] == [
        ("pi-0", 2, 1),
        ("pi-1", 1, 0),
        ("pi-1", 2, 1),
    ]
    assert counted[2].contribution == contribution("pi-1")


def test_without_a_word_an_update_counts_in_the_round_that_asked_for_it(store):
    store.open_round(a_round(1))
    store.record_assignment(1, ["pi-1"], train_until=640.0, at=40.0)
    store.record_accepted(1, "pi-1", contribution(), at=50.0)
    assert store.participant(1, "pi-1").counted_in == 1
    assert store.accepted_in(1) == store.participants(1)


def test_no_update_counts_in_a_round_that_is_closed_or_not_there(buffering):
    buffering.record_version(version(1, round_number=1))
    for counted_in in (1, None, 9):
        with pytest.raises(PeerError) as refused:
            buffering.record_accepted(1, "pi-1", contribution(), at=70.0, counted_in=counted_in)
        assert refused.value.reason is RejectReason.LATE
    assert buffering.participant(1, "pi-1").status is ParticipantStatus.ASKED


def test_what_was_counted_once_counts_nowhere_else(buffering):
    buffering.record_accepted(1, "pi-1", contribution("first"), at=50.0, counted_in=1)
    buffering.record_version(version(1, round_number=1))
    buffering.open_round(asynchronous(2, base=1))
    again = contribution("second")
    assert buffering.record_accepted(1, "pi-1", again, at=70.0, counted_in=2) is False
    assert buffering.accepted_in(2) == ()
    assert [p.contribution.update for p in buffering.accepted_in(1)] == [blob("first")]


@pytest.mark.parametrize("aggregated", [True, False])
def test_those_on_their_way_stay_so_when_their_round_closes(buffering, aggregated):
    buffering.record_offer(1, "pi-2", contribution(), at=45.0)
    if aggregated:
        buffering.record_version(version(1, round_number=1))
    else:
        buffering.abandon_round(1, "nothing came", at=60.0)
    assert [(p.device, p.status) for p in buffering.in_flight()] == [
        ("pi-1", ParticipantStatus.ASKED),
        ("pi-2", ParticipantStatus.OFFERED),
    ]


def test_only_who_is_awaited_is_in_flight(buffering):
    buffering.record_accepted(1, "pi-1", contribution(), at=50.0)
    buffering.record_version(version(1, round_number=1))
    buffering.open_round(a_round(2, base=1))
    buffering.record_assignment(2, ["pi-5"], train_until=640.0, at=40.0)
    assert [(p.round, p.device) for p in buffering.in_flight()] == [(1, "pi-2")]


def test_silence_is_for_those_who_have_not_answered(buffering):
    buffering.record_asked(1, "pi-3", base=0, until=640.0, at=40.0)
    buffering.record_accepted(1, "pi-1", contribution(), at=50.0)
    buffering.silence(1, ["pi-1", "pi-2", "stranger"], at=55.0)
    buffering.silence(1, [], at=56.0)
    assert {p.device: p.status.value for p in buffering.participants(1)} == {
        "pi-1": "accepted",
        "pi-2": "silent",
        "pi-3": "asked",
    }
    assert buffering.participant(1, "pi-2").decided_at == 55.0


def test_a_thousand_are_silenced_at_once(store):
    names = [f"pi-{n}" for n in range(1000)]
    store.open_round(asynchronous(1))
    store.record_assignment(1, names, train_until=640.0, at=1.0)
    assert store.participant(1, "pi-7").until == 640.0
    store.silence(1, iter(names), at=2.0)
    assert store.in_flight() == ()


# ---------------------------------------------------------------- what is on the broker


def test_what_is_on_the_broker_is_known_after_a_restart(tmp_path, database_url):
    large = describe(bytes(5000), 1024)
    with Store.open(tmp_path / "state", database_url, create=True) as store:
        assert store.retained() == {}
        store.note_retained([blob("weights"), large])
        store.note_retained([blob("weights")])
    with Store.open(tmp_path / "state", database_url) as store:
        assert store.retained() == {blob("weights").sha256: 1, large.sha256: 5}
        store.forget_retained([large.sha256, "0" * 64])
        assert store.retained() == {blob("weights").sha256: 1}


def test_a_blob_that_was_cut_into_more_chunks_before_is_cleared_in_full(store):
    data = bytes(5000)
    store.note_retained([describe(data, 1024)])
    store.note_retained([describe(data, 2048)])
    assert set(store.retained().values()) == {5}


def test_all_devices_are_offline_at_once(store):
    store.record_devices(
        [DeviceSighting("pi-1", at=1.0, online=True, boot=3), DeviceSighting("pi-2", at=2.0)]
    )
    store.set_all_offline()
    first, second = store.devices()
    assert (first.online, first.boot, first.last_seen_at) == (False, 3, 1.0)
    assert second.online is False


# ---------------------------------------------------------------- any order of calls

DEVICES = st.sampled_from(["a", "b", "c"])


class BufferModel(RuleBasedStateMachine):
    """Any order of asking, delivering and closing, against a dictionary of (round, device)."""

    def __init__(self, new_url):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.where = (Path(self.folder.name), new_url())
        self.store = Store.open(*self.where, create=True)
        self.store.record_plan(PLAN)
        self.store.record_version(version(0))
        self.newest = 0
        self.round = 0
        self.open = False
        self.asked: set[tuple[int, str]] = set()
        self.counted: dict[tuple[int, str], int] = {}
        self.silent: set[tuple[int, str]] = set()

    @precondition(lambda self: not self.open)
    @rule()
    def open_round(self):
        self.round += 1
        self.store.open_round(asynchronous(self.round, base=self.newest))
        self.open = True

    @precondition(lambda self: self.round)
    @rule(device=DEVICES)
    def ask(self, device):
        key = (self.round, device)
        try:
            fresh = self.store.record_asked(*key, base=self.newest, until=9.0, at=1.0)
        except StoreError:
            assert not self.open
            assert key not in self.asked
            return
        assert fresh is (key not in self.asked)
        self.asked.add(key)

    @precondition(lambda self: self.round)
    @rule(device=DEVICES, age=st.integers(0, 3))
    def deliver(self, device, age):
        key = (max(1, self.round - age), device)
        expected = None
        if key not in self.asked:
            expected = RejectReason.NOT_IN_COHORT
        elif key not in self.counted and not self.open:
            expected = RejectReason.LATE
        if expected is not None:
            with pytest.raises(PeerError) as refused:
                self._accept(key)
            assert refused.value.reason is expected
            return
        fresh = self._accept(key)
        assert fresh is (key not in self.counted)
        if fresh:
            self.counted[key] = self.round
            self.silent.discard(key)

    def _accept(self, key):
        return self.store.record_accepted(*key, contribution(), at=2.0, counted_in=self.round)

    @precondition(lambda self: self.round)
    @rule(devices=st.lists(DEVICES))
    def silence(self, devices):
        self.store.silence(self.round, devices, at=3.0)
        keys = {(self.round, device) for device in devices}
        self.silent |= (keys & self.asked) - self.counted.keys()

    @precondition(lambda self: self.open)
    @rule(aggregated=st.booleans())
    def close(self, aggregated):
        if aggregated:
            self.newest += 1
            self.store.record_version(version(self.newest, round_number=self.round))
        else:
            self.store.abandon_round(self.round, "superseded", at=3.0)
        self.open = False

    @rule()
    def restart(self):
        self.store.close()
        self.store = Store.open(*self.where)

    @invariant()
    def each_update_counts_in_one_round(self):
        found = {
            (p.round, p.device): number
            for number in range(1, self.round + 1)
            for p in self.store.accepted_in(number)
        }
        assert found == self.counted

    @invariant()
    def everybody_else_is_in_flight_or_silent(self):
        flying = {(p.round, p.device) for p in self.store.in_flight()}
        assert flying == self.asked - self.counted.keys() - self.silent

    def teardown(self):
        self.store.close()
        self.folder.cleanup()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_any_order_of_calls_keeps_the_promises(request, kind):
    check_any_order(BufferModel, request, kind)
