"""What the coordinator keeps on the broker: retained chunks and announcements.

The broker is a cache that may forget everything, so all of it can be published again from the
store at any time, and is at each reconnect. Chunks go first and the announcement that names them
last, so whoever reads an announcement finds what it names.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator

from fedge.coordinator.store import VersionRecord
from fedge.schemas.blob_files import BlobDirectory, read_chunk
from fedge.schemas.blobs import BlobRef, ChunkSet
from fedge.schemas.errors import LinkError, StoreError
from fedge.schemas.link.protocol import MAX_IN_FLIGHT, Link
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import Message, RollCall, VersionAnnouncement, encode
from fedge.schemas.plan import PlanManifest
from fedge.schemas.topics import Topics

log = EventLog(__name__)

ROLL_EXPIRY_S = 60.0
"""A roll is called for those who are there now."""


def announcement_of(
    version: VersionRecord, plan: BlobRef, *, staged: bool = False
) -> VersionAnnouncement:
    """What devices are told of a version. `staged`: rollouts say when apps use it."""
    return VersionAnnouncement(
        number=version.number,
        plan=plan,
        weights=version.weights,
        golden=version.golden,
        model_sha256=version.model_sha256,
        model_bytes=version.model_bytes,
        staged=True if staged else None,
    )


def plan_blobs(manifest: PlanManifest, plan: BlobRef) -> tuple[BlobRef, ...]:
    """Every blob of a plan, its manifest first."""
    return (plan, *manifest.blobs)


class Publisher:
    """Publishes over two sessions: announcements over `control`, chunks over `bulk`."""

    def __init__(self, control: Link, bulk: Link, topics: Topics, blobs: BlobDirectory) -> None:
        self._control = control
        self._bulk = bulk
        self._topics = topics
        self._blobs = blobs
        self._seeded: set[str] = set()
        self._announced: dict[type[Message], dict[str, object]] = {}
        self._generation = 0
        self._repeating: dict[str, ChunkSet] = {}
        self.chunk_bytes_published = 0

    def forget(self) -> None:
        """The broker may have lost what it kept: publish it again when it is next named."""
        self._seeded.clear()
        self._announced.clear()
        self._generation += 1

    def say_again(self) -> None:
        """Announcements may have been lost on their way: publish them when they are next made."""
        self._announced.clear()

    async def announce(self, message: Message) -> None:
        """Replaces the retained announcement of this kind, unless it says the same already."""
        kind = type(message)
        said = message.model_dump(exclude={"id", "ts"})
        if self._announced.get(kind) == said:
            return
        generation = self._generation
        await self._control.publish(self._topics.announcement(kind), encode(message), retain=True)
        if generation == self._generation:
            self._announced[kind] = said

    async def withdraw(self, kind: type[Message]) -> None:
        """Has the broker forget the retained announcement of this kind."""
        self._announced.pop(kind, None)
        await self._control.publish(self._topics.announcement(kind), b"", retain=True)

    async def call_roll(self, spread_s: float) -> None:
        """Asks every connected device to say that it is there."""
        roll = RollCall(spread_s=spread_s)
        topic = self._topics.announcement(RollCall)
        await self._control.publish(topic, encode(roll), expiry_s=ROLL_EXPIRY_S)

    async def seed(self, refs: Iterable[BlobRef]) -> None:
        """Publishes every chunk of the blobs that this connection has not seen yet.

        Raises `LinkError` if the broker refuses one, `StoreError` if one cannot be read.
        """
        for ref in refs:
            if ref.sha256 not in self._seeded:
                generation = self._generation
                read = await self._chunk_reader(ref)
                await self._each(ref.sha256, range(ref.chunk_count), read)
                if generation == self._generation:
                    self._seeded.add(ref.sha256)

    async def repeat(self, ref: BlobRef, missing: ChunkSet) -> None:
        """Publishes the chunks that a device did not find.

        What others miss of the same blob meanwhile is published with it, each chunk once.
        """
        underway = self._repeating.get(ref.sha256)
        if underway is not None:
            for index in range(ref.chunk_count):
                if index in missing:
                    underway.add(index)
            return
        self._repeating[ref.sha256] = missing
        try:
            done: set[int] = set()
            while wanted := [i for i in range(ref.chunk_count) if i in missing and i not in done]:
                log.info("chunks_repeated", sha256=ref.sha256[:12], chunks=len(wanted))
                await self._each(ref.sha256, wanted, await self._chunk_reader(ref))
                done.update(wanted)
        finally:
            del self._repeating[ref.sha256]

    async def clear(self, sha256: str, chunk_count: int) -> None:
        """Removes the chunks of a blob that no device needs any more from the broker."""
        self._seeded.discard(sha256)
        await self._each(sha256, range(chunk_count), lambda _: b"")

    async def _chunk_reader(self, ref: BlobRef) -> Callable[[int], bytes]:
        # It may have to be fetched from another place first.
        path = await asyncio.to_thread(self._blobs.path, ref.sha256)
        return lambda index: read_chunk(path, ref, index)

    async def _each(
        self, sha256: str, indexes: Iterable[int], read: Callable[[int], bytes]
    ) -> None:
        rest: Iterator[int] = iter(indexes)

        async def publish_rest() -> None:
            # Several of these share one iterator: that many chunks are in memory, and no more.
            for index in rest:
                payload = read(index)
                topic = self._topics.chunk(sha256, index)
                await self._bulk.publish(topic, payload, retain=True)
                self.chunk_bytes_published += len(payload)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(MAX_IN_FLIGHT):
                    group.create_task(publish_rest(), name=f"publish-{sha256[:8]}")
        except* (LinkError, StoreError) as failed:
            # One refusal, not a group of eight: callers deal with what the broker or the disk said.
            raise failed.exceptions[0] from None
