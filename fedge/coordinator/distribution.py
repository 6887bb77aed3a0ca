"""Distribution: which blobs lie on the broker now, and that nothing else does.

The newest version and its plan are wanted, and the version before for devices in the middle of it;
an older one while somebody holds it, because devices measure it. What is put on the broker is noted
in the store first, so what a killed coordinator left there is found and taken back. Announcements
and rounds are others' business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import partial

from fedge.coordinator.publisher import Publisher
from fedge.coordinator.store import Store, VersionRecord
from fedge.coordinator.workers import Workers
from fedge.schemas.blobs import BlobRef, ChunkSet
from fedge.schemas.errors import StoreError
from fedge.schemas.ids import Digest
from fedge.schemas.logs import EventLog

log = EventLog(__name__)

REPEAT_S = 2.0
"""The same blob is not repeated more often, however many devices miss it, or say so."""


class Distribution:
    """The blobs of one plan's versions on the broker. `plan`: see `plan_blobs`."""

    def __init__(
        self,
        plan: tuple[BlobRef, ...],
        *,
        publisher: Publisher,
        store: Store,
        workers: Workers,
        clock: Callable[[], float],
    ) -> None:
        self._publisher = publisher
        self._store = store
        self._workers = workers
        self._plan_blobs = plan
        self._clock = clock
        self._wanted: tuple[BlobRef, ...] = ()
        self._held: dict[Digest, BlobRef] = {}
        self._kept: tuple[BlobRef, ...] = ()
        self._noted: set[Digest] = set()
        self._repeated_at: dict[Digest, float] = {}
        # A rollback may want a blob again that is being taken back.
        self._one_at_a_time = asyncio.Lock()

    async def bring(self, version: VersionRecord) -> None:
        """Returns when every blob of the version is on the broker.

        Raises `LinkError` if the broker refuses one, `StoreError` if one cannot be read or noted.
        """
        self._wanted = (*self._plan_blobs, version.weights, version.golden)
        async with self._one_at_a_time:
            wanted = (*self._wanted, *self._kept)
            await self._note(wanted)
            await self._publisher.seed(wanted)

    async def hold(self, ref: BlobRef) -> None:
        """Returns when the blob is on the broker, which keeps it until `let_go`.

        Raises as `bring` does, and is held all the same. Again after a reconnect, it is put there
        again if the broker may have lost it.
        """
        self._held[ref.sha256] = ref
        async with self._one_at_a_time:
            await self._note([ref])
            await self._publisher.seed([ref])

    def let_go(self, ref: BlobRef) -> None:
        """The next `clear_before` takes it back, unless it is wanted for something else."""
        self._held.pop(ref.sha256, None)

    def keep(self, refs: Iterable[BlobRef]) -> None:
        """From now on these are on the broker beside the newest version, from the next `bring`."""
        self._kept = tuple(refs)

    async def clear_before(self, newest: VersionRecord) -> None:
        """Takes back everything but the two newest versions, what is held, and the plan."""
        before, retained = await self._workers.durable(
            lambda: (self._store.version(newest.number - 1), self._store.retained())
        )
        kept = {ref.sha256 for ref in self._plan_blobs}
        for one in (newest, before):
            if one is not None:
                kept |= {one.weights.sha256, one.golden.sha256}
        for sha256, chunk_count in retained.items():
            async with self._one_at_a_time:
                # `_wanted`: meanwhile a newer version may be on its way to the broker.
                if sha256 in kept or any(ref.sha256 == sha256 for ref in self._all_wanted()):
                    continue
                await self._publisher.clear(sha256, chunk_count)
                await self._workers.durable(partial(self._store.forget_retained, [sha256]))
                self._noted.discard(sha256)

    async def repeat(self, sha256: Digest, missing: ChunkSet) -> None:
        """Publishes chunks that a device did not find, if they are of the newest version, or held.

        A device waits longer than `REPEAT_S` before it asks again; those who miss the same chunks
        miss them together.
        """
        now = self._clock()
        self._repeated_at = {s: t for s, t in self._repeated_at.items() if now - t < REPEAT_S}
        if sha256 in self._repeated_at:
            return
        for ref in self._all_wanted():
            if ref.sha256 == sha256 and ref.chunk_count == missing.chunk_count:
                self._repeated_at[sha256] = now
                try:
                    await self._publisher.repeat(ref, missing)
                except StoreError as error:
                    # The device says again what it misses.
                    log.error("not_repeated", sha256=sha256[:12], reason=str(error))

    def _all_wanted(self) -> tuple[BlobRef, ...]:
        return (*self._wanted, *self._kept, *self._held.values())

    async def _note(self, refs: Iterable[BlobRef]) -> None:
        fresh = [ref for ref in refs if ref.sha256 not in self._noted]
        if fresh:
            await self._workers.durable(lambda: self._store.note_retained(fresh))
            self._noted.update(ref.sha256 for ref in fresh)
