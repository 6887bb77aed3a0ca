"""Backups: made beside writers, verified, restored to either database; and the check of it all."""

from __future__ import annotations

import dataclasses
import errno
import io
import itertools
import json
import os
import shutil
import sqlite3
import stat
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner

from fedge.coordinator.backup import make_backup, verify_backup
from fedge.coordinator.checkup import check
from fedge.coordinator.cli import cli
from fedge.coordinator.old_state import Place
from fedge.coordinator.restore import restore_backup
from fedge.coordinator.store import (
    DeviceSighting,
    Outcome,
    ParticipantStatus,
    Retention,
    Store,
)
from fedge.schemas.errors import ConfigError, FedgeError, StoreError, StoreUnavailable
from fedge.schemas.ids import sha256
from tests.coordinator.states import accepted_file, closed_round, put, put_plan, put_version
from tests.coordinator.test_store import a_round
from tests.coordinator.test_store_async import asynchronous

UPDATE = b"an accepted update of an open round"
MADE_AT = 1_700_000_000.0
_PLACES = itertools.count()


def quiet(_done: int, _files: int) -> None:
    """No progress is shown."""


@pytest.fixture
def place(tmp_path, database_url):
    return Place(tmp_path / "state", None if database_url.startswith("sqlite") else database_url)


@pytest.fixture
def other_place(request, tmp_path):
    """An empty place of the kind that `place` is not."""
    if request.getfixturevalue("place").database is None:
        return Place(tmp_path / "restored", request.getfixturevalue("postgres").new_database())
    return Place(tmp_path / "restored")


def opened(place, **how):
    return Store.open(place.state_dir, place.database, blobs=place.blobs, **how)


def fill(place):
    """Versions 0 to 2, and round 3 open with one accepted update and its file."""
    store = opened(place, create=True, serve=True)
    store.bind_population("kitchen")
    plan = put_plan(store)
    put_version(store, plan, 0)
    closed_round(store, plan, 1)
    closed_round(store, plan, 2)
    store.record_metrics(2, {"loss": 0.25})
    store.open_round(a_round(3, base=2))
    store.record_assignment(3, ["pi-1", "pi-2"], train_until=640.0, at=40.0)
    accepted_file(place.state_dir, store, 3, "pi-1", UPDATE)
    store.record_devices([DeviceSighting("pi-1", at=1.0, online=True, boot=2)])
    return store


def back_up(place, target, **how):
    with opened(place) as store:
        return make_backup(
            store, place.state_dir, target, now=MADE_AT, progress=how.get("progress", quiet)
        )


def restore(backup, place, **how):
    wished = {"population": "kitchen", "replace": False, "gap": 1000, "now": MADE_AT + 5} | how
    return restore_backup(backup, place, progress=quiet, **wished)


def problems(place):
    with opened(place) as store:
        return check(store, place.state_dir, Retention(), now=time.time(), progress=quiet).problems


def everything(store):
    """All rows that a restore leaves as they were."""
    return (
        store.population(),
        [v for v in store.versions() if v.number < 1000],
        [r for r in store.rounds() if r.outcome is not None and r.number < 3],
        [store.participants(n) for n in (1, 2)],
        [(d.name, d.boot) for d in store.devices()],
    )


# ---------------------------------------------------------------- backup


def test_a_backup_holds_everything_that_its_database_names(place, tmp_path):
    with fill(place) as store:
        manifest = back_up(place, tmp_path / "backup")
        assert set(manifest.blobs) == set(store.named_blobs())
    assert (manifest.population, manifest.newest_version, manifest.newest_round) == (
        "kitchen",
        2,
        3,
    )
    backup = tmp_path / "backup"
    assert {path.name for path in backup.iterdir()} == {
        *("backup.json", "fedge.sqlite", "blobs", "uploads")
    }
    assert {path.name for path in (backup / "blobs").iterdir()} == set(manifest.blobs)
    assert (backup / "uploads" / "3" / "pi-1" / sha256(UPDATE)).read_bytes() == UPDATE
    assert manifest.updates == (f"3/pi-1/{sha256(UPDATE)}",)
    assert verify_backup(backup, progress=quiet) == manifest
    assert stat.S_IMODE(backup.stat().st_mode) == 0o700
    assert not list(tmp_path.glob(".backup*"))


def test_a_backup_is_made_while_versions_are_made_and_collected(place, tmp_path):
    with fill(place) as store:
        plan, collected = store.plan(store.version(0).plan_sha256), []

        def go_on(done, _files):
            # Between two files of the backup the coordinator goes on as it does without one.
            closed_round(store, plan, 3 + done)
            collected.append(store.collect(Retention(versions=2, rounds=1), now=time.time()))

        store.abandon_round(3, "superseded", at=70.0)
        manifest = back_up(place, tmp_path / "backup", progress=go_on)
        assert (manifest.newest_version, manifest.newest_round) == (2, 3)
        assert store.newest_version().number == 3 + len(manifest.blobs)
        assert all(each.postponed and not each.blobs for each in collected)
        assert store.collect(Retention(versions=2), now=time.time()).versions > 10
    there = Place(tmp_path / "restored")
    restore(tmp_path / "backup", there)
    assert problems(there) == ()
    with opened(there) as store:
        assert [v.number for v in store.versions() if v.files_kept] == [0, 1, 2, 1002]


@pytest.mark.e2e
def test_a_backup_is_one_moment_however_busy_the_coordinator_is(place, tmp_path):
    with fill(place) as store:
        store.abandon_round(3, "superseded", at=70.0)
        plan, stop = store.plan(store.version(0).plan_sha256), threading.Event()

        def go_on():
            for number in itertools.count(4):
                if stop.is_set():
                    return
                closed_round(store, plan, number)

        with ThreadPoolExecutor(1) as pool:
            coordinator = pool.submit(go_on)
            try:
                manifests = [back_up(place, tmp_path / f"backup {n}") for n in range(3)]
            finally:
                stop.set()
            coordinator.result()
        assert store.newest_version().number > manifests[-1].newest_version
    for n, manifest in enumerate(manifests):
        there = Place(tmp_path / f"restored {n}")
        assert restore(tmp_path / f"backup {n}", there).manifest == manifest
        assert problems(there) == ()


def test_a_database_larger_than_the_memory_is_verified_in_pieces(tmp_path):
    place = Place(tmp_path / "state")
    with fill(place):
        back_up(place, tmp_path / "backup")
    size_bytes = 64 * 1024 * 1024
    os.truncate(tmp_path / "backup" / "fedge.sqlite", size_bytes)
    tracemalloc.start()
    try:
        with pytest.raises(StoreError, match="not what was written"):
            verify_backup(tmp_path / "backup", progress=quiet)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < size_bytes / 10


@pytest.mark.parametrize("part", ["fedge.sqlite", "blobs"])
def test_a_backup_that_cannot_be_read_now_is_not_said_to_be_damaged(tmp_path, part):
    place = Place(tmp_path / "state")
    with fill(place):
        back_up(place, tmp_path / "backup")
    hidden = tmp_path / "backup" / part
    if hidden.is_dir():
        hidden = next(hidden.iterdir())
    real, at_first = io.open, hidden.read_bytes()
    assert at_first

    def refuse(path, *arguments, **options):
        if Path(path) == hidden:
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "open", refuse)
        with pytest.raises(StoreUnavailable, match="Input/output error"):
            verify_backup(tmp_path / "backup", progress=quiet)
    verify_backup(tmp_path / "backup", progress=quiet)


def test_a_backup_is_not_made_over_another(place, tmp_path):
    with fill(place):
        back_up(place, tmp_path / "backup")
        with pytest.raises(ConfigError, match="there already"):
            back_up(place, tmp_path / "backup")


def test_a_damaged_state_gives_no_backup(place, tmp_path):
    with fill(place) as store:
        store.blobs.path(store.version(1).weights.sha256).write_bytes(b"damaged")
        with pytest.raises(StoreError, match="another digest"):
            back_up(place, tmp_path / "backup")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state"]


def test_an_update_whose_round_has_closed_meanwhile_is_not_missed(place, tmp_path):
    with fill(place) as store:
        shutil.rmtree(place.state_dir / "uploads")
        manifest = back_up(place, tmp_path / "backup")
        assert (manifest.updates, manifest.updates_gone) == ((), 1)
        assert store.accepted_in(3)


def test_an_empty_state_gives_no_backup(place, tmp_path):
    opened(place, create=True).close()
    with pytest.raises(ConfigError, match="nothing to back up"):
        back_up(place, tmp_path / "backup")


def test_a_backup_on_a_full_disk_leaves_nothing(place, tmp_path, monkeypatch):
    with fill(place):
        written = itertools.count()
        real = os.replace

        def full(self, target):
            if next(written) == 4:
                raise OSError(28, "No space left on device")
            real(self, target)
            return Path(target)

        monkeypatch.setattr(Path, "replace", full)
        with pytest.raises(StoreUnavailable, match="No space left"):
            back_up(place, tmp_path / "backup")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state"]


@pytest.mark.parametrize("part", ["backup.json", "fedge.sqlite", "blobs", "uploads"])
def test_a_damaged_backup_is_refused_before_anything_is_touched(tmp_path, part):
    place, there = Place(tmp_path / "state"), Place(tmp_path / "restored")
    with fill(place):
        back_up(place, tmp_path / "backup")
    damaged = tmp_path / "backup" / part
    if damaged.is_dir():
        damaged = next(path for path in sorted(damaged.rglob("*")) if path.is_file())
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(FedgeError, match=r"damaged|not what was written"):
        restore(tmp_path / "backup", there)
    assert not there.state_dir.exists()
    damaged.unlink()
    with pytest.raises(FedgeError):
        restore(tmp_path / "backup", there)
    assert not there.state_dir.exists()


# ---------------------------------------------------------------- restore


def test_a_backup_is_restored_to_either_database(place, other_place, tmp_path):
    with fill(place) as store:
        back_up(place, tmp_path / "backup")
        before = everything(store)
    restored = restore(tmp_path / "backup", other_place)
    assert (restored.version, restored.round, restored.replaced) == (1002, 1003, None)
    with opened(other_place, serve=True) as store:
        assert everything(store) == before
        newest = store.newest_version()
        assert newest.weights == store.version(2).weights
        assert (newest.number, newest.base, newest.round) == (1002, 2, None)
        assert newest.metrics == {"loss": 0.25}
        assert newest.note == "restored from the backup of 2023-11-14 22:13:20Z"
        assert not any(d.online for d in store.devices())
    assert problems(other_place) == ()


def test_after_a_restore_numbers_go_on_above_the_gap(place, other_place, tmp_path):
    with fill(place):
        back_up(place, tmp_path / "backup")
    restore(tmp_path / "backup", other_place, gap=50)
    with opened(other_place, serve=True) as store:
        assert (store.newest_version().number, store.newest_round().number) == (52, 53)
        assert store.open_rounds() == ()
        plan = store.plan(store.newest_version().plan_sha256)
        closed_round(store, plan, 54)
        assert store.newest_version().number == 54


def test_what_was_open_is_abandoned_with_the_reason(place, other_place, tmp_path):
    with fill(place) as store:
        store.open_round(asynchronous(4, base=2))
        store.record_asked(4, "pi-7", base=2, until=900.0, at=1.0)
        back_up(place, tmp_path / "backup")
    restored = restore(tmp_path / "backup", other_place)
    assert restored.abandoned == (3, 4)
    with opened(other_place) as store:
        for number in (3, 4):
            record = store.round_report(number).round
            assert record.outcome is Outcome.ABANDONED
            assert record.reason == "restored from the backup of 2023-11-14 22:13:20Z"
        assert [p.device for p in store.accepted_in(3)] == ["pi-1"]
        assert store.participant(3, "pi-2").status is ParticipantStatus.SILENT
        assert store.in_flight() == ()


def test_a_state_is_not_overwritten(place, tmp_path):
    with fill(place) as store:
        back_up(place, tmp_path / "backup")
        before = everything(store)
    with pytest.raises(ConfigError, match="--replace"):
        restore(tmp_path / "backup", place)
    with opened(place) as store:
        assert everything(store) == before


def test_a_state_that_is_replaced_is_kept_aside(place, tmp_path, postgres):
    with fill(place) as store:
        back_up(place, tmp_path / "backup")
        plan = store.plan(store.version(0).plan_sha256)
        store.abandon_round(3, "the deadline came", at=70.0)
        for number in (4, 5):
            closed_round(store, plan, number)
        lost = store.version(5)
    restored = restore(tmp_path / "backup", place, replace=True, gap=2)
    # Above what the old state had published, although the gap was too small for it.
    assert (restored.version, restored.round) == (6, 6)
    aside = place.state_dir / restored.replaced
    assert (aside / "blobs" / lost.weights.sha256).exists()
    assert (aside / "uploads" / "3" / "pi-1" / sha256(UPDATE)).exists()
    with opened(place, serve=True) as store:
        assert [v.number for v in store.versions()] == [0, 1, 2, 6]
        assert lost.weights.sha256 not in store.named_blobs()
    if place.database is None:
        with Store.open(aside) as old:
            assert old.newest_version() == lost
    else:
        table = f'"{restored.replaced}".versions'
        rows = postgres.run(
            f"SELECT max(number) FROM {table}",  # noqa: S608 -- a name that we made
            place.database.rpartition("/")[2],
        )
        assert rows == [(5,)]
    # And once more: every state that was replaced has a place of its own.
    again = restore(tmp_path / "backup", place, replace=True, now=MADE_AT + 9)
    assert again.replaced != restored.replaced
    assert aside.exists()
    assert problems(place) == ()


def test_a_damaged_state_can_be_replaced(tmp_path):
    place = Place(tmp_path / "state")
    with fill(place):
        back_up(place, tmp_path / "backup")
    (place.state_dir / "fedge.sqlite").write_bytes(b"a disk that lies" * 4000)
    restored = restore(tmp_path / "backup", place, replace=True)
    assert problems(place) == ()
    assert (place.state_dir / restored.replaced / "fedge.sqlite").read_bytes()[:16] == (
        b"a disk that lies"
    )


def test_nothing_is_restored_under_a_coordinator_that_serves(place, tmp_path):
    with fill(place) as store:
        back_up(place, tmp_path / "backup")
        with pytest.raises(ConfigError, match=r"a coordinator \(process \d+\) serves"):
            restore(tmp_path / "backup", place, replace=True)
        if place.database is not None:
            with pytest.raises(ConfigError, match="a coordinator serves"):
                restore(
                    tmp_path / "backup",
                    dataclasses.replace(place, state_dir=tmp_path / "elsewhere"),
                    replace=True,
                )
        assert store.newest_version().number == 2


def test_another_populations_backup_is_refused(tmp_path):
    place = Place(tmp_path / "state")
    with fill(place):
        back_up(place, tmp_path / "backup")
    with pytest.raises(ConfigError, match=r"population 'kitchen'.*'garden'"):
        restore(tmp_path / "backup", Place(tmp_path / "restored"), population="garden")


# ---------------------------------------------------------------- blobs in another place


@pytest.fixture(params=["file", "memory"])
def remote(request, tmp_path):
    if request.param == "file":
        return f"file://{tmp_path / 'elsewhere'}"
    return f"memory://backup-{next(_PLACES)}/blobs"


def test_a_state_with_blobs_elsewhere_is_backed_up_and_restored(tmp_path, remote):
    place = Place(tmp_path / "state", None, remote)
    with fill(place) as store:
        names = set(store.named_blobs())
    shutil.rmtree(place.state_dir / "blobs")
    back_up(place, tmp_path / "backup")
    restore(tmp_path / "backup", Place(tmp_path / "local"))
    assert problems(Place(tmp_path / "local")) == ()
    moved = Place(tmp_path / "moved", None, f"file://{tmp_path / 'new place'}")
    restore(tmp_path / "backup", moved)
    assert problems(moved) == ()
    assert names <= {path.name for path in (tmp_path / "new place").iterdir()}
    opened(moved, serve=True).close()


def test_what_a_replaced_state_had_elsewhere_is_kept_here(tmp_path, remote):
    place = Place(tmp_path / "state", None, remote)
    with fill(place) as store:
        back_up(place, tmp_path / "backup")
        plan = store.plan(store.version(0).plan_sha256)
        closed_round(store, plan, 4)
        lost = store.version(4).weights.sha256
    restored = restore(tmp_path / "backup", place, replace=True)
    assert (place.state_dir / restored.replaced / "blobs" / lost).exists()
    assert problems(place) == ()
    opened(place, serve=True).close()


def test_another_states_blobs_are_not_taken_over(tmp_path, remote):
    place = Place(tmp_path / "state", None, remote)
    fill(place).close()
    local = Place(tmp_path / "local")
    with fill(local):
        back_up(local, tmp_path / "backup")
    with pytest.raises(ConfigError, match="another coordinator's state"):
        restore(tmp_path / "backup", Place(tmp_path / "restored", None, remote))
    assert problems(place) == ()


# ---------------------------------------------------------------- check


def test_a_good_state_has_no_problems_while_it_is_served(place):
    with fill(place) as store:
        put(store, b"a leftover")
        with opened(place) as beside:
            found = check(
                beside, place.state_dir, Retention(versions=2), now=time.time(), progress=quiet
            )
    assert found.problems == ()
    assert (found.population, found.versions, found.rounds) == ("kitchen", 3, 3)
    assert found.collectable.versions == 1
    assert found.collectable.bytes_freed > 1000
    assert found.sizes.database > 10_000
    assert found.sizes.blobs > 3000
    assert found.sizes.uploads == len(UPDATE)
    assert found.free_bytes > 0


@pytest.mark.parametrize("part", ["weights", "golden", "server_state", "plan"])
@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_every_file_that_is_not_as_it_was_is_found(tmp_path, part, damage):
    place = Place(tmp_path / "state")
    with fill(place) as store:
        record = store.version(1)
        digest = {
            "weights": record.weights.sha256,
            "golden": record.golden.sha256,
            "server_state": record.server_state,
            "plan": record.plan_sha256,
        }[part]
        path = store.blobs.path(digest)
    path.unlink() if damage == "missing" else path.write_bytes(b"damaged")
    (problem,) = problems(place)
    assert digest in problem.what
    assert "backup" in problem.advice


def test_a_missing_accepted_update_is_found(place):
    with fill(place):
        shutil.rmtree(place.state_dir / "uploads")
        (problem,) = problems(place)
    assert "accepted update of pi-1 in round 3" in problem.what


BROKEN_PROMISES = {
    "counts in no round": "UPDATE participants SET counted_in = 99 WHERE round = 1",
    "counts in no round ": "UPDATE participants SET counted_in = NULL WHERE round = 1",
    "without a reason": "UPDATE rounds SET outcome = 'abandoned', phase = 'closed' "
    "WHERE number = 3",
    "there is none": "UPDATE rounds SET version = 77 WHERE number = 2",
    "which the round does not": "UPDATE versions SET round = 3 WHERE number = 2",
    "not above the version": "UPDATE versions SET base = 2 WHERE number = 2",
    "of no accepted update": "UPDATE participants SET status = 'silent' WHERE round = 1",
}


@pytest.mark.parametrize("said", BROKEN_PROMISES)
def test_a_broken_promise_is_found(tmp_path, said):
    place = Place(tmp_path / "state")
    fill(place).close()
    with sqlite3.connect(place.state_dir / "fedge.sqlite") as connection:
        connection.execute(BROKEN_PROMISES[said])
    found = problems(place)
    assert any(said.strip() in problem.what for problem in found)
    assert all(problem.advice for problem in found)


def test_rows_that_refer_to_nothing_are_found(tmp_path):
    place = Place(tmp_path / "state")
    fill(place).close()
    with sqlite3.connect(place.state_dir / "fedge.sqlite") as connection:
        connection.execute("DELETE FROM rounds WHERE number = 1")
    assert any("participants refers to a row of rounds" in p.what for p in problems(place))


# ---------------------------------------------------------------- the commands


@pytest.fixture
def commands(tmp_path):
    """Runs `fedge db …` with the configuration of a filled state."""
    config = tmp_path / "fedge.toml"
    config.write_text('population = "kitchen"\ntask = "digits"\nstate_dir = "state"\n')
    fill(Place(tmp_path / "state")).close()

    def run(*arguments, config=config):
        return CliRunner().invoke(
            cli, ["db", *map(str, arguments), "--config", str(config)], catch_exceptions=True
        )

    return run


def test_the_commands_do_what_their_names_say(commands, tmp_path):
    checked = commands("check")
    assert (checked.exit_code, checked.stdout.splitlines()[-1]) == (0, "all is well")
    assert json.loads(commands("check", "--json").stdout)["ok"] is True
    saved = commands("backup", tmp_path / "backup")
    assert (saved.exit_code, "up to version 2 and round 3" in saved.stdout) == (0, True)
    shutil.rmtree(tmp_path / "state")
    restored = commands("restore", tmp_path / "backup", "--gap", 10, "--json")
    assert restored.exit_code == 0
    assert json.loads(restored.stdout)["version"] == 12
    assert commands("check").exit_code == 0
    replaced = commands("restore", tmp_path / "backup", "--replace")
    assert "version 1002 has the weights of version 2" in replaced.stdout
    assert "round 3 was open and is abandoned" in replaced.stdout


def test_problems_give_exit_status_1_and_say_what_to_do(commands, tmp_path):
    (tmp_path / "state" / "blobs" / sha256(b"golden 1")).write_bytes(b"damaged")
    checked = commands("check")
    assert checked.exit_code == 1
    assert "problem: missing or damaged, the golden outputs of version 1: " in checked.stdout
    assert "from a backup" in checked.stdout
    found = json.loads(commands("check", "--json").stdout)
    assert (found["ok"], len(found["problems"])) == (False, 1)
    assert commands("backup", tmp_path / "backup").exit_code == 1


def test_of_a_damaged_database_it_is_said_what_to_do(commands, tmp_path):
    (tmp_path / "state" / "fedge.sqlite").write_bytes(b"a disk that lies" * 4000)
    checked = commands("check")
    assert isinstance(checked.exception, StoreError)
    assert "not a database; restore the newest good backup: fedge db restore" in str(
        checked.exception
    )


def test_a_wrong_request_is_a_configuration_error(commands, tmp_path):
    commands("backup", tmp_path / "backup")
    for arguments in (
        ("restore", tmp_path / "backup"),
        ("backup", tmp_path / "backup"),
        ("restore", tmp_path / "state", "--replace"),
    ):
        assert isinstance(commands(*arguments).exception, ConfigError)
    assert commands("restore", tmp_path / "nowhere").exit_code == 2
    assert commands("restore", tmp_path / "backup", "--gap", 0).exit_code == 2
