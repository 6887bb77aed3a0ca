"""Schemas: made by migrations, equal to the tables that the code knows, and upgraded in place."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, text

from fedge import __version__
from fedge.coordinator.store import Outcome, Store
from fedge.coordinator.store import schema as store_schema
from fedge.coordinator.store.database import Database
from fedge.coordinator.store.tables import metadata
from fedge.schemas.errors import ConfigError, StoreError

RELEASE_0_1_0 = Path(__file__).with_name("release_0_1_0.sql").read_text(encoding="utf-8")


@pytest.fixture
def old_url(empty_database_url: str, tmp_path: Path) -> str:
    """A database that the release 0.1.0 has made and filled."""
    (tmp_path / "state").mkdir()
    engine = create_engine(empty_database_url)
    with engine.begin() as connection:
        statements = [part.strip() for part in RELEASE_0_1_0.split(";\n")]
        # SQLite's words for three types; rows go after the tables that they refer to.
        if connection.dialect.name == "postgresql":
            statements = [as_postgresql(one) for one in statements]
        first = ["facts", "plans", "rounds", "versions"]
        tables = sorted(
            (one for one in statements if "CREATE TABLE" in one),
            key=lambda one: not any(f"CREATE TABLE {name}" in one for name in first),
        )
        rows = sorted(
            (one for one in statements if "INSERT INTO" in one),
            key=lambda one: not any(f'INSERT INTO "{name}"' in one for name in first),
        )
        for statement in (*tables, *rows):
            connection.exec_driver_sql(statement.replace("%", "%%"))
    engine.dispose()
    return empty_database_url


def as_postgresql(statement: str) -> str:
    """The statement with PostgreSQL's name of a type and its truth value."""
    statement = re.sub(r"\bDOUBLE\b", "DOUBLE PRECISION", statement)
    return statement.replace("3.0,3.0,NULL,1,", "3.0,3.0,NULL,TRUE,")


def run(url: str, *statements: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


def revision(url: str) -> str | None:
    engine = create_engine(url)
    with engine.connect() as connection:
        found = store_schema.revision_of(connection)
    engine.dispose()
    return found


def test_the_migrations_make_exactly_the_tables_that_the_code_knows(empty_database_url, tmp_path):
    with Store.open(tmp_path / "state", empty_database_url, create=True):
        pass
    check_equal_to_metadata(empty_database_url)


def check_equal_to_metadata(url: str) -> None:
    engine = create_engine(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True}
        )
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_the_comparison_sees_a_difference(empty_database_url, tmp_path):
    Store.open(tmp_path / "state", empty_database_url, create=True).close()
    run(empty_database_url, "DROP INDEX participants_by_counted_in")
    run(empty_database_url, "ALTER TABLE rounds DROP COLUMN mode")
    with pytest.raises(AssertionError, match="participants_by_counted_in"):
        check_equal_to_metadata(empty_database_url)


def test_the_newest_migration_is_the_one_that_the_code_names():
    script = ScriptDirectory(str(store_schema._folder()))
    assert script.get_current_head() == store_schema.HEAD
    assert {each.revision for each in script.walk_revisions()} == store_schema._migrations()


def test_a_database_of_the_first_release_is_upgraded_with_all_it_held(old_url, tmp_path):
    assert revision(old_url) == "0001"
    with Store.open(tmp_path / "state", old_url, create=True, serve=True) as store:
        assert store.population() == "kitchen"
        assert [v.number for v in store.versions()] == [0, 1]
        assert all(v.files_kept for v in store.versions())
        closed, still_open = store.rounds()
        assert (closed.outcome, closed.mode) == (Outcome.AGGREGATED, "sync")
        assert still_open.outcome is None
        assert [p.device for p in store.accepted_in(1)] == ["pi-1"]
        assert [(p.device, p.round) for p in store.accepted_in(2)] == [("pi-2", 2)]
        assert store.devices()[0].online is True
    assert revision(old_url) == store_schema.HEAD
    check_equal_to_metadata(old_url)


def test_a_command_that_only_looks_does_not_upgrade(old_url, tmp_path):
    with pytest.raises(ConfigError, match="`fedge serve` once"):
        Store.open(tmp_path / "state", old_url)
    assert revision(old_url) == "0001"


def test_the_first_release_refuses_what_was_upgraded(old_url, tmp_path):
    Store.open(tmp_path / "state", old_url, create=True).close()
    engine = create_engine(old_url)
    with engine.connect() as connection:
        # It reads nothing but this row, and goes on only if it says 1.
        found = connection.scalar(text("SELECT value FROM facts WHERE name = 'schema_version'"))
    engine.dispose()
    assert found != "1"


@pytest.mark.parametrize("create", [True, False])
def test_a_newer_database_is_refused_with_the_release_that_is_needed(
    empty_database_url, tmp_path, create
):
    Store.open(tmp_path / "state", empty_database_url, create=True).close()
    run(empty_database_url, "UPDATE alembic_version SET version_num = '0999'")
    run(empty_database_url, "UPDATE facts SET value = '7.1.0' WHERE name = 'release'")
    with pytest.raises(ConfigError, match=rf"schema 0999.*{__version__}.*install fedge 7\.1\.0"):
        Store.open(tmp_path / "state", empty_database_url, create=create)


@pytest.mark.parametrize("create", [True, False])
def test_a_database_of_another_program_is_left_alone(empty_database_url, tmp_path, create):
    (tmp_path / "state").mkdir()
    run(empty_database_url, "CREATE TABLE alembic_version (version_num VARCHAR(32))")
    run(empty_database_url, "INSERT INTO alembic_version VALUES ('0002')")
    with pytest.raises(ConfigError, match="another program"):
        Store.open(tmp_path / "state", empty_database_url, create=create)


def test_an_unknown_version_of_the_first_kind_is_refused(tmp_path):
    with sqlite3.connect(tmp_path / "fedge.sqlite") as connection:
        connection.execute("CREATE TABLE facts (name TEXT, value TEXT)")
        connection.execute("INSERT INTO facts VALUES ('schema_version', '99')")
    with pytest.raises(ConfigError, match="schema version 99"):
        Store.open(tmp_path, create=True)


def test_a_failed_upgrade_changes_nothing(old_url, tmp_path, monkeypatch):
    # The last statement of the upgrade, after all its tables, is given what no database takes.
    monkeypatch.setattr(store_schema, "__version__", object())
    with pytest.raises(StoreError):
        Store.open(tmp_path / "state", old_url, create=True)
    monkeypatch.undo()
    assert revision(old_url) == "0001"
    engine = create_engine(old_url)
    with engine.connect() as connection:
        assert not engine.dialect.has_table(connection, "retained")
        assert not engine.dialect.has_table(connection, "alembic_version")
    engine.dispose()
    Store.open(tmp_path / "state", old_url, create=True).close()
    assert revision(old_url) == store_schema.HEAD


def test_two_that_upgrade_at_once_do_it_once(old_url):
    with ThreadPoolExecutor(2) as pool:
        opened = list(pool.map(lambda _: Database(old_url, create=True), range(2)))
    for each in opened:
        each.close()
    assert revision(old_url) == store_schema.HEAD


def test_a_current_database_is_opened_without_loading_alembic(tmp_path):
    Store.open(tmp_path, create=True).close()
    program = (
        "import sys, pathlib; from fedge.coordinator.store import Store; "
        "Store.open(pathlib.Path(sys.argv[1]), create=True, serve=True).close(); "
        "print('alembic' in sys.modules)"
    )
    said = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True, text=True
    )
    assert said.stdout == "False\n"
