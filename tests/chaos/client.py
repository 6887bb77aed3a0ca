"""A bare MQTT client for the kit itself: it connects, listens and says whatever it is told.

It keeps nothing, promises nothing and never complains: the observer wants to see what the broker
says, and the stranger wants to say what no decent client would.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable

from tests.brokers import HOST
from tests.chaos.mqtt_wire import (
    PacketType,
    Publish,
    Splitter,
    WireError,
    connect,
    packet,
    packet_type,
    parse_publish,
    puback,
    publish,
    subscribe,
)

RETRY_S = 0.2
KEEPALIVE_S = 30


class BareClient:
    """Stays connected to a broker until it is cancelled; `run` it in a task of its own.

    `heard`: called with every message; it must not block. `connected`: set while there is a
    connection that the broker accepted.
    """

    def __init__(
        self,
        port: int,
        client_id: str,
        filters: tuple[str, ...],
        heard: Callable[[Publish], None] = lambda _: None,
    ) -> None:
        self._port = port
        self._client_id = client_id
        self._filters = filters
        self._heard = heard
        self._writer: asyncio.StreamWriter | None = None
        self._packet_ids = itertools.cycle(range(1, 65536))
        self.connected = asyncio.Event()

    async def run(self) -> None:
        """Connects again and again."""
        while True:
            with contextlib.suppress(OSError, WireError, TimeoutError):
                await self._converse()
            await asyncio.sleep(RETRY_S)

    async def say(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publishes with QoS 1, and does not wait for an answer. Silent while not connected."""
        await self.say_raw(publish(topic, payload, next(self._packet_ids), retain=retain))

    async def say_raw(self, data: bytes) -> None:
        """Sends bytes as they are."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.write(data)
                await self._writer.drain()

    async def _converse(self) -> None:
        async with asyncio.timeout(5):
            reader, self._writer = await asyncio.open_connection(HOST, self._port)
        try:
            self._writer.write(connect(self._client_id, KEEPALIVE_S))
            splitter = Splitter()
            while True:
                try:
                    async with asyncio.timeout(KEEPALIVE_S / 2):
                        data = await reader.read(1 << 16)
                except TimeoutError:
                    self._writer.write(packet(PacketType.PINGREQ))
                    continue
                if not data:
                    return
                for each in splitter.feed(data):
                    self._take(each, self._writer)
        finally:
            self.connected.clear()
            self._writer.transport.abort()
            self._writer = None

    def _take(self, received: bytes, writer: asyncio.StreamWriter) -> None:
        kind = packet_type(received)
        if kind == PacketType.CONNACK:
            if self._filters:
                writer.write(subscribe(next(self._packet_ids), *self._filters))
            else:
                self.connected.set()
        elif kind == PacketType.SUBACK:
            self.connected.set()
        elif kind == PacketType.PUBLISH:
            message = parse_publish(received, v5=False)
            if message.packet_id is not None:
                writer.write(puback(message.packet_id))
            self._heard(message)
