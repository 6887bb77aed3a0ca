"""Restoring a backup: into an empty state, or beside the old one, which is moved away and kept.

Numbers never go back: devices ignore versions and rounds numbered at or below what they have seen,
and since the backup the coordinator may have published more of both. So work goes on above a gap:
the newest version is recorded again with a higher number, and an abandoned round marks where the
numbers of rounds continue. What was open is abandoned, with the reason; nothing is recounted.

The new state is made beside the old one and complete before anything is moved. A crash leaves
either the old state, or none with the old one in `replaced-…` and the backup to be restored again.
"""

from __future__ import annotations

import dataclasses
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, delete, func, insert, select, text, true, update
from sqlalchemy.schema import CreateSchema

from fedge.coordinator.backup import (
    BLOBS,
    UPLOADS,
    BackupManifest,
    Progress,
    sync_folder,
    verify_backup,
)
from fedge.coordinator.store import Outcome, ParticipantStatus, RoundRecord, schema, snapshot
from fedge.coordinator.store.database import DATABASE_FILE, Database, sqlite_url
from fedge.coordinator.store.queries import UNANSWERED, close_round, version_numbered
from fedge.coordinator.store.rows import round_values, version_values
from fedge.coordinator.store.tables import devices, facts, metadata, participants, rounds, versions
from fedge.schemas.blob_files import BlobDirectory
from fedge.schemas.errors import ConfigError, FedgeError, StoreError, StoreUnavailable
from fedge.schemas.ids import Digest
from fedge.schemas.messages import RoundPhase
from fedge.schemas.state_lock import StateLock

if TYPE_CHECKING:
    from fedge.coordinator.store.remote_blobs import RemoteBlobs

DEFAULT_GAP = 1000

_MAKING = ".restoring-"
_SQLITE_FILES = (DATABASE_FILE, f"{DATABASE_FILE}-wal", f"{DATABASE_FILE}-shm")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a state lies or shall lie. `database`, `blobs`: URLs, None for the state folder."""

    state_dir: Path
    database: str | None = None
    blobs: str | None = None


@dataclass(frozen=True, slots=True)
class Restored:
    """What was done. `version`, `round`: the numbers above which work goes on.

    `abandoned`: the rounds that were open. `replaced`: the name of the folder, and on PostgreSQL of
    the schema, that holds the old state now; None if there was none.
    """

    manifest: BackupManifest
    version: int
    round: int
    abandoned: tuple[int, ...]
    replaced: str | None


@dataclass(frozen=True, slots=True)
class OldState:
    """What is known of the state that is replaced: its newest numbers, its mark on its blobs."""

    version: int = 0
    round: int = 0
    blobs_owner: str | None = None


def restore_backup(
    backup: Path,
    place: Place,
    *,
    population: str,
    replace: bool,
    gap: int = DEFAULT_GAP,
    now: float,
    progress: Progress,
) -> Restored:
    """Makes the state at `place` from a backup. Its next coordinator goes on from there.

    `replace`: a state that is there is moved aside. `gap`: how many versions and rounds may have
    been published since the backup was made.
    Raises `ConfigError` if a coordinator serves, if there is a state and `replace` is False, or if
    the backup is another population's; `StoreError` if the backup is damaged or the disk refuses.
    """
    manifest = verify_backup(backup, progress=progress)
    if manifest.population != population:
        raise ConfigError(
            f"{backup} holds the state of population {manifest.population!r}, and the "
            f"configuration says {population!r}"
        )
    try:
        place.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with StateLock(place.state_dir, "coordinator"), _folder_in(place.state_dir) as made:
            return _restore(backup, manifest, place, made, replace=replace, gap=gap, now=now)
    except OSError as error:
        raise StoreUnavailable(
            f"cannot restore into {place.state_dir}: {error.strerror}; what was there is there, or "
            "in the folder replaced-… beside"
        ) from error


def _restore(
    backup: Path,
    manifest: BackupManifest,
    place: Place,
    made: Path,
    *,
    replace: bool,
    gap: int,
    now: float,
) -> Restored:
    target = None
    if place.database is not None:
        target = Database(place.database, serve=True, as_it_is=True)
    try:
        old = _old_state(place, target)
        if old is not None and not replace:
            raise ConfigError(
                f"there is a state in {place.database or place.state_dir}: with --replace it is "
                "moved aside and kept"
            )
        fresh = made / DATABASE_FILE
        shutil.copyfile(backup / DATABASE_FILE, fresh)
        restored = _continue_above(fresh, manifest, old or OldState(), gap=gap, now=now)
        aside = f"replaced-{datetime.fromtimestamp(now, UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
        _bring_blobs(
            backup, manifest, place, fresh=fresh, old=old, made=made, aside=place.state_dir / aside
        )
        # From here on there are only renames, and one transaction.
        if old is not None:
            kept = (UPLOADS, *_SQLITE_FILES) if place.blobs else (BLOBS, UPLOADS, *_SQLITE_FILES)
            _move(place.state_dir, place.state_dir / aside, kept)
            restored = dataclasses.replace(restored, replaced=aside)
        if place.blobs is None:
            _move(made / BLOBS, place.state_dir / BLOBS, manifest.blobs)
        if target is None:
            _move(made, place.state_dir, [DATABASE_FILE])
        else:
            _fill(target, fresh, aside if old is not None else None)
    finally:
        if target is not None:
            target.close()
    return restored


def _old_state(place: Place, target: Database | None) -> OldState | None:
    """What the state that is there knows; None if there is none. Damage makes it know nothing."""
    if target is not None:
        with target.read() as connection:
            if schema.revision_of(connection) is None:
                return None
            return _read_old(connection)
    if not (place.state_dir / DATABASE_FILE).exists():
        return None
    try:
        database = Database(sqlite_url(place.state_dir), as_it_is=True)
        try:
            with database.read() as connection:
                return _read_old(connection)
        finally:
            database.close()
    except FedgeError:
        return OldState()


def _read_old(connection: Connection) -> OldState:
    # In words that every schema understands.
    owner = connection.scalar(select(facts.c.value).where(facts.c.name == "blobs_owner"))
    return OldState(
        connection.scalar(select(func.max(versions.c.number))) or 0,
        connection.scalar(select(func.max(rounds.c.number))) or 0,
        owner,
    )


def _continue_above(
    path: Path, manifest: BackupManifest, old: OldState, *, gap: int, now: float
) -> Restored:
    """Makes the copy of the database go on above every number that may have been published."""
    why = f"restored from the backup of {datetime.fromtimestamp(manifest.made_at, UTC):%F %TZ}"
    database = Database(snapshot.file_url(path), create=True)
    try:
        with database.write() as connection:
            still_open = connection.scalars(
                select(rounds.c.number).where(rounds.c.outcome.is_(None))
            )
            abandoned = list(still_open)
            for number in abandoned:
                close_round(connection, number, Outcome.ABANDONED, at=now, reason=why)
            connection.execute(
                update(participants)
                .where(participants.c.status.in_(UNANSWERED))
                .values(status=ParticipantStatus.SILENT.value, decided_at=now)
            )
            connection.execute(
                update(devices).where(devices.c.online == true()).values(online=False)
            )
            newest = version_numbered(connection, manifest.newest_version)
            if newest is None:
                raise StoreError(f"the backup lacks its version {manifest.newest_version}")
            version = dataclasses.replace(
                newest,
                number=max(newest.number + gap, old.version + 1),
                base=newest.number,
                round=None,
                created_at=now,
                note=why,
            )
            connection.execute(insert(versions).values(version_values(version)))
            mark = RoundRecord(
                number=max((manifest.newest_round or 0) + gap, old.round + 1),
                base=version.number,
                goal=1,
                quorum=1,
                seed=0,
                opened_at=now,
                gather_until=now,
                phase=RoundPhase.CLOSED,
                closed_at=now,
                outcome=Outcome.ABANDONED,
                reason=why,
            )
            connection.execute(insert(rounds).values(round_values(mark)))
    finally:
        database.close()
    snapshot.seal(path)
    return Restored(manifest, version.number, mark.number, tuple(abandoned), None)


def _bring_blobs(
    backup: Path,
    manifest: BackupManifest,
    place: Place,
    *,
    fresh: Path,
    old: OldState | None,
    made: Path,
    aside: Path,
) -> None:
    """Puts the blobs of the backup beside the state's, or into the other place."""
    saved = BlobDirectory(backup / BLOBS)
    if place.blobs is None:
        folder = BlobDirectory(made / BLOBS)
        for digest in manifest.blobs:
            folder.put(saved.read(digest))
        return
    from fedge.coordinator.store.remote_blobs import RemoteBlobs  # noqa: PLC0415 -- for few

    there = RemoteBlobs(place.state_dir / BLOBS, place.blobs)
    _check_owner(there, fresh, old)
    for digest in there.digests():
        if digest not in manifest.blobs:
            # The new state does not name it and will delete it: the old one may want it back.
            _copy_if_whole(there, digest, aside / BLOBS)
    for digest, size_bytes in manifest.blobs.items():
        if not there.has(digest) or there.describe(digest)[0] != size_bytes:
            there.put(saved.read(digest))


def _check_owner(there: RemoteBlobs, fresh: Path, old: OldState | None) -> None:
    """The new state takes over the mark on its blobs, if the mark is its own or the old state's."""
    owner = there.owner()
    if owner is None:
        return
    database = Database(snapshot.file_url(fresh))
    try:
        with database.write() as connection:
            mine = facts.c.name == "blobs_owner"
            marked = connection.scalar(select(facts.c.value).where(mine))
            if owner not in (marked, None if old is None else old.blobs_owner):
                raise ConfigError(
                    f"[store] blobs = {there.url!r} belongs to another coordinator's state: name a "
                    "folder of its own"
                )
            connection.execute(delete(facts).where(mine))
            connection.execute(insert(facts).values(name="blobs_owner", value=owner))
    finally:
        database.close()
    snapshot.seal(fresh)


def _copy_if_whole(there: RemoteBlobs, digest: Digest, folder: Path) -> None:
    try:
        data = there.read(digest)
    except StoreUnavailable:
        raise
    except StoreError:
        return
    BlobDirectory(folder).put(data)


def _fill(target: Database, fresh: Path, aside: str | None) -> None:
    """Replaces the tables of a server, in one transaction; the old ones go to schema `aside`."""
    source = Database(snapshot.file_url(fresh))
    try:
        with source.read() as rows, target.write() as connection:
            if aside is not None:
                connection.execute(CreateSchema(aside))
                for table in (*metadata.tables, schema.ALEMBIC_TABLE):
                    if target.engine.dialect.has_table(connection, table):
                        connection.execute(text(f'ALTER TABLE {table} SET SCHEMA "{aside}"'))
            schema.upgrade(connection)
            snapshot.copy_rows(rows, connection)
    finally:
        source.close()


def _move(source: Path, target: Path, names: Iterable[str]) -> None:
    """Renames those of `names` that are there, durably."""
    target.mkdir(mode=0o700, exist_ok=True)
    for name in names:
        with suppress(FileNotFoundError):
            (source / name).replace(target / name)
    for folder in (target, source, target.parent):
        sync_folder(folder)


@contextmanager
def _folder_in(state_dir: Path) -> Iterator[Path]:
    """A folder on the same disk, so that what is made in it is put in place by renaming."""
    for left in state_dir.glob(f"{_MAKING}*"):
        shutil.rmtree(left, ignore_errors=True)
    made = state_dir / f"{_MAKING}{secrets.token_hex(4)}"
    made.mkdir(mode=0o700)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
