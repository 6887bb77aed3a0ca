"""The succession of versions: which is the newest, and how the next one takes its place.

A version exists when it is recorded, and not before; what cannot be exported, verified or recorded
never becomes one, and the fleet goes on from the version that is. Numbers only rise. This module
knows updates as files with weights; whose they are, and why these, is the round's business.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedge.coordinator.aggregation import AcceptedUpdate
from fedge.coordinator.store import Store, VersionRecord
from fedge.coordinator.version_maker import VersionMaker
from fedge.coordinator.workers import Workers
from fedge.schemas.errors import StoreError
from fedge.schemas.logs import EventLog

log = EventLog(__name__)


class Succession:
    """The versions of one population. `newest` is set by `recover`, which comes first."""

    newest: VersionRecord

    def __init__(self, store: Store, maker: VersionMaker, workers: Workers) -> None:
        self._store = store
        self._maker = maker
        self._workers = workers

    async def recover(self, now: float) -> None:
        """Takes up the newest version of the store; makes version 0 if there is none."""
        newest = await self._workers.durable(self._store.newest_version)
        if newest is None:
            newest = await self._workers.compute(lambda: self._maker.make_first(now))
            first = newest
            await self._workers.durable(lambda: self._store.record_version(first))
            log.info("version_made", version=newest.number, model_bytes=newest.model_bytes)
        self.newest = newest
        taken = newest
        await self._workers.compute(lambda: self._maker.adopt(taken))

    async def make_next(
        self, base: int, round_number: int, updates: Sequence[AcceptedUpdate], now: float
    ) -> VersionRecord:
        """Makes, records and takes up the version after `base` from these updates.

        While the disk is full or the database away, it waits and tries again. Raises `FedgeError`
        or `ValueError` if no version can be made of them: nothing has changed then.
        """
        newest = self.newest
        if newest.number != base:
            raise StoreError(f"version {newest.number} took the place of its base")
        version = await self._workers.insist(
            lambda: self._maker.make_next(newest, round_number, updates, now), on_compute=True
        )
        await self._workers.insist(lambda: self._record(version))
        self.newest = version
        self._maker.commit()
        return version

    async def overtaken(self) -> VersionRecord | None:
        """A newer version that another process has recorded (a rollback); now the newest.

        Its weights are not taken up yet: see `take_up`. None if there is none.
        """
        found = await self._workers.insist(self._store.newest_version)
        if found is None or found.number <= self.newest.number:
            return None
        # Before anything else is awaited: no update to the old version may close its round now.
        self.newest = found
        return found

    async def take_up(self, version: VersionRecord) -> None:
        """Continues from the weights of a version that `overtaken` found."""
        await self._workers.insist(lambda: self._maker.adopt(version), on_compute=True)
        log.info("version_adopted", version=version.number, note=version.note)

    def measured(self, version: VersionRecord) -> None:
        """A version's metrics are known now."""
        if version.number == self.newest.number:
            self.newest = version

    def _record(self, version: VersionRecord) -> None:
        newest = self._store.newest_version()
        if newest is not None and _is_same(newest, version):
            # The database was lost in the moment of a commit that it had done.
            return
        # Another process may have recorded a rollback since the aggregation began.
        if newest is not None and newest.number >= version.number:
            raise StoreError(f"version {newest.number} was made meanwhile ({newest.note})")
        self._store.record_version(version)


def _is_same(one: VersionRecord, other: VersionRecord) -> bool:
    facts = [(v.number, v.round, v.weights.sha256, v.created_at) for v in (one, other)]
    return facts[0] == facts[1]
