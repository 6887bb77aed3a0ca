"""The publishes of a link: who goes next, how many at once, what happens to them at a loss.

Pure: knows neither sockets nor the event loop. paho's own queue is not used, because it ignores the
broker's Receive Maximum, resends all of it at once after a reconnect, and cannot be cancelled.

A packet that the broker will not take (larger than a limit that MQTT 3.1.1 cannot tell) makes it
close the connection, and would do so again after each reconnect for ever. So after
`BARREN_LOSSES` connections in a row that were lost with publishes on their way and none
acknowledged, publishes go one at a time, and one that alone loses `LONE_LOSSES` more is given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from dataclasses import dataclass, field

BARREN_LOSSES = 2
LONE_LOSSES = 3


@dataclass(slots=True, eq=False)
class Outgoing:
    """One publish. `done` resolves when the broker acknowledged it, or fails for good.

    `expires_s`: on the caller's clock; past it the publish is of no use and is not sent.
    """

    topic: str
    payload: bytes
    retain: bool
    done: asyncio.Future[None] = field(repr=False)
    expires_s: float = math.inf
    lone_losses: int = 0


class Outbox:
    """Publishes in the order they were asked for: some on their way, the rest waiting."""

    def __init__(self, max_in_flight: int) -> None:
        self._max_in_flight = max_in_flight
        self._limit = max_in_flight
        self._waiting: deque[Outgoing] = deque()
        self._in_flight: dict[int, Outgoing] = {}
        self._barren_losses = 0

    def __len__(self) -> int:
        return len(self._waiting) + len(self._in_flight)

    def connected(self, receive_maximum: int) -> None:
        """A connection is up, whose broker takes so many unacknowledged publishes at once."""
        self._limit = min(self._max_in_flight, receive_maximum)

    def add(self, outgoing: Outgoing) -> None:
        """Queues a publish behind all others."""
        self._waiting.append(outgoing)

    @property
    def waits_for_answers(self) -> bool:
        """Whether a publish is on its way."""
        return bool(self._in_flight)

    def next_to_send(self, now_s: float = -math.inf) -> Outgoing | None:
        """The publish to hand over now, if any may be; it counts only once it is `sent`.

        Those that expired are over: nobody wants them sent.
        """
        while self._waiting and now_s >= self._waiting[0].expires_s:
            expired = self._waiting.popleft()
            if not expired.done.done():
                expired.done.set_result(None)
        limit = 1 if self._barren_losses >= BARREN_LOSSES else self._limit
        if len(self._in_flight) >= limit:
            return None
        while self._waiting and self._waiting[0].done.done():
            self._waiting.popleft()
        return self._waiting[0] if self._waiting else None

    def sent(self, packet_id: int) -> None:
        """What `next_to_send` gave went out under this packet identifier."""
        self._in_flight[packet_id] = self._waiting.popleft()

    def acknowledged(self, packet_id: int) -> Outgoing | None:
        """The publish that a PUBACK answers, which frees its place; None if it is not known."""
        self._barren_losses = 0
        return self._in_flight.pop(packet_id, None)

    def withdraw(self, outgoing: Outgoing) -> None:
        """Nobody waits for this publish any more. One on its way keeps its place until the PUBACK,
        so that the broker never sees more than it allows."""
        # In neither place, if the answer and the cancellation came in one step of the loop.
        with contextlib.suppress(ValueError):
            self._waiting.remove(outgoing)

    def lost(self, *, closed_by_peer: bool) -> Outgoing | None:
        """The connection is gone: what was on its way waits again, in front and in order.

        Returns a publish to give up, if this loss convicts one (see above).
        """
        in_flight = [each for each in self._in_flight.values() if not each.done.done()]
        self._in_flight.clear()
        convicted = None
        if in_flight and closed_by_peer:
            if self._barren_losses >= BARREN_LOSSES:
                in_flight[0].lone_losses += 1
                if in_flight[0].lone_losses >= LONE_LOSSES:
                    convicted = in_flight.pop(0)
                    self._barren_losses = 0
            else:
                self._barren_losses += 1
        self._waiting.extendleft(reversed(in_flight))
        return convicted

    def close(self) -> list[Outgoing]:
        """Empties the box and returns what was in it."""
        left = [*self._in_flight.values(), *self._waiting]
        self._in_flight.clear()
        self._waiting.clear()
        return left
