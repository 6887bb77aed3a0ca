"""Offering what lies in the outbox, again and again, until there is a receipt.

Brokers drop what they have acknowledged, so an offer is repeated while there is no answer. An
update whose file is gone or damaged would be offered for ever and never arrive: now and then the
file is read before it is offered again, and what is lost is given up. So is an update that was
trained on a text which its user took back: what was not accepted yet never will be.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

from fedge.edge_agent.events import Event, UpdateLost
from fedge.edge_agent.outbox import Outbox
from fedge.edge_agent.storage_watch import StorageWatch
from fedge.edge_agent.typed_texts import TypedTexts
from fedge.schemas.blobs import BlobRef
from fedge.schemas.errors import FedgeError, PayloadTooLarge, StoreUnavailable
from fedge.schemas.ids import Digest, new_message_id
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import Offer

log = EventLog(__name__)

_FORGOTTEN = "some of what it was trained on was forgotten"

OFFER_AGAIN_S = 30.0
"""An offer that has no receipt after so long is said again."""


class Offers:
    """The offers of `device`. `send`: returns when the broker has it. `rng`: jitter.

    `fitting`: see `Uploads.fitting`. `connected`: whether there is somebody to offer to.
    `stop`: ends what is being sent of an update. `feed`: takes `UpdateLost`. `typed`: the example
    store that is trained on, None: it is another kind of data.
    """

    def __init__(
        self,
        device: str,
        outbox: Outbox,
        *,
        storage: StorageWatch,
        rng: random.Random,
        connected: Callable[[], bool],
        fitting: Callable[[BlobRef, Path], Awaitable[BlobRef]],
        send: Callable[[Offer], Awaitable[None]],
        stop: Callable[[Digest], None],
        feed: Callable[[Event], None],
        typed: TypedTexts | None = None,
    ) -> None:
        self._device = device
        self._outbox = outbox
        self._storage = storage
        self._rng = rng
        self._connected = connected
        self._fitting = fitting
        self._send = send
        self._stop = stop
        self._feed = feed
        self._typed = typed
        # What was kept by an earlier life is read before its first offer in this one.
        self._times = dict.fromkeys(outbox.rounds, 1)

    async def run(self) -> None:
        """Repeats the offers that have no receipt, until cancelled."""
        while True:
            await asyncio.sleep(OFFER_AGAIN_S * self._rng.uniform(0.75, 1.25))
            if self._connected():
                for number in sorted(self._outbox.rounds):
                    await self.offer(number)

    async def offer(self, number: int) -> None:
        """Offers the update of a round, if it is still what it was."""
        if number not in self._outbox.rounds:
            self._times.pop(number, None)
            return
        if await self._is_withdrawn(number):
            return
        times = self._times[number] = self._times.get(number, 0) + 1
        # At the 2nd, 4th, 8th, … time: reading megabytes for each offer would cost a Pi its card.
        is_due = times > 1 and times & (times - 1) == 0
        if (is_due or self._outbox.is_cut_short(number)) and await self._is_lost(number):
            return
        offer = await self._cut_to_fit(number)
        if offer is not None:
            await self._send(offer.model_copy(update={"id": new_message_id()}))

    async def _cut_to_fit(self, number: int) -> Offer | None:
        """The offer in chunks that the broker takes; None if it cannot be made now."""
        offer = self._outbox.offer(number)
        if offer is None:
            return None
        try:
            update = await self._fitting(offer.update, self._outbox.path(number))
        except PayloadTooLarge as error:
            log.error("update_not_sent", device=self._device, round=number, reason=str(error))
            return None
        except OSError:
            # Whether it is lost is found out when it is read for that.
            return offer
        if update == offer.update:
            return offer
        cut = offer.model_copy(update={"update": update})
        return cut if self._storage.attempt("outbox", lambda: self._outbox.keep(cut)) else None

    async def _is_lost(self, number: int) -> bool:
        try:
            damage = await asyncio.to_thread(self._outbox.damage, number)
        except StoreUnavailable:
            # It may be whole: the disk cannot say so now.
            return False
        if damage is None or number not in self._outbox.rounds:
            return False
        log.error("update_lost", device=self._device, round=number, reason=damage)
        self._give_up(number, damage, f"the update was lost on the device: {damage}")
        return True

    async def withdraw(self) -> None:
        """Something was forgotten: gives up every update that was made from it."""
        for number in sorted(self._outbox.rounds):
            await self._is_withdrawn(number)

    async def _is_withdrawn(self, number: int) -> bool:
        made_from = self._outbox.generation(number)
        if made_from is None or self._typed is None:
            return False
        try:
            generation = await asyncio.to_thread(self._typed.generation)
        except FedgeError as error:
            # Whether it may go out is not known, so it does not.
            log.warning("examples_not_counted", device=self._device, reason=str(error))
            return True
        if generation == made_from or number not in self._outbox.rounds:
            return False
        offer = self._outbox.offer(number)
        if offer is not None:
            self._stop(offer.update.sha256)
        log.info("update_withdrawn", device=self._device, round=number)
        self._give_up(number, _FORGOTTEN, f"the update was withdrawn: {_FORGOTTEN}")
        return True

    def _give_up(self, number: int, reason: str, told: str) -> None:
        if self._storage.attempt("outbox", lambda: self._outbox.lose(number, reason)):
            self._times.pop(number, None)
            self._feed(UpdateLost(number, told))
