"""Fetching blobs: from the broker's retained chunks, and from the coordinator as a last resort.

Chunks are asked for by exact topic, a window at a time, verified one by one and written where they
belong. What is half here when the power goes is verified and kept at the next start. If nothing
comes for a while, the coordinator is asked to publish what is missing once more. What a round needs
goes first: another download is cut off for it, whatever that waits for, and goes on afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Iterator
from itertools import islice

from fedge.schemas.blob_files import BlobDirectory, PartialBlob
from fedge.schemas.blobs import BlobRef, ChunkSet
from fedge.schemas.errors import PeerError, StoreError
from fedge.schemas.link.protocol import Link
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import Need
from fedge.schemas.topics import Topics

log = EventLog(__name__)

WINDOW_CHUNKS = 32
"""Chunks subscribed to at a time: enough to hide the broker's answer time, 2 MiB at the most."""
PROBE_CHUNKS = 1
"""After the disk refused a chunk: until one was written, no more are brought for nothing."""
PATIENCE_S = 10.0
"""After so long without a new chunk the coordinator is asked."""


class Downloads:
    """The downloads of one device over its bulk link. One blob at a time, in the order asked.

    What a round needs comes before all others.

    `ask`: publishes a `Need` to the coordinator.
    """

    def __init__(
        self,
        link: Link,
        topics: Topics,
        blobs: BlobDirectory,
        ask: Callable[[Need], Awaitable[None]],
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._link = link
        self._topics = topics
        self._blobs = blobs
        self._ask = ask
        self._patience_s = patience_s
        self._turn = asyncio.Lock()
        self._in_a_hurry = 0
        self._nobody_hurries = asyncio.Event()
        self._nobody_hurries.set()
        self._others: set[asyncio.Task[None]] = set()
        self._current: PartialBlob | None = None
        self._progress = asyncio.Event()
        self._refused: StoreError | None = None
        self._window_chunks = WINDOW_CHUNKS
        self.received_bytes = 0

    async def fetch(self, refs: Iterable[BlobRef], *, for_a_round: bool = False) -> None:
        """Returns when every blob is in the directory, verified. Cancel it to give up.

        `for_a_round`: nothing else is fetched meanwhile.

        Raises `StoreUnavailable` if the disk refuses for now, other `StoreError` if it will again,
        and `PeerError` (digest_mismatch) for a reference whose chunks are right and whose whole is
        not: nothing can be fetched by that. Whatever the network does only makes it wait. Called
        again after an error, it goes on from the chunks that are here.
        """
        if for_a_round:
            with self._hurrying():
                for ref in refs:
                    await self._fetch_in_turn(ref)
            return
        for ref in refs:
            while not self._blobs.has(ref.sha256):
                await self._nobody_hurries.wait()
                await self._fetch_unless_hurried(ref)

    def received(self, sha256: str, index: int, payload: bytes) -> None:
        """Feeds a chunk that came over the link. A wrong or unwanted one changes nothing."""
        partial = self._current
        if partial is None or partial.receiver.ref.sha256 != sha256 or not payload:
            return
        try:
            fresh = partial.receiver.receive(index, payload)
        except PeerError as error:
            log.warning("chunk_refused", sha256=sha256[:12], chunk=index, reason=error.reason.value)
            return
        except StoreError as error:
            # For whoever waits for the blob. The reader of the link has nothing to do with it.
            self._refused = error
            self._progress.set()
            return
        if fresh:
            self._window_chunks = WINDOW_CHUNKS
            self.received_bytes += len(payload)
            self._progress.set()

    @contextlib.contextmanager
    def _hurrying(self) -> Iterator[None]:
        self._in_a_hurry += 1
        self._nobody_hurries.clear()
        for other in self._others:
            other.cancel()
        try:
            yield
        finally:
            self._in_a_hurry -= 1
            if self._in_a_hurry == 0:
                self._nobody_hurries.set()

    async def _fetch_unless_hurried(self, ref: BlobRef) -> None:
        """Returns when the blob is here, or when something that hurries has cut it off."""
        work = asyncio.create_task(self._fetch_in_turn(ref), name=f"fetch-{ref.sha256[:12]}")
        self._others.add(work)
        try:
            await work
        except asyncio.CancelledError:
            own = asyncio.current_task()
            if own is not None and own.cancelling():
                raise
        finally:
            self._others.discard(work)

    async def _fetch_in_turn(self, ref: BlobRef) -> None:
        async with self._turn:
            if not self._blobs.has(ref.sha256):
                await self._fetch_one(ref)

    async def _fetch_one(self, ref: BlobRef) -> None:
        partial = self._blobs.open_partial(ref)
        self._current, self._refused = partial, None
        try:
            await self._fetch_chunks(ref, partial)
            # Hashing and fsync of megabytes: off the event loop, so that it keeps answering.
            committing = asyncio.ensure_future(asyncio.to_thread(partial.commit))
            try:
                await asyncio.shield(committing)
            except asyncio.CancelledError:
                # The thread goes on; the file must stay open until it is done.
                await asyncio.wait([committing])
                # A newer version's fetch may have cleared the blob away under it.
                committing.exception()
                raise
        finally:
            self._current = None
            partial.close()

    async def _fetch_chunks(self, ref: BlobRef, partial: PartialBlob) -> None:
        receiver = partial.receiver
        subscribed: set[int] = set()
        try:
            while not receiver.complete:
                # At once: whatever is still subscribed comes again when the link does.
                arrived = {index for index in subscribed if index in receiver.held}
                subscribed -= arrived
                await self._unsubscribe(ref, arrived)
                # Half a window at a time, so that asking and arriving overlap.
                if len(subscribed) <= self._window_chunks // 2:
                    wanted = (i for i in receiver.held.missing() if i not in subscribed)
                    fresh = list(islice(wanted, self._window_chunks - len(subscribed)))
                    if fresh:
                        subscribed.update(fresh)
                        await self._link.subscribe(*self._names(ref, fresh))
                await self._wait_for_progress(ref, receiver.held, subscribed)
                if self._refused is not None:
                    self._window_chunks = PROBE_CHUNKS
                    raise self._refused
        finally:
            await self._unsubscribe(ref, subscribed)

    async def _wait_for_progress(self, ref: BlobRef, held: ChunkSet, asked: set[int]) -> None:
        if held.complete:
            return
        try:
            async with asyncio.timeout(self._patience_s):
                await self._progress.wait()
        except TimeoutError:
            if self._link.connected:
                log.info(
                    "chunks_missing", sha256=ref.sha256[:12], held=len(held), of=ref.chunk_count
                )
                missing = ChunkSet(ref.chunk_count, (i for i in asked if i not in held))
                await self._ask(
                    Need(sha256=ref.sha256, missing=missing.encode(), chunk_count=ref.chunk_count)
                )
        self._progress.clear()

    async def _unsubscribe(self, ref: BlobRef, indexes: Iterable[int]) -> None:
        names = self._names(ref, indexes)
        if names:
            await self._link.unsubscribe(*names)

    def _names(self, ref: BlobRef, indexes: Iterable[int]) -> list[str]:
        return [self._topics.chunk(ref.sha256, index) for index in sorted(indexes)]
