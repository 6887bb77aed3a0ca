"""The coordinator's blobs: files named by their digest, in the state folder.

What was put last is not deleted by the collection of old versions: it may belong to the version
that is about to be recorded, even if an old version had the same bytes. Knows no versions and no
database; `remote_blobs` keeps the same blobs in another place.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

from fedge.coordinator.store.ownership import mark_folder, owners_of
from fedge.schemas.blob_files import BlobDirectory
from fedge.schemas.errors import StoreError
from fedge.schemas.ids import Digest, sha256

FRESH_PUTS = 64
"""So many of the last puts are protected; a version has three."""


class Blobs(BlobDirectory):
    """The blobs of one state folder, for one process that writes and any number that read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._fresh: deque[Digest] = deque(maxlen=FRESH_PUTS)
        self._deciding = threading.Lock()

    def put(self, data: bytes) -> None:
        """Keeps `data` under its digest, durably when this returns."""
        with self._deciding:
            self._fresh.append(sha256(data))
        self._keep(data)

    def secure(self, digests: Iterable[Digest]) -> None:
        """Makes blobs that lie in `folder` as safe as those that were put.

        For what another process has written into the folder. Here it is safe already.
        """

    def belong_to(self, owner: str, named: Callable[[], Iterable[Digest]]) -> None:
        """Marks the folder as the state's whose mark is `owner`, and nobody else's.

        Whether it may have the folder was decided before: see `ownership`. `named`: what that state
        names.
        """
        if owners_of(self.folder) != (owner,):
            mark_folder(self.folder, (owner,))

    def may_belong_to(self, owner: str | None) -> bool:
        """Whether the folder has no mark, or the mark `owner`."""
        marked = owners_of(self.folder)
        return not marked or owner in marked

    def discard(self, digest: Digest, *, keep_after: float | None = None) -> int:
        """Deletes a blob that nobody names, and returns its size in bytes.

        0, and no change, if it is not there, was put lately by this process, or was written after
        `keep_after` (seconds since the epoch) by any.
        """
        with self._deciding:
            if digest in self._fresh:
                return 0
            size_bytes, written_at = self.describe(digest)
            if keep_after is not None and not written_at <= keep_after:
                return 0
            self.delete(digest)
            return size_bytes

    def describe(self, digest: Digest) -> tuple[int, float]:
        """The size in bytes, and when it was written; 0 and now if it is not there."""
        return self._describe_file(self.path(digest))

    def verify(self, digest: Digest) -> None:
        """Raises `StoreError` unless the blob is there and is what its name says."""
        self.read(digest)

    def _keep(self, data: bytes) -> None:
        super().put(data)

    @staticmethod
    def _describe_file(path: Path) -> tuple[int, float]:
        try:
            found = path.stat()
        except FileNotFoundError:
            return 0, time.time()
        except OSError as error:
            raise StoreError(f"cannot look at {path}: {error.strerror}") from error
        return found.st_size, found.st_mtime
