"""Publishing blobs when one of them cannot be read."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from fedge.coordinator.publisher import Publisher
from fedge.schemas.blob_files import BlobDirectory
from fedge.schemas.blobs import describe
from fedge.schemas.errors import StoreError
from fedge.schemas.link.memory import MemoryBroker
from fedge.schemas.topics import Topics


def test_a_chunk_that_cannot_be_read_is_one_error_and_not_a_group(tmp_path: Path) -> None:
    async def scenario() -> None:
        blobs = BlobDirectory(tmp_path)
        data = random.Random(1).randbytes(20_000)
        ref = describe(data, 1024)
        blobs.put(data)
        bulk = MemoryBroker(random.Random(1)).link("bulk")
        await bulk.start()
        publisher = Publisher(bulk, bulk, Topics("test"), blobs)
        blobs.path(ref.sha256).unlink()
        with pytest.raises(StoreError):
            await publisher.seed([ref])
        blobs.put(data)
        await publisher.seed([ref])
        assert publisher.chunk_bytes_published == len(data)
        await bulk.close()

    asyncio.run(scenario())
