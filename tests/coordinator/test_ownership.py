"""A folder of blobs belongs to one state: no other serves from it, and none deletes there."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from fedge.coordinator.cli import cli
from fedge.coordinator.db_commands import stopped_by
from fedge.coordinator.old_state import Place
from fedge.coordinator.store import Retention
from fedge.coordinator.store.blobs import Blobs
from fedge.coordinator.store.ownership import Claim, mark_folder, may_take, owners_of
from fedge.schemas.errors import ConfigError, StoreError
from tests.coordinator.states import closed_round, make_old, put, put_version
from tests.coordinator.test_backup import back_up, fill, opened, problems, restore

MOVE = r"`fedge db backup B` with the old configuration, then `fedge db restore B` with the new one"


@pytest.fixture
def server_url(postgres):
    """An empty database on PostgreSQL, without tables."""
    return postgres.empty_database()


@pytest.fixture
def here(tmp_path):
    """The state folder with its database in SQLite."""
    return Place(tmp_path / "state")


@pytest.fixture
def on_server(tmp_path, server_url):
    """The same folder with its database on PostgreSQL."""
    return Place(tmp_path / "state", server_url)


@pytest.fixture(params=["to PostgreSQL", "to SQLite"])
def moved(request, here, on_server):
    """Where a state is, and where its operator wants it: the same folder, the other database."""
    return (here, on_server) if request.param == "to PostgreSQL" else (on_server, here)


def serve(place):
    return opened(place, create=True, serve=True)


def blobs_in(place):
    return {path.name for path in (place.state_dir / "blobs").iterdir() if len(path.name) == 64}


def mark(place):
    return owners_of(place.state_dir / "blobs")


def forget_mark(place):
    """As a release before the mark has left it."""
    (place.state_dir / "blobs" / "owner").unlink()


def tables_of(url, postgres):
    found = postgres.run(
        "SELECT tablename FROM pg_tables WHERE schemaname = 'public'", url.rpartition("/")[2]
    )
    return {name for (name,) in found}


def collect_all(place):
    """What a coordinator does an hour later."""
    with serve(place) as store:
        store.blobs = Blobs(store.blobs.folder)
        make_old(store)
        return store.collect(Retention(), now=time.time())


# ---------------------------------------------------------------- another database is named


def test_a_key_that_is_added_begins_no_new_population(here, on_server, postgres):
    with fill(here) as store:
        names = set(store.named_blobs())
    with pytest.raises(ConfigError, match=rf"in SQLite \(versions to 2\).*is empty.*{MOVE}"):
        serve(on_server)
    # Nothing was made there, so that the way out is open.
    assert tables_of(on_server.database, postgres) == set()
    assert collect_all(here).blobs == 0
    assert names <= blobs_in(here)


def test_a_key_that_is_taken_out_begins_no_new_population(here, on_server):
    with fill(on_server) as store:
        names = set(store.named_blobs())
    with pytest.raises(ConfigError, match=rf"another state, whose database is not .*{MOVE}"):
        serve(here)
    assert not (here.state_dir / "fedge.sqlite").exists()
    assert collect_all(on_server).blobs == 0
    assert names <= blobs_in(on_server)


@pytest.mark.parametrize("is_marked", [True, False])
def test_a_second_population_is_refused_before_and_after_the_mark(moved, is_marked):
    old, new = moved
    fill(old).close()
    if not is_marked:
        forget_mark(old)
    for _ in range(2):
        with pytest.raises(ConfigError):
            serve(new)
    serve(old).close()
    assert problems(old) == ()


def test_copies_of_blobs_that_lie_elsewhere_are_not_taken_either(here, on_server, tmp_path):
    with fill(here) as store:
        names = set(store.named_blobs())
    elsewhere = Place(here.state_dir, on_server.database, f"file://{tmp_path / 'elsewhere'}")
    with pytest.raises(ConfigError, match="in SQLite"):
        serve(elsewhere)
    assert names <= blobs_in(here)
    assert not (tmp_path / "elsewhere" / "owner").exists()


def test_a_second_server_begins_no_new_population(on_server, postgres):
    fill(on_server).close()
    other = Place(on_server.state_dir, postgres.new_database())
    with pytest.raises(ConfigError, match="another state"):
        serve(other)
    serve(on_server).close()


def test_a_lost_database_is_not_begun_anew_over_its_files(here):
    with fill(here):
        pass
    names = blobs_in(here)
    for path in here.state_dir.glob("fedge.sqlite*"):
        path.unlink()
    for _ in range(2):
        with pytest.raises(ConfigError, match="another state"):
            serve(here)
        if (here.state_dir / "blobs" / "owner").exists():
            forget_mark(here)
    with pytest.raises(ConfigError, match=r"does not name.*database was lost.*restore"):
        serve(here)
    assert blobs_in(here) == names


def test_a_damaged_state_beside_is_no_reason_to_begin_anew(here, on_server):
    fill(here).close()
    forget_mark(here)
    (here.state_dir / "fedge.sqlite").write_bytes(b"a disk that lies" * 4000)
    with pytest.raises(ConfigError, match="cannot be read"):
        serve(on_server)


# ---------------------------------------------------------------- a move


@pytest.mark.parametrize("replace", [True, False])
def test_a_state_moves_with_a_backup_and_a_restore(moved, tmp_path, replace):
    old, new = moved
    with fill(old) as store:
        before = set(store.named_blobs())
        back_up(old, tmp_path / "backup")
    with pytest.raises(ConfigError):
        serve(new)
    restored = restore(tmp_path / "backup", new, replace=replace)
    assert (restored.version, restored.replaced, restored.aside) == (1002, None, None)
    collect_all(new)
    assert before <= blobs_in(new)
    assert problems(new) == ()
    # The old one has its database still, and may not delete what the new one has.
    with pytest.raises(ConfigError, match="another state"):
        serve(old)
    assert any("another state's" in problem.what for problem in problems(old))
    with opened(old) as store, pytest.raises(StoreError, match="another one's"):
        store.collect(Retention(versions=2), now=time.time())
    serve(new).close()


@pytest.mark.e2e
def test_a_state_moves_there_and_back(moved, tmp_path):
    old, new = moved
    with fill(old):
        back_up(old, tmp_path / "backup")
    restore(tmp_path / "backup", new)
    with serve(new) as store:
        closed_round(store, store.plan(store.newest_version().plan_sha256), 2004)
        back_up(new, tmp_path / "again")
    with pytest.raises(ConfigError, match="--replace"):
        restore(tmp_path / "again", old)
    assert restore(tmp_path / "again", old, replace=True).version == 3004
    collect_all(old)
    assert problems(old) == ()
    with pytest.raises(ConfigError, match="another state"):
        serve(new)


def test_what_the_old_state_had_beyond_the_backup_is_kept_when_it_moves(moved, tmp_path):
    old, new = moved
    with fill(old) as store:
        back_up(old, tmp_path / "backup")
        closed_round(store, store.plan(store.version(0).plan_sha256), 4)
        lost = {store.version(4).weights.sha256, store.version(4).golden.sha256}
    restored = restore(tmp_path / "backup", new)
    assert collect_all(new).blobs >= 2
    assert lost.isdisjoint(blobs_in(new))
    kept = {path.name for path in (new.state_dir / restored.aside / "blobs").iterdir()}
    assert lost <= kept


@pytest.mark.e2e
def test_an_older_backup_is_restored_over_another_states_files_only_if_asked(moved, tmp_path):
    old, new = moved
    with fill(old):
        back_up(old, tmp_path / "first")
    restore(tmp_path / "first", new)
    with serve(new):
        back_up(new, tmp_path / "second")
    third = Place(new.state_dir, new.database)
    restore(tmp_path / "second", third, replace=True)
    for path in old.state_dir.glob("fedge.sqlite*"):
        if old.database is None:
            path.unlink()
    if old.database is None:
        # The first backup's mark has gone from the folder with the first move.
        with pytest.raises(ConfigError, match=r"files of another state.*--replace"):
            restore(tmp_path / "first", old)
    restore(tmp_path / "first", old, replace=True)
    serve(old).close()
    assert problems(old) == ()


# ---------------------------------------------------------------- states from before the mark


def test_a_state_without_a_mark_is_taken_over(here, on_server):
    for place in (here, on_server):
        with fill(place) as store:
            names = set(store.named_blobs())
            put(store, b"a leftover of a crash")
        forget_mark(place)
        serve(place).close()
        assert len(mark(place)) == 1
        assert names <= blobs_in(place)
        shutil.rmtree(place.state_dir)


def test_a_state_that_has_moved_before_the_mark_is_taken_over(here, on_server, tmp_path):
    with fill(here):
        back_up(here, tmp_path / "backup")
    restore(tmp_path / "backup", on_server)
    forget_mark(on_server)
    serve(on_server).close()
    with pytest.raises(ConfigError, match="another state"):
        serve(here)


def test_two_states_without_a_mark_that_both_name_files_are_for_their_operator(
    here, on_server, tmp_path
):
    other = Place(tmp_path / "other", on_server.database)
    with fill(other) as store:
        put_version(store, store.plan(store.version(0).plan_sha256), 3)
    fill(here).close()
    with serve(here) as store:
        put_version(store, store.plan(store.version(0).plan_sha256), 7)
    for blob in (other.state_dir / "blobs").iterdir():
        shutil.copyfile(blob, here.state_dir / "blobs" / blob.name)
    forget_mark(here)
    with pytest.raises(ConfigError, match=r"\(versions to 7\) beside .*both name files"):
        serve(on_server)
    (here.state_dir / "fedge.sqlite").rename(tmp_path / "away")
    serve(on_server).close()


# ---------------------------------------------------------------- copies, crashes


def test_a_state_folder_may_be_moved_or_copied(moved, tmp_path):
    place, _ = moved
    fill(place).close()
    copy = Place(tmp_path / "copy", place.database)
    shutil.copytree(place.state_dir, copy.state_dir)
    serve(copy).close()
    copy.state_dir.rename(tmp_path / "moved")
    serve(Place(tmp_path / "moved", place.database)).close()
    # And without the mark, as a tool that takes only what it knows.
    shutil.copytree(place.state_dir, copy.state_dir, ignore=shutil.ignore_patterns("owner"))
    serve(copy).close()
    assert mark(copy) == mark(place)
    assert problems(copy) == ()


def test_blobs_that_are_copied_back_from_another_place_are_the_states_own(tmp_path):
    elsewhere = Place(tmp_path / "state", None, f"file://{tmp_path / 'elsewhere'}")
    fill(elsewhere).close()
    shutil.rmtree(tmp_path / "state" / "blobs")
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "state" / "blobs")
    serve(Place(tmp_path / "state")).close()
    assert problems(Place(tmp_path / "state")) == ()


KILLED_BEFORE_ITS_FIRST_VERSION = """
import os, pathlib, signal, sys
from fedge.coordinator.store import Store, ownership
from fedge.coordinator.store import blobs

def killed(*_arguments):
    os.kill(os.getpid(), signal.SIGKILL)

where = pathlib.Path(sys.argv[1]), sys.argv[2] or None
if sys.argv[3] == "before the mark":
    blobs.mark_folder = killed
with Store.open(*where, create=True, serve=True) as store:
    store.blobs.put(b"a part of a plan")
    killed()
"""


@pytest.mark.parametrize("when", ["before the mark", "after the mark"])
def test_a_first_start_that_was_killed_is_begun_again(moved, when):
    place, other = moved
    command = [sys.executable, "-c", KILLED_BEFORE_ITS_FIRST_VERSION, str(place.state_dir)]
    done = subprocess.run(
        [*command, place.database or "", when],
        cwd=Path(__file__).resolve().parents[2],
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    with serve(place) as store:
        assert store.newest_version() is None
    if other.database is not None:
        # A state without a version has nothing to lose: its operator may choose again.
        fill(other).close()
        assert problems(other) == ()
        with pytest.raises(ConfigError, match="another state"):
            serve(place)


def test_a_restore_that_was_killed_leaves_the_folder_to_either_state(moved, tmp_path, monkeypatch):
    old, new = moved
    with fill(old):
        back_up(old, tmp_path / "backup")
    first = mark(old)

    class Killed(BaseException):
        pass

    def killed(*_arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("fedge.coordinator.restore._Marks.let_only_the_new_in", killed)
        with pytest.raises(Killed):
            restore(tmp_path / "backup", new)
    assert len(mark(new)) == 2
    for place in (old, new):
        assert problems(place) == ()
    serve(new).close()
    assert len(mark(new)) == 1
    assert mark(new) != first
    with pytest.raises(ConfigError, match="another state"):
        serve(old)


def test_nothing_is_deleted_once_another_state_has_the_folder(moved):
    place, _ = moved
    with fill(place) as store:
        store.blobs = Blobs(store.blobs.folder)
        make_old(store)
        before = blobs_in(place)
        mark_folder(store.blobs.folder, ("another",))
        with pytest.raises(StoreError, match="none was deleted"):
            store.collect(Retention(versions=2), now=time.time())
        assert blobs_in(place) == before
        assert all(version.files_kept for version in store.versions())


# ---------------------------------------------------------------- the decision by itself

DIGESTS = st.frozensets(st.sampled_from("abcd"))
OWNERS = st.none() | st.sampled_from(["one", "two", "three"])
CLAIMS = st.builds(Claim, OWNERS, st.none() | st.integers(0, 9), DIGESTS)


@given(
    st.sampled_from([(), ("one",), ("two",), ("one", "two")]), DIGESTS, CLAIMS, st.none() | CLAIMS
)
def test_a_folder_with_a_mark_is_never_taken_from_a_state_with_versions(
    marked, present, mine, beside
):
    reason = may_take(marked, present, mine, beside)
    if mine.owner in marked:
        assert reason is None
    elif marked and reason is None:
        assert beside is not None
        assert beside.owner in marked
        assert beside.newest is None
    elif reason is None:
        # Without a mark: nothing that only the other one names is there.
        assert beside is None or not (present & beside.named) - mine.named
        assert not present or present & mine.named
    else:
        reason.format(state_dir="s", folder="f", database="d")


# ---------------------------------------------------------------- the commands


@pytest.fixture
def fedge(tmp_path):
    def run(*arguments, population="kitchen", extra=""):
        config = tmp_path / "fedge.toml"
        config.write_text(
            f'population = "{population}"\ntask = "digits"\nstate_dir = "state"\n{extra}'
        )
        return CliRunner().invoke(cli, [*map(str, arguments), "--config", str(config)])

    return run


@pytest.mark.parametrize(
    "command",
    [
        "version list",
        "version show 1",
        "version rollback 1",
        "version export 1 a.onnx",
        "round list",
        "round show 1",
        "device list",
        "db check",
        "db backup a-backup",
    ],
)
def test_a_command_shows_nothing_of_another_population(fedge, here, command):
    fill(here).close()
    refused = fedge(*command.split(), population="garden")
    assert isinstance(refused.exception, ConfigError)
    assert "belongs to population 'kitchen', and the configuration says 'garden'" in str(
        refused.exception
    )
    assert refused.stdout == ""


def test_a_state_that_is_not_there_is_named_by_its_whole_path(fedge, here):
    refused = fedge("version", "list")
    assert str(refused.exception) == (
        f"there is no coordinator state in {here.state_dir}: start `fedge serve` first"
    )


def test_a_restore_says_that_training_has_ended(fedge, here, tmp_path):
    with fill(here):
        back_up(here, tmp_path / "backup")
    command = "db", "restore", tmp_path / "backup", "--replace"
    ended = "[round]\nversions = 10\n"
    assert fedge(*command, extra=ended).stdout.splitlines()[-1] == (
        "[round] versions = 10 is below 1002: no round begins until you raise it (to 1010 for as "
        "many as before)"
    )
    facts = json.loads(fedge(*command, "--json", extra=ended).stdout)
    assert facts["stopped"] == {"versions": 10, "version": 1003, "raise_to": 1011}
    goes_on = "[round]\nversions = 1006\n"
    assert fedge(*command, extra=goes_on).stdout.splitlines()[-1].startswith("start `fedge serve`")
    assert json.loads(fedge(*command, "--json").stdout)["stopped"] is None


@pytest.mark.parametrize(
    ("versions", "raise_to", "said"),
    [
        (10, 1010, "is below 1005: no round begins until you raise it (to 1010 for as many as"),
        (1005, 2005, "is not above 1005: no round begins until you raise it (to 2005 for as many"),
        (5, None, "is below 1005: no round begins until you raise it"),
    ],
)
def test_versions_is_raised_by_as_many_as_were_to_come(versions, raise_to, said):
    found = stopped_by(versions, version=1005, newest_version=5)
    assert found.raise_to == raise_to
    assert f"[round] versions = {versions} {said}" in found.said
    assert found.said.endswith(")") == (raise_to is not None)


@pytest.mark.parametrize("versions", [None, 1006])
def test_training_that_goes_on_is_not_spoken_of(versions):
    assert stopped_by(versions, version=1005, newest_version=5) is None
