"""Retention: what the operator wants kept no longer goes, and nothing else does."""

from __future__ import annotations

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from fedge.coordinator.export import export_model, rolled_back
from fedge.coordinator.rollouts import Phase
from fedge.coordinator.settings import RolloutSettings
from fedge.coordinator.store import (
    Collected,
    DeviceSighting,
    Refusal,
    Retention,
    Store,
)
from fedge.coordinator.store.blobs import FRESH_PUTS
from fedge.schemas.errors import ConfigError, RejectReason, StoreError
from fedge.schemas.messages import TrialOutcome, TrialReport, WordCountAnswer
from tests.coordinator.states import PARTS, closed_round, make_old, put, put_plan, put_version
from tests.coordinator.test_store import a_round, contribution
from tests.coordinator.test_store_async import asynchronous

ALL = Retention()
DAY_S = 86400.0


@pytest.fixture
def where(tmp_path, database_url):
    return tmp_path / "state", database_url


@pytest.fixture
def filled(where):
    """Versions 0 to 5 of rounds 1 to 5, as a coordinator finds them that starts again."""
    with Store.open(*where, create=True) as store:
        plan = put_plan(store)
        put_version(store, plan, 0)
        for number in range(1, 6):
            closed_round(store, plan, number)
    with Store.open(*where, serve=True) as store:
        yield store


def texts(store):
    return {store.blobs.read(digest)[:20].strip() for digest in store.blobs.digests()}


def test_without_a_wish_nothing_is_deleted(filled):
    make_old(filled)
    before = set(filled.blobs.digests())
    assert filled.collect(ALL, now=time.time()) == Collected()
    assert set(filled.blobs.digests()) == before
    assert all(v.files_kept for v in filled.versions())


def test_the_newest_versions_keep_their_files_and_all_keep_their_rows(filled):
    wish = Retention(versions=2)
    expected = filled.collectable(wish, now=time.time())
    collected = filled.collect(wish, now=time.time())
    assert collected == expected
    assert (collected.versions, collected.blobs) == (4, 12)
    assert collected.bytes_freed == sum(
        1000 + len(f"golden {n}") + len(f"server state {n}") for n in range(4)
    )
    assert [v.files_kept for v in filled.versions()] == [False] * 4 + [True] * 2
    left = texts(filled)
    assert {b"weights 4", b"weights 5", b"golden 5", b"server state 5"} <= left
    assert {part.encode() for part in PARTS} <= left
    assert not {b"weights 3", b"golden 3", b"server state 3"} & left
    assert filled.collect(wish, now=time.time()) == Collected()


def test_fewer_versions_than_wanted_are_all_kept(filled):
    assert filled.collect(Retention(versions=6), now=time.time()) == Collected()
    assert filled.collect(Retention(versions=99), now=time.time()) == Collected()


def test_a_file_that_a_kept_version_shares_stays(filled):
    filled.record_version(rolled_back(filled.newest_version(), filled.version(1), 200.0), copy_of=1)
    assert filled.collect(Retention(versions=2), now=time.time()).versions == 5
    assert filled.version(1).files_kept is False
    assert {b"weights 1", b"golden 1"} <= texts(filled)


def test_a_version_without_files_is_neither_exported_nor_gone_back_to(filled):
    filled.collect(Retention(versions=2), now=time.time())
    old, newest = filled.version(1), filled.newest_version()
    with pytest.raises(ConfigError, match="version 1 is known, but its files were deleted"):
        export_model(filled, old)
    with pytest.raises(ConfigError, match="version 1 is known, but its files were deleted"):
        rolled_back(newest, old, 200.0)


def test_files_that_go_while_somebody_decides_to_go_back_are_not_promised(filled):
    back = rolled_back(filled.newest_version(), filled.version(1), 200.0)
    filled.collect(Retention(versions=2), now=time.time())
    with pytest.raises(StoreError, match="files of version 1 were deleted"):
        filled.record_version(back, copy_of=1)
    assert filled.newest_version().number == 5


def test_what_a_crash_left_goes_when_it_is_old(filled):
    put_long_ago = put(filled, b"a version that was never recorded")
    # So many others were put since that it is not what was put last.
    for number in range(FRESH_PUTS):
        put(filled, f"filler {number}".encode())
    make_old(filled)
    young = put(filled, b"a version that is about to be recorded")
    now = time.time()
    assert filled.collectable(ALL, now=now).blobs == 1 + FRESH_PUTS
    collected = filled.collect(ALL, now=now)
    assert not filled.blobs.has(put_long_ago.sha256)
    assert filled.blobs.has(young.sha256)
    assert collected.versions == 0
    assert collected.blobs >= 1
    # Looked for as seldom as it can be old.
    make_old(filled)
    assert filled.collect(ALL, now=now + 60).blobs == 0


def test_what_was_just_put_is_not_deleted_for_an_old_version_with_the_same_bytes(filled):
    again = put(filled, filled.blobs.read(filled.version(0).weights.sha256))
    filled.collect(Retention(versions=2), now=time.time())
    assert filled.version(0).files_kept is False
    assert filled.blobs.has(again.sha256)


def test_without_its_plan_no_file_is_taken_for_a_leftover(filled):
    put(filled, b"a leftover, perhaps")
    make_old(filled)
    filled.blobs.delete(filled.newest_version().plan_sha256)
    before = set(filled.blobs.digests())
    assert filled.collect(ALL, now=time.time()).blobs == 0
    assert set(filled.blobs.digests()) == before


def test_nothing_goes_while_a_backup_is_made(filled, where):
    wish = Retention(versions=2, rounds=1)
    with Store.open(*where) as other, other._database.backing_up():
        collected = filled.collect(wish, now=time.time())
        assert (collected.postponed, collected.versions, collected.blobs) == (True, 0, 0)
        assert all(v.files_kept for v in filled.versions())
    assert filled.collect(wish, now=time.time()).versions == 4


def test_a_backup_waits_until_nobody_deletes(filled, where):
    deleting, done = threading.Event(), threading.Event()
    order = []

    def back_up():
        with Store.open(*where) as other:
            deleting.wait()
            with other._database.backing_up():
                order.append("backup")

    with ThreadPoolExecutor(1) as pool:
        backup = pool.submit(back_up)
        with filled._database.collecting() as free:
            assert free
            deleting.set()
            done.wait(0.2)
            order.append("deleted")
        backup.result()
    assert order == ["deleted", "backup"]


# ---------------------------------------------------------------- rounds and devices


def test_older_rounds_keep_their_row_and_lose_their_details(filled):
    filled.count_refusals(
        [
            Refusal(RejectReason.LATE, "", at=1.0, round=number, device="pi-1")
            for number in (None, 1, 5)
        ]
    )
    assert filled.collect(Retention(rounds=2), now=time.time()).rounds == 3
    assert [r.details_kept for r in filled.rounds()] == [False] * 3 + [True] * 2
    assert [r.version for r in filled.rounds()] == [1, 2, 3, 4, 5]
    assert [len(filled.participants(n)) for n in range(1, 6)] == [0, 0, 0, 3, 3]
    assert sorted(r.round or 0 for r in filled.refusals()) == [0, 5]
    assert filled.collect(Retention(rounds=2), now=time.time()).rounds == 0


def test_a_round_whose_work_still_counts_keeps_its_details(filled):
    for number in (6, 7, 8):
        filled.open_round(asynchronous(number, base=5))
        filled.record_asked(number, "pi-1", base=5, until=900.0, at=1.0)
        if number < 8:
            filled.abandon_round(number, "", at=2.0)
    # Of round 6 somebody is on the way; of round 7 the update waits in the buffer that is open.
    filled.record_accepted(7, "pi-1", contribution(), at=3.0, counted_in=8)
    assert filled.collect(Retention(rounds=1), now=time.time()).rounds == 5
    assert [r.number for r in filled.rounds() if r.details_kept] == [6, 7, 8]
    filled.silence(6, ["pi-1"], at=4.0)
    filled.abandon_round(8, "", at=5.0)
    filled.open_round(a_round(9, base=5))
    assert filled.collect(Retention(rounds=1), now=time.time()).rounds == 2
    assert [r.number for r in filled.rounds() if r.details_kept] == [8, 9]


def test_devices_that_were_not_seen_for_long_are_forgotten(filled):
    now = 100 * DAY_S
    filled.record_devices(
        [
            DeviceSighting("long-gone", at=now - 31 * DAY_S),
            DeviceSighting("still-here", at=now - 31 * DAY_S, online=True),
            DeviceSighting("lately", at=now - 29 * DAY_S),
        ]
    )
    wish = Retention(devices_unseen_days=30)
    assert filled.collectable(wish, now=now).devices == 1
    assert filled.collect(wish, now=now).devices == 1
    assert [d.name for d in filled.devices()] == ["lately", "still-here"]


def tried(store, version, *, ended=Phase.ABORTED):
    """A rollout of a version, tried by one device; `ended` None: it is open."""
    made = store.start_rollout(version, RolloutSettings().terms(straight=True), at=1.0)
    report = TrialReport(rollout=made.number, version=version, outcome=TrialOutcome.ACTIVE)
    store.count_trial("pi-1", report, at=2.0)
    if ended is not None:
        store.keep_rollout(dataclasses.replace(made, phase=ended, reason="why", ended_at=3.0))
    return made.number


def test_the_newest_rollouts_are_kept_and_what_the_next_ones_depend_on(filled):
    filled.serve_in_stages()
    done = tried(filled, 2, ended=Phase.DONE)
    highest = [tried(filled, 4) for _ in range(3)][-1]
    older = [tried(filled, number) for number in (1, 3, 1, 3)]
    is_open = tried(filled, 3, ended=None)
    assert filled.collect(ALL, now=time.time()) == Collected()
    wish = Retention(rollouts=2)
    assert filled.collectable(wish, now=time.time()) == Collected(rollouts=4)
    assert filled.collect(wish, now=time.time()) == Collected(rollouts=4)
    # The one of the stable version and the last of the highest that was tried, which would else be
    # tried by itself again.
    assert [one.number for one in filled.rollouts()] == [done, highest, *older[2:], is_open]
    assert filled.newest_tried() == 4
    assert filled.stable_version() == 2
    assert [len(filled.trials(number)) for number in (done, older[0], older[3])] == [1, 0, 1]
    assert filled.collect(wish, now=time.time()) == Collected()
    filled.keep_rollout(
        dataclasses.replace(filled.newest_rollout(), phase=Phase.ABORTED, ended_at=4.0)
    )
    assert filled.collect(Retention(rollouts=1), now=time.time()).rollouts == 2
    assert tried(filled, 1) == is_open + 1


def test_the_newest_word_counts_are_kept_and_open_ones(filled):
    def ask():
        return filled.request_word_count(
            epsilon=4.0, least_typed=3, new_only=False, deadline_s=60.0, at=1.0
        )

    for number in range(1, 6):
        ask()
        record = filled.open_word_count(at=2.0)
        said = WordCountAnswer(campaign=record.campaign, key="0" * 48, bucket=number)
        filled.record_word_report("pi-1", said, at=3.0)
        if number < 5:
            filled.close_word_count(number, "over", at=4.0)
    assert filled.collect(ALL, now=time.time()) == Collected()
    wish = Retention(word_counts=1)
    assert filled.collectable(wish, now=time.time()) == Collected(word_counts=3)
    assert filled.collect(wish, now=time.time()) == Collected(word_counts=3)
    assert [(one.number, devices) for one, devices in filled.word_counts()] == [(4, 1), (5, 1)]
    assert filled.word_reports(3) == ()
    assert [one.bucket for one in filled.word_reports(4)] == [4]
    assert filled.collect(wish, now=time.time()) == Collected()
    assert ask().number == 6
