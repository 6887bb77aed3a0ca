"""What a link to a broker promises, whoever implements it.

A link is one MQTT session that outlives its connections: it connects, reconnects with jittered
back-off, and resumes, until it is closed. Its owner sees one ordered stream of events and three
calls. All of it runs on the owner's event loop: no thread, no callback into the owner's code.

- `publish` returns when the broker has acknowledged, however many reconnects that takes. That is
  not delivery: brokers drop acknowledged messages when queues overflow, and forget them when they
  are killed. Whoever needs delivery asks the peer.
- A message that loses its meaning with time is published with `expiry_s`: past that, neither this
  side sends it nor, with MQTT 5, does the broker deliver it. A device that comes back after a week
  is not handed a week of grants.
- A delivery is acknowledged to the broker when its owner calls `ack`, after what it caused is
  durable. Unacknowledged deliveries are limited (MQTT 5 Receive Maximum), so an owner that is slow
  slows the broker down instead of filling memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

MAX_IN_FLIGHT = 8
"""Publishes handed to the transport at a time; the rest wait in their callers."""


@dataclass(frozen=True, slots=True)
class LinkUp:
    """The broker accepted the connection.

    `session_present`: the broker kept our session, with its queued messages. Either way the link
    has subscribed again before this event, and what was retained comes again.
    """

    session_present: bool


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The connection was lost, or an attempt failed. The link goes on trying."""

    reason: str


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message. `retained`: it was kept by the broker and sent because we subscribed."""

    topic: str
    payload: bytes
    retained: bool
    token: int
    """Names the delivery to `Link.ack`; 0 where there is nothing to acknowledge."""


LinkEvent = LinkUp | LinkDown | Delivery


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker publishes for us when the connection dies without a goodbye (retained)."""

    topic: str
    payload: bytes


class Link(Protocol):
    """One MQTT session, as above."""

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted the connection that we have now."""
        ...

    @property
    def max_payload_bytes(self) -> int:
        """The largest payload that the broker takes under a topic of Fedge, as far as is known.

        It is known from the broker (MQTT 5), from the settings, or from what it did not take.
        """
        ...

    async def start(self) -> None:
        """Begins to connect and returns at once. Call once."""
        ...

    def hurry(self) -> None:
        """The broker is known to be back: a link that waits to try again tries now."""
        ...

    async def close(self) -> None:
        """Says goodbye (no will is sent) and ends; waiting calls raise `LinkClosed`."""
        ...

    async def next_event(self) -> LinkEvent:
        """The next event, in order. Raises `LinkClosed` after `close`."""
        ...

    def ack(self, delivery: Delivery) -> None:
        """Tells the broker that it may forget this delivery. Harmless when repeated or too late."""
        ...

    async def publish(
        self, topic: str, payload: bytes, *, retain: bool = False, expiry_s: float | None = None
    ) -> None:
        """Publishes with QoS 1 and returns when the broker acknowledged.

        `expiry_s`: it is of no use to anybody after so long, and returns unsent if it could not be
        sent by then. Raises `PayloadTooLarge`, `LinkRefused` (the broker's negative answer) or
        `LinkClosed`.
        """
        ...

    async def subscribe(self, *filters: str) -> None:
        """Subscribes with QoS 1 and returns when the broker granted; kept across reconnects.

        While the link is down it only notes the filters. Raises `LinkRefused` or `LinkClosed`.
        """
        ...

    async def unsubscribe(self, *filters: str) -> None:
        """Takes back a subscription, here and at the broker."""
        ...
