"""Rollouts in the store: on both databases, beside commands, backups and retention."""

from __future__ import annotations

import dataclasses
import time

import pytest

from fedge.coordinator.backup import make_backup
from fedge.coordinator.checkup import check
from fedge.coordinator.old_state import Place
from fedge.coordinator.restore import restore_backup
from fedge.coordinator.rollout_fleet import KnownDevice
from fedge.coordinator.rollouts import Phase, Wish
from fedge.coordinator.settings import RolloutSettings
from fedge.coordinator.store import Retention, Store
from fedge.schemas.errors import ConfigError, StoreError
from fedge.schemas.messages import TrialOutcome, TrialReason, TrialReport
from tests.coordinator.states import put_plan, put_version

TERMS = RolloutSettings().terms()
STRAIGHT = RolloutSettings(soak_s=7.0).terms(straight=True)


@pytest.fixture
def where(tmp_path, database_url):
    return tmp_path / "state", database_url


@pytest.fixture
def store(where):
    with Store.open(*where, create=True, serve=True) as opened:
        opened.bind_population("kitchen")
        plan = put_plan(opened)
        for number in range(4):
            put_version(opened, plan, number)
        yield opened


def passed(rollout: int = 1, version: int = 3) -> TrialReport:
    return TrialReport(
        rollout=rollout,
        version=version,
        outcome=TrialOutcome.ACTIVE,
        detail="hold-out: fine",
        latency_ms=0.5,
        loss_ratio=0.75,
        hold_out=40,
    )


def failed(rollout: int = 1, version: int = 3) -> TrialReport:
    return passed(rollout, version).model_copy(
        update={"outcome": TrialOutcome.ROLLED_BACK, "reason": TrialReason.HOLD_OUT}
    )


def test_the_version_of_the_change_of_mode_is_stable(store) -> None:
    assert store.stable_version() is None
    assert store.serve_in_stages() == 3
    put_version(store, store.plan(store.version(0).plan_sha256), 4)
    # Also after a restart: what is newest then is not what devices use.
    assert store.serve_in_stages() == 3
    assert store.newest_tried() == 3


def test_a_rollout_comes_back_as_it_was_kept(store) -> None:
    store.serve_in_stages()
    made = store.start_rollout(1, STRAIGHT, at=5.0)
    assert store.newest_rollout() == made == store.rollout(1)
    assert (made.stable, made.terms.stages, made.terms.policy.soak_s) == (3, (1.0,), 7.0)
    further = dataclasses.replace(made, stage=0, share=0.123, reached=4, soaked_s=3.5)
    store.keep_rollout(further)
    assert store.rollouts() == (further,)
    assert store.rollout(2) is None


def test_when_it_is_done_its_version_is_stable_in_the_same_breath(store) -> None:
    store.serve_in_stages()
    made = store.start_rollout(1, TERMS, at=5.0)
    store.keep_rollout(dataclasses.replace(made, phase=Phase.DONE, ended_at=9.0))
    assert store.stable_version() == 1
    with pytest.raises(StoreError, match="rollout 1 is not open"):
        store.keep_rollout(made)
    assert store.start_rollout(2, TERMS, at=10.0).number == 2


@pytest.mark.parametrize(
    ("version", "says"), [(3, "serves already"), (77, "no version 77"), (0, "files of version 0")]
)
def test_what_cannot_be_rolled_out_is_said(store, version, says) -> None:
    store.serve_in_stages()
    store.collect(Retention(versions=2), now=time.time())
    with pytest.raises(ConfigError, match=says):
        store.start_rollout(version, TERMS, at=5.0)


def test_one_rollout_at_a_time_and_none_while_each_newest_one_serves(store) -> None:
    with pytest.raises(ConfigError, match=r"set \[rollout\] mode"):
        store.start_rollout(1, TERMS, at=5.0)
    store.serve_in_stages()
    store.start_rollout(1, TERMS, at=5.0)
    with pytest.raises(ConfigError, match="rollout 1 is under way"):
        store.start_rollout(2, TERMS, at=6.0)


def test_a_wish_and_what_the_coordinator_keeps_do_not_overwrite_one_another(store) -> None:
    store.serve_in_stages()
    with pytest.raises(ConfigError, match="no rollout is under way"):
        store.wish_of_rollout(Wish.PAUSE)
    made = store.start_rollout(1, TERMS, at=5.0)
    store.wish_of_rollout(Wish.ABORT, "second thoughts")
    done = dataclasses.replace(made, phase=Phase.DONE, share=1.0, ended_at=9.0)
    assert not store.keep_rollout(done)
    asked = store.newest_rollout()
    assert asked == dataclasses.replace(made, wish=Wish.ABORT, reason="second thoughts")
    assert store.stable_version() == 3
    for wish in (Wish.PAUSE, Wish.RUN):
        with pytest.raises(ConfigError, match="rollout 1 is to be aborted already"):
            store.wish_of_rollout(wish)
    assert store.newest_rollout() == asked
    assert store.keep_rollout(dataclasses.replace(asked, phase=Phase.ABORTED, ended_at=9.0))
    assert store.newest_rollout().reason == "second thoughts"


def test_a_reason_does_not_outlive_its_wish(store) -> None:
    store.serve_in_stages()
    made = store.start_rollout(1, TERMS, at=5.0)
    # As an earlier release could leave it: aborted, then resumed before it was carried out.
    store.keep_rollout(dataclasses.replace(made, reason="aborted by the operator"))
    store.wish_of_rollout(Wish.PAUSE)
    assert store.newest_rollout().reason == ""
    store.wish_of_rollout(Wish.RUN)
    now = store.newest_rollout()
    assert store.keep_rollout(dataclasses.replace(now, phase=Phase.DONE, ended_at=9.0))
    assert (store.newest_rollout().phase, store.newest_rollout().reason) == (Phase.DONE, "")


def test_a_device_is_counted_once_in_a_rollout(store) -> None:
    store.serve_in_stages()
    store.start_rollout(1, TERMS, at=5.0)
    assert store.count_trial("pi-1", failed(version=1), at=6.0)
    assert not store.count_trial("pi-1", passed(version=1), at=7.0)
    assert store.count_trial("pi-2", passed(version=1), at=8.0)
    assert store.trial_counts(1) == {TrialOutcome.ACTIVE: 1, TrialOutcome.ROLLED_BACK: 1}
    first, second = store.trials(1)
    assert (first.device, first.reason, first.at) == ("pi-1", TrialReason.HOLD_OUT, 6.0)
    assert (second.loss_ratio, second.latency_ms, second.hold_out) == (0.75, 0.5, 40)
    with pytest.raises(StoreError):
        store.count_trial("pi-1", passed(rollout=9), at=9.0)


def test_retention_leaves_the_files_that_devices_fetch_or_go_back_to(store) -> None:
    store.serve_in_stages()
    store.start_rollout(1, TERMS, at=5.0)
    plan = store.plan(store.version(0).plan_sha256)
    for number in range(4, 9):
        put_version(store, plan, number)
    wish = Retention(versions=2)
    expected = store.collectable(wish, now=time.time())
    assert store.collect(wish, now=time.time()).versions == expected.versions == 5
    kept = [v.number for v in store.versions() if v.files_kept]
    # 1 is rolled out, 3 is stable, 7 and 8 are the newest.
    assert kept == [1, 3, 7, 8]
    for number in kept:
        store.blobs.verify(store.version(number).weights.sha256)
    rollout = store.newest_rollout()
    store.keep_rollout(dataclasses.replace(rollout, phase=Phase.HALTED, reason="r", ended_at=9.0))
    store.collect(wish, now=time.time())
    assert [v.number for v in store.versions() if v.files_kept] == [3, 7, 8]


def test_the_mode_every_ends_what_is_open_and_says_why(store) -> None:
    store.serve_in_stages()
    store.start_rollout(1, TERMS, at=5.0)
    assert store.serve_the_newest("no stages any more", at=9.0)
    assert not store.serve_the_newest("no stages any more", at=10.0)
    ended = store.newest_rollout()
    assert (ended.phase, ended.reason, ended.ended_at) == (
        *(Phase.ABORTED, "no stages any more", 9.0),
    )
    assert store.stable_version() is None


def test_devices_are_known_by_their_birth_however_long_ago(store) -> None:
    from fedge.coordinator.store import DeviceSighting  # noqa: PLC0415 -- for this test

    store.record_devices(
        [
            DeviceSighting("away", 100.0, boot=3, online=False),
            DeviceSighting("here", 900.0, boot=1, online=True),
            DeviceSighting("invented", 900.0, online=True),
        ]
    )
    assert sorted(store.born_devices(), key=lambda one: one.name) == [
        KnownDevice("away", online=False, last_seen_at=100.0),
        KnownDevice("here", online=True, last_seen_at=900.0),
    ]
    assert [store.is_born(name) for name in ("away", "invented", "nobody")] == [True, False, False]


def test_a_backup_has_the_rollouts_and_a_restored_state_begins_none_twice(
    store, where, tmp_path
) -> None:
    store.serve_in_stages()
    store.start_rollout(1, TERMS, at=5.0)
    store.count_trial("pi-1", passed(version=1), at=6.0)
    state_dir, _ = where
    make_backup(store, state_dir, tmp_path / "b", now=time.time(), progress=lambda *_: None)
    place = Place(tmp_path / "restored")
    restore_backup(
        tmp_path / "b",
        place,
        population="kitchen",
        replace=False,
        gap=10,
        now=50.0,
        progress=lambda *_: None,
    )
    with Store.open(place.state_dir) as restored:
        [ended] = restored.rollouts()
        assert (ended.phase, ended.number) == (Phase.ABORTED, 1)
        assert "restored" in ended.reason
        assert [one.device for one in restored.trials(1)] == ["pi-1"]
        assert restored.stable_version() == 3
        # Devices may have seen rollouts since the backup: their numbers are not used again.
        assert restored.start_rollout(1, TERMS, at=60.0).number == 12


def test_the_check_finds_what_breaks_a_promise(store, where) -> None:
    from sqlalchemy import update  # noqa: PLC0415 -- for this test

    from fedge.coordinator.store.tables import rollouts, versions  # noqa: PLC0415 -- as above

    store.serve_in_stages()
    store.start_rollout(1, TERMS, at=5.0)

    def problems() -> list[str]:
        found = check(store, where[0], Retention(), now=time.time(), progress=lambda *_: None)
        return [one.what for one in found.problems if "free on the disk" not in one.what]

    assert problems() == []
    with store.database.write() as connection:
        connection.execute(update(versions).where(versions.c.number == 1).values(files_kept=False))
    assert problems() == ["version 1 is served or rolled out, and its files were deleted"]
    with store.database.write() as connection:
        connection.execute(update(rollouts).values(phase="halted", ended_at=6.0))
    assert problems() == ["rollout 1 was stopped without a reason"]
