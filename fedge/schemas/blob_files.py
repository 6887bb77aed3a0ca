"""Blobs as files named by their digest, and blobs that are still arriving.

A file under a digest is whole: it was written beside its place, synced, renamed and the folder
synced, so a power cut leaves it there in full or not at all. A blob that is arriving is a `.part`
file of its full size; which chunks it holds is found out by hashing them, so nothing on the disk
can contradict it. Knows nothing of topics, rounds or versions. Not for two processes that write
the same digest at the same time.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fedge.schemas.blobs import BlobReceiver, BlobRef, ChunkSet
from fedge.schemas.closing import Closing
from fedge.schemas.errors import PeerError, RejectReason, StoreError, StoreUnavailable
from fedge.schemas.ids import Digest, sha256

_DIGEST = re.compile(r"[0-9a-f]{64}")
_PART = ".part"
_TEMPORARY = ".tmp"
_PASSING = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES),
        *(errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENODEV, errno.ENXIO),
        errno.ESTALE,
    }
)
"""What may be otherwise when it is tried again: a full disk, a quota, a lost mount, too many
open files."""


class BlobDirectory:
    """The blobs in one folder, which is made if it is not there.

    Every method raises `PeerError` (invalid_field) for a digest that is not one, before it touches
    the disk, and `StoreError` with the system's words for what the disk refuses.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with disk(f"make the blob folder {folder}"):
            folder.mkdir(parents=True, exist_ok=True)

    def path(self, digest: Digest) -> Path:
        """Where the blob is, or would be."""
        return self.folder / _checked(digest)

    def has(self, digest: Digest) -> bool:
        """Whether the blob is there in full."""
        return self.path(digest).is_file()

    def put(self, data: bytes) -> None:
        """Keeps `data` under its digest, durably when this returns."""
        digest = sha256(data)
        if not self._holds_whole(digest):
            with disk(f"write the blob {digest}"), self._temporary() as (file, temporary):
                file.write(data)
                file.flush()
                settle(file.fileno(), temporary, self.path(digest))

    def read(self, digest: Digest) -> bytes:
        """The blob's bytes. Raises `StoreError` if it is not there or no longer what it was."""
        with disk(f"read the blob {digest}"):
            data = self.path(digest).read_bytes()
        if sha256(data) != digest:
            raise StoreError(
                f"the blob {digest} on the disk has another digest: "
                f"delete {self.path(digest)} so that it is fetched again"
            )
        return data

    def delete(self, digest: Digest) -> None:
        """Removes the blob and what has arrived of it, if anything is there."""
        with disk(f"delete the blob {digest}"):
            self.path(digest).unlink(missing_ok=True)
            self._part(digest).unlink(missing_ok=True)

    def digests(self) -> Iterator[Digest]:
        """The blobs that are there in full, in no particular order."""
        return (path.name for path in self._whole_files())

    def sweep(self) -> None:
        """Removes temporary files that a crash left. For the start, before anybody writes."""
        with disk(f"sweep {self.folder}"):
            for path in self.folder.glob(f"*{_TEMPORARY}"):
                path.unlink(missing_ok=True)

    def open_partial(self, ref: BlobRef) -> PartialBlob:
        """What has arrived of `ref` so far, each chunk verified anew, ready for the rest."""
        return PartialBlob(ref, self._part(ref.sha256), self.path(ref.sha256))

    def reopen(self, ref: BlobRef) -> PartialBlob:
        """As `open_partial`, and a blob that is whole already counts as arrived.

        For a receiver that was stopped after a blob was whole, and before it was told so.
        """
        part, whole = self._part(ref.sha256), self.path(ref.sha256)
        with disk(f"open {whole}"):
            if whole.is_file():
                # Under both names: whoever was told that it is whole finds it where it was.
                part.unlink(missing_ok=True)
                part.hardlink_to(whole)
        return self.open_partial(ref)

    def _part(self, digest: Digest) -> Path:
        return self.folder / (_checked(digest) + _PART)

    def _whole_files(self) -> Iterator[Path]:
        with disk(f"list {self.folder}"):
            return iter([each for each in self.folder.iterdir() if _DIGEST.fullmatch(each.name)])

    def _holds_whole(self, digest: Digest) -> bool:
        try:
            self.read(digest)
        except StoreError:
            return False
        return True

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[tuple[BinaryIO, Path]]:
        path = self.folder / (secrets.token_hex(16) + _TEMPORARY)
        try:
            with path.open("xb") as file:
                yield file, path
        finally:
            path.unlink(missing_ok=True)


class PartialBlob(Closing):
    """A blob that is arriving. `receiver` takes its chunks in any order and verifies each.

    For one owner at a time. Closing keeps what has arrived; so does a crash.
    """

    def __init__(self, ref: BlobRef, path: Path, whole_path: Path) -> None:
        self.ref = ref
        self._path = path
        self._whole_path = whole_path
        # Chunks that come in order are hashed as they come; the rest is read again at the end.
        self._hasher = hashlib.sha256()
        self._hashed_chunks = 0
        with disk(f"open {path}"):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._open = True
        try:
            with disk(f"read {path}"):
                held = self._verify_held()
        except StoreError:
            self.close()
            raise
        self.receiver = BlobReceiver(ref, self._write, held)

    def commit(self) -> Path:
        """Makes the complete blob a whole one and returns its path, durably.

        Raises `PeerError` (digest_mismatch) if the chunks are right and the whole is not: the
        reference contradicts itself, and what had arrived is deleted. Raises `RuntimeError` while
        chunks are missing.
        """
        if not self.receiver.complete:
            missing = self.ref.chunk_count - len(self.receiver.held)
            raise RuntimeError(f"{missing} chunks of {self.ref.sha256} are missing")
        with disk(f"complete {self._path}"):
            while self._hashed_chunks < self.ref.chunk_count:
                self._hash_next(self._read(self._hashed_chunks))
            actual = self._hasher.hexdigest()
            if actual != self.ref.sha256:
                self.discard()
                raise PeerError(
                    RejectReason.DIGEST_MISMATCH,
                    f"the chunks make a blob with digest {actual}, not {self.ref.sha256}",
                )
            settle(self._file, self._path, self._whole_path)
        self.close()
        return self._whole_path

    def discard(self) -> None:
        """Deletes what has arrived."""
        self.close()
        with disk(f"delete {self._path}"):
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Lets go of the file and keeps it. Harmless when repeated."""
        if self._open:
            self._open = False
            os.close(self._file)

    def _verify_held(self) -> ChunkSet:
        held = ChunkSet(self.ref.chunk_count)
        is_new = os.fstat(self._file).st_size == 0
        os.ftruncate(self._file, self.ref.size_bytes)
        if is_new:
            return held
        for index in range(self.ref.chunk_count):
            payload = self._read(index)
            with contextlib.suppress(PeerError):
                self.ref.check_chunk(index, payload)
                held.add(index)
                self._hash_if_next(index, payload)
        return held

    def _read(self, index: int) -> bytes:
        return os.pread(self._file, self.ref.chunk_size(index), index * self.ref.chunk_bytes)

    def _write(self, index: int, payload: bytes) -> None:
        view, position = memoryview(payload), index * self.ref.chunk_bytes
        with disk(f"write chunk {index} to {self._path}"):
            while view:
                written = os.pwrite(self._file, view, position)
                view, position = view[written:], position + written
        self._hash_if_next(index, payload)

    def _hash_if_next(self, index: int, payload: bytes) -> None:
        if index == self._hashed_chunks:
            self._hash_next(payload)

    def _hash_next(self, payload: bytes) -> None:
        self._hasher.update(payload)
        self._hashed_chunks += 1


def read_chunk(path: Path, ref: BlobRef, index: int) -> bytes:
    """Chunk `index` of the blob in `path`: one chunk in memory at a time. Raises `StoreError`."""
    with disk(f"read {path}"), path.open("rb") as file:
        file.seek(index * ref.chunk_bytes)
        return file.read(ref.chunk_size(index))


def _checked(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise PeerError(RejectReason.INVALID_FIELD, f"not a SHA-256 in hexadecimal: {digest!r:.80}")
    return digest


def settle(descriptor: int, written: Path, place: Path) -> None:
    """Puts a written file in its place durably: its bytes first, then its name, then the folder.

    `descriptor`: of `written`, still open, in the same folder as `place`. Raises `OSError`.
    """
    os.fsync(descriptor)
    written.replace(place)
    _sync_folder(place.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk(what: str) -> Iterator[None]:
    """Turns an `OSError` within into `StoreUnavailable` if it may pass, else into `StoreError`."""
    try:
        yield
    except OSError as error:
        kind = StoreUnavailable if error.errno in _PASSING else StoreError
        raise kind(f"cannot {what}: {error.strerror or error} ({error.errno})") from error
