"""The postbox: messages to devices, in bounded memory however slow the broker is.

Of one kind about one round, only the newest message to a device is worth sending: an older grant
says less than a newer one. So what waits is at most one message for each device, kind and round,
and a device that asks faster than its answers go out gets fewer answers, not a longer queue. A few
senders work through it in order.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from fedge.schemas import messages
from fedge.schemas.errors import LinkClosed, LinkError
from fedge.schemas.link.protocol import MAX_IN_FLIGHT, Link
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import Message
from fedge.schemas.topics import Topics

log = EventLog(__name__)

_EXPIRY_S: dict[type[Message], float] = {
    messages.Grant: 60.0,
    messages.Have: 60.0,
    messages.Retry: 600.0,
    messages.Abort: 3600.0,
}
"""What is of no use to a device that comes back later. A receipt is, however late."""

Slot = tuple[str, str, object]


class Postbox:
    """Sends over `link` while `run` runs. `most`: messages that wait; the oldest goes beyond it."""

    def __init__(self, link: Link, topics: Topics, *, most: int = 100_000) -> None:
        self._link = link
        self._topics = topics
        self._most = most
        self._waiting: OrderedDict[Slot, Message] = OrderedDict()
        self._due = asyncio.Event()
        self.replaced = 0
        """Messages that a newer one took the place of before they were sent."""

    def __len__(self) -> int:
        return len(self._waiting)

    def send(self, device: str, message: Message) -> None:
        """Puts a message in line; it keeps the place of the one that it replaces."""
        slot = (device, type(message).__name__, getattr(message, "round", None))
        if slot in self._waiting:
            self.replaced += 1
        elif len(self._waiting) >= self._most:
            # Honest devices ask again for what has no answer.
            self._waiting.popitem(last=False)
            self.replaced += 1
        self._waiting[slot] = message
        self._due.set()

    async def run(self) -> None:
        """Sends what is in line, until cancelled or the link is closed."""
        async with asyncio.TaskGroup() as group:
            for index in range(MAX_IN_FLIGHT):
                group.create_task(self._send_in_turn(), name=f"postbox-{index}")

    async def _send_in_turn(self) -> None:
        while True:
            while not self._waiting:
                self._due.clear()
                await self._due.wait()
            (device, kind, _), message = self._waiting.popitem(last=False)
            try:
                topic = self._topics.down(device, type(message))
                payload = messages.encode(message)
                await self._link.publish(topic, payload, expiry_s=_expiry_s(message))
            except LinkClosed:
                return
            except LinkError as error:
                log.error("not_sent", device=device, kind=kind, reason=str(error))


def _expiry_s(message: Message) -> float | None:
    if isinstance(message, messages.Assignment | messages.EvaluationRequest):
        return max(1.0, message.deadline_s)
    return _EXPIRY_S.get(type(message))
