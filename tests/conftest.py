"""Fixtures for every test: real brokers, free ports, the data folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis  # noqa: F401 -- torch imports it, and CPython 3.11 may fail to in another thread
import pytest

from tests.brokers import MOSQUITTO, MosquittoBroker, find_free_port

# The suite runs beside other programs on small machines; set before numpy or torch are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MosquittoBroker]:
    """A Mosquitto for the whole session, on a free port: never kill it in a test."""
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed (Debian: apt-get install mosquitto)")
    with MosquittoBroker(tmp_path_factory.mktemp("mosquitto")) as broker:
        yield broker


@pytest.fixture
def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    return find_free_port()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of data sets: FEDGE_DATA, or `shared/data` beside the repository."""
    folder = Path(os.environ.get("FEDGE_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; set FEDGE_DATA")
    return folder
