"""Backups: a folder with the state as of one moment, made beside a coordinator that serves.

    backup.json                         what it is and what it holds
    fedge.sqlite                        the database, whatever kind it was taken from
    blobs/<digest>                      every blob that the database names
    uploads/<round>/<device>/<digest>   accepted updates of rounds that were open

The database is copied first and the files after it: what it names was there before it was named,
and nothing is deleted while a backup is made. The folder gets its name when it is complete, synced
and verified, and not before. This module makes and reads backups; `restore` takes up work from one.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedge import __version__
from fedge.coordinator.store import Store, snapshot
from fedge.coordinator.store.database import DATABASE_FILE, Database
from fedge.coordinator.store.schema import HEAD
from fedge.schemas.blob_files import BlobDirectory, disk, settle
from fedge.schemas.errors import ConfigError, StoreError, StoreUnavailable
from fedge.schemas.ids import Digest

MANIFEST = "backup.json"
BLOBS = "blobs"
UPLOADS = "uploads"

Progress = Callable[[int, int], None]
"""Called with the number of files that are done, and of those that there are."""


class BackupManifest(BaseModel):
    """`backup.json`. `made_at`: seconds since the epoch. `blobs`: size in bytes by digest.

    `updates`: as `round/device/digest`; `updates_gone`: accepted updates that were not there any
    more, since their round closed while the backup was made.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    release: str
    schema_revision: str
    population: str
    made_at: float
    newest_version: int
    newest_round: int | None
    database_sha256: Digest
    blobs: dict[Digest, int]
    updates: tuple[Annotated[str, Field(pattern=r"^\d+/[a-z0-9_-]+/[0-9a-f]{64}$")], ...]
    updates_gone: int


@dataclass(frozen=True, slots=True)
class AcceptedFile:
    """The file of an accepted update. `asked_in`: the round that asked for it."""

    asked_in: int
    device: str
    digest: Digest

    @property
    def place(self) -> str:
        """Where it lies within the folder of uploads."""
        return f"{self.asked_in}/{self.device}/{self.digest}"

    def read(self, uploads: Path) -> bytes:
        """Its bytes. Raises `StoreError` if it is not there or damaged."""
        folder = (uploads / self.place).parent
        if not folder.is_dir():
            raise StoreError(f"{folder} is not there")
        return BlobDirectory(folder).read(self.digest)


def accepted_files(store: Store) -> Iterator[AcceptedFile]:
    """The accepted updates whose files are still needed: those that count in an open round."""
    for record in store.open_rounds():
        for one in store.accepted_in(record.number):
            if one.contribution is not None:
                yield AcceptedFile(one.round, one.device, one.contribution.update.sha256)


def make_backup(
    store: Store, state_dir: Path, target: Path, *, now: float, progress: Progress
) -> BackupManifest:
    """Backs up the state to the new folder `target`, and verifies what was written.

    Raises `ConfigError` if `target` is there already or there is nothing to back up, `StoreError`
    if a blob is missing or damaged, or the disk refuses; no part of a backup is left then.
    """
    if target.exists():
        raise ConfigError(f"{target} is there already: name a new folder for each backup")
    population, newest = store.population(), store.newest_version()
    if population is None or newest is None:
        raise ConfigError("this state holds no version yet: there is nothing to back up")
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(mode=0o700, parents=True)
        with store.database.backing_up():
            snapshot.take(store.database, partial / DATABASE_FILE)
            manifest = _copy_files(store, state_dir, partial, now, progress)
        _write(partial / MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n")
        verify_backup(partial, progress=lambda _done, _all: None)
        for folder, _, _ in os.walk(partial):
            sync_folder(Path(folder))
        partial.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        raise StoreUnavailable(f"cannot write the backup {target}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def read_manifest(backup: Path) -> BackupManifest:
    """What a backup says of itself. Raises `ConfigError` if the folder is none."""
    try:
        text = (backup / MANIFEST).read_bytes()
    except OSError as error:
        raise ConfigError(f"{backup} is no backup: it has no readable {MANIFEST}") from error
    try:
        return BackupManifest.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(
            f"{backup / MANIFEST} is damaged, or of a newer release than {__version__}"
        ) from error


def verify_backup(backup: Path, *, progress: Progress) -> BackupManifest:
    """Reads all of a backup again. Raises `StoreError` for the first thing that is not as it was.

    Raises `ConfigError` if the folder is no backup, `StoreUnavailable` if it cannot be read now.
    """
    manifest = read_manifest(backup)
    database, advice = backup / DATABASE_FILE, "use another backup"
    try:
        actual = _digest_of(database)
    except StoreUnavailable:
        raise
    except StoreError as error:
        raise StoreError(f"{error}; {advice}") from error
    if actual != manifest.database_sha256:
        raise StoreError(f"{database} is not what was written; {advice}")
    for damage in snapshot.damages(database):
        raise StoreError(f"{database} is damaged ({damage}); {advice}")
    blobs, files = BlobDirectory(backup / BLOBS), len(manifest.blobs) + len(manifest.updates)
    done = 0
    for digest in manifest.blobs:
        try:
            blobs.read(digest)
        except StoreUnavailable:
            raise
        except StoreError as error:
            raise StoreError(f"{backup}: blob {digest} is missing or damaged; {advice}") from error
        done += 1
        progress(done, files)
    for place in manifest.updates:
        _parsed(place).read(backup / UPLOADS)
        done += 1
        progress(done, files)
    return manifest


def _copy_files(
    store: Store, state_dir: Path, partial: Path, now: float, progress: Progress
) -> BackupManifest:
    taken = Store(Database(snapshot.file_url(partial / DATABASE_FILE)), store.blobs, lock=None)
    try:
        population, newest = taken.population(), taken.newest_version()
        if population is None or newest is None:
            raise StoreError("the copy of the database lacks what the database has; try again")
        named, updates = sorted(taken.named_blobs()), list(accepted_files(taken))
        newest_round = taken.newest_round()
    finally:
        taken.close()
    snapshot.seal(partial / DATABASE_FILE)
    files, blobs = len(named) + len(updates), BlobDirectory(partial / BLOBS)
    sizes: dict[Digest, int] = {}
    for digest in named:
        data = store.blobs.read(digest)
        blobs.put(data)
        sizes[digest] = len(data)
        progress(len(sizes), files)
    saved = []
    for done, update in enumerate(updates, len(sizes) + 1):
        try:
            data = update.read(state_dir / UPLOADS)
        except StoreUnavailable:
            raise
        except StoreError:
            # Its round has closed since the database was copied, and its files were removed.
            continue
        BlobDirectory((partial / UPLOADS / update.place).parent).put(data)
        saved.append(update.place)
        progress(done, files)
    return BackupManifest(
        release=__version__,
        schema_revision=HEAD,
        population=population,
        made_at=now,
        newest_version=newest.number,
        newest_round=None if newest_round is None else newest_round.number,
        database_sha256=_digest_of(partial / DATABASE_FILE),
        blobs=sizes,
        updates=tuple(saved),
        updates_gone=len(updates) - len(saved),
    )


def _digest_of(path: Path) -> Digest:
    """Of a file of any size: a database may be larger than the memory."""
    with disk(f"read {path}"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parsed(place: str) -> AcceptedFile:
    asked_in, device, digest = place.split("/")
    return AcceptedFile(int(asked_in), device, digest)


def _write(path: Path, data: bytes) -> None:
    written = path.with_suffix(".tmp")
    with written.open("xb") as file:
        file.write(data)
        file.flush()
        settle(file.fileno(), written, path)


def sync_folder(folder: Path) -> None:
    """Makes durable which names are in a folder. Raises `OSError`."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
