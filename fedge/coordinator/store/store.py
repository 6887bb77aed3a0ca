"""The store: the one door to the coordinator's database and blob folder.

Methods are synchronous and short; what writes is durable when it returns. It decides nothing about
rounds: it keeps what was decided, and refuses what would break a promise (a second contribution
of one device to one round, a version number that does not rise).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import func, insert, select, update

from fedge.coordinator.store.database import Database, sqlite_file, sqlite_url
from fedge.coordinator.store.queries import (
    close_round,
    decide,
    participants_in,
    population_of,
    refusals_in,
    version_numbered,
)
from fedge.coordinator.store.records import (
    Contribution,
    DeviceRecord,
    DeviceSighting,
    Outcome,
    ParticipantRecord,
    ParticipantStatus,
    PlanRecord,
    Refusal,
    RefusalRecord,
    RoundRecord,
    RoundReport,
    VersionRecord,
)
from fedge.coordinator.store.rows import (
    contribution_values,
    device_of,
    participant_of,
    plan_of,
    plan_values,
    refusal_of,
    round_of,
    round_values,
    version_of,
    version_values,
)
from fedge.coordinator.store.tables import (
    devices,
    facts,
    participants,
    plans,
    refusals,
    rounds,
    versions,
)
from fedge.schemas.blob_files import BlobDirectory
from fedge.schemas.errors import ConfigError, RejectReason, StoreError
from fedge.schemas.messages import RoundPhase
from fedge.schemas.state_lock import StateLock

BLOBS_FOLDER = "blobs"


class Store:
    """The coordinator's durable state; open it with `open`.

    Any thread may call it: each call is one transaction on a connection of its own.
    """

    def __init__(self, database: Database, blobs: BlobDirectory, lock: StateLock | None) -> None:
        self.blobs = blobs
        self._database = database
        self._lock = lock

    @classmethod
    def open(
        cls, state_dir: Path, url: str | None = None, *, create: bool = False, serve: bool = False
    ) -> Store:
        """The store in `state_dir`, its database at `url` or in the folder itself.

        `create`: make the folder and the tables if they are missing. `serve`: hold the folder's
        lock, as only the process that runs rounds does; commands that look need not.
        Raises `ConfigError` if there is no state and `create` is False, if another process serves
        it, or if the URL cannot be used; `StoreError` if the database refused.
        """
        url = url or sqlite_url(state_dir)
        database_file = sqlite_file(url)
        if create:
            _make_folder(state_dir)
        elif not (database_file or state_dir).exists():
            raise ConfigError(f"there is no coordinator state in {state_dir}")
        lock = StateLock(state_dir, "coordinator") if serve else None
        try:
            database = Database(url, create=create)
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        return cls(database, BlobDirectory(state_dir / BLOBS_FOLDER), lock)

    def close(self) -> None:
        """Closes the database and releases the lock."""
        self._database.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ------------------------------------------------------------ population and plans

    def population(self) -> str | None:
        """The population whose state this is; None before `bind_population`."""
        with self._database.read() as connection:
            return population_of(connection)

    def bind_population(self, name: str) -> None:
        """Says whose state this is. Raises `ConfigError` if it is another population's."""
        with self._database.write() as connection:
            bound = population_of(connection)
            if bound is None:
                connection.execute(insert(facts).values(name="population", value=name))
            elif bound != name:
                raise ConfigError(f"this state belongs to population {bound!r}, not {name!r}")

    def record_plan(self, plan: PlanRecord) -> None:
        """Keeps a plan; one that is there already stays as it was."""
        with self._database.write() as connection:
            statement = self._database.upsert(plans).values(plan_values(plan))
            connection.execute(statement.on_conflict_do_nothing())

    def plan(self, sha256: str) -> PlanRecord | None:
        """The plan of that digest."""
        with self._database.read() as connection:
            row = connection.execute(select(plans).where(plans.c.sha256 == sha256)).first()
        return None if row is None else plan_of(row)

    # ------------------------------------------------------------ versions

    def record_version(self, version: VersionRecord) -> None:
        """Keeps a version and, if `version.round` is set, closes that round in the same breath.

        Raises `StoreError` if the number does not rise, or if the round is not open.
        """
        with self._database.write() as connection:
            newest = connection.scalar(select(func.max(versions.c.number)))
            if newest is not None and version.number <= newest:
                raise StoreError(f"version {version.number} after version {newest}")
            connection.execute(insert(versions).values(version_values(version)))
            if version.round is not None:
                close_round(
                    connection,
                    version.round,
                    Outcome.AGGREGATED,
                    at=version.created_at,
                    version=version.number,
                )

    def record_metrics(self, number: int, metrics: Mapping[str, float]) -> None:
        """Keeps a version's evaluation. Raises `StoreError` if there is no such version."""
        with self._database.write() as connection:
            statement = update(versions).where(versions.c.number == number)
            if connection.execute(statement.values(metrics=dict(metrics))).rowcount != 1:
                raise StoreError(f"there is no version {number} to keep metrics of")

    def newest_version(self) -> VersionRecord | None:
        """The version with the highest number."""
        with self._database.read() as connection:
            statement = select(versions).order_by(versions.c.number.desc()).limit(1)
            row = connection.execute(statement).first()
        return None if row is None else version_of(row)

    def version(self, number: int) -> VersionRecord | None:
        """The version of that number."""
        with self._database.read() as connection:
            return version_numbered(connection, number)

    def versions(self) -> tuple[VersionRecord, ...]:
        """Every version, by number."""
        with self._database.read() as connection:
            rows = connection.execute(select(versions).order_by(versions.c.number)).all()
        return tuple(version_of(row) for row in rows)

    # ------------------------------------------------------------ rounds

    def open_round(self, record: RoundRecord) -> None:
        """Keeps a new round. Raises `StoreError` if the number is taken."""
        with self._database.write() as connection:
            connection.execute(insert(rounds).values(round_values(record)))

    def record_assignment(
        self, round_number: int, cohort: Iterable[str], *, train_until: float, at: float
    ) -> None:
        """Keeps who was asked, all in one transaction; the round now trains until `train_until`.

        A device that was asked before keeps what is known of it.
        Raises `StoreError` if the round is not open.
        """
        with self._database.write() as connection:
            trains = (
                update(rounds)
                .where(rounds.c.number == round_number, rounds.c.outcome.is_(None))
                .values(phase=RoundPhase.TRAINING.value, train_until=train_until)
            )
            if connection.execute(trains).rowcount != 1:
                raise StoreError(f"round {round_number} is not open")
            asked = [
                {
                    "round": round_number,
                    "device": device,
                    "status": ParticipantStatus.ASKED.value,
                    "asked_at": at,
                }
                for device in cohort
            ]
            if asked:
                statement = self._database.upsert(participants).on_conflict_do_nothing()
                connection.execute(statement, asked)

    def record_offer(
        self, round_number: int, device: str, contribution: Contribution, *, at: float
    ) -> None:
        """Keeps what a device of the cohort offered; an accepted update stays as it was.

        Raises `PeerError` (not_in_cohort) for a device that was not asked.
        """
        values = contribution_values(contribution) | {"offered_at": at}
        with self._database.write() as connection:
            decide(connection, round_number, device, ParticipantStatus.OFFERED, values)

    def record_accepted(
        self, round_number: int, device: str, contribution: Contribution, *, at: float
    ) -> bool:
        """Counts a device's update: True the first time, False if one was accepted before.

        The update's file must be durable before this is called; a receipt may follow it.
        Raises `PeerError`: not_in_cohort, or late if the round has closed.
        """
        values = contribution_values(contribution) | {
            "decided_at": at,
            "reason": None,
            "detail": "",
        }
        status = ParticipantStatus.ACCEPTED
        with self._database.write() as connection:
            return decide(connection, round_number, device, status, values, only_while_open=True)

    def record_rejected(
        self, round_number: int, device: str, reason: RejectReason, detail: str, *, at: float
    ) -> bool:
        """Keeps why a device's update was refused; False, and no change, if one was accepted.

        Raises `PeerError` (not_in_cohort) for a device that was not asked.
        """
        values = {"reason": reason.value, "detail": detail, "decided_at": at}
        with self._database.write() as connection:
            return decide(connection, round_number, device, ParticipantStatus.REJECTED, values)

    def record_failed(self, round_number: int, device: str, detail: str, *, at: float) -> bool:
        """Keeps that a device cannot deliver; False, and no change, if an update was accepted.

        Raises `PeerError` (not_in_cohort) for a device that was not asked.
        """
        values = {"reason": None, "detail": detail, "decided_at": at}
        with self._database.write() as connection:
            return decide(connection, round_number, device, ParticipantStatus.FAILED, values)

    def abandon_round(self, round_number: int, reason: str, *, at: float) -> None:
        """Closes a round without a version. Raises `StoreError` if it is not open."""
        with self._database.write() as connection:
            close_round(connection, round_number, Outcome.ABANDONED, at=at, reason=reason)

    def newest_round(self) -> RoundRecord | None:
        """The round with the highest number."""
        with self._database.read() as connection:
            statement = select(rounds).order_by(rounds.c.number.desc()).limit(1)
            row = connection.execute(statement).first()
        return None if row is None else round_of(row)

    def rounds(self) -> tuple[RoundRecord, ...]:
        """Every round, by number."""
        with self._database.read() as connection:
            rows = connection.execute(select(rounds).order_by(rounds.c.number)).all()
        return tuple(round_of(row) for row in rows)

    def open_rounds(self) -> tuple[RoundRecord, ...]:
        """The rounds without an outcome, by number: what a restart takes up again."""
        with self._database.read() as connection:
            unfinished = select(rounds).where(rounds.c.outcome.is_(None)).order_by(rounds.c.number)
            return tuple(round_of(row) for row in connection.execute(unfinished))

    def participants(self, round_number: int) -> tuple[ParticipantRecord, ...]:
        """The devices of a round, in name order."""
        with self._database.read() as connection:
            return participants_in(connection, round_number)

    def participant(self, round_number: int, device: str) -> ParticipantRecord | None:
        """What is known of one device in one round; None if it was not asked."""
        with self._database.read() as connection:
            statement = select(participants).where(
                participants.c.round == round_number, participants.c.device == device
            )
            row = connection.execute(statement).first()
        return None if row is None else participant_of(row)

    def round_report(self, round_number: int) -> RoundReport | None:
        """Everything kept about a round, as of one moment; None if there is no such round."""
        with self._database.read() as connection:
            row = connection.execute(select(rounds).where(rounds.c.number == round_number)).first()
            if row is None:
                return None
            record = round_of(row)
            made = None if record.version is None else version_numbered(connection, record.version)
            return RoundReport(
                round=record,
                participants=participants_in(connection, round_number),
                refusals=refusals_in(connection, round_number),
                version=made,
            )

    # ------------------------------------------------------------ refusals and devices

    def count_refusals(self, refused: Iterable[Refusal]) -> None:
        """Counts each under its (round, device, reason), all in one transaction."""
        with self._database.write() as connection:
            for refusal in refused:
                statement = self._database.upsert(refusals).values(
                    round=refusal.round or 0,
                    device=refusal.device or "",
                    reason=refusal.reason.value,
                    count=1,
                    last_detail=refusal.detail,
                    last_at=refusal.at,
                )
                connection.execute(
                    statement.on_conflict_do_update(
                        index_elements=["round", "device", "reason"],
                        set_={
                            "count": refusals.c.count + 1,
                            "last_detail": statement.excluded.last_detail,
                            "last_at": statement.excluded.last_at,
                        },
                    )
                )

    def refusals(self) -> tuple[RefusalRecord, ...]:
        """Every count, the latest first."""
        with self._database.read() as connection:
            rows = connection.execute(select(refusals).order_by(refusals.c.last_at.desc())).all()
        return tuple(refusal_of(row) for row in rows)

    def record_devices(self, sightings: Iterable[DeviceSighting]) -> None:
        """Keeps what became known of devices, in order, all in one transaction."""
        with self._database.write() as connection:
            for seen in sightings:
                known = {
                    name: value
                    for name in ("boot", "online", "examples", "version", "agent_version")
                    if (value := getattr(seen, name)) is not None
                }
                statement = self._database.upsert(devices).values(
                    {"online": False}
                    | known
                    | {"name": seen.name, "first_seen_at": seen.at, "last_seen_at": seen.at}
                )
                connection.execute(
                    statement.on_conflict_do_update(
                        index_elements=["name"], set_=known | {"last_seen_at": seen.at}
                    )
                )

    def devices(self) -> tuple[DeviceRecord, ...]:
        """Every device that was ever seen, in name order."""
        with self._database.read() as connection:
            rows = connection.execute(select(devices).order_by(devices.c.name)).all()
        return tuple(device_of(row) for row in rows)


def _make_folder(state_dir: Path) -> None:
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the state folder {state_dir} cannot be made: {error.strerror}"
        ) from error
