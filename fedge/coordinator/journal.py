"""The journal: what was refused and who was seen, written in batches beside the rounds.

Nothing waits for it, and a flood cannot fill memory: refusals that come faster than they can be
written are counted in one log line.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace

from fedge.coordinator.store import DeviceSighting, Refusal, Store
from fedge.coordinator.workers import Workers
from fedge.schemas.errors import PeerError, RejectReason, StoreUnavailable
from fedge.schemas.logs import EventLog

log = EventLog(__name__)

MAX_PENDING_REFUSALS = 10_000
QUIET_S = 10.0
"""What one device does too often is logged once in so long; all of it is counted."""


class Journal:
    """Collects, and writes when `keep` runs. `wall_clock`: seconds since the epoch."""

    def __init__(self, store: Store, workers: Workers, wall_clock: Callable[[], float]) -> None:
        self._store = store
        self._workers = workers
        self._wall_clock = wall_clock
        self._refusals: list[Refusal] = []
        self._overflow = 0
        self._limited: dict[str | None, float] = {}
        self._sightings: dict[str, DeviceSighting] = {}
        self._due = asyncio.Event()

    def refused(self, device: str | None, error: PeerError, round_number: int | None) -> None:
        """Something was refused: logged now, counted in the record of the round soon."""
        self._log(device, error, round_number)
        if len(self._refusals) >= MAX_PENDING_REFUSALS:
            self._overflow += 1
            return
        at = self._wall_clock()
        self._refusals.append(Refusal(error.reason, error.detail, at, round_number, device))
        self._due.set()

    def saw(
        self,
        device: str,
        *,
        boot: int | None = None,
        online: bool | None = None,
        examples: int | None = None,
        version: int | None = None,
        agent_version: str | None = None,
    ) -> None:
        """Something became known of a device; None leaves what was known."""
        new = DeviceSighting(
            device, self._wall_clock(), boot, online, examples, version, agent_version
        )
        old = self._sightings.get(device)
        self._sightings[device] = new if old is None else _merged(old, new)
        self._due.set()

    def _log(self, device: str | None, error: PeerError, round_number: int | None) -> None:
        if error.reason is RejectReason.LIMIT_EXCEEDED or device is None:
            now = self._wall_clock()
            # Also when the clock was set back: then the difference is negative.
            if 0 <= now - self._limited.get(device, -math.inf) < QUIET_S:
                return
            if len(self._limited) >= MAX_PENDING_REFUSALS:
                self._limited.clear()
            self._limited[device] = now
        log.warning(
            "refused",
            device=device,
            round=round_number,
            reason=error.reason.value,
            detail=error.detail,
        )

    async def keep(self) -> None:
        """Writes what was collected, whenever there is something, until cancelled."""
        while True:
            await self._due.wait()
            self._due.clear()
            if not await self.flush():
                await asyncio.sleep(QUIET_S)
                self._due.set()

    async def flush(self) -> bool:
        """Writes what was collected; False if the storage is unavailable now."""
        refusals, self._refusals = self._refusals, []
        sightings, self._sightings = self._sightings, {}
        if self._overflow:
            log.warning("refusals_not_recorded", count=self._overflow)
            self._overflow = 0
        try:
            if refusals:
                await self._workers.durable(lambda: self._store.count_refusals(refusals))
            if sightings:
                await self._workers.durable(lambda: self._store.record_devices(sightings.values()))
        except StoreUnavailable:
            # What is known of devices, each once, is written later; counts of refusals are for
            # people, and are not kept in memory for a disk.
            if refusals:
                log.warning("refusals_not_recorded", count=len(refusals))
            for device, newer in self._sightings.items():
                older = sightings.get(device)
                sightings[device] = newer if older is None else _merged(older, newer)
            self._sightings = sightings
            return False
        return True


def _merged(old: DeviceSighting, new: DeviceSighting) -> DeviceSighting:
    facts = ("boot", "online", "examples", "version", "agent_version")
    known = {name: getattr(old, name) for name in facts if getattr(new, name) is None}
    return replace(new, **known)
