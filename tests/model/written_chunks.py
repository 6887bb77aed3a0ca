"""A watch over every file that is arriving: which chunks were written, and that each was once."""

from __future__ import annotations

from unittest import mock

from fedge.schemas.blob_files import PartialBlob
from fedge.schemas.blobs import BlobRef
from fedge.schemas.errors import StoreUnavailable


class WrittenChunks:
    """Chunks that were verified and written, by digest, across all restarts; `close` ends it.

    `broken`: chunks that were written although they were there. `disk_refuses`: until it is False
    again, every write fails as on a full disk.
    """

    def __init__(self) -> None:
        self._written: dict[str, set[int]] = {}
        self.broken: list[str] = []
        self.disk_refuses = False
        plain = PartialBlob._write

        def write(partial: PartialBlob, index: int, payload: bytes) -> None:
            if self.disk_refuses:
                raise StoreUnavailable("the disk is full")
            plain(partial, index, payload)
            written = self.of(partial.ref)
            if index in written:
                self.broken.append(f"chunk {index} of {partial.ref.sha256[:8]} is written again")
            written.add(index)

        self._patch = mock.patch.object(PartialBlob, "_write", write)
        self._patch.start()

    def of(self, ref: BlobRef) -> set[int]:
        """The chunks of this blob; clear it where the file was discarded on purpose."""
        return self._written.setdefault(ref.sha256, set())

    def close(self) -> None:
        """Watches no longer."""
        self._patch.stop()
