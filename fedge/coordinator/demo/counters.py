"""The broker's own count of bytes, which includes what no program counts: headers, answers, wills.

Mosquitto publishes it under `$SYS/broker/bytes`; amqtt does not.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

from fedge.coordinator.demo.brokers import HOST, DemoBroker
from fedge.schemas.link.broker import BrokerSettings
from fedge.schemas.link.protocol import Delivery, Link

RECEIVED, SENT = "$SYS/broker/bytes/received", "$SYS/broker/bytes/sent"
_COUNTING_S = 2.5
"""Twice the interval at which the demonstration's Mosquitto counts, and time to connect."""


@dataclass(frozen=True, slots=True)
class BrokerBytes:
    """What the broker received from all clients and sent to all clients since it started."""

    received: int
    sent: int


async def broker_bytes(broker: DemoBroker) -> BrokerBytes | None:
    """The newest counts within a short time; None from a broker that does not count."""
    if broker.name != "mosquitto":
        return None
    link = BrokerSettings(host=HOST, port=broker.port).link("fedge-demo-counter", random.Random(0))  # noqa: S311 -- jitter
    found: dict[str, int] = {}
    try:
        await link.subscribe(RECEIVED, SENT)
        await link.start()
        async with asyncio.timeout(_COUNTING_S):
            await _listen(link, found)
    except TimeoutError:
        pass  # it counts for ever
    finally:
        await link.close()
    if RECEIVED not in found or SENT not in found:
        return None
    return BrokerBytes(found[RECEIVED], found[SENT])


async def _listen(link: Link, found: dict[str, int]) -> None:
    while True:
        event = await link.next_event()
        if isinstance(event, Delivery):
            link.ack(event)
            if event.payload.isdigit():
                found[event.topic] = int(event.payload)
