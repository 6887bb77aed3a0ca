"""The intake: what becomes of offers and chunks, up to the durable decision.

An offer is checked against the round, then its chunks are collected by the upload desk, then the
whole update is verified, stored and recorded, and only then does the device get its receipt. A
device that asks again gets the same answer again: the store decides who has contributed, and its
key is (round, device). Nothing here knows how rounds proceed; the service tells it which is open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedge.coordinator.aggregation import validate_update
from fedge.coordinator.store import Contribution, ParticipantStatus, Store
from fedge.coordinator.uploads import Reply, Upload, UploadDesk
from fedge.schemas.errors import PeerError, RejectReason
from fedge.schemas.messages import Offer, Receipt, ReceiptStatus
from fedge.schemas.plan import PlanManifest
from fedge.schemas.tensors import encoded_limit_bytes


@dataclass(frozen=True, slots=True)
class OpenRound:
    """What the intake must know of the round that trains now.

    `waiting`: devices that were asked and have no accepted update. `claims`: the examples that
    each said it has when it checked in; weight cannot be claimed afterwards.
    """

    number: int
    base: int
    waiting: frozenset[str]
    claims: Mapping[str, int]


class Intake:
    """Offers and updates of the present round.

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

    def offered(
        self, device: str, offer: Offer, now_open: OpenRound | None, now: float
    ) -> Sequence[Reply | tuple[str, Receipt]]:
        """What to answer to an offer: a grant, nothing yet (the line is long), or a receipt.

        Raises `PeerError` with the reason if the offer is refused. For an update that was accepted
        before the receipt comes again, whatever round is open.
        """
        if now_open is None or offer.round != now_open.number or device not in now_open.waiting:
            return ((device, self._settled(device, offer, now_open)),)
        self._check(device, offer, now_open)
        return self._desk.offered(device, offer, now)

    def finish(self, upload: Upload) -> Receipt:
        """Verifies and records a complete upload, durably; the receipt may be sent then.

        Raises `PeerError` with the reason if the update is refused; its file is gone then.
        """
        offer = upload.offer
        path = upload.part.commit()
        try:
            validate_update(path, self._manifest, self._max_update_norm)
            self._store.record_accepted(
                offer.round, upload.device, contribution_of(offer), at=self._wall_clock()
            )
        except PeerError:
            path.unlink(missing_ok=True)
            raise
        return accepted_receipt(offer)

    def accepted_updates(self, round_number: int) -> list[tuple[Path, int]]:
        """The accepted updates' files in the order of the devices' names, and their examples."""
        return [
            (
                self._desk.directory(round_number, p.device).path(p.contribution.update.sha256),
                p.contribution.examples,
            )
            for p in self._store.participants(round_number)
            if p.status is ParticipantStatus.ACCEPTED and p.contribution is not None
        ]

    def _settled(self, device: str, offer: Offer, now_open: OpenRound | None) -> Receipt:
        known = self._store.participant(offer.round, device)
        if known is not None and known.status is ParticipantStatus.ACCEPTED:
            accepted = known.contribution
            if accepted is not None and accepted.update.sha256 == offer.update.sha256:
                return accepted_receipt(offer)
            raise PeerError(
                RejectReason.REPLAY, f"another update of round {offer.round} was accepted before"
            )
        if now_open is not None and offer.round == now_open.number:
            raise PeerError(
                RejectReason.NOT_IN_COHORT, f"{device} was not asked in round {offer.round}"
            )
        there_is = "no round is" if now_open is None else f"round {now_open.number} is"
        raise PeerError(
            RejectReason.STALE_ROUND if known is None else RejectReason.LATE,
            f"round {offer.round} is not open; {there_is}",
        )

    def _check(self, device: str, offer: Offer, now_open: OpenRound) -> None:
        if offer.examples > now_open.claims.get(device, offer.examples):
            raise PeerError(
                RejectReason.INVALID_FIELD,
                f"{offer.examples} examples; the check-in said {now_open.claims[device]}",
            )
        if offer.base != now_open.base:
            raise PeerError(
                RejectReason.WRONG_BASE,
                f"made from version {offer.base}, the round's base is {now_open.base}",
            )
        if offer.update.size_bytes > self._limit_bytes:
            raise PeerError(
                RejectReason.OVERSIZED,
                f"an update of {offer.update.size_bytes} bytes, at most {self._limit_bytes}",
            )
        foreign = sorted(set(offer.metrics) - set(self._manifest.metrics))
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
