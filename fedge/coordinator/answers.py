"""Answers: what becomes of what a device answers when it was asked.

An offer is kept in the record, a complete update is decided durably before its device is told, a
refusal is recorded, counted and told. The course then hears of each, and decides what it means for
the round. This module knows devices by name and messages by type, and no topic.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from fedge.coordinator import rounds
from fedge.coordinator.buffer import Key
from fedge.coordinator.course import Course
from fedge.coordinator.intake import Intake, contribution_of, rejected_receipt
from fedge.coordinator.journal import Journal
from fedge.coordinator.latest import LatestOnly
from fedge.coordinator.rounds import Mode
from fedge.coordinator.store import Store
from fedge.coordinator.surroundings import Surroundings
from fedge.coordinator.uploads import Reply, Upload, UploadDesk
from fedge.coordinator.workers import Workers
from fedge.schemas.errors import FedgeError, PeerError, RejectReason
from fedge.schemas.ids import Digest
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import Offer, Receipt

log = EventLog(__name__)


class Answers:
    """The answers to one course of rounds. `feed`: tells the course what has happened."""

    def __init__(
        self,
        *,
        store: Store,
        intake: Intake,
        desk: UploadDesk,
        journal: Journal,
        workers: Workers,
        course: Course,
        feed: Callable[[rounds.Event], None],
        around: Surroundings,
    ) -> None:
        self._store = store
        self._intake = intake
        self._desk = desk
        self._journal = journal
        self._workers = workers
        self._course = course
        self._feed = feed
        self._around = around
        self._offered: dict[Key, Digest] = {}
        self._offers = LatestOnly(self._record_offer, around.start, "offered")
        self._counting = asyncio.Event()

    def count(self) -> None:
        """From now on updates can be counted, or refused."""
        self._counting.set()

    def hold(self) -> None:
        """A buffer has closed: updates wait for the next."""
        self._counting.clear()

    def forget_ended(self) -> None:
        """A round has ended: what is remembered of its offers is not needed any more."""
        flying = self._course.flights
        self._offered = {key: sha for key, sha in self._offered.items() if key in flying}

    def offered(self, device: str, offer: Offer) -> None:
        """An offer was taken: kept in the record, for whoever asks why a device fell silent."""
        key = (offer.round, device)
        if self._course.has_failed(device) or self._offered.get(key) == offer.update.sha256:
            return
        self._offered[key] = offer.update.sha256
        self._offers.put(device, offer)

    async def _record_offer(self, device: str, offer: Offer) -> None:
        # It may have waited while the device was written off: that record must not be undone.
        if not self._is_waited_for(device, offer.round):
            return
        at = self._around.wall_clock()

        def record() -> None:
            self._store.record_offer(offer.round, device, contribution_of(offer), at=at)

        await self._workers.durable(record)

    def training_failed(self, device: str, asked_in: int | None, detail: str) -> None:
        """A device says that no update will come. Raises `PeerError` if nobody asked it."""
        if asked_in is None:
            return
        if self._course.is_foreign(device, asked_in):
            raise PeerError(RejectReason.NOT_IN_COHORT, f"{device} was not asked")
        if not self._is_waited_for(device, asked_in):
            return
        at = self._around.wall_clock()

        def record() -> None:
            self._store.record_failed(asked_in, device, detail, at=at)

        self._around.start(self._workers.durable(record), f"failed-{device}")
        self._feed(rounds.Failed(device, asked_in))

    def reject(self, device: str, offer: Offer, error: PeerError) -> None:
        """An offer or its update is refused: recorded, counted, and the device told."""
        # What came after its round's end belongs to that round's record, else to the open one's.
        belated = error.reason in (RejectReason.REPLAY, RejectReason.LATE, RejectReason.STALE)
        self._journal.refused(device, error, offer.round if belated else self._course.number)
        self._around.tell(device, rejected_receipt(offer, error))
        if not self._is_waited_for(device, offer.round):
            return
        at = self._around.wall_clock()

        def record() -> None:
            self._store.record_rejected(offer.round, device, error.reason, error.detail, at=at)

        self._around.start(self._workers.durable(record), f"rejected-{device}")
        self._feed(rounds.Failed(device, offer.round))

    def _is_waited_for(self, device: str, asked_in: int) -> bool:
        """Whether an answer is awaited of the device, and it was not written off."""
        awaited = self._course.awaited(device, asked_in)
        return awaited is not None and not self._course.has_failed(device)

    async def finish(self, upload: Upload) -> Sequence[Reply]:
        """Decides a complete upload, durably, and tells its device. Returns grants for others."""
        device, offer = upload.device, upload.offer
        try:
            counted_in, receipt = await self._accept(upload)
        except PeerError as error:
            others = self._desk.taken(upload, self._around.clock())
            self.reject(device, offer, error)
            return others
        except FedgeError as error:
            # It is not decided: what has arrived stays, and the device offers it again.
            log.warning(
                "update_not_kept_yet",
                device=device,
                round=offer.round,
                reason=str(error),
                advice="the device has it still, and offers it again",
            )
            return self._desk.taken(upload, self._around.clock())
        others = self._desk.taken(upload, self._around.clock())
        self._around.tell(device, receipt)
        log.info(
            "update_accepted",
            round=offer.round,
            device=device,
            counted_in=counted_in,
            examples=offer.examples,
            bytes=offer.update.size_bytes,
            training_s=offer.training_s,
            loss=offer.loss.by_epoch[-1] if offer.loss.by_epoch else None,
        )
        if counted_in == self._course.number:
            self._feed(rounds.Accepted(device, offer.round))
        elif self._course.policy.mode is Mode.ASYNC:
            # Its buffer is full and closed already: no other counts it, and its place is free.
            self._feed(rounds.Failed(device, offer.round))
        return others

    async def _accept(self, upload: Upload) -> tuple[int | None, Receipt]:
        if self._course.policy.mode is Mode.ASYNC:
            # An update that comes while a version is made goes into the next buffer.
            while not self._counting.is_set():
                await self._counting.wait()
        # From this check to the durable thread's queue there is no await: what is queued while the
        # round trains is decided before `_aggregate` asks, in the same queue, what was accepted.
        number, asked_in = self._course.number, upload.offer.round
        if number is None or self._course.awaited(upload.device, asked_in) is None:
            raise PeerError(RejectReason.LATE, f"round {asked_in} has closed")
        return await self._workers.durable(lambda: self._intake.finish(upload, number))
