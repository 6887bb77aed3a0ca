"""The store when its database is away, full, locked or taken, and when many write at once."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import event, text

from fedge.coordinator.store import Outcome, ParticipantStatus, Store
from fedge.coordinator.store import sqlite as store_sqlite
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
    return tmp_path / "state", postgres.new_database()


# ---------------------------------------------------------------- many at once


def in_threads(count, work):
    """The results of `work(index)` on so many threads that all begin at once."""
    ready = threading.Barrier(count)

    def begin(index):
        ready.wait()
        return work(index)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def test_of_many_that_record_one_contribution_one_counts_it(where):
    with filled(where) as first, Store.open(*where) as second:
        stores = (first, second)

        def accept(index):
            update = contribution(f"update {index}")
            return stores[index % 2].record_accepted(1, "pi-1", update, at=50.0)

        assert sorted(in_threads(6, accept)) == [False] * 5 + [True]
        assert [p.device for p in first.accepted_in(1)] == ["pi-1"]


def test_of_many_that_make_the_same_version_one_does(where):
    with filled(where) as first, Store.open(*where) as second:

        def record(index):
            with contextlib.suppress(StoreError):
                (first, second)[index % 2].record_version(version(1, note=f"by {index}"))
                return f"by {index}"

        recorded = [note for note in in_threads(6, record) if note is not None]
        assert recorded == [first.newest_version().note]
        assert [v.number for v in first.versions()] == [0, 1]


@pytest.mark.parametrize("attempt", range(4))
def test_an_update_is_accepted_before_the_close_or_late(where, attempt):
    with filled(where) as first, Store.open(*where) as second:
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


def test_of_many_that_close_a_round_one_does(where):
    with filled(where) as store:

        def close(index):
            with contextlib.suppress(StoreError):
                if index % 2:
                    store.abandon_round(1, f"by {index}", at=60.0)
                else:
                    store.record_version(version(index + 1, round_number=1))
                return True
            return False

        assert sum(in_threads(6, close)) == 1


def test_a_device_is_asked_once_however_many_ask(where):
    with filled(where) as store:
        store.open_round(asynchronous(2))

        def ask(_index):
            return store.record_asked(2, "pi-1", base=0, until=9.0, at=1.0)

        assert sum(in_threads(6, ask)) == 1


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
    monkeypatch.setattr(store_sqlite, "WAL_WAIT_MS", 5000)
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
        for number in range(2, 12):
            store.open_round(a_round(number))
            names = [f"pi-{n}" for n in range(200)]
            store.record_assignment(number, names, train_until=640.0, at=40.0)
            attempts.append(backend._empty_again_at)
        # It grows, since the reader needs it, and was tried once, not at each commit.
        assert log.stat().st_size > 200_000
        assert len(set(attempts) - {0.0}) == 1
        reader.close()
        monkeypatch.setattr(backend, "_empty_again_at", 0.0)
        store.open_round(a_round(12))
        assert log.stat().st_size < 100_000


# ---------------------------------------------------------------- PostgreSQL: gone and back


@pytest.fixture
def own_server() -> Iterator[PostgresServer]:
    """A server that the test may stop."""
    if POSTGRES_BIN is None:
        pytest.skip(MISSING)
    with PostgresServer() as server:
        yield server


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
        with pytest.raises(ConfigError, match="another coordinator serves"):
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
        with pytest.raises(ConfigError, match="another coordinator serves"):
            Store.open(on_postgres[0].parent / "other", on_postgres[1], serve=True, create=True)


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
    with filled(on_postgres) as store:

        def cut(connection):
            # The connection breaks in the middle of a commit: after it, or before it.
            driver = connection.connection.driver_connection
            if committed:
                driver.pgconn.exec_(b"COMMIT")
            postgres.run(f"SELECT pg_terminate_backend({driver.info.backend_pid}, 5000)")

        event.listen(store._database.engine, "commit", cut, once=True)
        if committed:
            assert store.record_accepted(1, "pi-1", contribution(), at=50.0) is True
        else:
            with pytest.raises(StoreUnavailable):
                store.record_accepted(1, "pi-1", contribution(), at=50.0)
        assert len(store.accepted_in(1)) == committed
        assert store.record_accepted(1, "pi-1", contribution(), at=51.0) is not committed


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
