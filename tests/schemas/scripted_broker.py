"""A broker that does what a test tells it, packet by packet: for what real brokers do rarely.

It speaks just enough MQTT to be misunderstood: fixed headers, and the few bodies that tests send.
Written from the MQTT specifications, not from paho, so the two check each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType
from typing import Self

from tests.brokers import HOST


class Type(IntEnum):
    """Control packet types (MQTT 5, section 2.1.2)."""

    CONNECT = 1
    CONNACK = 2
    PUBLISH = 3
    PUBACK = 4
    PUBREC = 5
    PUBREL = 6
    PUBCOMP = 7
    SUBSCRIBE = 8
    SUBACK = 9
    UNSUBSCRIBE = 10
    UNSUBACK = 11
    PINGREQ = 12
    PINGRESP = 13
    DISCONNECT = 14


@dataclass(frozen=True, slots=True)
class Packet:
    """One control packet."""

    type: Type
    flags: int
    body: bytes

    @property
    def packet_id(self) -> int:
        """Of a SUBSCRIBE, UNSUBSCRIBE or PUBACK."""
        (found,) = struct.unpack_from("!H", self.body)
        return found

    @property
    def publish_id(self) -> int:
        """Of a PUBLISH with QoS 1: it stands behind the topic."""
        (topic_bytes,) = struct.unpack_from("!H", self.body)
        (found,) = struct.unpack_from("!H", self.body, 2 + topic_bytes)
        return found

    @property
    def protocol_level(self) -> int:
        """Of a CONNECT: 5 for MQTT 5, 4 for 3.1.1. It stands behind the name "MQTT"."""
        return self.body[6]

    def filter_count(self, *, v5: bool) -> int:
        """Of a SUBSCRIBE."""
        position, count = (3 if v5 else 2), 0
        while position < len(self.body):
            (size,) = struct.unpack_from("!H", self.body, position)
            position += 2 + size + 1
            count += 1
        return count


class Wire:
    """The broker's end of one connection."""

    def __init__(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.number = number
        self.v5 = False
        self.writer = writer
        self._reader = reader

    async def packet(self) -> Packet:
        """The next packet of the client. Raises `IncompleteReadError` at its end."""
        (first,) = await self._reader.readexactly(1)
        size, shift = 0, 0
        while True:
            (byte,) = await self._reader.readexactly(1)
            size |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                break
        packet = Packet(Type(first >> 4), first & 0x0F, await self._reader.readexactly(size))
        if packet.type is Type.CONNECT:
            self.v5 = packet.protocol_level == 5
        return packet

    async def expect(self, kind: Type) -> Packet:
        """The next packet of this type; pings are answered, others skipped."""
        while True:
            packet = await self.packet()
            if packet.type is kind:
                return packet
            if packet.type is Type.PINGREQ:
                self.send(Type.PINGRESP)

    def send(self, kind: Type, body: bytes = b"", flags: int = 0) -> None:
        size, length = len(body), bytearray()
        while True:
            size, low = divmod(size, 128)
            length.append(low | (0x80 if size else 0))
            if not size:
                break
        self.writer.write(bytes([kind << 4 | flags]) + bytes(length) + body)

    def connack(
        self, code: int = 0, *, session_present: bool = False, properties: bytes = b""
    ) -> None:
        tail = bytes([len(properties)]) + properties if self.v5 else b""
        self.send(Type.CONNACK, bytes([session_present, code]) + tail)

    def puback(self, packet_id: int, code: int = 0) -> None:
        self.send(Type.PUBACK, struct.pack("!H", packet_id) + (bytes([code]) if code else b""))

    def suback(self, subscribe: Packet, code: int = 1) -> None:
        codes = bytes([code]) * subscribe.filter_count(v5=self.v5)
        self.send(Type.SUBACK, subscribe.body[:2] + (b"\0" if self.v5 else b"") + codes)

    def publish(
        self,
        topic: bytes,
        payload: bytes,
        packet_id: int | None = None,
        *,
        qos: int = 1,
        retained: bool = False,
        again: bool = False,
    ) -> None:
        """A PUBLISH with QoS 1 or the given one, or 0 without a packet identifier."""
        identifier = b"" if packet_id is None else struct.pack("!H", packet_id)
        properties = b"\0" if self.v5 else b""
        body = struct.pack("!H", len(topic)) + topic + identifier + properties + payload
        level = 0 if packet_id is None else qos
        self.send(Type.PUBLISH, body, flags=again << 3 | level << 1 | retained)

    def raw(self, data: bytes) -> None:
        """Bytes as they are, whatever they mean."""
        self.writer.write(data)

    def disconnect(self, code: int) -> None:
        """DISCONNECT with a reason (MQTT 5, section 3.14.2.1)."""
        self.send(Type.DISCONNECT, bytes([code]))

    async def accept(self, *, session_present: bool = False, properties: bytes = b"") -> Packet:
        """Answers CONNECT with a positive CONNACK and returns it."""
        connect = await self.expect(Type.CONNECT)
        self.connack(session_present=session_present, properties=properties)
        return connect

    async def serve(self) -> None:
        """Grants and acknowledges whatever comes, to the end of the connection."""
        while True:
            packet = await self.packet()
            if packet.type is Type.PUBLISH:
                self.puback(packet.publish_id)
            elif packet.type is Type.SUBSCRIBE:
                self.suback(packet)
            elif packet.type is Type.PINGREQ:
                self.send(Type.PINGRESP)


def receive_maximum(value: int) -> bytes:
    """The CONNACK property (MQTT 5, section 3.2.2.3.3)."""
    return b"\x21" + struct.pack("!H", value)


def server_keep_alive(value: int) -> bytes:
    """The CONNACK property (MQTT 5, section 3.2.2.3.14)."""
    return b"\x13" + struct.pack("!H", value)


def maximum_packet_size(value: int) -> bytes:
    """The CONNACK property (MQTT 5, section 3.2.2.3.6)."""
    return b"\x27" + struct.pack("!I", value)


def message_expiry_s(publish: Packet) -> int | None:
    """The expiry in the properties of a PUBLISH of MQTT 5 with QoS 1, if it has one."""
    (topic_bytes,) = struct.unpack_from("!H", publish.body)
    start = 2 + topic_bytes + 2
    size = publish.body[start]
    properties = publish.body[start + 1 : start + 1 + size]
    if not properties:
        return None
    assert properties[0] == 0x02
    (found,) = struct.unpack_from("!I", properties, 1)
    return found


Script = Callable[[Wire], Awaitable[None]]


class ScriptedBroker:
    """Runs `script` for each connection, numbered from 0; at its end the connection is closed."""

    def __init__(self, script: Script, *, port: int = 0) -> None:
        self._script = script
        self._numbers = itertools.count()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.failures: list[BaseException] = []
        self.port = port

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                await self._script(Wire(next(self._numbers), reader, writer))
                await writer.drain()
        except Exception as error:
            self.failures.append(error)
        finally:
            self._tasks.discard(task)
            writer.close()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, HOST, self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(tuple(self._tasks))
        if kind is None and self.failures:
            raise self.failures[0]
