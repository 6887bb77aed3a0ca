"""Restoring over a state: the old one or the new one, whole, whatever happens in between."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from click.testing import CliRunner
from sqlalchemy import Engine, event

from fedge.coordinator.cli import cli
from fedge.coordinator.old_state import Place
from fedge.coordinator.store import Retention, Store
from fedge.coordinator.store import postgresql as store_postgresql
from fedge.coordinator.store import sqlite as store_sqlite
from fedge.coordinator.store.blobs import Blobs
from fedge.schemas.errors import StoreError, StoreUnavailable
from tests.coordinator.states import closed_round, make_old
from tests.coordinator.test_backup import MADE_AT, back_up, fill, opened, problems, restore

CHANGES = frozenset({"os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "open"})
"""What the interpreter reports (sys.addaudithook) where a restore changes files."""
OLD, NEW = [0, 1, 2, 4, 5], [0, 1, 2, 1002]
"""The versions of `gone_on`, and of what is restored over it."""
_CUT_OTHERS_OFF = """
    SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
"""


@pytest.fixture
def place(tmp_path, database_url):
    return Place(tmp_path / "state", None if database_url.startswith("sqlite") else database_url)


def gone_on(place, backup):
    """A state that has gone on since its backup: to version 5, and only 4 and 5 have files."""
    with fill(place) as store:
        back_up(place, backup)
        plan = store.plan(store.version(0).plan_sha256)
        store.abandon_round(3, "the deadline came", at=70.0)
        for number in (4, 5):
            closed_round(store, plan, number)
        # As after a restart: what was put last is not deleted.
        store.blobs = Blobs(store.blobs.folder)
        store.collect(Retention(versions=2), now=time.time())
        assert [v.number for v in store.versions() if v.files_kept] == [4, 5]


def numbers_in(place):
    with opened(place) as store:
        return [v.number for v in store.versions()]


def files_in(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("lock", "fedge.sqlite-shm")
    }


def database_of(place):
    return place.database.rpartition("/")[2]


# ---------------------------------------------------------------- killed, refused


def killed_at(moment: int, work: Callable[[], object]) -> bool:
    """Whether `work`, in a process of its own, was killed at its change number `moment`."""
    child = os.fork()
    if child == 0:
        changes = itertools.count()

        def count(*_event: object) -> None:
            if next(changes) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        def audit(name: str, arguments: tuple[object, ...]) -> None:
            writes = name != "open" or str(arguments[1])[:1] in "wxa"
            if name in CHANGES and writes:
                count()

        try:
            event.listen(Engine, "commit", count)
            sys.addaudithook(audit)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert status == 0, "the restore failed by itself"
    return False


def kill_at_every(step, place, backup, postgres):
    """How many restores were killed, each a `step` further, before one had put the new state in."""
    for kills in itertools.count(1):
        killed = killed_at(step * kills, lambda: restore(backup, place, replace=True))
        if place.database is not None:
            # The server notices a lost client only when it has done what it was asked.
            postgres.run(_CUT_OTHERS_OFF, database_of(place))
        assert problems(place) == ()
        numbers = numbers_in(place)
        if numbers != OLD:
            assert numbers == NEW
            return kills - 1 if killed else kills - 2
        for leftover in place.state_dir.glob(".restoring-*"):
            # The next restore would do this, and get so much less far.
            shutil.rmtree(leftover)
    raise AssertionError


def old_states_kept(place, postgres):
    """The numbers of versions in each copy of a state that was replaced."""
    if place.database is None:
        for folder in place.state_dir.glob("replaced-*"):
            with Store.open(folder) as copy:
                # Each is a state in itself.
                assert all(map(copy.blobs.has, copy.named_blobs()))
                yield [v.number for v in copy.versions()]
        return
    of_schemas = "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'replaced-%'"
    for (name,) in postgres.run(of_schemas, database_of(place)):
        assert (place.state_dir / name / "blobs").is_dir()
        numbers = f'SELECT number FROM "{name}".versions ORDER BY number'  # noqa: S608 -- ours
        yield [number for (number,) in postgres.run(numbers, database_of(place))]


def test_a_restore_that_is_killed_leaves_the_old_state_or_the_new_one(place, tmp_path, postgres):
    gone_on(place, tmp_path / "backup")
    assert kill_at_every(11, place, tmp_path / "backup", postgres) >= 3
    assert OLD in old_states_kept(place, postgres)
    assert restore(tmp_path / "backup", place, replace=True).version == 1003
    assert problems(place) == ()
    assert not list(place.state_dir.glob(".restoring-*"))


@pytest.mark.e2e
def test_killed_at_any_change_a_restore_leaves_the_old_state_or_the_new_one(
    place, tmp_path, postgres
):
    gone_on(place, tmp_path / "backup")
    assert kill_at_every(1, place, tmp_path / "backup", postgres) > 40
    assert OLD in old_states_kept(place, postgres)


def test_a_server_that_refuses_the_new_tables_keeps_the_old_state(tmp_path, postgres, monkeypatch):
    place = Place(tmp_path / "state", postgres.used_database())
    gone_on(place, tmp_path / "backup")
    monkeypatch.setattr(store_postgresql, "LOCK_TIMEOUT_S", 0.1)
    with psycopg.connect(place.database.replace("+psycopg", "")) as other:
        # The old state can be read, and its tables cannot be moved.
        other.execute("LOCK TABLE versions IN SHARE MODE")
        with pytest.raises(StoreError, match=r"lock timeout.*each with all of its files"):
            restore(tmp_path / "backup", place, replace=True)
        other.rollback()
    assert problems(place) == ()
    assert numbers_in(place) == OLD
    assert restore(tmp_path / "backup", place, replace=True).version == 1002
    assert problems(place) == ()


def test_what_the_new_state_does_not_name_is_swept_by_its_coordinator(place, tmp_path):
    gone_on(place, tmp_path / "backup")
    with opened(place) as store:
        old = set(store.named_blobs())
    restored = restore(tmp_path / "backup", place, replace=True)
    with opened(place, serve=True) as store:
        make_old(store)
        store.collect(Retention(), now=time.time())
        assert set(store.blobs.digests()) == set(store.named_blobs())
    kept = {path.name for path in (place.state_dir / restored.replaced / "blobs").iterdir()}
    assert old <= kept


# ---------------------------------------------------------------- an old state that is not read


def lock_all(place):
    """Somebody else has the database for itself; the connection, to be closed."""
    if place.database is None:
        file = sqlite3.connect(place.state_dir / "fedge.sqlite", isolation_level=None)
        file.execute("PRAGMA locking_mode=EXCLUSIVE")
        file.execute("BEGIN IMMEDIATE")
        return file
    server = psycopg.connect(place.database.replace("+psycopg", ""))
    server.execute("LOCK TABLE versions IN ACCESS EXCLUSIVE MODE")
    return server


def test_a_state_that_cannot_be_read_now_is_not_taken_for_an_empty_one(
    place, tmp_path, monkeypatch
):
    monkeypatch.setattr(store_sqlite, "BUSY_TIMEOUT_MS", 20)
    monkeypatch.setattr(store_postgresql, "LOCK_TIMEOUT_S", 0.1)
    gone_on(place, tmp_path / "backup")
    other, before = lock_all(place), files_in(place.state_dir)
    try:
        with pytest.raises(StoreUnavailable, match=r"cannot be read now.*nothing was changed"):
            restore(tmp_path / "backup", place, replace=True, gap=1)
        assert files_in(place.state_dir) == before
    finally:
        other.close()
    assert restore(tmp_path / "backup", place, replace=True, gap=1).version == 6
    assert problems(place) == ()


def test_a_state_whose_file_cannot_be_opened_is_not_taken_for_an_empty_one(tmp_path):
    place = Place(tmp_path / "state")
    gone_on(place, tmp_path / "backup")
    database = place.state_dir / "fedge.sqlite"
    database.rename(tmp_path / "away")
    # What SQLite says of a mount that is gone, of a file without permission, of too many files.
    database.mkdir()
    with pytest.raises(StoreUnavailable, match=r"unable to open.*nothing was changed"):
        restore(tmp_path / "backup", place, replace=True, gap=1)
    database.rmdir()
    (tmp_path / "away").rename(database)
    assert restore(tmp_path / "backup", place, replace=True, gap=1).version == 6


def test_a_state_that_somebody_reads_is_not_replaced_under_them(tmp_path, monkeypatch):
    place = Place(tmp_path / "state")
    gone_on(place, tmp_path / "backup")
    with sqlite3.connect(place.state_dir / "fedge.sqlite") as reader:
        reader.execute("SELECT * FROM versions").fetchone()
        with pytest.raises(StoreUnavailable, match="has it open"):
            restore(tmp_path / "backup", place, replace=True)
    reader.close()
    assert numbers_in(place) == OLD
    assert restore(tmp_path / "backup", place, replace=True).version == 1002


def test_what_was_only_in_the_log_of_the_old_state_is_kept_and_not_played_into_the_new(tmp_path):
    place = Place(tmp_path / "state")
    gone_on(place, tmp_path / "backup")
    database = place.state_dir / "fedge.sqlite"
    # As a kill -9 leaves it: committed, and in the log alone.
    writer = sqlite3.connect(database)
    writer.execute("UPDATE versions SET note = 'in the log'")
    writer.commit()
    for name in ("fedge.sqlite", "fedge.sqlite-wal"):
        shutil.copyfile(place.state_dir / name, tmp_path / name)
    writer.close()
    for name in ("fedge.sqlite", "fedge.sqlite-wal"):
        shutil.copyfile(tmp_path / name, place.state_dir / name)
    restored = restore(tmp_path / "backup", place, replace=True)
    with opened(place) as store:
        assert {v.note for v in store.versions()} == {
            *("", "restored from the backup of 2023-11-14 22:13:20Z")
        }
    with Store.open(place.state_dir / restored.replaced) as old:
        assert {v.note for v in old.versions()} == {"in the log"}


def test_the_log_of_a_damaged_state_is_not_played_into_the_new(tmp_path):
    place = Place(tmp_path / "state")
    gone_on(place, tmp_path / "backup")
    database = place.state_dir / "fedge.sqlite"
    writer = sqlite3.connect(database)
    writer.execute("UPDATE versions SET note = 'in the log'")
    writer.commit()
    log = (place.state_dir / "fedge.sqlite-wal").read_bytes()
    database.write_bytes(b"a disk that lies" * 4000)
    # Somebody has it open still: without that, SQLite itself puts the log into the file.
    restored = restore(tmp_path / "backup", place, replace=True)
    writer.close()
    assert "not a database" in restored.damage
    assert problems(place) == ()
    with opened(place) as store:
        assert "in the log" not in {v.note for v in store.versions()}
    aside = place.state_dir / restored.replaced
    assert (aside / "fedge.sqlite-wal").read_bytes() == log


def test_damaged_tables_of_a_server_can_be_replaced(tmp_path, postgres):
    place = Place(tmp_path / "state", postgres.new_database())
    gone_on(place, tmp_path / "backup")
    postgres.run("DROP TABLE versions CASCADE", database_of(place))
    restored = restore(tmp_path / "backup", place, replace=True)
    assert "versions" in restored.damage
    assert problems(place) == ()


def test_the_command_says_that_the_old_state_was_damaged(tmp_path):
    place, config = Place(tmp_path / "state"), tmp_path / "fedge.toml"
    gone_on(place, tmp_path / "backup")
    config.write_text('population = "kitchen"\ntask = "digits"\nstate_dir = "state"\n')
    (place.state_dir / "fedge.sqlite").write_bytes(b"a disk that lies" * 4000)
    command = ["db", "restore", str(tmp_path / "backup"), "--config", str(config)]
    refused = CliRunner().invoke(cli, command)
    assert "--replace" in str(refused.exception)
    done = CliRunner().invoke(cli, [*command, "--replace"])
    assert done.exit_code == 0
    assert "the old state is damaged" in done.stdout
    assert "--gap" in done.stdout


def test_a_mark_of_the_time_names_the_copy(tmp_path):
    place = Place(tmp_path / "state")
    gone_on(place, tmp_path / "backup")
    restored = restore(tmp_path / "backup", place, replace=True, now=MADE_AT)
    assert restored.replaced.startswith("replaced-20231114T221320Z-")
    assert Path(place.state_dir / restored.replaced).is_dir()
