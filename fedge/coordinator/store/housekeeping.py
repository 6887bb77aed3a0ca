"""What is deleted: what the operator wants kept no longer, and files that a crash left.

A row says that its files are gone before the first of them is deleted, so nobody is promised what
may be missing. A file that no row names may belong to a version that is about to be recorded: it is
only deleted when it is old. While a backup is being made, no file is deleted at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sqlalchemy import (
    ColumnElement,
    Connection,
    delete,
    false,
    func,
    select,
    true,
    update,
)

from fedge.coordinator.store.blobs import Blobs
from fedge.coordinator.store.database import Database
from fedge.coordinator.store.ownership import give_owner, owner_in
from fedge.coordinator.store.queries import UNANSWERED, digests_of, files_of_versions
from fedge.coordinator.store.records import Collected, Retention
from fedge.coordinator.store.rollouts import is_open, stable_version, staged_versions
from fedge.coordinator.store.rows import AnyRow
from fedge.coordinator.store.tables import (
    devices,
    evaluation_answers,
    evaluations,
    participants,
    plans,
    refusals,
    rollouts,
    rounds,
    trials,
    versions,
    word_count_answers,
    word_counts,
)
from fedge.schemas.errors import FedgeError, StoreError
from fedge.schemas.ids import Digest
from fedge.schemas.plan import PlanManifest

LEFTOVER_AGE_S = 3600.0
"""A file that no row names is left alone for so long, and looked for as seldom."""
ROUNDS_A_TRANSACTION = 200
"""Writers wait for one another, so details are deleted in portions."""
DAY_S = 86400.0

_VERSIONS_MEASURED = select(evaluations.c.version).where(evaluations.c.closed_at.is_(None))
"""Devices fetch them now, or will."""


class Housekeeping:
    """The part of the store that deletes."""

    _database: Database
    blobs: Blobs
    _swept_at: float | None = None

    def collect(self, retention: Retention, *, now: float) -> Collected:
        """Deletes what `retention` wants kept no longer, and leftovers of a crash.

        `now`: seconds since the epoch. Not for two threads at a time. Raises `StoreError`, and
        deletes no file, if another state has taken over where they lie.
        """
        forgotten = self._forget_rounds(retention)
        evaluations_gone = self._forget_evaluations(retention)
        rollouts_gone = self._forget_rollouts(retention)
        word_counts_gone = self._forget_word_counts(retention)
        devices_gone = self._forget_devices(retention, now)
        with self._database.collecting() as free:
            if not free:
                return Collected(
                    rounds=forgotten,
                    devices=devices_gone,
                    evaluations=evaluations_gone,
                    rollouts=rollouts_gone,
                    word_counts=word_counts_gone,
                    postponed=True,
                )
            if not self.owns_its_blobs():
                raise StoreError(
                    "the files of this state are marked as another one's, and none was deleted: "
                    "stop one of the two coordinators"
                )
            numbers, doomed = self._give_up_files(retention)
            sizes = [self.blobs.discard(digest) for digest in doomed]
            if self._sweep_is_due(now):
                self._swept_at = now
                keep_after = now - LEFTOVER_AGE_S
                sizes += [
                    self.blobs.discard(digest, keep_after=keep_after) for digest in self._unnamed()
                ]
        return Collected(
            versions=len(numbers),
            rounds=forgotten,
            devices=devices_gone,
            blobs=sum(size > 0 for size in sizes),
            bytes_freed=sum(sizes),
            evaluations=evaluations_gone,
            rollouts=rollouts_gone,
            word_counts=word_counts_gone,
        )

    def collectable(self, retention: Retention, *, now: float) -> Collected:
        """What `collect` would delete; nothing is changed."""
        with self._database.read() as connection:
            numbers, doomed = _overdue_versions(connection, retention)
            overdue_rounds = _overdue_rounds(connection, retention, None)
            overdue_evaluations = _overdue_evaluations(connection, retention)
            overdue_rollouts = _overdue_rollouts(connection, retention)
            overdue_word_counts = _overdue_word_counts(connection, retention)
            unseen = connection.execute(select(devices.c.name).where(_unseen(retention, now))).all()
        found = [self.blobs.describe(digest) for digest in sorted(doomed)]
        old = (self.blobs.describe(digest) for digest in self._unnamed() if digest not in doomed)
        found += [each for each in old if each[1] <= now - LEFTOVER_AGE_S]
        return Collected(
            versions=len(numbers),
            rounds=len(overdue_rounds),
            devices=len(unseen),
            blobs=sum(size > 0 for size, _ in found),
            bytes_freed=sum(size for size, _ in found),
            evaluations=len(overdue_evaluations),
            rollouts=len(overdue_rollouts),
            word_counts=len(overdue_word_counts),
        )

    def named_blobs(self) -> dict[Digest, str]:
        """Every blob that must be there, and what it is, for people.

        Raises `FedgeError` if a plan cannot be read, and with it what it names.
        """
        with self._database.read() as connection:
            rows = connection.execute(files_of_versions().where(versions.c.files_kept == true()))
            named = {
                digest: f"{part} of version {row.number}"
                for row in rows
                for part, digest in digests_of(row)
            }
            known_plans = connection.scalars(select(plans.c.sha256)).all()
        for plan in known_plans:
            named |= plan_digests(PlanManifest.decode(self.blobs.read(plan)), plan)
        return named

    def own(self) -> None:
        """Marks where the blobs lie as this state's, which deletes there what it does not name.

        Raises `ConfigError` if another place for them is another state's.
        """
        owner = self._owner()
        if owner is None:
            with self._database.write() as connection:
                owner = owner_in(connection) or give_owner(connection)
        self.blobs.belong_to(owner, self.named_blobs)

    def owns_its_blobs(self) -> bool:
        """False if where the blobs lie is marked as another state's."""
        return self.blobs.may_belong_to(self._owner())

    def _owner(self) -> str | None:
        with self._database.read() as connection:
            return owner_in(connection)

    def _unnamed(self) -> Iterator[Digest]:
        present = list(self.blobs.digests())
        try:
            named = self.named_blobs()
        except FedgeError:
            # Without its plan nobody can tell what belongs to it; `fedge db check` says what to do.
            return iter(())
        return (digest for digest in present if digest not in named)

    def _sweep_is_due(self, now: float) -> bool:
        # Also when the clock was set back.
        return self._swept_at is None or not 0 <= now - self._swept_at < LEFTOVER_AGE_S

    def _give_up_files(self, retention: Retention) -> tuple[list[int], set[Digest]]:
        with self._database.read() as connection:
            if not _overdue_versions(connection, retention)[0]:
                return [], set()
        with self._database.write() as connection:
            numbers, doomed = _overdue_versions(connection, retention)
            connection.execute(
                update(versions)
                .where(
                    versions.c.number <= numbers[-1],
                    versions.c.files_kept == true(),
                    versions.c.number.not_in(_VERSIONS_MEASURED),
                    versions.c.number.not_in(staged_versions(connection)),
                )
                .values(files_kept=False)
            )
        return numbers, doomed

    def _forget_rounds(self, retention: Retention) -> int:
        forgotten = 0
        while True:
            with self._database.read() as connection:
                numbers = _overdue_rounds(connection, retention, ROUNDS_A_TRANSACTION)
            if not numbers:
                return forgotten
            with self._database.write() as connection:
                connection.execute(delete(participants).where(participants.c.round.in_(numbers)))
                connection.execute(delete(refusals).where(refusals.c.round.in_(numbers)))
                connection.execute(
                    update(rounds).where(rounds.c.number.in_(numbers)).values(details_kept=False)
                )
            forgotten += len(numbers)

    def _forget_evaluations(self, retention: Retention) -> int:
        with self._database.read() as connection:
            if not _overdue_evaluations(connection, retention):
                return 0
        with self._database.write() as connection:
            numbers = _overdue_evaluations(connection, retention)
            for number in numbers:
                connection.execute(
                    delete(evaluation_answers).where(evaluation_answers.c.evaluation == number)
                )
                connection.execute(delete(evaluations).where(evaluations.c.number == number))
        return len(numbers)

    def _forget_rollouts(self, retention: Retention) -> int:
        with self._database.read() as connection:
            if not _overdue_rollouts(connection, retention):
                return 0
        with self._database.write() as connection:
            numbers = _overdue_rollouts(connection, retention)
            for number in numbers:
                connection.execute(delete(trials).where(trials.c.rollout == number))
                connection.execute(delete(rollouts).where(rollouts.c.number == number))
        return len(numbers)

    def _forget_word_counts(self, retention: Retention) -> int:
        with self._database.read() as connection:
            if not _overdue_word_counts(connection, retention):
                return 0
        with self._database.write() as connection:
            numbers = _overdue_word_counts(connection, retention)
            for number in numbers:
                told = word_count_answers.c.word_count == number
                connection.execute(delete(word_count_answers).where(told))
                connection.execute(delete(word_counts).where(word_counts.c.number == number))
        return len(numbers)

    def _forget_devices(self, retention: Retention, now: float) -> int:
        if retention.devices_unseen_days is None:
            return 0
        with self._database.write() as connection:
            return connection.execute(delete(devices).where(_unseen(retention, now))).rowcount


def plan_digests(manifest: PlanManifest, plan: Digest) -> dict[Digest, str]:
    """Every blob of a plan, and what it is, for people. `plan`: the manifest's own digest."""
    graphs = manifest.graphs
    words = {} if manifest.vocabulary is None else {manifest.vocabulary.sha256: "vocabulary"}
    return {
        plan: "plan",
        **words,
        graphs.train.sha256: "train graph",
        graphs.eval.sha256: "eval graph",
        graphs.infer.sha256: "infer graph",
        manifest.golden.sha256: "golden inputs",
    }


def _overdue_versions(
    connection: Connection, retention: Retention
) -> tuple[list[int], set[Digest]]:
    """The versions whose files are wanted no longer, and the files that no other version shares."""
    if retention.versions is None:
        return [], set()
    newest = select(versions.c.number).order_by(versions.c.number.desc())
    oldest_kept = connection.scalar(newest.offset(retention.versions - 1).limit(1))
    if oldest_kept is None:
        return [], set()
    kept = files_of_versions().where(versions.c.files_kept == true())
    is_old = (
        (versions.c.number < oldest_kept)
        & versions.c.number.not_in(_VERSIONS_MEASURED)
        & versions.c.number.not_in(staged_versions(connection))
    )
    old = connection.execute(kept.where(is_old).order_by(versions.c.number)).all()
    shared = connection.execute(kept.where(~is_old)).all()
    return [row.number for row in old], _all_digests(old) - _all_digests(shared)


def _overdue_rounds(connection: Connection, retention: Retention, limit: int | None) -> list[int]:
    """The closed rounds whose details are wanted no longer by the operator or by any open round."""
    if retention.rounds is None:
        return []
    closed = select(rounds.c.number).where(rounds.c.outcome.is_not(None))
    oldest_kept = connection.scalar(
        closed.order_by(rounds.c.number.desc()).offset(retention.rounds - 1).limit(1)
    )
    if oldest_kept is None:
        return []
    awaited = select(participants.c.round).where(participants.c.status.in_(UNANSWERED))
    still_open = select(rounds.c.number).where(rounds.c.outcome.is_(None))
    counts = select(participants.c.round).where(participants.c.counted_in.in_(still_open))
    overdue = (
        closed.where(
            rounds.c.number < oldest_kept,
            rounds.c.details_kept == true(),
            rounds.c.number.not_in(awaited),
            rounds.c.number.not_in(counts),
        )
        .order_by(rounds.c.number)
        .limit(limit)
    )
    return list(connection.scalars(overdue))


def _overdue_evaluations(connection: Connection, retention: Retention) -> list[int]:
    if retention.evaluations is None:
        return []
    closed = select(evaluations.c.number).where(evaluations.c.closed_at.is_not(None))
    # The newest number is never given up: the next one is above it.
    newest_first = closed.order_by(evaluations.c.number.desc())
    return list(connection.scalars(newest_first.offset(retention.evaluations)))


def _overdue_rollouts(connection: Connection, retention: Retention) -> list[int]:
    if retention.rollouts is None:
        return []
    newest_first = select(rollouts.c.number).where(~is_open()).order_by(rollouts.c.number.desc())
    overdue = connection.scalars(newest_first.offset(retention.rollouts)).all()
    # What was tried last is not tried by itself again, and of what serves it is known how it fared.
    told = {connection.scalar(select(func.max(rollouts.c.version))), stable_version(connection)}
    of_those = (
        select(func.max(rollouts.c.number))
        .where(rollouts.c.version.in_(told - {None}))
        .group_by(rollouts.c.version)
    )
    kept = set(connection.scalars(of_those))
    return [number for number in overdue if number not in kept]


def _overdue_word_counts(connection: Connection, retention: Retention) -> list[int]:
    if retention.word_counts is None:
        return []
    closed = select(word_counts.c.number).where(word_counts.c.closed_at.is_not(None))
    newest_first = closed.order_by(word_counts.c.number.desc())
    return list(connection.scalars(newest_first.offset(retention.word_counts)))


def _unseen(retention: Retention, now: float) -> ColumnElement[bool]:
    days = retention.devices_unseen_days
    if days is None:
        return false()
    return (devices.c.online == false()) & (devices.c.last_seen_at < now - days * DAY_S)


def _all_digests(rows: Iterable[AnyRow]) -> set[Digest]:
    return {digest for row in rows for _, digest in digests_of(row)}
