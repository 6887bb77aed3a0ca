"""Sending updates: offer, wait for a grant, send what the credit allows, until there is a receipt.

A broker's acknowledgement is not delivery, so nothing here believes it: what the coordinator has is
what its `grant` and `have` messages say. The update stays in the outbox all the while. Chunks go
out in order, one after the other: from the order in which they come the coordinator learns what was
lost.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from fedge.schemas.blob_files import read_chunk
from fedge.schemas.blobs import (
    MAX_CHUNKS,
    BlobRef,
    BlobSender,
    ChunkSet,
    chunk_bytes_within,
    describe,
)
from fedge.schemas.errors import LinkClosed, LinkError, PayloadTooLarge, PeerError, StoreError
from fedge.schemas.link.protocol import Link
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import Grant, Have
from fedge.schemas.topics import Topics

log = EventLog(__name__)


@dataclass(slots=True)
class _Transfer:
    sender: BlobSender
    wake: asyncio.Event
    task: asyncio.Task[None]


class Uploads:
    """The uploads of one device over its bulk link."""

    def __init__(self, link: Link, topics: Topics, device: str) -> None:
        self._link = link
        self._topics = topics
        self._device = device
        self._transfers: dict[str, _Transfer] = {}

    async def fitting(self, update: BlobRef, path: Path) -> BlobRef:
        """What to offer of the update in `path`: the same bytes, cut smaller where the broker takes
        less than it was cut for.

        Ask before each offer, when the link is up: another broker may have another limit. Raises
        `PayloadTooLarge` if it cannot be cut so small, and `OSError` if the file cannot be read.
        """
        topic = self._topics.upload_chunk(self._device, update.sha256, MAX_CHUNKS - 1)
        limit_bytes = self._link.max_payload_bytes
        chunk_bytes = chunk_bytes_within(limit_bytes, update.chunk_bytes, topic)
        if min(update.chunk_bytes, update.size_bytes) <= chunk_bytes:
            return update
        if update.size_bytes > MAX_CHUNKS * chunk_bytes:
            raise PayloadTooLarge(topic, -(-update.size_bytes // MAX_CHUNKS), limit_bytes)
        log.info(
            "update_cut_anew",
            device=self._device,
            sha256=update.sha256[:12],
            chunk_bytes=chunk_bytes,
            before=update.chunk_bytes,
        )
        return await asyncio.to_thread(lambda: describe(path.read_bytes(), chunk_bytes))

    def granted(self, grant: Grant, update: BlobRef, path: Path) -> None:
        """Starts or restarts sending the update in `path` from what the coordinator has.

        A bitmap that does not fit the update is logged and ignored: the next grant replaces it.
        """
        held = self._held(grant.held, update)
        if held is None:
            return
        transfer = self._transfers.get(update.sha256)
        if transfer is not None and transfer.sender.ref != update:
            # It was cut anew since.
            self.stop(update.sha256)
            transfer = None
        if transfer is None or transfer.task.done():
            sender = BlobSender(update, lambda index: read_chunk(path, update, index))
            wake = asyncio.Event()
            task = asyncio.create_task(
                self._send(sender, wake), name=f"upload-{self._device}-{update.sha256[:8]}"
            )
            transfer = self._transfers[update.sha256] = _Transfer(sender, wake, task)
        transfer.sender.granted(grant.window, held)
        transfer.wake.set()

    def acknowledged(self, have: Have) -> None:
        """The coordinator has more chunks: their credit is free."""
        transfer = self._transfers.get(have.sha256)
        if transfer is None:
            return
        held = self._held(have.held, transfer.sender.ref)
        if held is not None:
            transfer.sender.acknowledged(held)
            transfer.wake.set()

    def stop(self, sha256: str) -> None:
        """Ends a transfer: there is a receipt, or the update is given up."""
        transfer = self._transfers.pop(sha256, None)
        if transfer is not None:
            transfer.task.cancel()

    async def close(self) -> None:
        """Ends every transfer."""
        tasks = [transfer.task for transfer in self._transfers.values()]
        for sha256 in list(self._transfers):
            self.stop(sha256)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _send(self, sender: BlobSender, wake: asyncio.Event) -> None:
        try:
            while not sender.complete:
                await wake.wait()
                wake.clear()
                for index, payload in sender.take():
                    topic = self._topics.upload_chunk(self._device, sender.ref.sha256, index)
                    await self._link.publish(topic, payload)
        except LinkClosed:
            return
        except PayloadTooLarge as error:
            log.error(
                "broker_limit",
                device=self._device,
                chunk_bytes=sender.ref.chunk_bytes,
                limit_bytes=error.limit_bytes,
                advice="it is offered again in smaller chunks",
            )
        except (LinkError, OSError, StoreError) as error:
            # The next grant begins anew; until then the update waits in the outbox.
            log.error("upload_failed", device=self._device, reason=str(error))

    def _held(self, text: str, update: BlobRef) -> ChunkSet | None:
        try:
            return ChunkSet.decode(text, update.chunk_count)
        except PeerError as error:
            log.warning("grant_refused", sha256=update.sha256[:12], detail=error.detail)
            return None
