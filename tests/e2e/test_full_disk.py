"""A coordinator whose disk is full, or read-only, says so, promises nothing, and goes on after."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedge.coordinator.store import ParticipantStatus
from fedge.schemas.blobs import chunks_of, describe
from fedge.schemas.ids import new_message_id
from fedge.schemas.messages import Grant, Receipt, ReceiptStatus
from fedge.schemas.tensors import encode_tensors
from tests.brokers import MosquittoBroker
from tests.chaos.disks import Disk, NoMounting
from tests.fleet import Fleet, fleet
from tests.scripted_device import ScriptedDevice, scripted_device

pytestmark = pytest.mark.e2e

UPDATE = encode_tensors(
    {
        "0.weight": np.ones((8, 4), np.float32),
        "0.bias": np.ones(8, np.float32),
        "2.weight": np.ones((3, 8), np.float32),
        "2.bias": np.ones(3, np.float32),
    }
)


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[Disk]:
    try:
        disk = Disk(path, 4 * 1024 * 1024)
    except NoMounting as error:
        pytest.skip(f"a small disk cannot be mounted here: {error}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


async def offered_until_settled(device: ScriptedDevice, assignment, update: bytes) -> Receipt:
    """Offers and sends again and again, as a device does that gets no receipt."""
    offer = device.offer_of(assignment, describe(update))
    while True:
        await device.send(offer.model_copy(update={"id": new_message_id()}))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                return await device.receive(Receipt)
        if device.has_received(Grant):
            await device.receive(Grant)
            for index, chunk in enumerate(chunks_of(update, offer.update.chunk_bytes)):
                await device.send_chunk(offer.update, index, bytes(chunk))


async def storage_is_said_to_be(caplog: pytest.LogCaptureFixture, event: str) -> None:
    while not any(  # noqa: ASYNC110 -- pytest keeps a list, and tells nobody
        record.getMessage().startswith(event) for record in caplog.records
    ):
        await asyncio.sleep(0.05)


async def play(here: Fleet, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    async with scripted_device(here, "a") as device:
        assignment = await device.join_round()
        disk.fill()
        trying = asyncio.create_task(offered_until_settled(device, assignment, UPDATE))
        await storage_is_said_to_be(caplog, "storage_unavailable")
        await asyncio.sleep(1.0)
        assert not trying.done()
        with here.store() as store:
            (participant,) = store.participants(1)
            assert participant.status is not ParticipantStatus.ACCEPTED
        disk.free()
        receipt = await trying
        assert receipt.status is ReceiptStatus.ACCEPTED
        await storage_is_said_to_be(caplog, "storage_available")


def test_a_full_disk_delays_an_update_and_loses_nothing(
    mosquitto: MosquittoBroker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedge.coordinator")

    async def scenario(disk: Disk) -> None:
        settings = {"goal": 1, "over_selection": 1.0, "versions": 1}
        async with fleet(mosquitto.port, tmp_path, round=settings) as here:
            here.start_coordinator()
            await here.version(0)
            await here.during(play(here, disk, caplog))
            await here.version(1)
            report = here.report(1)
            assert [p.status for p in report.participants] == [ParticipantStatus.ACCEPTED]

    with small_disk(tmp_path / "coordinator") as disk:
        asyncio.run(scenario(disk))
