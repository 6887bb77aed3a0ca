"""A look over everything that is kept: is it whole, and does it keep what was promised?

Beside a coordinator that serves, and without changing anything. The promises are checked from the
rows themselves, as a stranger would: each accepted update is in exactly one version, or the round
that it counts in is open or abandoned with a reason; a round makes at most one version; numbers of
versions rise; every file that a row names is there and is what its name says.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, false, func, select, text, true

from fedge.coordinator.backup import BLOBS, UPLOADS, Progress, accepted_files
from fedge.coordinator.rollouts import Phase
from fedge.coordinator.store import Collected, Outcome, ParticipantStatus, Retention, Store, schema
from fedge.coordinator.store.database import DATABASE_FILE
from fedge.coordinator.store.rollouts import is_open, staged_versions
from fedge.coordinator.store.tables import (
    evaluations,
    participants,
    rollouts,
    rounds,
    versions,
)
from fedge.schemas.errors import FedgeError, StoreError, StoreUnavailable

LITTLE_SPACE_BYTES = 200 * 1024 * 1024
VERSIONS_OF_SPACE = 10
"""Below so many bytes, or so many times the newest version, the disk counts as nearly full."""

RESTORE = "restore the newest good backup: fedge db restore PATH --replace"
"""What to do about a damaged database."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it should be. `advice`: what to do."""

    what: str
    advice: str


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes on the disk of the state folder, or on the server. `other`: all else in the folder."""

    database: int
    blobs: int
    uploads: int
    other: int


@dataclass(frozen=True, slots=True)
class Checkup:
    """What was found. `problems`: none if all is well. `collectable`: what retention would free."""

    population: str | None
    database: str
    schema: str
    versions: int
    rounds: int
    blobs: int
    sizes: Sizes
    free_bytes: int
    collectable: Collected
    problems: tuple[Problem, ...]


def check(
    store: Store, state_dir: Path, retention: Retention, *, now: float, progress: Progress
) -> Checkup:
    """Checks all of the state. Raises `StoreUnavailable` if the database cannot be reached."""
    problems = [*_check_database(store), *_check_owner(store)]
    with store.database.read() as connection:
        problems += _check_promises(connection)
        problems += _check_rollouts(connection)
        problems += _check_evaluations(connection)
        counts = [
            connection.scalar(select(func.count()).select_from(table)) or 0
            for table in (versions, rounds)
        ]
    # While files are read, none is deleted: what was named at the beginning stays.
    with store.database.backing_up():
        names, problem = _named(store)
        problems += [] if problem is None else [problem]
        problems += _check_files(store, names, progress)
        problems += _check_updates(store, state_dir)
    free_bytes = shutil.disk_usage(state_dir).free
    problems += _check_space(store, free_bytes)
    return Checkup(
        population=store.population(),
        database=store.database.engine.url.render_as_string(hide_password=True),
        schema=schema.HEAD,
        versions=counts[0],
        rounds=counts[1],
        blobs=len(names),
        sizes=_sizes(store, state_dir),
        free_bytes=free_bytes,
        collectable=store.collectable(retention, now=now),
        problems=tuple(problems),
    )


def _check_database(store: Store) -> Iterator[Problem]:
    with store.database.read() as connection:
        if connection.dialect.name == "postgresql":
            for setting in ("fsync", "full_page_writes"):
                if connection.scalar(text(f"SHOW {setting}")) != "on":
                    yield Problem(
                        f"the PostgreSQL server runs with {setting} off",
                        f"switch {setting} on: a power cut may damage the database",
                    )
            return
        for (found,) in connection.execute(text("PRAGMA integrity_check")):
            if found != "ok":
                yield Problem(f"the database is damaged: {found}", RESTORE)
        for row in connection.execute(text("PRAGMA foreign_key_check")):
            yield Problem(
                f"a row of {row[0]} refers to a row of {row[2]} that is not there", RESTORE
            )


def _check_owner(store: Store) -> Iterator[Problem]:
    if not store.owns_its_blobs():
        yield Problem(
            "the files of this state are marked as another state's, which deletes what it does not "
            "name",
            "see that [store] names the right database; this state cannot be served from there",
        )


def _check_promises(connection: Connection) -> Iterator[Problem]:
    report = "this breaks a promise of Fedge: please report it, with the log of that round"
    unordered = select(versions.c.number).where(versions.c.base >= versions.c.number)
    for number in connection.scalars(unordered):
        yield Problem(f"version {number} is not above the version it was made from", report)

    # The link between a round and its version, from both ends.
    made = versions.outerjoin(rounds, rounds.c.number == versions.c.round)
    for row in connection.execute(
        select(versions.c.number, versions.c.round)
        .select_from(made)
        .where(versions.c.round.is_not(None), rounds.c.version.is_distinct_from(versions.c.number))
    ):
        yield Problem(
            f"version {row.number} says that round {row.round} made it, which the round does not",
            report,
        )
    result = rounds.outerjoin(versions, versions.c.number == rounds.c.version)
    aggregated = rounds.c.outcome == Outcome.AGGREGATED
    for number in connection.scalars(
        select(rounds.c.number)
        .select_from(result)
        .where(aggregated, versions.c.round.is_distinct_from(rounds.c.number))
    ):
        yield Problem(f"round {number} says that it made a version, and there is none", report)
    for number in connection.scalars(
        select(rounds.c.number).where(rounds.c.outcome == Outcome.ABANDONED, rounds.c.reason == "")
    ):
        yield Problem(f"round {number} was abandoned without a reason", report)

    accepted = participants.c.status == ParticipantStatus.ACCEPTED
    counted = participants.outerjoin(rounds, rounds.c.number == participants.c.counted_in)
    for row in connection.execute(
        select(participants.c.device, participants.c.round)
        .select_from(counted)
        .where(accepted, rounds.c.number.is_(None))
    ):
        yield Problem(
            f"the accepted update of {row.device} in round {row.round} counts in no round", report
        )
    of_none = select(participants.c.counted_in).where(
        accepted, participants.c.counted_in.is_not(None)
    )
    for number in connection.scalars(
        select(rounds.c.number).where(
            aggregated, rounds.c.details_kept == true(), rounds.c.number.not_in(of_none)
        )
    ):
        yield Problem(f"round {number} made a version of no accepted update", report)


def _check_evaluations(connection: Connection) -> Iterator[Problem]:
    report = "this breaks a promise of Fedge: please report it, with the log of that evaluation"
    for number in connection.scalars(
        select(evaluations.c.number).where(
            evaluations.c.closed_at.is_not(None), evaluations.c.reason == ""
        )
    ):
        yield Problem(f"evaluation {number} was closed without a reason", report)
    measured = evaluations.join(versions, versions.c.number == evaluations.c.version)
    for number in connection.scalars(
        select(evaluations.c.number)
        .select_from(measured)
        .where(evaluations.c.closed_at.is_(None), versions.c.files_kept == false())
    ):
        yield Problem(f"evaluation {number} is open, and its version has no files", report)


def _check_rollouts(connection: Connection) -> Iterator[Problem]:
    report = "this breaks a promise of Fedge: please report it, with the log of that rollout"
    numbers = list(connection.scalars(select(rollouts.c.number).where(is_open())))
    if len(numbers) > 1:
        yield Problem(f"rollouts {numbers} are under way at the same time", report)
    without = versions.c.number.in_(staged_versions(connection)) & (
        versions.c.files_kept == false()
    )
    for number in connection.scalars(select(versions.c.number).where(without)):
        yield Problem(
            f"version {number} is served or rolled out, and its files were deleted", report
        )
    stopped = rollouts.c.phase.in_((Phase.HALTED.value, Phase.ABORTED.value))
    for number in connection.scalars(
        select(rollouts.c.number).where(stopped, rollouts.c.reason == "")
    ):
        yield Problem(f"rollout {number} was stopped without a reason", report)


def _named(store: Store) -> tuple[dict[str, str], Problem | None]:
    try:
        return store.named_blobs(), None
    except StoreUnavailable:
        raise
    except FedgeError as error:
        return {}, Problem(
            f"the plan cannot be read, and with it the names of its files: {error}",
            "put the file back from a backup: its blobs/ has it under the same name",
        )


def _check_files(store: Store, names: dict[str, str], progress: Progress) -> Iterator[Problem]:
    for done, (digest, what) in enumerate(sorted(names.items()), 1):
        try:
            store.blobs.verify(digest)
        except StoreUnavailable:
            raise
        except StoreError as error:
            yield Problem(
                f"missing or damaged, the {what}: {error}",
                "put the file back from a backup: its blobs/ has it under the same name",
            )
        progress(done, len(names))


def _check_updates(store: Store, state_dir: Path) -> Iterator[Problem]:
    for update in accepted_files(store):
        try:
            update.read(state_dir / UPLOADS)
        except StoreUnavailable:
            raise
        except StoreError as error:
            # The coordinator may just have closed the round, and then removes its files.
            if update in accepted_files(store):
                yield Problem(
                    f"missing or damaged, the accepted update of {update.device} in round "
                    f"{update.asked_in}: {error}",
                    "the round is abandoned when it closes, and says so: look at the disk",
                )


def _check_space(store: Store, free_bytes: int) -> Iterator[Problem]:
    newest = store.newest_version()
    wanted = LITTLE_SPACE_BYTES
    if newest is not None:
        wanted = max(wanted, VERSIONS_OF_SPACE * newest.weights.size_bytes)
    if free_bytes < wanted:
        yield Problem(
            f"{free_bytes:,} bytes are free on the disk of the state folder, less than {wanted:,}",
            "free space, or keep less: [retention] in the configuration",
        )


def _sizes(store: Store, state_dir: Path) -> Sizes:
    parts = {BLOBS: 0, UPLOADS: 0, DATABASE_FILE: 0, "": 0}
    for path in state_dir.rglob("*"):
        try:
            size_bytes = path.stat().st_size if path.is_file() else 0
        except OSError:
            continue  # It has gone since.
        first = path.relative_to(state_dir).parts[0]
        part = DATABASE_FILE if first.startswith(DATABASE_FILE) else first
        parts[part if part in parts else ""] += size_bytes
    database = parts[DATABASE_FILE]
    if store.database.engine.dialect.name == "postgresql":
        with store.database.read() as connection:
            database = connection.scalar(text("SELECT pg_database_size(current_database())"))
    return Sizes(database, parts[BLOBS], parts[UPLOADS], parts[""])
