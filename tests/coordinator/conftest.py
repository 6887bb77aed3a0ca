"""Fixtures for the coordinator's tests: both databases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres import MISSING, POSTGRES_BIN, PostgresServer


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL for the whole session: never stop it in a test."""
    if POSTGRES_BIN is None:
        pytest.skip(MISSING)
    pytest.importorskip("psycopg", reason="psycopg is not installed: fedge[postgresql]")
    with PostgresServer() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without a row: a file in the state folder, then one on a real PostgreSQL."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'state' / 'fedge.sqlite'}"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.used_database()


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without tables, of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'state' / 'fedge.sqlite'}"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.new_database()
