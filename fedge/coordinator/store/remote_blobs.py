"""Blobs in another place (`s3://…`, `gs://…`, a mounted folder), with the state folder as a cache.

A blob is safe when it lies in the other place, and not before; reading goes through the cache,
which may be wiped at any time. Every blob that comes from the other place is hashed: what a bucket
returns is believed no more than what a peer sends. The drivers are fsspec's
(https://filesystem-spec.readthedocs.io). Knows no versions and no database.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from fedge.coordinator.store.blobs import Blobs
from fedge.coordinator.store.ownership import OWNER, mark_folder, mark_of, parse_mark
from fedge.schemas.blob_files import BlobDirectory
from fedge.schemas.errors import ConfigError, StoreError, StoreUnavailable
from fedge.schemas.ids import Digest, sha256

_DIGEST = re.compile(r"[0-9a-f]{64}")


class RemoteBlobs(Blobs):
    """The blobs at `url`; `folder` holds copies. Methods raise as `BlobDirectory`'s do.

    Raises `ConfigError` for a URL without a driver.
    """

    def __init__(self, folder: Path, url: str) -> None:
        super().__init__(folder)
        self.url = url
        self._cache = BlobDirectory(folder)
        self._verified: set[Digest] = set()
        place: Any
        try:
            # Another process may have written since: nothing is answered from an old listing.
            place, root = url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"[store] blobs = {url!r} cannot be reached: {error}") from error
        self._place = place
        self._root = root.rstrip("/")
        # fsspec does not sync local files, and a power cut would leave half of one.
        self._synced = BlobDirectory(Path(root)) if isinstance(place, LocalFileSystem) else None

    def path(self, digest: Digest) -> Path:
        """The copy here: verified once by this process, and fetched if it is not there."""
        copy = self._cache.path(digest)
        if digest not in self._verified or not copy.is_file():
            self.read(digest)
        return copy

    def has(self, digest: Digest) -> bool:
        """Whether the blob is in the other place."""
        with self._reaching(f"look for the blob {digest}"):
            return bool(self._place.exists(self._at(digest)))

    def read(self, digest: Digest) -> bytes:
        """The blob's bytes, fetched if the copy here is damaged or missing."""
        try:
            data = self._cache.read(digest)
        except StoreError:
            data = self._fetch(digest)
            self._cache.put(data)
        self._verified.add(digest)
        return data

    def delete(self, digest: Digest) -> None:
        """Removes the blob there, then the copy here."""
        with suppress(_Missing), self._reaching(f"delete the blob {digest}"):
            self._place.rm_file(self._at(digest))
        self._verified.discard(digest)
        self._cache.delete(digest)

    def digests(self) -> Iterator[Digest]:
        """The blobs in the other place and the copies here, in no particular order."""
        found = set(self._cache.digests())
        with suppress(_Missing), self._reaching("list the blobs"):
            names = (path.rpartition("/")[2] for path in self._place.ls(self._root, detail=False))
            found |= {name for name in names if _DIGEST.fullmatch(name)}
        return iter(found)

    def describe(self, digest: Digest) -> tuple[int, float]:
        """The size in bytes, and when it was written; 0 and now if it is not there."""
        at = self._at(digest)
        with suppress(_Missing), self._reaching(f"look at the blob {digest}"):
            size_bytes = int(self._place.info(at)["size"])
            try:
                return size_bytes, self._place.modified(at).timestamp()
            except NotImplementedError:
                # A driver that cannot tell when: then it counts as written just now.
                return size_bytes, math.inf
        return self._describe_file(self._cache.path(digest))

    def sweep(self) -> None:
        """Removes temporary files that a crash left, here and in a mounted folder."""
        super().sweep()
        if self._synced is not None:
            self._synced.sweep()

    def verify(self, digest: Digest) -> None:
        """Raises `StoreError` unless the blob in the other place is what its name says."""
        self._fetch(digest)

    def secure(self, digests: Iterable[Digest]) -> None:
        """Copies to the other place what lies in `folder` and is not there."""
        for digest in digests:
            if self._cache.has(digest) and not self.has(digest):
                self._send(digest, self._cache.read(digest))

    def owners(self) -> tuple[str, ...]:
        """The marks in the other place; none if nobody has put one."""
        try:
            with self._reaching("read whose blobs these are"):
                mark: bytes = self._place.cat_file(f"{self._root}/{OWNER}")
        except _Missing:
            return ()
        return parse_mark(mark)

    def mark(self, owners: Iterable[str]) -> None:
        """Says whose blobs lie in the other place."""
        with self._reaching("write whose blobs these are"):
            if self._synced is not None:
                mark_folder(self._synced.folder, owners)
            else:
                self._place.pipe_file(f"{self._root}/{OWNER}", mark_of(owners))

    def belong_to(self, owner: str, named: Callable[[], Iterable[Digest]]) -> None:
        """Marks both as this state's; the first time, copies to the other place what lies here.

        Raises `ConfigError` if the other place belongs to another state, whose blobs this one would
        take for leftovers.
        """
        found = self.owners()
        if not found:
            self.secure(named())
        elif owner not in found:
            raise self.is_of_another()
        if found != (owner,):
            self.mark((owner,))
        super().belong_to(owner, named)

    def may_belong_to(self, owner: str | None) -> bool:
        """Whether neither the other place nor the folder here has another state's mark."""
        found = self.owners()
        return (not found or owner in found) and super().may_belong_to(owner)

    def is_of_another(self) -> ConfigError:
        """The error for whoever names a place that has another state's mark."""
        return ConfigError(
            f"[store] blobs = {self.url!r} belongs to another coordinator's state: name a folder "
            "of its own"
        )

    def _keep(self, data: bytes) -> None:
        self._cache.put(data)
        digest = sha256(data)
        self._send(digest, data)
        self._verified.add(digest)

    def _fetch(self, digest: Digest) -> bytes:
        with self._reaching(f"fetch the blob {digest}"):
            data: bytes = self._place.cat_file(self._at(digest))
        if sha256(data) != digest:
            raise StoreError(
                f"the blob {digest} at {self.url} has another digest: put it there again from a "
                "backup, or from the copy in the state folder if that is whole"
            )
        return data

    def _send(self, digest: Digest, data: bytes) -> None:
        with self._reaching(f"write the blob {digest}"):
            if self._synced is not None:
                self._synced.put(data)
                return
            try:
                self._place.pipe_file(self._at(digest), data)
            except FileNotFoundError:
                # Only some places have folders, and only those need them made.
                self._place.makedirs(self._root, exist_ok=True)
                self._place.pipe_file(self._at(digest), data)

    def _at(self, digest: Digest) -> str:
        return f"{self._root}/{self._cache.path(digest).name}"

    @contextmanager
    def _reaching(self, what: str) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except FileNotFoundError as error:
            raise _Missing(f"cannot {what}: {self.url} does not have it") from error
        except Exception as error:  # every driver has errors of its own, and no common root
            raise StoreUnavailable(f"cannot {what} at {self.url}: {error}") from error


class _Missing(StoreError):  # noqa: N818 -- a state, as StoreUnavailable is
    """It is not in the other place."""
