"""A fleet whose coordinator loses its disk: the backup is restored elsewhere, and devices go on."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from fedge.coordinator.backup import BackupManifest, make_backup
from fedge.coordinator.checkup import check
from fedge.coordinator.old_state import Place
from fedge.coordinator.restore import Restored, restore_backup
from fedge.coordinator.settings import Settings, StoreSettings
from fedge.coordinator.store import Outcome, Store
from tests.brokers import MosquittoBroker
from tests.fleet import fleet, tiny_examples
from tests.postgres import MISSING, POSTGRES_BIN, PostgresServer

pytestmark = pytest.mark.e2e


def quiet(_done: int, _files: int) -> None:
    """No progress is shown."""


def opened(settings: Settings) -> Store:
    return Store.open(settings.state_dir, settings.store.database, blobs=settings.store.blobs)


def back_up(settings: Settings, target: Path) -> BackupManifest:
    with opened(settings) as store:
        return make_backup(store, settings.state_dir, target, now=time.time(), progress=quiet)


def restore(settings: Settings, backup: Path, gap: int) -> Restored:
    return restore_backup(
        backup,
        Place(settings.state_dir, settings.store.database, settings.store.blobs),
        population=settings.population,
        replace=False,
        gap=gap,
        now=time.time(),
        progress=quiet,
    )


@pytest.fixture
def server() -> PostgresServer:
    if POSTGRES_BIN is None:
        pytest.skip(MISSING)
    with PostgresServer() as started:
        yield started


async def lose_and_restore(folder: Path, broker: MosquittoBroker, server: PostgresServer) -> None:
    on_postgres = {
        "database": server.new_database(),
        "blobs": f"file://{folder / 'blobs elsewhere'}",
    }
    tables = {
        "round": {"goal": 2, "over_selection": 1.0, "versions": 3},
        "retention": {"versions": 2},
        "store": on_postgres,
    }
    async with fleet(broker.port, folder, **tables) as f:
        coordinator = f.start_coordinator()
        for index in range(2):
            f.start_agent(f"d{index}", tiny_examples(60, seed=index))
        await f.version(1)
        manifest = await asyncio.to_thread(back_up, f.settings, folder / "backup")
        await f.version(3)
        await f.stop([coordinator])
        with opened(f.settings) as store:
            assert [v.number for v in store.versions()] == [0, 1, 2, 3]

        # The server and the bucket are lost. What is left is the backup, and another computer.
        round_settings = f.settings.round.model_copy(update={"versions": 14})
        f.settings = f.settings.model_copy(
            update={
                "state_dir": folder / "new computer",
                "store": StoreSettings(),
                "round": round_settings,
            }
        )
        restored = await asyncio.to_thread(restore, f.settings, folder / "backup", 10)
        assert restored.version == manifest.newest_version + 10 > 3
        f.start_coordinator()
        # The devices know version 3, and follow: they train from what was restored.
        await f.version(14)
        with opened(f.settings) as store:
            numbers = [v.number for v in store.versions()]
            assert numbers[-1] == 14
            assert numbers == sorted(numbers)
            for record in store.rounds():
                if record.number > restored.round and record.outcome is Outcome.AGGREGATED:
                    assert len(store.accepted_in(record.number)) == 2
            wish = f.settings.retention.wish
            state = f.settings.state_dir
            found = check(store, state, wish, now=time.time(), progress=quiet)
            assert found.problems == ()


def test_devices_follow_a_coordinator_that_was_restored_elsewhere(
    tmp_path: Path, mosquitto: MosquittoBroker, server: PostgresServer
) -> None:
    asyncio.run(lose_and_restore(tmp_path, mosquitto, server))
