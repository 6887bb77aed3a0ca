"""The state that a restore replaces: how far its numbers had gone, and a copy of it that is kept.

Devices have seen its numbers, so a state that cannot be read now is not taken for an empty one:
the operator is told, and nothing is changed. Only what is damaged, which no waiting mends, counts
as knowing nothing. This module changes nothing of the old state; `restore` puts another in its
place.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, func, select

from fedge.coordinator.backup import BLOBS, UPLOADS, sync_folder
from fedge.coordinator.store import schema, snapshot
from fedge.coordinator.store.database import DATABASE_FILE, Database, sqlite_url
from fedge.coordinator.store.ownership import owner_in
from fedge.coordinator.store.tables import rounds, versions
from fedge.schemas.blob_files import BlobDirectory
from fedge.schemas.errors import StoreError, StoreUnavailable

LOG_FILE = f"{DATABASE_FILE}-wal"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a state lies or shall lie. `database`, `blobs`: URLs, None for the state folder."""

    state_dir: Path
    database: str | None = None
    blobs: str | None = None


@dataclass(frozen=True, slots=True)
class OldState:
    """What a state knows: its newest numbers, its mark on its blobs. `damage`: why it does not."""

    version: int = 0
    round: int = 0
    blobs_owner: str | None = None
    damage: str | None = None


def read_old_state(place: Place, server: Database | None) -> OldState | None:
    """What the state at `place` knows, None if there is none.

    `server`: its database, None where that is a file in the state folder.
    Raises `StoreUnavailable` if it cannot be read now, `ConfigError` if it is another program's.
    """
    try:
        if server is not None:
            with server.read() as connection:
                return None if schema.revision_of(connection) is None else _read(connection)
        if not (place.state_dir / DATABASE_FILE).exists():
            return None
        database = Database(sqlite_url(place.state_dir), as_it_is=True)
        try:
            with database.read() as connection:
                return _read(connection)
        finally:
            database.close()
    except StoreUnavailable as error:
        raise StoreUnavailable(
            f"the state that is there cannot be read now: {error}; nothing was changed, since "
            "numbers must go on above its own: restore when it can be read, or, if it never can "
            "be, move it away yourself and choose a --gap that is large enough"
        ) from error
    except StoreError as error:
        return OldState(damage=str(error))


def _read(connection: Connection) -> OldState:
    # In words that every schema understands.
    return OldState(
        connection.scalar(select(func.max(versions.c.number))) or 0,
        connection.scalar(select(func.max(rounds.c.number))) or 0,
        owner_in(connection),
    )


def keep_old_state(place: Place, old: OldState, folder: Path) -> None:
    """Puts a copy of the state at `place` into the new `folder`, without a server's tables.

    Its files get a second name there, since they are never written again.
    Raises `StoreUnavailable` if somebody else has its database open.
    """
    folder.mkdir(mode=0o700)
    if place.blobs is None:
        # What a crash left half-written is part of no state.
        BlobDirectory(place.state_dir / BLOBS).sweep()
    for name in (UPLOADS,) if place.blobs else (BLOBS, UPLOADS):
        if (place.state_dir / name).exists():
            shutil.copytree(place.state_dir / name, folder / name, copy_function=link)
    if place.database is not None:
        return
    if old.damage is None:
        _fold_log(place.state_dir / DATABASE_FILE)
    for name in (DATABASE_FILE, LOG_FILE):
        with suppress(FileNotFoundError):
            shutil.copyfile(place.state_dir / name, folder / name)


def settle_in(folder: Path, place: Path) -> None:
    """Gives a folder its place, with everything in it, durably."""
    for inner, _, names in os.walk(folder):
        for name in names:
            with (Path(inner) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(inner))
    folder.rename(place)
    sync_folder(place.parent)


def _fold_log(database: Path) -> None:
    """Afterwards the file is all of the database, so that replacing it replaces all."""
    try:
        snapshot.seal(database)
    except StoreUnavailable as error:
        raise StoreUnavailable(
            f"{error}; nothing was changed: end what else has it open, and restore again"
        ) from error
    except StoreError:
        # What could be read is not damaged, and something else is: its log is copied beside it.
        return


def link(source: str | Path, target: str | Path) -> None:
    """Gives a file that is never written again a second name. Raises `OSError`."""
    try:
        os.link(source, target)
    except OSError:
        # Not every disk has second names.
        shutil.copyfile(source, target)
