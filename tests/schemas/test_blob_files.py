"""Blobs on the disk: whole or not there, and resumed with exactly what was verified."""

from __future__ import annotations

import base64
import contextlib
import random
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.schemas.blob_files import BlobDirectory
from fedge.schemas.blobs import MIN_CHUNK_BYTES, BlobRef, chunk_digest, chunks_of, describe
from fedge.schemas.errors import PeerError, RejectReason, StoreError, StoreUnavailable
from fedge.schemas.ids import sha256

CHUNK = MIN_CHUNK_BYTES
DATA = random.Random(7).randbytes(6400)  # six chunks of 1,024 bytes and one of 256
REF = describe(DATA, CHUNK)
CHUNKS = [bytes(chunk) for chunk in chunks_of(DATA, CHUNK)]


@pytest.fixture
def blobs(tmp_path: Path) -> BlobDirectory:
    return BlobDirectory(tmp_path / "blobs")


@contextlib.contextmanager
def fresh_directory() -> Iterator[BlobDirectory]:
    """For Hypothesis, whose examples must not share a folder."""
    with tempfile.TemporaryDirectory() as folder:
        yield BlobDirectory(Path(folder))


def names_in(blobs: BlobDirectory) -> set[str]:
    return {path.name for path in blobs.folder.iterdir()}


def test_what_is_put_is_read_back_under_its_digest(blobs):
    blobs.put(DATA)
    assert blobs.has(REF.sha256)
    assert blobs.read(REF.sha256) == DATA
    assert blobs.path(REF.sha256).read_bytes() == DATA
    assert names_in(blobs) == {REF.sha256}


def test_blobs_are_listed_without_what_is_unfinished(blobs):
    blobs.put(DATA)
    blobs.put(b"other")
    with blobs.open_partial(describe(b"arriving", CHUNK)):
        assert set(blobs.digests()) == {REF.sha256, sha256(b"other")}


def test_deleting_removes_the_blob_and_what_has_arrived_of_it_and_may_be_repeated(blobs):
    blobs.put(DATA)
    blobs.open_partial(REF).close()
    blobs.delete(REF.sha256)
    blobs.delete(REF.sha256)
    assert not blobs.has(REF.sha256)
    assert names_in(blobs) == set()


def test_a_blob_that_rotted_on_the_disk_is_not_read_and_is_healed_by_putting_it(blobs):
    blobs.put(DATA)
    blobs.path(REF.sha256).write_bytes(DATA[:-1] + b"\0")
    with pytest.raises(StoreError, match="another digest"):
        blobs.read(REF.sha256)
    blobs.put(DATA)
    assert blobs.read(REF.sha256) == DATA


def test_reading_a_blob_that_is_not_there_says_so(blobs):
    with pytest.raises(StoreError, match="No such file"):
        blobs.read(REF.sha256)


@pytest.mark.parametrize("name", ["", "..", "../" + "a" * 61, "A" * 64, "a" * 63, "a" * 64 + "\n"])
def test_no_name_but_a_digest_becomes_a_path(blobs, name):
    for use in (blobs.path, blobs.has, blobs.read, blobs.delete):
        with pytest.raises(PeerError) as refusal:
            use(name)
        assert refusal.value.reason is RejectReason.INVALID_FIELD


def test_a_crash_before_the_rename_leaves_a_temporary_file_that_a_sweep_removes(blobs):
    (blobs.folder / "0123.tmp").write_bytes(b"half")
    blobs.put(DATA)
    blobs.sweep()
    assert names_in(blobs) == {REF.sha256}


def test_chunks_in_order_make_the_blob(blobs):
    partial = blobs.open_partial(REF)
    for index, chunk in enumerate(CHUNKS):
        assert not partial.receiver.complete
        assert partial.receiver.receive(index, chunk)
    assert partial.commit() == blobs.path(REF.sha256)
    assert blobs.read(REF.sha256) == DATA
    assert names_in(blobs) == {REF.sha256}


@given(
    order=st.permutations(range(len(CHUNKS))),
    repeated=st.lists(st.integers(0, len(CHUNKS) - 1), max_size=5),
    crashes=st.sets(st.integers(0, len(CHUNKS))),
)
def test_chunks_in_any_order_with_repeats_and_crashes_make_the_blob(order, repeated, crashes):
    with fresh_directory() as blobs:
        partial = blobs.open_partial(REF)
        arrived: set[int] = set()
        for step, index in enumerate([*order, *repeated]):
            if step in crashes:
                # A crash writes nothing more and closes nothing; the next process opens anew.
                partial.close()
                partial = blobs.open_partial(REF)
                assert list(partial.receiver.held.missing()) == sorted(
                    set(range(len(CHUNKS))) - arrived
                )
            assert partial.receiver.receive(index, CHUNKS[index]) == (index not in arrived)
            arrived.add(index)
        assert partial.commit().read_bytes() == DATA


@given(
    arrived=st.sets(st.integers(0, len(CHUNKS) - 1)),
    rotten=st.dictionaries(st.integers(0, len(DATA) - 1), st.integers(1, 255), max_size=4),
    keep_bytes=st.integers(0, len(DATA)),
)
def test_after_a_crash_exactly_the_undamaged_chunks_are_held(arrived, rotten, keep_bytes):
    with fresh_directory() as blobs:
        partial = blobs.open_partial(REF)
        for index in arrived:
            partial.receiver.receive(index, CHUNKS[index])
        partial.close()
        path = blobs.folder / f"{REF.sha256}.part"
        content = bytearray(path.read_bytes())
        for position, difference in rotten.items():
            content[position] ^= difference
        content = content[:keep_bytes]
        path.write_bytes(content)
        whole = bytes(content).ljust(len(DATA), b"\0")
        undamaged = {
            index
            for index in range(len(CHUNKS))
            if whole[index * CHUNK : (index + 1) * CHUNK] == CHUNKS[index]
        }
        with blobs.open_partial(REF) as again:
            held = {index for index in range(len(CHUNKS)) if index in again.receiver.held}
            assert held == undamaged
            for index in again.receiver.held.missing():
                again.receiver.receive(index, CHUNKS[index])
            assert again.commit().read_bytes() == DATA


@pytest.mark.parametrize(
    ("index", "payload", "reason"),
    [
        (0, CHUNKS[1], RejectReason.DIGEST_MISMATCH),
        (0, CHUNKS[0][:-1], RejectReason.TRUNCATED),
        (6, CHUNKS[0], RejectReason.OVERSIZED),
        (7, CHUNKS[0], RejectReason.INVALID_FIELD),
        (-1, CHUNKS[0], RejectReason.INVALID_FIELD),
    ],
)
def test_a_wrong_chunk_is_refused_and_not_written(blobs, index, payload, reason):
    with blobs.open_partial(REF) as partial:
        with pytest.raises(PeerError) as refusal:
            partial.receiver.receive(index, payload)
        assert refusal.value.reason is reason
        assert len(partial.receiver.held) == 0
    assert (blobs.folder / f"{REF.sha256}.part").read_bytes() == bytes(len(DATA))


def test_a_reference_that_contradicts_itself_is_refused_at_the_end_and_its_part_deleted(blobs):
    liar = BlobRef(
        sha256=sha256(b"something else"),
        size_bytes=REF.size_bytes,
        chunk_bytes=REF.chunk_bytes,
        chunk_digests=REF.chunk_digests,
    )
    for reopen in (False, True):
        partial = blobs.open_partial(liar)
        for index, chunk in enumerate(CHUNKS):
            partial.receiver.receive(index, chunk)
        if reopen:
            partial.close()
            partial = blobs.open_partial(liar)
        with pytest.raises(PeerError) as refusal:
            partial.commit()
        assert refusal.value.reason is RejectReason.DIGEST_MISMATCH
        assert names_in(blobs) == set()


def test_an_incomplete_blob_cannot_be_committed(blobs):
    with blobs.open_partial(REF) as partial:
        partial.receiver.receive(0, CHUNKS[0])
        with pytest.raises(RuntimeError, match="6 chunks"):
            partial.commit()
    assert not blobs.has(REF.sha256)


def test_what_is_discarded_is_gone(blobs):
    partial = blobs.open_partial(REF)
    partial.receiver.receive(0, CHUNKS[0])
    partial.discard()
    assert names_in(blobs) == set()
    with blobs.open_partial(REF) as again:
        assert len(again.receiver.held) == 0


def test_a_part_takes_room_only_for_what_arrived(blobs):
    size_bytes = 64 * 1024 * 1024
    chunk_bytes = 64 * 1024
    zeros = base64.b64encode(chunk_digest(bytes(chunk_bytes)) * (size_bytes // chunk_bytes))
    ref = BlobRef(
        sha256="0" * 64,
        size_bytes=size_bytes,
        chunk_bytes=chunk_bytes,
        chunk_digests=zeros.decode(),
    )
    with blobs.open_partial(ref):
        stat = (blobs.folder / f"{ref.sha256}.part").stat()
        assert stat.st_size == size_bytes
        assert stat.st_blocks * 512 < chunk_bytes


@contextlib.contextmanager
def files_limited_to(limit_bytes: int) -> Iterator[None]:
    """A disk that refuses to grow files past `limit_bytes` (the error is EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_refuses_is_reported_in_its_own_words_and_leaves_nothing_behind(blobs):
    with files_limited_to(1000):
        for attempt in (lambda: blobs.put(DATA), lambda: blobs.open_partial(REF)):
            # A limit that somebody can lift, as a quota.
            with pytest.raises(StoreUnavailable, match="File too large"):
                attempt()
    assert not blobs.has(REF.sha256)
    assert not [name for name in names_in(blobs) if name.endswith(".tmp")]
    blobs.put(DATA)
    assert blobs.read(REF.sha256) == DATA


def test_a_folder_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot make the blob folder"):
        BlobDirectory(tmp_path / "file" / "blobs")
