"""A device's uploads: in order, within the credit, and in chunks that the broker takes."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from fedge.edge_agent.upload import Uploads
from fedge.schemas import topics
from fedge.schemas.blobs import MIN_CHUNK_BYTES, BlobRef, ChunkSet, describe
from fedge.schemas.errors import PayloadTooLarge
from fedge.schemas.link.memory import MemoryBroker, MemoryLink
from fedge.schemas.link.protocol import Delivery
from fedge.schemas.messages import Grant, Have
from fedge.schemas.topics import Topics

CHUNK = MIN_CHUNK_BYTES
DATA = random.Random(1).randbytes(10 * CHUNK - 7)
NAMES = Topics("p")


class Bench:
    """One device's `Uploads`, and a session that sees its chunks."""

    def __init__(self, folder: Path, **limits: int) -> None:
        self.broker = MemoryBroker(random.Random(1), **limits)
        self.link = self.broker.link("device")
        self.watcher: MemoryLink = self.broker.link("watcher", receive_maximum=1000)
        self.uploads = Uploads(self.link, NAMES, "d")
        self.path = folder / "update"
        self.path.write_bytes(DATA)

    async def start(self) -> None:
        await self.watcher.subscribe(*NAMES.coordinator_bulk)
        await self.watcher.start()
        await self.link.start()

    async def chunks(self) -> list[tuple[int, bytes]]:
        """What has come since the last call."""
        for _ in range(100):
            await asyncio.sleep(0)
        found = []
        for event in list(self.watcher._events):
            if isinstance(event, Delivery):
                index = topics.parse(event.topic).chunk
                assert index is not None
                found.append((index, event.payload))
        self.watcher._events.clear()
        return found

    async def indexes(self) -> list[int]:
        return [index for index, _ in await self.chunks()]


def grant(ref: BlobRef, window: int, *held: int) -> Grant:
    text = ChunkSet(ref.chunk_count, held).encode()
    return Grant(round=1, sha256=ref.sha256, window=window, held=text)


def have(ref: BlobRef, *held: int) -> Have:
    return Have(round=1, sha256=ref.sha256, held=ChunkSet(ref.chunk_count, held).encode())


def test_chunks_go_out_in_order_and_no_more_than_the_credit(tmp_path: Path) -> None:
    async def scenario() -> None:
        bench, ref = Bench(tmp_path), describe(DATA, CHUNK)
        await bench.start()
        bench.uploads.granted(grant(ref, 4, 1), ref, bench.path)
        assert await bench.indexes() == [0, 2, 3, 4]
        bench.uploads.acknowledged(have(ref, 0, 1, 2))
        assert await bench.indexes() == [5, 6]
        # One that comes late takes nothing back.
        bench.uploads.acknowledged(have(ref, 1))
        assert await bench.indexes() == []
        await bench.uploads.close()

    asyncio.run(scenario())


def test_a_new_grant_begins_anew_from_the_lowest_missing_chunk(tmp_path: Path) -> None:
    async def scenario() -> None:
        bench, ref = Bench(tmp_path), describe(DATA, CHUNK)
        await bench.start()
        bench.broker.partition("device")
        bench.uploads.granted(grant(ref, 8), ref, bench.path)
        assert await bench.indexes() == []
        # The chunk in hand goes out first; then what the new grant asks for, from the beginning.
        bench.uploads.granted(grant(ref, 2, 3), ref, bench.path)
        bench.broker.heal("device")
        assert await bench.indexes() == [0, 0, 1]
        await bench.uploads.close()

    asyncio.run(scenario())


def test_an_update_is_cut_anew_for_a_broker_that_takes_less(tmp_path: Path) -> None:
    async def scenario() -> None:
        bench = Bench(tmp_path, max_payload_bytes=3000)
        large = describe(DATA, 4 * CHUNK)
        await bench.start()
        bench.uploads.granted(grant(large, 8), large, bench.path)
        assert await bench.indexes() == []
        smaller = await bench.uploads.fitting(large, bench.path)
        assert (smaller.sha256, smaller.chunk_bytes) == (large.sha256, 3000)
        bench.uploads.granted(grant(smaller, 8), smaller, bench.path)
        assert b"".join(payload for _, payload in await bench.chunks()) == DATA
        # Once it fits, it stays as it is, whatever the broker takes later.
        bench.broker.max_payload_bytes = 10**6
        assert await bench.uploads.fitting(smaller, bench.path) == smaller
        await bench.uploads.close()

    asyncio.run(scenario())


def test_what_fits_is_not_read_again_and_what_cannot_fit_is_an_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        bench = Bench(tmp_path, max_payload_bytes=3000)
        nowhere = tmp_path / "not there"
        small = describe(DATA[:2000], 4 * CHUNK)
        assert await bench.uploads.fitting(small, nowhere) is small
        fitting = describe(DATA, 2 * CHUNK)
        assert await bench.uploads.fitting(fitting, nowhere) is fitting
        bench.broker.max_payload_bytes = MIN_CHUNK_BYTES - 1
        with pytest.raises(PayloadTooLarge, match="max_packet_size"):
            await bench.uploads.fitting(fitting, nowhere)

    asyncio.run(scenario())
