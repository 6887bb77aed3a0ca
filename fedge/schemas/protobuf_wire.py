"""Protocol Buffers on the wire: fields read and written without a schema compiler.

A reader says which fields it knows; a field that it does not know, has with another wire type, or
sees twice where it may come once, is refused, because two readers could take it differently. Sans
I/O, on memory views, so that weights of many megabytes are skipped and not copied.

Format: Protocol Buffers documentation, "Encoding".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from fedge.schemas.errors import PlanRefused

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types. Groups (3 and 4) are refused: ONNX never had them."""

_MAX_VARINT_BYTES = 10


class MessageType(NamedTuple):
    """The fields of a message: number → wire types, and those that may come repeatedly."""

    wire_types: Mapping[int, tuple[int, ...]]
    repeated: frozenset[int]


def message_type(
    *,
    varints: str = "",
    floats: str = "",
    strings: str = "",
    numbers: Mapping[int, int] | None = None,
    repeated: str,
) -> MessageType:
    """A message type from its fields' numbers, by the kind of their values.

    `numbers`: repeated numbers with the wire type of one.
    """
    wire_types: dict[int, tuple[int, ...]] = {int(n): (VARINT,) for n in varints.split()}
    wire_types |= {int(n): (FIXED32,) for n in floats.split()}
    wire_types |= {int(n): (BYTES,) for n in strings.split()}
    # Repeated numbers may come packed or one by one; a reader has to take both.
    wire_types |= {n: (wire, BYTES) for n, wire in (numbers or {}).items()}
    return MessageType(wire_types, frozenset(int(n) for n in repeated.split()))


Value = int | memoryview


def read_fields(data: memoryview, what: str) -> Iterator[tuple[int, int, int, Value]]:
    """(start, end, number, value) of each field of a message, end being after the value.

    Raises `PlanRefused` if the bytes end too early or are no fields.
    """
    position = 0
    while position < len(data):
        start = position
        key, position = _varint(data, position, what)
        number, wire_type = key >> 3, key & 7
        if not 1 <= number < 2**29:
            raise PlanRefused(f"{what}: a field with the number {number}")
        value: Value
        if wire_type == VARINT:
            value, position = _varint(data, position, what)
        elif wire_type == BYTES:
            size, position = _varint(data, position, what)
            value = data[position : position + size]
            position += size
        elif wire_type in (FIXED32, FIXED64):
            size = 4 if wire_type == FIXED32 else 8
            value = data[position : position + size]
            position += size
        else:
            raise PlanRefused(f"{what}: field {number} has the unknown wire type {wire_type}")
        if position > len(data):
            raise PlanRefused(f"{what} ends within field {number}")
        yield start, position, number, value


def read_message(data: memoryview, known: MessageType, what: str) -> Iterator[tuple[int, Value]]:
    """(number, value) of each field, all of them known, none twice that may come once.

    Raises `PlanRefused` otherwise; `what` names the message in the sentence.
    """
    seen: set[int] = set()
    for start, _, number, value in read_fields(data, what):
        wire_types = known.wire_types.get(number)
        if wire_types is None or data[start] & 7 not in wire_types:
            raise PlanRefused(f"{what} has a field {number} that is not part of ONNX")
        if number in seen and number not in known.repeated:
            raise PlanRefused(f"{what} has its field {number} twice")
        seen.add(number)
        yield number, value


def _varint(data: memoryview, position: int, what: str) -> tuple[int, int]:
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        if position + index >= len(data):
            raise PlanRefused(f"{what} ends within a number")
        byte = data[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value & (2**64 - 1), position + index + 1
    raise PlanRefused(f"{what} has a number of more than {_MAX_VARINT_BYTES} bytes")


def as_bytes(value: Value) -> memoryview:
    """The value of a field that holds bytes or a message."""
    if isinstance(value, int):  # pragma: no cover -- the tables above give these fields bytes
        raise PlanRefused("a number where a message should be")
    return value


def as_integer(value: Value) -> int:
    """An int64 or enum. Negative ones are two's complement of 64 bits."""
    if not isinstance(value, int):  # pragma: no cover -- the tables give these fields numbers
        raise PlanRefused("a message where a number should be")
    return value - 2**64 if value >= 2**63 else value


def as_text(value: Value) -> str:
    """The value of a field that holds a name."""
    try:
        return bytes(as_bytes(value)).decode("utf-8")
    except UnicodeDecodeError as error:
        raise PlanRefused(f"a name in the graph is not UTF-8: {error}") from error


def write_varint(value: int) -> bytes:
    """A number that is not negative, seven bits a byte, the lowest first."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def write_field(number: int, payload: bytes) -> bytes:
    """A field that holds bytes or a message."""
    return write_varint(number << 3 | BYTES) + write_varint(len(payload)) + payload
