"""Word counts in the store: a device counts once, and only while one is under way."""

from __future__ import annotations

import contextlib

import pytest
from sqlalchemy import select

from fedge.coordinator.store import Store
from fedge.coordinator.store.tables import word_count_answers
from fedge.coordinator.word_estimates import WordReport
from fedge.schemas.errors import PeerError, RejectReason
from fedge.schemas.messages import WordCountAnswer

KEY = "0123456789abcdef" * 3


@pytest.fixture
def store(tmp_path, database_url):
    with Store.open(tmp_path / "state", database_url, create=True) as opened_store:
        yield opened_store


def request(store, *, epsilon=2.0):
    return store.request_word_count(
        epsilon=epsilon, least_typed=3, new_only=False, deadline_s=60.0, at=100.0
    )


def answer(campaign, bucket=3):
    return WordCountAnswer(campaign=campaign, key=KEY, bucket=bucket)


def refused(store, device, said):
    with pytest.raises(PeerError) as error:
        store.record_word_report(device, said, at=110.0)
    return error.value.reason


def test_word_counts_take_turns_and_begin_once(store):
    first, second = request(store), request(store, epsilon=4.0)
    assert first.campaign != second.campaign
    begun = store.open_word_count(at=101.0)
    assert (begun.number, begun.opened_at, begun.until) == (1, 101.0, 161.0)
    assert store.open_word_count(at=150.0) == begun
    assert store.close_word_count(1, "the deadline came", at=161.0)
    assert not store.close_word_count(1, "again", at=162.0)
    assert store.open_word_count(at=162.0).number == 2
    store.close_word_count(2, "stopped", at=163.0)
    assert store.open_word_count(at=164.0) is None
    assert [(one.number, one.reason) for one, _ in store.word_counts()] == [
        (1, "the deadline came"),
        (2, "stopped"),
    ]


def test_a_device_counts_once_and_what_it_said_first_stays(store):
    campaign = request(store).campaign
    store.open_word_count(at=101.0)
    assert store.record_word_report("pi-1", answer(campaign, 3), at=110.0) is True
    assert store.record_word_report("pi-1", answer(campaign, 5), at=111.0) is False
    assert store.record_word_report("pi-2", answer(campaign, 7), at=112.0) is True
    assert set(store.word_reports(1)) == {WordReport(KEY, 3), WordReport(KEY, 7)}
    assert [devices for _, devices in store.word_counts()] == [2]


def test_what_comes_late_or_has_no_such_bucket_does_not_count(store):
    campaign = request(store).campaign
    store.open_word_count(at=101.0)
    assert refused(store, "pi-1", answer("f" * 32)) is RejectReason.LATE
    assert refused(store, "pi-1", answer(campaign, 8)) is RejectReason.INVALID_FIELD
    store.close_word_count(1, "stopped", at=120.0)
    assert refused(store, "pi-1", answer(campaign)) is RejectReason.LATE
    assert store.word_reports(1) == ()


def test_it_is_there_after_a_restart(store, tmp_path, database_url):
    campaign = request(store).campaign
    store.open_word_count(at=101.0)
    store.record_word_report("pi-1", answer(campaign), at=110.0)
    with Store.open(tmp_path / "state", database_url) as again:
        assert again.open_word_count(at=115.0).campaign == campaign
        assert again.word_reports(1) == (WordReport(KEY, 3),)


def test_one_that_a_command_stops_while_it_is_opened_is_not_opened(store, monkeypatch):
    first = request(store)
    database, write = store.database, store.database.write

    @contextlib.contextmanager
    def stopped_before():
        monkeypatch.setattr(database, "write", write)
        store.close_word_count(first.number, "stopped by a command", at=101.0)
        with write() as connection:
            yield connection

    monkeypatch.setattr(database, "write", stopped_before)
    assert store.open_word_count(at=102.0) is None
    [(kept, _)] = store.word_counts()
    assert (kept.opened_at, kept.closed_at) == (None, 101.0)

    second = request(store)
    third = request(store)
    first = second
    monkeypatch.setattr(database, "write", stopped_before)
    # The next one is begun instead.
    assert store.open_word_count(at=103.0).number == third.number


def test_who_told_what_is_forgotten_at_the_end(store):
    campaign = request(store).campaign
    store.open_word_count(at=101.0)
    names = {f"pi-{number}" for number in range(20)}
    for number, name in enumerate(sorted(names)):
        store.record_word_report(name, answer(campaign, number % 8), at=110.0 + number)
    told = sorted(store.word_reports(1), key=lambda one: one.bucket)
    assert len(told) == 20

    def rows():
        with store.database.read() as connection:
            return connection.execute(select(word_count_answers)).all()

    assert {row.device for row in rows()} == names
    store.close_word_count(1, "the deadline came", at=200.0)
    assert sorted(store.word_reports(1), key=lambda one: one.bucket) == told
    assert len({row.device for row in rows()} - names) == 20
    assert {row.at for row in rows()} == {200.0}
    assert [devices for _, devices in store.word_counts()] == [20]
