"""Rollouts: asked for by a command, carried on by the coordinator; each device counts once in each.

A command writes a new row or a wish; everything else in a row is the coordinator's, so the two
never overwrite one another. The version that is stable is a fact beside them, and becomes the
candidate in the same transaction in which its rollout is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict
from sqlalchemy import ColumnElement, Connection, func, insert, select, update

from fedge.coordinator.rollout_fleet import KnownDevice
from fedge.coordinator.rollouts import Phase, RolloutPolicy, Wish
from fedge.coordinator.store.database import Database
from fedge.coordinator.store.queries import fact_named, version_numbered
from fedge.coordinator.store.rows import AnyRow
from fedge.coordinator.store.tables import devices, facts, rollouts, trials, versions
from fedge.schemas.errors import ConfigError, StoreError
from fedge.schemas.messages import TrialChecks, TrialOutcome, TrialReason, TrialReport

STABLE = "stable_version"
"""The fact that names the version of who is in no rollout; absent while each newest one serves."""
NUMBERS_ABOVE = "rollouts_above"
"""The fact that a restored state has: numbers up to this may have been used since its backup."""


class Terms(BaseModel):
    """What a rollout was begun with; a configuration that changes does not change it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stages: tuple[float, ...]
    soak_s: float
    min_devices: int
    min_answered: float
    max_failure_share: float
    checks: TrialChecks

    @property
    def policy(self) -> RolloutPolicy:
        """What the machine is given."""
        return RolloutPolicy(
            stages=self.stages,
            soak_s=self.soak_s,
            min_devices=self.min_devices,
            min_answered=self.min_answered,
            max_failure_share=self.max_failure_share,
        )


@dataclass(frozen=True, slots=True)
class RolloutRecord:
    """One rollout of `version`, beside `stable`. `stage`: from 0. See `rollouts.Rollout`."""

    number: int
    version: int
    stable: int
    terms: Terms
    started_at: float
    phase: Phase = Phase.RUNNING
    wish: Wish = Wish.RUN
    stage: int = 0
    share: float = 0.0
    reached: int = 0
    soaked_s: float = 0.0
    reason: str = ""
    ended_at: float | None = None


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """What became of the candidate on one device. See `TrialReport`."""

    rollout: int
    device: str
    outcome: TrialOutcome
    reason: TrialReason | None
    detail: str
    latency_ms: float | None
    loss_ratio: float | None
    hold_out: int | None
    at: float


class Rollouts:
    """The part of the store that keeps rollouts."""

    _database: Database

    # ------------------------------------------------------------ what serves

    def stable_version(self) -> int | None:
        """The version of who is in no rollout; None while each newest one serves."""
        with self._database.read() as connection:
            return stable_version(connection)

    def serve_in_stages(self) -> int:
        """From now on rollouts say what serves: the number of the stable version.

        It is the newest one if each newest one served until now. Raises `StoreError` without any.
        """
        with self._database.write() as connection:
            stable = stable_version(connection)
            if stable is None:
                stable = connection.scalar(select(func.max(versions.c.number)))
                if stable is None:
                    raise StoreError("there is no version yet")
                self._keep_stable(connection, stable)
            return stable

    def serve_the_newest(self, reason: str, *, at: float) -> bool:
        """From now on each newest version serves; an open rollout is aborted with the reason.

        False if it was so before.
        """
        with self._database.write() as connection:
            end_rollouts(connection, reason, at=at)
            gone = connection.execute(facts.delete().where(facts.c.name == STABLE))
            return gone.rowcount > 0

    # ------------------------------------------------------------ rollouts

    def start_rollout(self, version: int, terms: Terms, *, at: float) -> RolloutRecord:
        """Keeps a new rollout of a version; the coordinator begins when it looks.

        Raises `ConfigError` if another one is open, if the version is stable already or is not
        there, or if its files were deleted.
        """
        with self._database.write() as connection:
            still_open = connection.scalar(select(rollouts.c.number).where(is_open()))
            if still_open is not None:
                raise ConfigError(
                    f"rollout {still_open} is under way: wait for its end, or abort it first "
                    "(fedge rollout abort)"
                )
            stable = stable_version(connection)
            if stable is None:
                raise ConfigError(
                    "each newest version is served at once: set [rollout] mode to staged or manual "
                    "and start the coordinator again"
                )
            candidate = version_numbered(connection, version)
            if candidate is None:
                raise ConfigError(f"there is no version {version}; `fedge version list` shows them")
            if version == stable:
                raise ConfigError(f"version {version} is what every device serves already")
            if not candidate.files_kept:
                raise ConfigError(
                    f"the files of version {version} were deleted, as [retention] says: no device "
                    "could fetch it"
                )
            newest = connection.scalar(select(func.max(rollouts.c.number))) or 0
            above = fact_named(connection, NUMBERS_ABOVE)
            record = RolloutRecord(
                number=max(newest, int(above or 0)) + 1,
                version=version,
                stable=stable,
                terms=terms,
                started_at=at,
            )
            connection.execute(insert(rollouts).values(_values(record)))
        return record

    def keep_rollout(self, record: RolloutRecord) -> bool:
        """Keeps how far an open rollout is, all but its wish; if it is done, what is stable now.

        False, and no change, if a command wished something else since the record was read: that
        comes first. Raises `StoreError` if it is not open any more.
        """
        values = _values(record)
        wish = values.pop("wish")
        this = (rollouts.c.number == record.number, is_open())
        keeps = update(rollouts).where(*this, rollouts.c.wish == wish)
        with self._database.write() as connection:
            if connection.execute(keeps.values(values)).rowcount != 1:
                if connection.execute(select(rollouts.c.number).where(*this)).first() is None:
                    raise StoreError(f"rollout {record.number} is not open")
                return False
            if record.phase is Phase.DONE:
                self._keep_stable(connection, record.version)
        return True

    def wish_of_rollout(self, wish: Wish, reason: str = "") -> RolloutRecord:
        """Keeps what the operator wants of the open rollout, for the coordinator to carry out.

        Raises `ConfigError` if there is none, or if it is being aborted: that is not taken back.
        """
        with self._database.write() as connection:
            row = connection.execute(select(rollouts).where(is_open())).first()
            if row is None:
                raise ConfigError(
                    "no rollout is under way: `fedge rollout status` shows the last. To bring an "
                    "earlier version back: fedge rollout start --version N --straight"
                )
            record = _rollout_of(row)
            if record.wish is Wish.ABORT and wish is not Wish.ABORT:
                raise ConfigError(
                    f"rollout {record.number} is to be aborted already, as soon as the coordinator "
                    "looks; then begin another one: fedge rollout start"
                )
            values = {"wish": wish.value, "reason": reason if wish is Wish.ABORT else ""}
            connection.execute(
                update(rollouts).where(rollouts.c.number == record.number).values(values)
            )
        return record

    def newest_rollout(self) -> RolloutRecord | None:
        """The one with the highest number."""
        statement = select(rollouts).order_by(rollouts.c.number.desc()).limit(1)
        with self._database.read() as connection:
            row = connection.execute(statement).first()
        return None if row is None else _rollout_of(row)

    def rollout(self, number: int) -> RolloutRecord | None:
        """The rollout of that number."""
        with self._database.read() as connection:
            row = connection.execute(select(rollouts).where(rollouts.c.number == number)).first()
        return None if row is None else _rollout_of(row)

    def rollouts(self) -> tuple[RolloutRecord, ...]:
        """Every rollout, by number."""
        with self._database.read() as connection:
            rows = connection.execute(select(rollouts).order_by(rollouts.c.number)).all()
        return tuple(_rollout_of(row) for row in rows)

    def newest_tried(self) -> int:
        """The highest version that a rollout was begun of, or that is stable."""
        with self._database.read() as connection:
            tried = connection.scalar(select(func.max(rollouts.c.version)))
            return max(tried or 0, stable_version(connection) or 0)

    # ------------------------------------------------------------ devices

    def count_trial(self, device: str, report: TrialReport, *, at: float) -> bool:
        """Keeps a device's report; False, and no change, if that device was counted before.

        Also after the rollout has ended: what happened is worth knowing. Raises `StoreError` if
        there is no such rollout.
        """
        counted = select(trials.c.at).where(
            trials.c.rollout == report.rollout, trials.c.device == device
        )
        with self._database.write() as connection:
            # There is one writer at a time.
            if connection.execute(counted).first() is not None:
                return False
            connection.execute(
                insert(trials).values(
                    rollout=report.rollout,
                    device=device,
                    outcome=report.outcome.value,
                    reason=None if report.reason is None else report.reason.value,
                    detail=report.detail,
                    latency_ms=report.latency_ms,
                    loss_ratio=report.loss_ratio,
                    hold_out=report.hold_out,
                    at=at,
                )
            )
        return True

    def trials(self, number: int) -> tuple[TrialRecord, ...]:
        """The devices that reported in a rollout, in name order."""
        statement = select(trials).where(trials.c.rollout == number)
        with self._database.read() as connection:
            found = [_trial_of(row) for row in connection.execute(statement)]
        return tuple(sorted(found, key=lambda one: one.device))

    def trial_counts(self, number: int) -> Mapping[TrialOutcome, int]:
        """How many devices it ended how on."""
        statement = (
            select(trials.c.outcome, func.count())
            .where(trials.c.rollout == number)
            .group_by(trials.c.outcome)
        )
        with self._database.read() as connection:
            counts = {TrialOutcome(row[0]): row[1] for row in connection.execute(statement)}
        return {outcome: counts.get(outcome, 0) for outcome in TrialOutcome}

    def born_devices(self) -> tuple[KnownDevice, ...]:
        """The devices whose birth was ever heard: other names anybody may have made up."""
        statement = select(devices.c.name, devices.c.online, devices.c.last_seen_at)
        with self._database.read() as connection:
            rows = connection.execute(statement.where(devices.c.boot.is_not(None)))
            return tuple(KnownDevice(*row) for row in rows)

    def is_born(self, device: str) -> bool:
        """Whether a birth of the device was ever heard."""
        statement = select(devices.c.name).where(
            devices.c.name == device, devices.c.boot.is_not(None)
        )
        with self._database.read() as connection:
            return connection.execute(statement).first() is not None

    def _keep_stable(self, connection: Connection, number: int) -> None:
        statement = self._database.upsert(facts).values(name=STABLE, value=str(number))
        connection.execute(
            statement.on_conflict_do_update(index_elements=["name"], set_={"value": str(number)})
        )


def is_open() -> ColumnElement[bool]:
    """Of a row of `rollouts`."""
    return rollouts.c.ended_at.is_(None)


def stable_version(connection: Connection) -> int | None:
    """See `Rollouts.stable_version`."""
    text = fact_named(connection, STABLE)
    return None if text is None else int(text)


def staged_versions(connection: Connection) -> frozenset[int]:
    """The versions that devices may fetch or go back to, whatever is newest."""
    candidates = connection.execute(
        select(rollouts.c.version, rollouts.c.stable).where(is_open())
    ).all()
    stable = stable_version(connection)
    named = {number for row in candidates for number in row}
    return frozenset(named if stable is None else named | {stable})


def end_rollouts(connection: Connection, reason: str, *, at: float) -> None:
    """Aborts what is open."""
    connection.execute(
        update(rollouts)
        .where(is_open())
        .values(phase=Phase.ABORTED.value, reason=reason, ended_at=at)
    )


def _values(record: RolloutRecord) -> dict[str, object]:
    return {
        "number": record.number,
        "version": record.version,
        "stable": record.stable,
        "policy": record.terms.model_dump_json(),
        "phase": record.phase.value,
        "wish": record.wish.value,
        "stage": record.stage,
        "share": record.share,
        "reached": record.reached,
        "soaked_s": record.soaked_s,
        "reason": record.reason,
        "started_at": record.started_at,
        "ended_at": record.ended_at,
    }


def _rollout_of(row: AnyRow) -> RolloutRecord:
    values = dict(row._mapping)
    values["terms"] = Terms.model_validate_json(values.pop("policy"))
    values["phase"] = Phase(values["phase"])
    values["wish"] = Wish(values["wish"])
    return RolloutRecord(**values)


def _trial_of(row: AnyRow) -> TrialRecord:
    values = dict(row._mapping)
    values["outcome"] = TrialOutcome(values["outcome"])
    values["reason"] = None if values["reason"] is None else TrialReason(values["reason"])
    return TrialRecord(**values)
