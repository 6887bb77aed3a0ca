"""Whose blobs lie in a folder: one state's, which deletes there what it does not name.

A state has a mark of its own (`blobs_owner` in `facts`), and a folder that it has taken holds it in
the file `owner`. Several marks stand there while a restore puts one state in the place of another:
whichever serves next has the folder alone. A folder without a mark is taken by the state whose
files lie in it. Decided from what two databases say and what lies there; deletes nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, delete, func, insert, select

from fedge.coordinator.store import schema
from fedge.coordinator.store.database import (
    DATABASE_FILE,
    Database,
    parse_url,
    sqlite_file,
    sqlite_url,
)
from fedge.coordinator.store.queries import digests_of, fact_named, files_of_versions
from fedge.coordinator.store.tables import facts, plans, versions
from fedge.schemas.blob_files import BlobDirectory, disk, settle
from fedge.schemas.errors import ConfigError, StoreError, StoreUnavailable
from fedge.schemas.ids import Digest

OWNER = "owner"
"""The file, or the object in another place, that says whose blobs these are."""

_MARK = "blobs_owner"
_MOVE = (
    "`fedge db backup B` with the old configuration, then `fedge db restore B` with the new one. "
    "To begin anew: another state_dir."
)


@dataclass(frozen=True, slots=True)
class Claim:
    """What a database says of blobs. `owner`: its mark, None before it has one.

    `newest`: the number of its newest version, None without any. `named`: the blobs of its plans
    and versions. `damage`: why it cannot say.
    """

    owner: str | None = None
    newest: int | None = None
    named: frozenset[Digest] = frozenset()
    damage: str | None = None

    @property
    def is_worth_keeping(self) -> bool:
        """Whether it has versions, or may have."""
        return self.newest is not None or self.damage is not None


def may_take(
    marked: tuple[str, ...], present: Iterable[Digest], mine: Claim, beside: Claim | None
) -> str | None:
    """Why the state of `mine` may not have a folder; None if it may.

    `marked`: the marks in the folder; `present`: its blobs. `beside`: what the SQLite file of the
    same state folder says, None if there is none or it is `mine` itself. The answer has places for
    `state_dir`, `folder` and `database`.
    """
    if mine.owner is not None and mine.owner in marked:
        return None
    is_of_beside = beside is not None and (not marked or beside.owner in marked)
    if beside is not None and is_of_beside and beside.is_worth_keeping and mine.newest is None:
        how_far = f"versions to {beside.newest}" if beside.damage is None else beside.damage
        return (
            f"{{state_dir}} holds a state in SQLite ({how_far}), and the database in [store] is "
            f"empty. To move it: {_MOVE}"
        )
    if not marked:
        return _may_take_unmarked(frozenset(present), mine, beside)
    if beside is not None and is_of_beside and not beside.is_worth_keeping:
        # A first start that ended before its first version has nothing to lose.
        return None
    return (
        "{folder} holds the files of another state, whose database is not {database}. If [store] "
        f"database was changed, put it back; or move the state: {_MOVE}"
    )


def _may_take_unmarked(present: frozenset[Digest], mine: Claim, beside: Claim | None) -> str | None:
    if beside is not None and (present & beside.named) - mine.named:
        return (
            f"{{state_dir}} holds a state in SQLite (versions to {beside.newest}) beside the one "
            "in {database}, and both name files in {folder}. If the one in SQLite is wanted no "
            f"longer, move {DATABASE_FILE} out of the folder"
        )
    if present and not present & mine.named:
        return (
            "{folder} holds files that {database} does not name: they are another state's, or its "
            "database was lost. To have that state back: `fedge db restore` a backup of it. To "
            "begin anew: another state_dir."
        )
    return None


def check_folder(state_dir: Path, folder: Path, url: str) -> None:
    """Raises `ConfigError` unless the state in the database at `url` may have the blob `folder`.

    For the start, under the lock of `state_dir`, before anything is made: a database that is empty
    is left so. Raises `StoreError` if the database refuses, `StoreUnavailable` if that may pass.
    """
    marked, file = owners_of(folder), sqlite_file(url)
    with_tables = file is None or file.exists()
    mine = _claim_of(url, unless=marked) if with_tables else Claim()
    if mine.owner is not None and mine.owner in marked:
        return
    beside = state_dir / DATABASE_FILE
    is_mine = file is not None and file.resolve() == beside.resolve()
    present = BlobDirectory(folder).digests() if folder.is_dir() else ()
    reason = may_take(
        marked, present, mine, None if is_mine or not beside.exists() else _claim_beside(state_dir)
    )
    if reason is not None:
        raise ConfigError(
            reason.format(
                state_dir=state_dir.resolve(),
                folder=folder.resolve(),
                database=parse_url(url).render_as_string(hide_password=True)
                if file is None
                else file.resolve(),
            )
        )


def owners_of(folder: Path) -> tuple[str, ...]:
    """The marks in a folder of blobs; none if nobody has taken it."""
    try:
        with disk(f"read whose blobs lie in {folder}"):
            return parse_mark((folder / OWNER).read_bytes())
    except StoreError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return ()
        raise


def mark_folder(folder: Path, owners: Iterable[str]) -> None:
    """Says whose blobs lie in a folder, durably and in one step."""
    written = folder / f"{OWNER}-{secrets.token_hex(8)}.tmp"
    with disk(f"write whose blobs lie in {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with written.open("xb") as file:
                file.write(mark_of(owners))
                file.flush()
                settle(file.fileno(), written, folder / OWNER)
        finally:
            written.unlink(missing_ok=True)


def parse_mark(data: bytes) -> tuple[str, ...]:
    """The marks in the bytes of the file `owner`."""
    return tuple(data.decode(errors="replace").split())


def mark_of(owners: Iterable[str]) -> bytes:
    """The bytes of the file `owner`."""
    return "\n".join(owners).encode()


def owner_in(connection: Connection) -> str | None:
    """The mark of a state; None before it has one."""
    return fact_named(connection, _MARK)


def give_owner(connection: Connection) -> str:
    """Gives a state a new mark, in the caller's transaction, and returns it."""
    owner = secrets.token_hex(16)
    connection.execute(delete(facts).where(facts.c.name == _MARK))
    connection.execute(insert(facts).values(name=_MARK, value=owner))
    return owner


def _claim_of(url: str, *, unless: tuple[str, ...] = ()) -> Claim:
    """What the database at `url` says; of one whose mark is in `unless`, the mark alone."""
    database = Database(url, as_it_is=True)
    try:
        with database.read() as connection:
            revision = schema.revision_of(connection)
            if revision is None:
                return Claim()
            schema.check_known(connection, revision)
            # In words that every schema understands.
            owner = owner_in(connection)
            if owner is not None and owner in unless:
                return Claim(owner)
            files = {
                digest
                for row in connection.execute(files_of_versions())
                for _, digest in digests_of(row)
            }
            return Claim(
                owner,
                connection.scalar(select(func.max(versions.c.number))),
                frozenset(files | set(connection.scalars(select(plans.c.sha256)))),
            )
    finally:
        database.close()


def _claim_beside(state_dir: Path) -> Claim:
    try:
        return _claim_of(sqlite_url(state_dir))
    except StoreUnavailable as error:
        raise StoreUnavailable(
            f"{state_dir / DATABASE_FILE} holds another state, which cannot be read now: {error}"
        ) from error
    except (StoreError, ConfigError) as error:
        return Claim(damage=f"which cannot be read: {error}")
