"""MQTT as bytes, for the proxy and the kit's own clients: just enough of versions 3.1.1 and 5.

Written from the specifications (MQTT 3.1.1, sections 2 and 3; MQTT 5, section 3.3) and not from
paho, so that a mistake in one does not hide in the other. Knows neither sockets nor Fedge.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum


class PacketType(IntEnum):
    """The first four bits of a packet."""

    CONNECT = 1
    CONNACK = 2
    PUBLISH = 3
    PUBACK = 4
    SUBSCRIBE = 8
    SUBACK = 9
    PINGREQ = 12
    PINGRESP = 13
    DISCONNECT = 14


DUPLICATE_FLAG = 0x08


class WireError(Exception):
    """Bytes that are not MQTT."""


@dataclass(frozen=True, slots=True)
class Publish:
    """One PUBLISH. `packet_id`: None with QoS 0."""

    topic: str
    payload: bytes
    packet_id: int | None
    retained: bool


class Splitter:
    """Cuts a stream of bytes into whole packets, whatever the sizes it comes in."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The packets that are complete now. Raises `WireError` for an impossible length."""
        buffer = self._rest + data
        packets: list[bytes] = []
        start = 0
        while (end := _end_of_packet(buffer, start)) is not None and end <= len(buffer):
            packets.append(buffer[start:end])
            start = end
        self._rest = buffer[start:]
        return packets


def _end_of_packet(buffer: bytes, start: int) -> int | None:
    size, shift, position = 0, 0, start + 1
    while position < len(buffer):
        byte = buffer[position]
        size |= (byte & 0x7F) << shift
        position += 1
        if not byte & 0x80:
            return position + size
        shift += 7
        if shift > 21:
            raise WireError("a remaining length of more than four bytes")
    return None


def packet_type(packet: bytes) -> int:
    """What a whole packet is; 0 and 15 are in no table but may come all the same."""
    return packet[0] >> 4


def body_of(packet: bytes) -> bytes:
    """A whole packet without its fixed header."""
    position = 1
    while packet[position] & 0x80:
        position += 1
    return packet[position + 1 :]


def is_v5(connect: bytes) -> bool:
    """Whether a CONNECT speaks MQTT 5: the level stands behind the name "MQTT"."""
    return body_of(connect)[6] == 5


def parse_publish(packet: bytes, *, v5: bool) -> Publish:
    """A whole PUBLISH, parsed. Raises `WireError` if it is shorter than it says."""
    flags, body = packet[0] & 0x0F, body_of(packet)
    try:
        (topic_bytes,) = struct.unpack_from("!H", body)
        position = 2 + topic_bytes
        topic = body[2:position].decode(errors="replace")
        packet_id = None
        if flags & 0x06:
            (packet_id,) = struct.unpack_from("!H", body, position)
            position += 2
        if v5:
            size, shift = 0, 0
            while True:
                byte = body[position]
                position += 1
                size |= (byte & 0x7F) << shift
                shift += 7
                if not byte & 0x80:
                    break
            position += size
    except (struct.error, IndexError) as error:
        raise WireError("a PUBLISH that ends too early") from error
    return Publish(topic, body[position:], packet_id, bool(flags & 0x01))


def acknowledged_id(puback: bytes) -> int:
    """The packet identifier of a PUBACK."""
    (found,) = struct.unpack_from("!H", body_of(puback))
    return int(found)


def packet(kind: PacketType, body: bytes = b"", flags: int = 0) -> bytes:
    """A packet with this body."""
    size, length = len(body), bytearray()
    while True:
        size, low = divmod(size, 128)
        length.append(low | (0x80 if size else 0))
        if not size:
            return bytes([kind << 4 | flags]) + bytes(length) + body


def puback(packet_id: int) -> bytes:
    """A PUBACK that says success, the same in both versions."""
    return packet(PacketType.PUBACK, struct.pack("!H", packet_id))


def publish(
    topic: str, payload: bytes, packet_id: int | None = None, *, retain: bool = False
) -> bytes:
    """A PUBLISH of version 3.1.1, with QoS 1 if it has a packet identifier."""
    name = topic.encode()
    body = struct.pack("!H", len(name)) + name
    if packet_id is not None:
        body += struct.pack("!H", packet_id)
    flags = (0x02 if packet_id is not None else 0) | (0x01 if retain else 0)
    return packet(PacketType.PUBLISH, body + payload, flags)


def connect(client_id: str, keepalive_s: int = 30) -> bytes:
    """A CONNECT of version 3.1.1 with a clean session."""
    name = client_id.encode()
    head = b"\0\4MQTT\4\2" + struct.pack("!H", keepalive_s)
    return packet(PacketType.CONNECT, head + struct.pack("!H", len(name)) + name)


def subscribe(packet_id: int, *filters: str) -> bytes:
    """A SUBSCRIBE with QoS 1."""
    body = struct.pack("!H", packet_id)
    for each in filters:
        name = each.encode()
        body += struct.pack("!H", len(name)) + name + b"\1"
    return packet(PacketType.SUBSCRIBE, body, flags=0x02)
