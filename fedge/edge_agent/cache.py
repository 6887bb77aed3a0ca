"""Which blobs a device keeps when it may not keep them all: pure, sizes in, digests out.

The version in hand and the one that is fetched must fit together, or the fetch is refused: a device
that deleted what works for what may come would be left with nothing by one bad version. Older
versions, and what has arrived of versions that nobody wants any more, go before the fetch begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fedge.schemas.blobs import BlobRef
from fedge.schemas.errors import StoreError
from fedge.schemas.ids import Digest

Sizes = Mapping[Digest, int]
"""Bytes of each blob, in full also where it is still arriving."""


class CacheTooSmall(StoreError):  # noqa: N818 -- a fact about the settings
    """Two versions do not fit on this device at the same time. Only another version could."""

    def __init__(self, what: str, need_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"{what} need {need_bytes} bytes, storage.cache_limit_bytes is {limit_bytes}: "
            "raise it, or use a smaller model"
        )
        self.need_bytes = need_bytes
        self.limit_bytes = limit_bytes


def sizes_of(refs: Iterable[BlobRef]) -> dict[Digest, int]:
    """The sizes that references name, each blob once."""
    return {ref.sha256: ref.size_bytes for ref in refs}


def superfluous(
    present: Sizes, needed: Sizes, limit_bytes: int | None, what: str
) -> frozenset[Digest]:
    """The blobs of `present` that go before all of `needed` is here.

    `what` names `needed` in the error. Raises `CacheTooSmall` if that is above the limit.
    """
    need_bytes = sum(needed.values())
    if limit_bytes is not None and need_bytes > limit_bytes:
        raise CacheTooSmall(what, need_bytes, limit_bytes)
    return frozenset(present) - frozenset(needed)
