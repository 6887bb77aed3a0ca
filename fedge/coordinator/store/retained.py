"""What lies on the broker by our doing: noted before it is published, forgotten after it is gone.

The broker cannot be asked which retained chunks it holds; this can, also after a restart, and
also for a blob whose file and version were deleted since.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import delete, select

from fedge.coordinator.store.database import Database
from fedge.coordinator.store.tables import retained
from fedge.schemas.blobs import BlobRef
from fedge.schemas.ids import Digest


class Retained:
    """The part of the store that keeps what is on the broker."""

    _database: Database

    def note_retained(self, refs: Iterable[BlobRef]) -> None:
        """Keeps that these blobs' chunks may lie on the broker from now on.

        A blob that was noted in fewer chunks counts with the larger number.
        """
        with self._database.write() as connection:
            for ref in refs:
                statement = self._database.upsert(retained).values(
                    sha256=ref.sha256, chunk_count=ref.chunk_count
                )
                connection.execute(
                    statement.on_conflict_do_update(
                        index_elements=["sha256"],
                        set_={"chunk_count": statement.excluded.chunk_count},
                        where=retained.c.chunk_count < statement.excluded.chunk_count,
                    )
                )

    def retained(self) -> dict[Digest, int]:
        """Chunks by digest, for all that was put on the broker and not taken back."""
        with self._database.read() as connection:
            rows = connection.execute(select(retained.c.sha256, retained.c.chunk_count))
            return {row.sha256: row.chunk_count for row in rows}

    def forget_retained(self, digests: Iterable[Digest]) -> None:
        """Keeps that the chunks of these are on the broker no longer."""
        with self._database.write() as connection:
            for digest in digests:
                connection.execute(delete(retained).where(retained.c.sha256 == digest))
