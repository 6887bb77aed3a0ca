"""Whose state this is, its plans, and its versions, whose numbers only rise."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import func, insert, select, update

from fedge.coordinator.store.database import Database
from fedge.coordinator.store.queries import close_round, population_of, version_numbered
from fedge.coordinator.store.records import Outcome, PlanRecord, VersionRecord
from fedge.coordinator.store.rows import plan_of, plan_values, version_of, version_values
from fedge.coordinator.store.tables import facts, plans, versions
from fedge.schemas.errors import ConfigError, StoreError


class Versions:
    """The part of the store that keeps plans and versions."""

    _database: Database

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

    def record_version(self, version: VersionRecord, *, copy_of: int | None = None) -> None:
        """Keeps a version and, if `version.round` is set, closes that round in the same breath.

        `copy_of`: the older version whose files it shares. Raises `StoreError` if the number does
        not rise, if the round is not open, or if those files were deleted meanwhile.
        """
        with self._database.write() as connection:
            if copy_of is not None:
                shared = version_numbered(connection, copy_of)
                if shared is None or not shared.files_kept:
                    raise StoreError(f"the files of version {copy_of} were deleted")
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
