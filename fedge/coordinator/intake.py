"""The intake: what becomes of offers and chunks, up to the durable decision.

An offer is checked against what its device was asked for, then its chunks are collected by the
upload desk, then the whole update is verified, stored and recorded, and only then does the device
get its receipt. A device that asks again gets the same answer again: the store decides who has
contributed, and its key is (round, device). Nothing here knows how rounds proceed; the conductor
says whom it waits for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from fedge.coordinator.aggregation import AcceptedUpdate, validate_update
from fedge.coordinator.buffer import staleness_weight
from fedge.coordinator.course import Awaited
from fedge.coordinator.store import Contribution, ParticipantStatus, Store
from fedge.coordinator.uploads import Reply, Upload, UploadDesk
from fedge.schemas.errors import PeerError, RejectReason
from fedge.schemas.messages import Offer, Receipt, ReceiptStatus
from fedge.schemas.plan import PlanManifest
from fedge.schemas.tensors import encoded_limit_bytes


class Intake:
    """Offers and updates.

    `max_update_norm`: L2, in weight units. `wall_clock`: seconds since the epoch, for the records.
    """

    def __init__(
        self,
        store: Store,
        manifest: PlanManifest,
        desk: UploadDesk,
        *,
        max_update_norm: float,
        wall_clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._manifest = manifest
        self._desk = desk
        self._wall_clock = wall_clock
        self._max_update_norm = max_update_norm
        self._limit_bytes = encoded_limit_bytes(manifest.update_specs)

    def awaited(self, device: str, offer: Offer, awaited: Awaited, now: float) -> Sequence[Reply]:
        """What to answer to an offer that is waited for: a grant, nothing while the line is long.

        Raises `PeerError` with the reason if the offer is refused, `StoreUnavailable` if what
        comes cannot be kept now.
        """
        self._check(offer, awaited)
        return self._desk.offered(device, offer, now)

    def settled(self, device: str, offer: Offer, open_number: int | None) -> Receipt:
        """The answer to an offer that nobody waits for: the receipt again, if it was accepted.

        Reads the store. Raises `PeerError` with the reason otherwise: replay, not_in_cohort, late
        or stale_round. `open_number`: the round that is open.
        """
        known = self._store.participant(offer.round, device)
        if known is not None and known.status is ParticipantStatus.ACCEPTED:
            accepted = known.contribution
            if accepted is not None and accepted.update.sha256 == offer.update.sha256:
                return accepted_receipt(offer)
            raise PeerError(
                RejectReason.REPLAY, f"another update of round {offer.round} was accepted before"
            )
        if offer.round == open_number and known is None:
            raise PeerError(
                RejectReason.NOT_IN_COHORT, f"{device} was not asked in round {offer.round}"
            )
        there_is = "no round is" if open_number is None else f"round {open_number} is"
        raise PeerError(
            RejectReason.STALE_ROUND if known is None else RejectReason.LATE,
            f"round {offer.round} is not open for it; {there_is}",
        )

    def finish(self, upload: Upload, counted_in: int) -> tuple[int | None, Receipt]:
        """Verifies and records a complete upload, durably; the receipt may be sent then.

        `counted_in`: the round into whose version it goes. Returns that round, or the one in which
        it was counted before, if the database was lost in the moment of a commit that it had done.
        Raises `PeerError` with the reason if the update is refused; its file is gone then. Raises
        `StoreUnavailable` if it cannot be kept now: nothing is decided then, and what has arrived
        stays.
        """
        offer = upload.offer
        path = upload.part.commit()
        try:
            validate_update(path, self._manifest, self._max_update_norm)
            fresh = self._store.record_accepted(
                offer.round,
                upload.device,
                contribution_of(offer),
                at=self._wall_clock(),
                counted_in=counted_in,
            )
            if not fresh:
                receipt = self.settled(upload.device, offer, counted_in)
                known = self._store.participant(offer.round, upload.device)
                return None if known is None else known.counted_in, receipt
        except PeerError:
            with contextlib.suppress(OSError):
                # Left where it is, it goes with its round's folder.
                path.unlink(missing_ok=True)
            raise
        return counted_in, accepted_receipt(offer)

    def accepted_updates(self, round_number: int, base: int) -> list[AcceptedUpdate]:
        """What goes into the version of this round, in the order of device names.

        `base`: the version it is made from; updates from older ones count less.
        """
        return [
            AcceptedUpdate(
                self._desk.directory(p.round, p.device).path(p.contribution.update.sha256),
                p.contribution.examples,
                1.0 if p.base is None else staleness_weight(base - p.base),
            )
            for p in self._store.accepted_in(round_number)
            if p.contribution is not None
        ]

    def _check(self, offer: Offer, awaited: Awaited) -> None:
        if awaited.claim is not None and offer.examples > awaited.claim:
            raise PeerError(
                RejectReason.INVALID_FIELD,
                f"{offer.examples} examples; the check-in said {awaited.claim}",
            )
        if offer.base != awaited.base:
            raise PeerError(
                RejectReason.WRONG_BASE,
                f"made from version {offer.base}, the round's base is {awaited.base}",
            )
        if offer.update.size_bytes > self._limit_bytes:
            raise PeerError(
                RejectReason.OVERSIZED,
                f"an update of {offer.update.size_bytes} bytes, at most {self._limit_bytes}",
            )
        foreign = sorted(set(offer.metrics) - set(self._manifest.measures))
        if foreign:
            raise PeerError(RejectReason.UNKNOWN_FIELD, f"the plan has no metrics {foreign}")


def accepted_receipt(offer: Offer) -> Receipt:
    """The receipt of an update that is durable and counts."""
    return Receipt(round=offer.round, sha256=offer.update.sha256, status=ReceiptStatus.ACCEPTED)


def rejected_receipt(offer: Offer, error: PeerError) -> Receipt:
    """The receipt of an update that does not count, with the reason."""
    return Receipt(
        round=offer.round,
        sha256=offer.update.sha256,
        status=ReceiptStatus.REJECTED,
        reason=error.reason,
        detail=error.detail[:500],
    )


def contribution_of(offer: Offer) -> Contribution:
    """What the record keeps of an offer."""
    return Contribution(
        update=offer.update,
        examples=offer.examples,
        steps=offer.steps,
        training_s=offer.training_s,
        loss=offer.loss,
        metrics=offer.metrics,
    )
