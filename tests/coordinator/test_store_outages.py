"""The store when its database is away, full, locked or taken, and when many write at once."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import event, text

from fedge.coordinator.store import Outcome, ParticipantStatus, Store
from fedge.coordinator.store import postgresql as store_postgresql
from fedge.coordinator.store import sqlite as store_sqlite
from fedge.coordinator.store.queries import participants_in
from fedge.schemas.errors import ConfigError, PeerError, RejectReason, StoreError, StoreUnavailable
from tests.coordinator.test_store import PLAN, a_round, contribution, version
from tests.coordinator.test_store_async import asynchronous
from tests.postgres import MISSING, POSTGRES_BIN, PostgresServer


def filled(where: tuple[Path, str | None], *, serve: bool = True) -> Store:
    store = Store.open(*where, create=True, serve=serve)
    store.record_plan(PLAN)
    store.record_version(version(0))
    store.open_round(a_round(1))
    store.record_assignment(1, ["pi-1", "pi-2", "pi-3"], train_until=640.0, at=40.0)
    return store


@pytest.fixture
def where(tmp_path: Path, database_url: str) -> tuple[Path, str]:
    return tmp_path / "state", database_url


@pytest.fixture
def on_postgres(tmp_path: Path, postgres: PostgresServer) -> tuple[Path, str]:
    return tmp_path / "state", postgres.used_database()


# ---------------------------------------------------------------- many at once


@pytest.fixture
def two(where):
    """Two processes' views of one state, with time between what they read and what they write."""
    with filled(where, serve=False) as first, Store.open(*where) as second:
        for store in (first, second):
            event.listen(store.database.engine, "after_cursor_execute", dawdle)
        yield first, second


def dawdle(_connection, _cursor, statement, *_others):
    if statement.startswith("SELECT") and "pg_" not in statement:
        time.sleep(0.01)


def in_threads(count, work):
    """The results of `work(index)` on so many threads that all begin at once."""
    ready = threading.Barrier(count)

    def begin(index):
        ready.wait()
        return work(index)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def test_of_many_that_record_one_contribution_one_counts_it(two):
    def accept(index):
        update = contribution(f"update {index}")
        return two[index % 2].record_accepted(1, "pi-1", update, at=50.0)

    assert sorted(in_threads(6, accept)) == [False] * 5 + [True]
    assert [p.device for p in two[0].accepted_in(1)] == ["pi-1"]


def test_of_many_that_make_a_version_each_numbers_only_rise(two):
    def record(index):
        try:
            two[index % 2].record_version(version(1 + index // 2, note=f"by {index}"))
        except StoreError:
            return None
        return f"by {index}"

    recorded = [note for note in in_threads(6, record) if note is not None]
    kept = two[0].versions()
    assert sorted(recorded) == sorted(v.note for v in kept[1:])
    # In the order in which they were recorded, as far as a database remembers it.
    assert len({v.number for v in kept}) == len(kept)
    assert kept[-1].number == 3


@pytest.mark.parametrize("attempt", range(4))
def test_an_update_is_accepted_before_the_close_or_late(two, attempt):
    first, second = two
    devices = ("pi-1", "pi-2", "pi-3")

    def act(index):
        if index == attempt:
            second.record_version(version(1, round_number=1))
            # What the version was made of: nothing may join it after this.
            return first.accepted_in(1)
        device = devices[index - (index > attempt)]
        try:
            return first.record_accepted(1, device, contribution(), at=50.0)
        except PeerError as refused:
            return refused.reason

    done = in_threads(4, act)
    made_of = done.pop(attempt)
    assert set(done) <= {True, RejectReason.LATE}
    assert len(made_of) == done.count(True)
    assert first.accepted_in(1) == made_of
    assert first.newest_round().outcome is Outcome.AGGREGATED


def test_of_many_that_close_a_round_one_does(two):
    def close(index):
        store = two[index % 2]
        with contextlib.suppress(StoreError):
            if index % 3:
                store.abandon_round(1, f"by {index}", at=60.0)
            else:
                store.record_version(version(index + 1, round_number=1))
            return True
        return False

    assert sum(in_threads(6, close)) == 1


def test_a_device_is_asked_once_however_many_ask(two):
    two[0].open_round(asynchronous(2))

    def ask(index):
        return two[index % 2].record_asked(2, "pi-1", base=0, until=9.0, at=1.0)

    assert sum(in_threads(6, ask)) == 1


def test_a_reader_sees_one_moment(where):
    with filled(where) as store, store.database.read() as connection:
        before = participants_in(connection, 1)
        store.record_accepted(1, "pi-1", contribution(), at=50.0)
        store.abandon_round(1, "superseded", at=60.0)
        assert participants_in(connection, 1) == before
        assert store.participants(1) != before


# ---------------------------------------------------------------- SQLite: full, locked, read-only


def test_a_full_disk_is_a_state_that_passes(tmp_path):
    with filled((tmp_path, None)) as store:
        # SQLite's own limit: the same error as that of a disk without a free block.
        event.listen(store._database.engine, "checkout", limit_pages)
        with pytest.raises(StoreUnavailable, match="full"):
            store.record_assignment(
                1, [f"pi-{n}" for n in range(20_000)], train_until=640.0, at=41.0
            )
        assert len(store.participants(1)) == 3
        event.remove(store._database.engine, "checkout", limit_pages)
        event.listen(store._database.engine, "checkout", allow_pages)
        store.record_assignment(1, ["pi-9"], train_until=640.0, at=42.0)
        assert len(store.participants(1)) == 4


def limit_pages(connection, *_others):
    connection.execute("PRAGMA max_page_count=60")


def allow_pages(connection, *_others):
    connection.execute("PRAGMA max_page_count=1000000")


def test_a_locked_database_is_a_state_that_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(store_sqlite, "BUSY_TIMEOUT_MS", 10)
    with filled((tmp_path, None)) as store:
        other = sqlite3.connect(tmp_path / "fedge.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="locked"):
            store.record_accepted(1, "pi-1", contribution(), at=50.0)
        # Readers do not wait for a writer.
        assert store.participant(1, "pi-1").status is ParticipantStatus.ASKED
        other.execute("COMMIT")
        other.close()
        assert store.record_accepted(1, "pi-1", contribution(), at=50.0) is True


def test_a_read_only_database_is_a_state_that_passes(tmp_path):
    with filled((tmp_path, None)) as store:
        event.listen(store._database.engine, "checkout", read_only)
        with pytest.raises(StoreUnavailable, match="readonly"):
            store.record_accepted(1, "pi-1", contribution(), at=50.0)
        event.remove(store._database.engine, "checkout", read_only)
        event.listen(store._database.engine, "checkout", writable)
        assert store.record_accepted(1, "pi-1", contribution(), at=50.0) is True


def read_only(connection, *_others):
    connection.execute("PRAGMA query_only=1")


def writable(connection, *_others):
    connection.execute("PRAGMA query_only=0")


def test_a_damaged_database_is_not_a_state_that_passes(tmp_path):
    filled((tmp_path, None)).close()
    (tmp_path / "fedge.sqlite").write_bytes(b"no database at all" * 1000)
    with pytest.raises(StoreError, match="not a database") as refused:
        Store.open(tmp_path)
    assert not isinstance(refused.value, StoreUnavailable)


def test_a_constraint_is_not_a_state_that_passes(where):
    with filled(where) as store:
        with pytest.raises(StoreError) as refused:
            store.open_round(a_round(1))
        assert not isinstance(refused.value, StoreUnavailable)


def test_the_log_stays_small_while_readers_overlap(tmp_path, monkeypatch):
    limit = 300_000
    monkeypatch.setattr(store_sqlite, "WAL_LIMIT_BYTES", limit)
    monkeypatch.setattr(store_sqlite, "WAL_PAUSE_S", 0.0)
    sizes, done = [], threading.Event()

    def read_on():
        reader = sqlite3.connect(tmp_path / "fedge.sqlite", isolation_level=None)
        while not done.is_set():
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM participants").fetchall()
            done.wait(0.01)
            reader.execute("COMMIT")
        reader.close()

    with filled((tmp_path, None)) as store, ThreadPoolExecutor(3) as pool:
        reading = [pool.submit(read_on) for _ in range(3)]
        try:
            for number in range(2, 42):
                store.open_round(a_round(number))
                names = [f"pi-{n}" for n in range(200)]
                store.record_assignment(number, names, train_until=640.0, at=40.0)
                sizes.append((tmp_path / "fedge.sqlite-wal").stat().st_size)
        finally:
            done.set()
        for each in reading:
            each.result()
    written = sum(max(0, after - before) for before, after in itertools.pairwise(sizes))
    assert written > 3 * limit
    assert max(sizes) < 2 * limit


def test_a_reader_that_never_ends_delays_no_writer_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(store_sqlite, "WAL_LIMIT_BYTES", 100_000)
    attempts = []
    log = tmp_path / "fedge.sqlite-wal"
    with filled((tmp_path, None)) as store:
        reader = sqlite3.connect(tmp_path / "fedge.sqlite", isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM rounds").fetchall()
        backend = store._database._backend
        for number in range(2, 16):
            store.open_round(a_round(number))
            names = [f"pi-{n}" for n in range(200)]
            store.record_assignment(number, names, train_until=640.0, at=40.0)
            attempts.append(backend._empty_again_at)
        # It grows, since the reader needs it, and after a few attempts writers do not wait for it.
        assert log.stat().st_size > 200_000
        assert len(set(attempts) - {0.0}) == 1
        assert attempts[-1] > 0
        reader.close()
        monkeypatch.setattr(backend, "_empty_again_at", 0.0)
        store.open_round(a_round(99))
        assert log.stat().st_size < 100_000


def test_a_log_that_cannot_be_emptied_leaves_writers_their_patience(tmp_path, monkeypatch):
    monkeypatch.setattr(store_sqlite, "WAL_LIMIT_BYTES", 0)
    refused = []

    def no_checkpoint(action, what, *_others):
        if action == sqlite3.SQLITE_PRAGMA and what == "wal_checkpoint":
            refused.append(what)
            return sqlite3.SQLITE_DENY
        return sqlite3.SQLITE_OK

    with filled((tmp_path, None)) as store:
        with store.database.engine.connect() as connection:
            connection.connection.driver_connection.set_authorizer(no_checkpoint)
        store.open_round(a_round(2))
        assert refused
        with store.database.read() as connection:
            patience_ms = connection.scalar(text("PRAGMA busy_timeout"))
    assert patience_ms == store_sqlite.BUSY_TIMEOUT_MS


# ---------------------------------------------------------------- PostgreSQL: gone and back


@pytest.fixture
def own_server() -> Iterator[PostgresServer]:
    """A server that the test may stop."""
    if POSTGRES_BIN is None:
        pytest.skip(MISSING)
    with PostgresServer() as server:
        yield server


@pytest.mark.e2e
def test_a_server_that_was_away_is_used_again_when_it_is_back(tmp_path, own_server):
    with filled((tmp_path, own_server.new_database())) as store:
        assert store.record_accepted(1, "pi-1", contribution("first"), at=50.0) is True
        for stop in (own_server.stop, own_server.kill):
            stop()
            for call in (
                lambda: store.record_accepted(1, "pi-2", contribution(), at=51.0),
                lambda: store.participants(1),
                store.newest_version,
            ):
                with pytest.raises(StoreUnavailable):
                    call()
            own_server.start()
            # What was accepted is there, what was not done was not done, and work goes on.
            assert [p.device for p in store.accepted_in(1)] == ["pi-1"]
            assert store.record_accepted(1, "pi-1", contribution("second"), at=52.0) is False
        assert store.record_accepted(1, "pi-2", contribution(), at=53.0) is True


def test_a_server_that_is_not_there_is_said_so(tmp_path, free_port):
    with pytest.raises(StoreUnavailable, match=str(free_port)):
        Store.open(tmp_path, f"postgresql+psycopg://fedge@127.0.0.1:{free_port}/fedge", create=True)


def test_one_coordinator_serves_a_database_whatever_its_folder(tmp_path, on_postgres):
    folder, url = on_postgres
    with Store.open(folder, url, create=True, serve=True):
        with pytest.raises(ConfigError, match="a coordinator serves"):
            Store.open(tmp_path / "elsewhere", url, create=True, serve=True)
        # The folder that was refused is free again.
        Store.open(tmp_path / "elsewhere", None, create=True, serve=True).close()
    Store.open(tmp_path / "elsewhere", url, serve=True).close()


def end_serving_connection(server: PostgresServer, url: str) -> None:
    """What a restart of a router between the two does to an idle connection."""
    server.run(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_locks WHERE locktype = 'advisory' "
        "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
        url.rpartition("/")[2],
    )


def test_the_right_to_serve_is_taken_again_when_its_connection_was_lost(on_postgres, postgres):
    with filled(on_postgres) as store:
        end_serving_connection(postgres, on_postgres[1])
        assert store.record_accepted(1, "pi-1", contribution(), at=50.0) is True
        with pytest.raises(ConfigError, match="a coordinator serves"):
            Store.open(on_postgres[0].parent / "other", on_postgres[1], serve=True, create=True)


def test_another_lock_is_not_the_right_to_serve(on_postgres):
    with filled(on_postgres) as store:
        # The connection is there, and what it holds is somebody else's: in a database of many
        # programs the number of a process, and a lock, may be those of another one.
        serving = store._database._backend._serving
        serving.execute(text("SELECT pg_advisory_unlock_all()"))
        serving.execute(text("SELECT pg_advisory_lock(42), pg_advisory_lock(0, 42)"))
        assert store.record_accepted(1, "pi-1", contribution(), at=50.0) is True
        # So it has taken the right again.
        with pytest.raises(ConfigError, match="a coordinator serves"):
            Store.open(on_postgres[0].parent / "other", on_postgres[1], serve=True, create=True)


def test_who_serves_takes_the_right_once(on_postgres):
    with filled(on_postgres) as store:
        serving = store._database._backend._serving
        for device in ("pi-1", "pi-2"):
            store.record_accepted(1, device, contribution(), at=50.0)
        # It recognised its own lock.
        assert store._database._backend._serving is serving


def test_a_server_that_forbids_is_a_state_that_passes(on_postgres, postgres):
    name = on_postgres[1].rpartition("/")[2]
    filled(on_postgres).close()
    postgres.run("CREATE ROLE guest LOGIN")
    try:
        as_guest = on_postgres[0], on_postgres[1].replace("fedge@", "guest@")
        with pytest.raises(StoreUnavailable, match="permission denied"):
            Store.open(*as_guest)
        postgres.run("GRANT SELECT ON ALL TABLES IN SCHEMA public TO guest", name)
        with Store.open(*as_guest) as guest:
            assert guest.newest_version().number == 0
            with pytest.raises(StoreUnavailable, match="permission denied"):
                guest.open_round(a_round(2))
    finally:
        postgres.run("REVOKE ALL ON ALL TABLES IN SCHEMA public FROM guest", name)
        postgres.run("DROP ROLE guest", name)


def test_who_lost_the_right_to_serve_writes_no_more(tmp_path, on_postgres, postgres):
    _, url = on_postgres
    with filled(on_postgres) as first:
        end_serving_connection(postgres, url)
        with Store.open(tmp_path / "other", url, create=True, serve=True) as second:
            with pytest.raises(StoreUnavailable, match="another coordinator serves now"):
                first.record_accepted(1, "pi-1", contribution(), at=50.0)
            assert second.record_accepted(1, "pi-2", contribution(), at=50.0) is True
        # The other is gone, and what the first one knows is out of date: it must not go on.
        with pytest.raises(StoreError, match="start it again") as refused:
            first.record_accepted(1, "pi-1", contribution(), at=51.0)
        assert not isinstance(refused.value, StoreUnavailable)
    with Store.open(tmp_path / "third", url, create=True, serve=True) as third:
        assert [p.device for p in third.accepted_in(1)] == ["pi-2"]


@pytest.mark.parametrize("committed", [True, False])
def test_a_commit_whose_answer_was_lost_is_settled(on_postgres, postgres, committed):
    lost = []

    def cut(connection):
        """The connection breaks in the middle of a commit: after it happened, or before."""
        driver = connection.connection.driver_connection

        def commit():
            lost.append(driver.info.backend_pid)
            if committed:
                type(driver).commit(driver)
            postgres.run(f"SELECT pg_terminate_backend({driver.info.backend_pid}, 5000)")
            raise psycopg.OperationalError("server closed the connection unexpectedly")

        driver.commit = commit

    with filled(on_postgres) as store:
        event.listen(store._database.engine, "commit", cut, once=True)
        if committed:
            assert store.record_accepted(1, "pi-1", contribution(), at=50.0) is True
        else:
            with pytest.raises(StoreUnavailable, match="closed the connection"):
                store.record_accepted(1, "pi-1", contribution(), at=50.0)
        assert len(lost) == 1
        assert len(store.accepted_in(1)) == committed
        assert store.record_accepted(1, "pi-1", contribution(), at=51.0) is not committed


@pytest.mark.e2e
def test_a_commit_that_nobody_can_tell_of_is_not_said_to_have_failed(
    tmp_path, own_server, monkeypatch
):
    monkeypatch.setattr(store_postgresql, "IN_DOUBT_S", 0.0)

    def cut(connection):
        own_server.kill()

    with filled((tmp_path, own_server.new_database())) as store:
        event.listen(store._database.engine, "commit", cut, once=True)
        with pytest.raises(StoreError, match="nobody says whether it happened") as refused:
            store.record_accepted(1, "pi-1", contribution(), at=50.0)
        # Not "nothing was changed": who hears this starts again and reads what is there.
        assert not isinstance(refused.value, StoreUnavailable)


def test_a_database_may_hold_a_state_in_each_of_its_schemas(tmp_path, postgres):
    url = postgres.new_database()
    for name in ("first", "second"):
        postgres.run(f"CREATE SCHEMA {name}", url.rpartition("/")[2])
    places = [
        (tmp_path / name, f"{url}?options=-csearch_path%3D{name}") for name in ("first", "second")
    ]
    with filled(places[0]) as first, filled(places[1]) as second:
        first.bind_population("kitchen")
        second.bind_population("garden")
        assert first.record_accepted(1, "pi-1", contribution(), at=50.0) is True
        assert second.accepted_in(1) == ()
        # Neither waits for the other's writers.
        with first.database.write():
            assert second.record_accepted(1, "pi-1", contribution(), at=50.0) is True


def test_a_rollback_by_another_process_is_written_beside_the_coordinator(on_postgres):
    with filled(on_postgres) as serving, Store.open(*on_postgres) as command:
        command.record_version(version(1, note="rollback of 0 to 0"))
        assert serving.newest_version().number == 1
        serving.record_version(version(2))


def test_a_long_transaction_of_somebody_else_delays_and_does_not_block(on_postgres, postgres):
    with filled(on_postgres) as store, store._database.engine.connect() as other, other.begin():
        other.execute(text("SELECT count(*) FROM participants"))
        assert store.record_accepted(1, "pi-1", contribution(), at=50.0) is True


def test_commits_are_durable_whatever_the_server_does_by_default(on_postgres):
    with filled(on_postgres) as store, store._database.read() as connection:
        assert connection.scalar(text("SHOW synchronous_commit")) == "on"
        assert connection.scalar(text("SHOW transaction_isolation")) == "repeatable read"
