"""Restoring a backup: into an empty state, or in the place of an old one, of which all is kept.

Numbers never go back: devices ignore versions and rounds numbered at or below what they have seen,
and since the backup the coordinator may have published more of both. So work goes on above a gap:
the newest version is recorded again with a higher number, and an abandoned round marks where the
numbers of rounds continue. What was open is abandoned, with the reason; nothing is recounted.

The new state is complete beside the old one before it takes its place, in one step: the database
is renamed, or a server's tables change in one transaction. Files are only added before that, since
blobs have the names of their bytes, and what the new state does not name is left for the next
coordinator to sweep. So a crash leaves the old state or the new one, whole, and a restore that is
run again finds either. The old one is in `replaced-…` from just before that step. The new state has
a mark of its own on its files: where the old one still has its database, after a move from SQLite
to PostgreSQL or back, it may not serve there any more.
"""

from __future__ import annotations

import dataclasses
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, func, insert, select, text, true, update
from sqlalchemy.schema import CreateSchema

from fedge.coordinator.backup import (
    BLOBS,
    BackupManifest,
    Progress,
    sync_folder,
    verify_backup,
)
from fedge.coordinator.old_state import (
    LOG_FILE,
    OldState,
    Place,
    keep_old_state,
    link,
    read_old_state,
    settle_in,
)
from fedge.coordinator.store import Outcome, ParticipantStatus, RoundRecord, schema, snapshot
from fedge.coordinator.store.database import DATABASE_FILE, Database
from fedge.coordinator.store.evaluations import close_evaluations
from fedge.coordinator.store.ownership import give_owner, mark_folder, owner_in, owners_of
from fedge.coordinator.store.queries import (
    UNANSWERED,
    close_round,
    fact_named,
    version_numbered,
)
from fedge.coordinator.store.rollouts import NUMBERS_ABOVE, end_rollouts
from fedge.coordinator.store.rows import round_values, version_values
from fedge.coordinator.store.tables import (
    devices,
    facts,
    metadata,
    participants,
    rollouts,
    rounds,
    versions,
)
from fedge.coordinator.store.word_counts import close_word_counts
from fedge.schemas.blob_files import BlobDirectory
from fedge.schemas.errors import ConfigError, StoreError, StoreUnavailable
from fedge.schemas.ids import Digest
from fedge.schemas.messages import RoundPhase
from fedge.schemas.state_lock import StateLock

if TYPE_CHECKING:
    from fedge.coordinator.store.remote_blobs import RemoteBlobs

DEFAULT_GAP = 1000

_MAKING = ".restoring-"
_ASIDE = "replaced"


@dataclass(frozen=True, slots=True)
class Restored:
    """What was done. `version`, `round`: the numbers above which work goes on.

    `abandoned`: the rounds that were open. `replaced`: the name of the folder, and on PostgreSQL of
    the schema, that holds the old state now; None if there was none. `aside`: the name of the
    folder that holds files that the backup does not name, where no old state did; None without any.
    `damage`: why the old state did not say how far its numbers had gone; None if it did.
    """

    manifest: BackupManifest
    version: int
    round: int
    abandoned: tuple[int, ...]
    replaced: str | None = None
    aside: str | None = None
    damage: str | None = None


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

    `replace`: a state that is there is replaced, and kept aside. `gap`: how many versions and
    rounds may have been published since the backup was made.
    Raises `ConfigError` if a coordinator serves, if there is a state, or there are files of one
    that the backup is not of, and `replace` is False, or if the backup is another population's;
    `StoreError` if the backup is damaged or the disk refuses; `StoreUnavailable` also while the
    state that is there cannot be read: its numbers must be known.
    """
    manifest = verify_backup(backup, progress=progress)
    if manifest.population != population:
        raise ConfigError(
            f"{backup} holds the state of population {manifest.population!r}, and the "
            f"configuration says {population!r}"
        )
    try:
        place.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone_in(place.state_dir), _folder_in(place.state_dir) as made:
            return _restore(backup, manifest, place, made, replace=replace, gap=gap, now=now)
    except OSError as error:
        # Where many files were refused, the error has their names and no word of the system.
        raise StoreUnavailable(
            f"cannot restore into {place.state_dir}: {error.strerror or error}; the state that was "
            "there is still in use, or it is complete in a folder replaced-…: restore again"
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
        old = read_old_state(place, target)
        if old is not None and not replace:
            raise ConfigError(
                f"there is a state in {place.database or place.state_dir} already; with --replace "
                "this backup takes its place, and all of it is kept"
            )
        fresh = made / DATABASE_FILE
        shutil.copyfile(backup / DATABASE_FILE, fresh)
        restored = _continue_above(fresh, manifest, old or OldState(), gap=gap, now=now)
        marks = _Marks.of(place, fresh, old, replace=replace)
        kept = made / _ASIDE
        name = f"replaced-{datetime.fromtimestamp(now, UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
        if old is not None:
            keep_old_state(place, old, kept)
            restored = dataclasses.replace(restored, replaced=name, damage=old.damage)
        _bring_blobs(backup, manifest, place, marks.there, old=old, aside=kept)
        if kept.exists():
            settle_in(kept, place.state_dir / name)
            if old is None:
                restored = dataclasses.replace(restored, aside=name)
        marks.let_both_in()
        # Until here it is the old state, whole; after the next call it is the new one.
        if target is None:
            _put_in_place(fresh, place.state_dir)
        else:
            _fill(target, fresh, restored.replaced)
        marks.let_only_the_new_in()
    finally:
        if target is not None:
            target.close()
    return restored


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
            close_evaluations(connection, why, at=now)
            close_word_counts(connection, why, at=now)
            _end_rollouts(connection, why, gap=gap, now=now)
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
    return Restored(manifest, version.number, mark.number, tuple(abandoned))


def _end_rollouts(connection: Connection, why: str, *, gap: int, now: float) -> None:
    """Ends what is open; the next number is above those that devices may have seen since."""
    end_rollouts(connection, why, at=now)
    newest = connection.scalar(select(func.max(rollouts.c.number))) or 0
    above = max(newest, int(fact_named(connection, NUMBERS_ABOVE) or 0)) + gap
    connection.execute(facts.delete().where(facts.c.name == NUMBERS_ABOVE))
    connection.execute(insert(facts).values(name=NUMBERS_ABOVE, value=str(above)))


@dataclass(frozen=True, slots=True)
class _Marks:
    """Whose the files are, while one state takes the place of another.

    `marked`, `marked_there`: the marks found in the folder and in the other place for blobs,
    `there`, if one is named. `new`: the mark of the state that is made.
    """

    folder: Path
    marked: tuple[str, ...]
    there: RemoteBlobs | None
    marked_there: tuple[str, ...]
    new: str

    @classmethod
    def of(cls, place: Place, fresh: Path, old: OldState | None, *, replace: bool) -> _Marks:
        """Gives the `fresh` database a new mark, if its state may have the files at `place`.

        Raises `ConfigError` if they are neither the old state's nor the one's that was backed up.
        """
        there, folder = None, place.state_dir / BLOBS
        if place.blobs is not None:
            from fedge.coordinator.store.remote_blobs import RemoteBlobs  # noqa: PLC0415 -- for few

            there = RemoteBlobs(folder, place.blobs)
        marked, marked_there = owners_of(folder), () if there is None else there.owners()
        known = {None if old is None else old.blobs_owner}
        database = Database(snapshot.file_url(fresh))
        try:
            with database.write() as connection:
                known.add(owner_in(connection))
                new = give_owner(connection)
        finally:
            database.close()
        snapshot.seal(fresh)
        if there is not None and marked_there and known.isdisjoint(marked_there):
            raise there.is_of_another()
        if marked and known.isdisjoint(marked) and not replace:
            raise ConfigError(
                f"{folder} holds files of another state than the one that was backed up; with "
                "--replace this backup takes its place, and all of them are kept"
            )
        return cls(folder, marked, there, marked_there, new)

    def let_both_in(self) -> None:
        """A state that had the files may serve until the new one is in its place, and that, too."""
        # Without any mark the folder is the state's whose files lie in it.
        if self.marked:
            mark_folder(self.folder, (*self.marked, self.new))
        if self.there is not None and self.marked_there:
            self.there.mark((*self.marked_there, self.new))

    def let_only_the_new_in(self) -> None:
        """From now on no other state deletes here what it does not name."""
        if self.there is not None:
            self.there.mark((self.new,))
        mark_folder(self.folder, (self.new,))


def _bring_blobs(
    backup: Path,
    manifest: BackupManifest,
    place: Place,
    there: RemoteBlobs | None,
    *,
    old: OldState | None,
    aside: Path,
) -> None:
    """Puts the blobs of the backup beside the old ones, of which none goes.

    `aside`: gets those that the next coordinator would delete and that are not kept there yet.
    """
    saved = BlobDirectory(backup / BLOBS)
    if there is None:
        folder = BlobDirectory(place.state_dir / BLOBS)
        if old is None:
            # They may be of a state that has its database elsewhere.
            for digest in folder.digests():
                if digest not in manifest.blobs:
                    (aside / BLOBS).mkdir(mode=0o700, parents=True, exist_ok=True)
                    link(folder.path(digest), aside / BLOBS / digest)
        for digest in manifest.blobs:
            folder.put(saved.read(digest))
        return
    for digest in there.digests():
        if digest not in manifest.blobs:
            # The new state does not name it and will delete it: the old one may want it back.
            _copy_if_whole(there, digest, aside / BLOBS)
    for digest, size_bytes in manifest.blobs.items():
        if not there.has(digest) or there.describe(digest)[0] != size_bytes:
            there.put(saved.read(digest))


def _copy_if_whole(there: RemoteBlobs, digest: Digest, folder: Path) -> None:
    try:
        data = there.read(digest)
    except StoreUnavailable:
        raise
    except StoreError:
        return
    BlobDirectory(folder).put(data)


def _put_in_place(fresh: Path, state_dir: Path) -> None:
    """Makes `fresh` the database of a state folder."""
    # An old log that is still there is of a damaged database: it must not be played into this one.
    for name in (LOG_FILE, f"{DATABASE_FILE}-shm"):
        (state_dir / name).unlink(missing_ok=True)
    sync_folder(state_dir)
    fresh.replace(state_dir / DATABASE_FILE)
    sync_folder(state_dir)


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
    except StoreUnavailable as error:
        # Not "nothing was changed": the answer to the commit may be what was lost.
        raise StoreError(
            f"{error}; the database holds the old state or the new one, each with all of its files:"
            " restore again"
        ) from error
    finally:
        source.close()


@contextmanager
def _alone_in(state_dir: Path) -> Iterator[None]:
    """No coordinator serves meanwhile."""
    try:
        # Nobody must take it for a coordinator, and send it what ends a program without a handler.
        lock = StateLock(state_dir, "restore", serves=False)
    except ConfigError as error:
        holder = StateLock.holder(state_dir)
        if holder is None:
            raise
        raise ConfigError(
            f"a coordinator (process {holder}) serves {state_dir.resolve()}: stop it first"
        ) from error
    with lock:
        yield


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
