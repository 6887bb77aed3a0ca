"""Blobs: bytes named by their SHA-256, cut into chunks that a broker will carry.

Sans I/O: the classes here decide which chunk to send or ask for next and verify what comes, and
leave topics, files and clocks to the rooms that have them. A reference carries 16 bytes of each
chunk's digest, so a wrong chunk is refused by itself, and a half-finished file tells by its own
content which chunks it holds: no bitmap on disk can disagree with the data after a power cut.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import islice
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedge.schemas.errors import PayloadTooLarge, PeerError, RejectReason
from fedge.schemas.ids import Digest, sha256

DEFAULT_CHUNK_BYTES = 58 * 1024
"""Under the longest topic (209 bytes) a packet of 59,610 bytes: within a limit of 60 KB, whether
that means 60,000 bytes or 61,440."""
MIN_CHUNK_BYTES = 1024
MAX_CHUNK_BYTES = 1024 * 1024
MAX_CHUNKS = 2048
CHUNK_DIGEST_BYTES = 16
"""SHA-256 cut to 128 bits: enough to tell a wrong chunk; the whole is checked in full."""


class BlobRef(BaseModel):
    """What one must know of a blob to fetch and verify it.

    `chunk_digests`: base64 of the concatenated first 16 bytes of each chunk's SHA-256.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: Digest
    size_bytes: Annotated[int, Field(ge=1, le=MAX_CHUNKS * MAX_CHUNK_BYTES)]
    chunk_bytes: Annotated[int, Field(ge=MIN_CHUNK_BYTES, le=MAX_CHUNK_BYTES)]
    chunk_digests: Annotated[str, Field(max_length=MAX_CHUNKS * 22 + 4)]

    @model_validator(mode="after")
    def _one_digest_a_chunk(self) -> BlobRef:
        try:
            digests = base64.b64decode(self.chunk_digests, validate=True)
        except binascii.Error as error:
            raise ValueError(f"chunk_digests is not base64: {error}") from error
        if self.chunk_count > MAX_CHUNKS:
            raise ValueError(f"{self.chunk_count} chunks, at most {MAX_CHUNKS}")
        if len(digests) != self.chunk_count * CHUNK_DIGEST_BYTES:
            raise ValueError(
                f"{self.size_bytes} bytes make {self.chunk_count} chunks of {self.chunk_bytes}, "
                f"but there are {len(digests)} bytes of digests"
            )
        return self

    @property
    def chunk_count(self) -> int:
        """Number of chunks; only the last may be shorter than `chunk_bytes`."""
        return -(-self.size_bytes // self.chunk_bytes)

    def chunk_size(self, index: int) -> int:
        """Bytes of chunk `index`."""
        return min(self.chunk_bytes, self.size_bytes - index * self.chunk_bytes)

    def is_chunk(self, index: int, payload: bytes | memoryview) -> bool:
        """Whether `payload` has the digest of chunk `index`."""
        start = index * CHUNK_DIGEST_BYTES
        return chunk_digest(payload) == self._digests[start : start + CHUNK_DIGEST_BYTES]

    @cached_property
    def _digests(self) -> bytes:
        return base64.b64decode(self.chunk_digests)

    def check_chunk(self, index: int, payload: bytes | memoryview) -> None:
        """Raises `PeerError` unless `payload` is chunk `index` of this blob.

        Reasons: invalid_field (no such chunk), truncated, oversized, digest_mismatch.
        """
        if not 0 <= index < self.chunk_count:
            raise PeerError(
                RejectReason.INVALID_FIELD, f"chunk {index} of a blob of {self.chunk_count}"
            )
        expected_bytes = self.chunk_size(index)
        if len(payload) != expected_bytes:
            raise PeerError(
                RejectReason.TRUNCATED if len(payload) < expected_bytes else RejectReason.OVERSIZED,
                f"chunk {index} has {len(payload)} bytes, expected {expected_bytes}",
            )
        if not self.is_chunk(index, payload):
            raise PeerError(RejectReason.DIGEST_MISMATCH, f"chunk {index} has another digest")


def chunk_digest(payload: bytes | memoryview) -> bytes:
    """The 16 bytes that stand for a chunk in `BlobRef.chunk_digests`."""
    return hashlib.sha256(payload).digest()[:CHUNK_DIGEST_BYTES]


def describe(data: bytes, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> BlobRef:
    """The reference of `data`. Raises `ValueError` if it is empty or needs over 2048 chunks."""
    digests = b"".join(chunk_digest(chunk) for chunk in chunks_of(data, chunk_bytes))
    return BlobRef(
        sha256=sha256(data),
        size_bytes=len(data),
        chunk_bytes=chunk_bytes,
        chunk_digests=base64.b64encode(digests).decode("ascii"),
    )


def chunks_of(data: bytes, chunk_bytes: int) -> Iterator[memoryview]:
    """The chunks of `data` in order, without copying."""
    view = memoryview(data)
    for start in range(0, len(view), chunk_bytes):
        yield view[start : start + chunk_bytes]


def chunk_bytes_within(limit_bytes: int, wanted: int, topic: str) -> int:
    """The size in which to cut a blob for a broker: `wanted`, or less where the broker takes less.

    `limit_bytes`: the link's `max_payload_bytes`, which allows for the longest topic already.
    `topic`: where the chunks go, for the error. Raises `PayloadTooLarge` for a broker that does
    not take even the smallest chunk.
    """
    if limit_bytes < MIN_CHUNK_BYTES:
        raise PayloadTooLarge(topic, MIN_CHUNK_BYTES, limit_bytes)
    return min(wanted, limit_bytes, MAX_CHUNK_BYTES)


class ChunkSet:
    """Which chunks of a blob are there: a bitmap with a text form for messages.

    The text is the base64 of the bits, chunk 0 in the lowest bit of the first byte.
    """

    def __init__(self, chunk_count: int, present: Iterable[int] = ()) -> None:
        self.chunk_count = chunk_count
        self._bits = 0
        for index in present:
            self.add(index)

    def __contains__(self, index: int) -> bool:
        return bool(self._bits >> index & 1)

    def __len__(self) -> int:
        return self._bits.bit_count()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChunkSet):
            return NotImplemented
        return (self.chunk_count, self._bits) == (other.chunk_count, other._bits)

    __hash__ = None  # type: ignore[assignment] # mutable

    def add(self, index: int) -> None:
        """Marks chunk `index` as there. Raises `IndexError` for a chunk the blob does not have."""
        if not 0 <= index < self.chunk_count:
            raise IndexError(index)
        self._bits |= 1 << index

    def missing(self) -> Iterator[int]:
        """The chunks that are not there, in order."""
        return (index for index in range(self.chunk_count) if index not in self)

    def __or__(self, other: ChunkSet) -> ChunkSet:
        made = ChunkSet(self.chunk_count)
        made._bits = self._bits | other._bits
        return made

    def copy(self) -> ChunkSet:
        """The same chunks, for keeping."""
        return self | self

    def first_missing(self) -> int | None:
        """The first chunk that is not there; None if it is complete."""
        if self.complete:
            return None
        return (~self._bits & (self._bits + 1)).bit_length() - 1

    def frontier(self, window: int) -> int | None:
        """The last chunk that is reached by a sender in order who may send `window` missing ones.

        None if nothing is missing.
        """
        reached = list(islice(self.missing(), window))
        return reached[-1] if reached else None

    def added_beyond(self, index: int, before: ChunkSet) -> int:
        """How many chunks after `index` are here and were not in `before`."""
        return ((self._bits & ~before._bits) >> (index + 1)).bit_count()

    @property
    def complete(self) -> bool:
        """Whether every chunk is there."""
        return len(self) == self.chunk_count

    def encode(self) -> str:
        """The text form."""
        return base64.b64encode(self._bits.to_bytes(-(-self.chunk_count // 8), "little")).decode()

    @classmethod
    def decode(cls, text: str, chunk_count: int) -> ChunkSet:
        """The inverse of `encode`. Raises `PeerError` (invalid_field) for another size."""
        try:
            raw = base64.b64decode(text, validate=True)
        except ValueError as error:  # binascii.Error is one; text beyond ASCII raises it bare
            raise PeerError(RejectReason.INVALID_FIELD, f"bitmap: {error}") from error
        bits = int.from_bytes(raw, "little")
        if len(raw) != -(-chunk_count // 8) or bits >> chunk_count:
            raise PeerError(
                RejectReason.INVALID_FIELD, f"a bitmap of {len(raw)} bytes for {chunk_count} chunks"
            )
        found = cls(chunk_count)
        found._bits = bits
        return found


class BlobSender:
    """Decides which chunks of a granted upload go out next.

    The receiver grants `window` chunks of credit: never more than that many are on their way
    beyond what it said it has. `read(index)` returns a chunk's bytes.
    """

    def __init__(self, ref: BlobRef, read: Callable[[int], bytes]) -> None:
        self.ref = ref
        self._read = read
        self._held = ChunkSet(ref.chunk_count)
        self._sent: set[int] = set()
        self._window = 0
        self._grants = 0

    @property
    def complete(self) -> bool:
        """Whether the receiver said that it has every chunk."""
        return self._held.complete

    def granted(self, window: int, held: ChunkSet) -> None:
        """A grant: `held` is all that the receiver has. What was on its way is sent again."""
        self._window = window
        self._held = held
        self._sent = set()
        self._grants += 1

    def acknowledged(self, held: ChunkSet) -> None:
        """A `have`: frees the credit of the chunks that arrived. One that comes late takes nothing
        back."""
        self._held = self._held | held
        self._sent = {index for index in self._sent if index not in held}

    def take(self) -> Iterator[tuple[int, bytes]]:
        """The chunks that the credit allows now; each counts as on its way once it is yielded.

        In order, so that the receiver knows of a chunk that did not come as soon as a later one
        did. A new grant ends the iteration: begin again.
        """
        grants = self._grants
        for index in range(self.ref.chunk_count):
            # Looked at anew for each: while one was sent, the receiver may have said more.
            if index in self._held or index in self._sent:
                continue
            if len(self._sent) >= self._window or grants != self._grants:
                return
            self._sent.add(index)
            yield index, self._read(index)


class BlobReceiver:
    """Collects the chunks of one blob in any order, each verified by itself, each once.

    `write(index, payload)` stores a verified chunk at `index * ref.chunk_bytes`.
    """

    def __init__(
        self,
        ref: BlobRef,
        write: Callable[[int, bytes], None],
        held: ChunkSet | None = None,
    ) -> None:
        self.ref = ref
        self.held = held or ChunkSet(ref.chunk_count)
        self._write = write

    @property
    def complete(self) -> bool:
        """Whether every chunk was verified and written."""
        return self.held.complete

    def receive(self, index: int, payload: bytes) -> bool:
        """Verifies and writes a chunk; False if it was there before.

        Raises `PeerError` as `BlobRef.check_chunk` does; nothing is written then.
        """
        self.ref.check_chunk(index, payload)
        if index in self.held:
            return False
        self._write(index, payload)
        self.held.add(index)
        return True
