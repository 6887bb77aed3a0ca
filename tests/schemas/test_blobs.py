"""Blobs: references that fit their data, bitmaps, and transfers that end whatever gets lost."""

from __future__ import annotations

import base64
import hashlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedge.schemas.blobs import (
    MAX_CHUNKS,
    MIN_CHUNK_BYTES,
    BlobReceiver,
    BlobRef,
    BlobSender,
    ChunkSet,
    chunks_of,
    describe,
)
from fedge.schemas.errors import PeerError, RejectReason

CHUNK = MIN_CHUNK_BYTES
DATA = random.Random(3).randbytes(12 * CHUNK + 5)
REF = describe(DATA, CHUNK)
CHUNKS = [bytes(chunk) for chunk in chunks_of(DATA, CHUNK)]

sets = st.integers(1, 70).flatmap(
    lambda count: st.tuples(st.just(count), st.sets(st.integers(0, count - 1)))
)


def test_a_reference_holds_the_digests_of_the_whole_and_of_each_chunk():
    ref = describe(b"a" * CHUNK + b"b", CHUNK)
    assert ref.sha256 == hashlib.sha256(b"a" * CHUNK + b"b").hexdigest()
    assert (ref.size_bytes, ref.chunk_count) == (CHUNK + 1, 2)
    assert (ref.chunk_size(0), ref.chunk_size(1)) == (CHUNK, 1)
    digests = base64.b64decode(ref.chunk_digests)
    assert digests[:16] == hashlib.sha256(b"a" * CHUNK).digest()[:16]
    assert digests[16:] == hashlib.sha256(b"b").digest()[:16]


@pytest.mark.parametrize("size", [1, CHUNK - 1, CHUNK, CHUNK + 1, MAX_CHUNKS * CHUNK])
def test_sizes_around_a_chunk_are_described(size):
    ref = describe(bytes(size), CHUNK)
    assert sum(ref.chunk_size(index) for index in range(ref.chunk_count)) == size
    assert BlobRef.model_validate_json(ref.model_dump_json()) == ref


@pytest.mark.parametrize("size", [0, MAX_CHUNKS * CHUNK + 1])
def test_what_is_empty_or_has_too_many_chunks_cannot_be_described(size):
    with pytest.raises(ValidationError):
        describe(bytes(size), CHUNK)


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": "../" + "a" * 61},
        {"size_bytes": REF.size_bytes + CHUNK},
        {"size_bytes": 0},
        {"chunk_bytes": 1},
        {"chunk_digests": REF.chunk_digests[:-4]},
        {"chunk_digests": "!" * len(REF.chunk_digests)},
        {"more": 1},
    ],
)
def test_a_reference_that_contradicts_itself_is_refused(change):
    with pytest.raises(ValidationError):
        BlobRef.model_validate(REF.model_dump() | change)


@given(sets)
def test_a_bitmap_survives_its_text_form(some):
    count, present = some
    chunks = ChunkSet(count, present)
    again = ChunkSet.decode(chunks.encode(), count)
    assert again == chunks
    assert set(range(count)) - set(again.missing()) == present
    assert len(again) == len(present)
    assert again.complete is (len(present) == count)


def test_chunk_0_is_the_lowest_bit_of_the_first_byte():
    assert base64.b64decode(ChunkSet(10, [0, 3, 9]).encode()) == bytes([0b00001001, 0b00000010])


@pytest.mark.parametrize("text", ["", "A", "AAAA", "/w==", "not base64!", "AA==AA=="])
def test_a_bitmap_of_another_size_or_no_bitmap_is_an_invalid_field(text):
    with pytest.raises(PeerError) as refusal:
        ChunkSet.decode(text, 5)
    assert refusal.value.reason is RejectReason.INVALID_FIELD


@given(st.text(max_size=40), st.integers(1, 100))
def test_arbitrary_text_is_a_bitmap_or_an_invalid_field(text, count):
    try:
        found = ChunkSet.decode(text, count)
    except PeerError:
        return
    assert ChunkSet.decode(found.encode(), count) == found


@pytest.mark.parametrize("index", [-1, 10])
def test_a_chunk_that_the_blob_does_not_have_cannot_be_marked(index):
    with pytest.raises(IndexError):
        ChunkSet(10).add(index)


def test_a_sender_sends_nothing_before_the_grant_and_no_more_than_the_window_after_it():
    sender = BlobSender(REF, CHUNKS.__getitem__)
    assert list(sender.take()) == []
    sender.granted(4, ChunkSet(REF.chunk_count, [1]))
    assert list(sender.take()) == [(index, CHUNKS[index]) for index in (0, 2, 3, 4)]
    assert list(sender.take()) == []
    sender.acknowledged(ChunkSet(REF.chunk_count, [1, 2]))
    assert [index for index, _ in sender.take()] == [5]


def test_a_new_grant_sends_again_what_was_on_its_way():
    sender = BlobSender(REF, CHUNKS.__getitem__)
    sender.granted(2, ChunkSet(REF.chunk_count))
    assert [index for index, _ in sender.take()] == [0, 1]
    sender.granted(2, ChunkSet(REF.chunk_count, [1]))
    assert [index for index, _ in sender.take()] == [0, 2]


@given(
    seed=st.integers(0, 2**32),
    window=st.integers(1, 20),
    drop=st.floats(0.0, 0.6),
    duplicate=st.floats(0.0, 0.5),
    corrupt=st.floats(0.0, 0.3),
)
def test_an_upload_ends_under_loss_repeats_disorder_and_corruption_within_its_window(
    seed, window, drop, duplicate, corrupt
):
    rng = random.Random(seed)
    stored = bytearray(REF.size_bytes)
    writes: list[int] = []

    def write(index: int, payload: bytes) -> None:
        writes.append(index)
        stored[index * CHUNK : index * CHUNK + len(payload)] = payload

    sender, receiver = BlobSender(REF, CHUNKS.__getitem__), BlobReceiver(REF, write)
    outstanding: set[int] = set()
    for _ in range(10_000):
        if receiver.complete:
            break
        # Each pass is one grant, answered by "have"s some of which are lost, too.
        sender.granted(window, ChunkSet.decode(receiver.held.encode(), REF.chunk_count))
        outstanding.clear()
        for _ in range(3):
            sent = list(sender.take())
            outstanding.update(index for index, _ in sent)
            assert len(outstanding) <= window
            on_the_wire = [each for each in sent if rng.random() >= drop]
            on_the_wire += [each for each in sent if rng.random() < duplicate]
            rng.shuffle(on_the_wire)
            for index, payload in on_the_wire:
                if rng.random() < corrupt:
                    with pytest.raises(PeerError):
                        receiver.receive(index, payload[:-1] + bytes([payload[-1] ^ 1]))
                else:
                    is_new = index not in writes
                    assert receiver.receive(index, payload) is is_new
            if rng.random() >= drop:
                sender.acknowledged(receiver.held)
                outstanding.difference_update(
                    set(range(REF.chunk_count)) - set(receiver.held.missing())
                )
    assert bytes(stored) == DATA
    assert sorted(writes) == list(range(REF.chunk_count))
    sender.acknowledged(receiver.held)
    assert sender.complete
    assert list(sender.take()) == []


@given(sets, st.integers(1, 80))
def test_the_frontier_is_where_a_sender_in_order_comes_to(some, window):
    count, present = some
    held = ChunkSet(count, present)
    ref = describe(bytes(count * CHUNK), CHUNK)
    sender = BlobSender(ref, lambda _: b"")
    sender.granted(window, held)
    sent = [index for index, _ in sender.take()]
    assert held.frontier(window) == (sent[-1] if sent else None)
    assert held.first_missing() == (sent[0] if sent else None)


@given(sets, st.data())
def test_what_was_added_is_counted_beyond_a_chunk(some, data):
    count, present = some
    before = ChunkSet(count, present)
    held = before.copy()
    added = data.draw(st.sets(st.integers(0, count - 1)))
    for index in added:
        held.add(index)
    chunk = data.draw(st.integers(0, count - 1))
    assert held.added_beyond(chunk, before) == len({i for i in added - present if i > chunk})
    assert before == ChunkSet(count, present)
    assert held == before | ChunkSet(count, added)


def test_a_grant_in_the_middle_of_sending_begins_anew_from_the_lowest_chunk():
    sender = BlobSender(REF, CHUNKS.__getitem__)
    sender.granted(8, ChunkSet(REF.chunk_count))
    sending = sender.take()
    assert [next(sending)[0] for _ in range(3)] == [0, 1, 2]
    sender.granted(2, ChunkSet(REF.chunk_count, [1]))
    # What was begun under the old grant ends: a chunk is missed only if a later one is there.
    assert list(sending) == []
    assert [index for index, _ in sender.take()] == [0, 2]


def test_news_that_come_late_take_no_chunk_back():
    sender = BlobSender(REF, CHUNKS.__getitem__)
    sender.granted(3, ChunkSet(REF.chunk_count))
    list(sender.take())
    sender.acknowledged(ChunkSet(REF.chunk_count, [0, 1]))
    sender.acknowledged(ChunkSet(REF.chunk_count, [0]))
    assert [index for index, _ in sender.take()] == [3, 4]
