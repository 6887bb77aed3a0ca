"""The rollout desk: carries out what the rollout machine decides, beside the rounds.

It looks at the store (what devices reported, what the operator wishes, who is known), has the
machine decide, writes that down, and then has it published: in this order, so a coordinator that is
killed goes on where devices were told it is. Training does not wait for it: the newest version is
the base of the next round, whatever apps use.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from fedge.coordinator import rollouts
from fedge.coordinator.distribution import Distribution
from fedge.coordinator.publisher import Publisher, plan_blobs
from fedge.coordinator.rollout_fleet import KnownDevice, RolloutFleet
from fedge.coordinator.rollouts import Fleet, Looked, Phase, Rollout, ServingMode, Wished
from fedge.coordinator.store import RolloutRecord, Store, Terms, VersionRecord
from fedge.coordinator.workers import Workers
from fedge.schemas.blobs import BlobRef
from fedge.schemas.errors import (
    ConfigError,
    FedgeError,
    PeerError,
    RejectReason,
    StoreError,
    StoreUnavailable,
)
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import (
    CandidateAnnouncement,
    CandidatePhase,
    StableAnnouncement,
    TrialCounted,
    TrialOutcome,
    TrialReport,
)
from fedge.schemas.plan import PlanManifest
from fedge.schemas.rollout_share import place_of

log = EventLog(__name__)

LOOK_S = 10.0
"""While a rollout is under way, the fleet is looked at so often."""
LEARN_S = 1.0
"""And so often while the roll is called."""
GATHER_S = 0.2
"""Reports that come within so long are looked at together."""
KEEP_S = 10.0
"""Time that a stage has soaked is written down at least so often."""
TOLD = "rollout_told"
"""The note that says that announcements of rollouts may lie on the broker."""


_SAID = {
    Phase.RUNNING: CandidatePhase.RUNNING,
    Phase.PAUSED: CandidatePhase.PAUSED,
    Phase.DONE: CandidatePhase.DONE,
    Phase.HALTED: CandidatePhase.WITHDRAWN,
    Phase.ABORTED: CandidatePhase.WITHDRAWN,
}


@dataclass(frozen=True, slots=True)
class _Version:
    """A version with its plan: populations may change how their inference file is made."""

    record: VersionRecord
    plan: BlobRef
    blobs: tuple[BlobRef, ...]

    @property
    def facts(self) -> dict[str, Any]:
        """What an announcement says of it."""
        version = self.record
        return {
            "number": version.number,
            "plan": self.plan,
            "weights": version.weights,
            "golden": version.golden,
            "model_sha256": version.model_sha256,
            "model_bytes": version.model_bytes,
        }


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the store says. `counts`: of the newest rollout, while it is open; `devices`: all."""

    stable: _Version
    newest: RolloutRecord | None = None
    candidate: _Version | None = None
    counts: tuple[int, int] = (0, 0)
    devices: tuple[KnownDevice, ...] = ()


class RolloutDesk:
    """The rollouts of one population.

    `terms`: what a rollout that begins by itself begins with. `newest`: the newest version.
    `publish`: has everything published, soon. `all_known`: whether the roll was called in this life
    and everybody is known who will be; no rollout reaches further before. `clock`: monotonic
    seconds; `wall_clock`: seconds since the epoch.
    """

    def __init__(
        self,
        population: str,
        *,
        mode: ServingMode,
        terms: Terms,
        store: Store,
        workers: Workers,
        distribution: Distribution,
        publisher: Publisher,
        newest: Callable[[], VersionRecord],
        publish: Callable[[], None],
        all_known: Callable[[], bool],
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self._population = population
        self._mode = mode
        self._terms = terms
        self._store = store
        self._workers = workers
        self._distribution = distribution
        self._publisher = publisher
        self._newest = newest
        self._publish = publish
        self._all_known = all_known
        self._clock = clock
        self._wall_clock = wall_clock
        self._due = asyncio.Event()
        self._state: tuple[int, Rollout] | None = None
        self._known_terms = (0, terms)
        self._kept_at = 0.0
        self._said: tuple[StableAnnouncement, CandidateAnnouncement] | None = None
        self._noted = False
        self._versions: dict[int, _Version] = {}
        self._fleet: RolloutFleet | None = None
        self._listens_since: float | None = None

    @property
    def is_staged(self) -> bool:
        """Whether rollouts say what apps use."""
        return self._mode is not ServingMode.EVERY

    async def recover(self) -> None:
        """Takes up the mode and the rollout that is under way; versions come first."""
        if self.is_staged:
            await self._workers.insist(self._store.serve_in_stages)
            await self._look()
            return
        reason = 'the coordinator was started with [rollout] mode = "every"'
        at = self._wall_clock()
        if await self._workers.insist(lambda: self._store.serve_the_newest(reason, at=at)):
            log.info("rollouts_off", advice="each newest version is served at once")

    async def count(self, device: str, report: TrialReport) -> TrialCounted:
        """Keeps what a device reported, once, and returns the answer to it.

        Raises `PeerError` (not_in_cohort) for a rollout that does not reach the device and for a
        name that nobody was born with, and `StoreUnavailable`: then the device says it again.
        """
        at = self._wall_clock()

        def keep() -> bool:
            record = self._store.rollout(report.rollout)
            place = place_of(self._population, report.rollout, device)
            if record is None or record.version != report.version or place >= record.share:
                raise PeerError(
                    RejectReason.NOT_IN_COHORT,
                    f"no rollout {report.rollout} of version {report.version} reaches {device}",
                )
            if not self._store.is_born(device):
                raise PeerError(RejectReason.NOT_IN_COHORT, f"no birth of {device} was heard yet")
            return self._store.count_trial(device, report, at=at)

        if await self._workers.durable(keep):
            log.info(
                "trial_counted",
                device=device,
                rollout=report.rollout,
                version=report.version,
                outcome=report.outcome.value,
                reason=None if report.reason is None else report.reason.value,
                detail=report.detail,
            )
            self.look()
        return TrialCounted(rollout=report.rollout)

    def look(self) -> None:
        """Something may have changed: a report, a wish, a new version."""
        self._due.set()

    async def run(self) -> None:
        """Looks when something may have changed or time has passed, until cancelled."""
        while self.is_staged:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._wait_s()):
                    await self._due.wait()
            await asyncio.sleep(GATHER_S)
            self._due.clear()
            try:
                if await self._look():
                    self._publish()
            except StoreUnavailable as error:
                self._workers.storage.failed(error)
                await asyncio.sleep(LOOK_S)
                self._due.set()
            except FedgeError as error:
                log.error("rollout_not_looked_at", reason=str(error))

    async def announce(self) -> None:
        """Keeps the announcements on the broker, or takes back those of an earlier life.

        Raises as `Publisher.announce`, and `StoreUnavailable`.
        """
        if self._said is None:
            if await self._workers.durable(lambda: self._store.note(TOLD)):
                for kind in (CandidateAnnouncement, StableAnnouncement):
                    await self._publisher.withdraw(kind)
                await self._workers.durable(lambda: self._store.keep_note(TOLD, ""))
            return
        if not self._noted:
            await self._workers.durable(lambda: self._store.keep_note(TOLD, "yes"))
            self._noted = True
        for message in self._said:
            await self._publisher.announce(message)

    # ------------------------------------------------------------ looking

    def _wait_s(self) -> float | None:
        if self._state is None or not self._state[1].phase.is_open:
            return None
        if not self._all_known():
            return LEARN_S
        number, state = self._state
        due = rollouts.next_look(state, self._terms_of(number).policy, self._clock())
        return LOOK_S if due is None else min(LOOK_S, max(0.0, due - self._clock()))

    async def _look(self) -> bool:
        """Whether what devices should be told has changed."""
        seen = await self._workers.durable(self._read)
        if await self._begin_the_newest(seen):
            seen = await self._workers.durable(self._read)
        while (record := seen.newest) is not None and record.ended_at is None:
            kept = await self._carry_on(record, seen)
            if kept is not None and kept.ended_at is None:
                return self._say(replace(seen, newest=kept))
            # It is over, or a command came between the look and the record: that comes first.
            seen = await self._workers.durable(self._read)
        self._state = None
        return self._say(seen)

    def _read(self) -> _Seen:
        stable = self._version(self._store.stable_version())
        newest = self._store.newest_rollout()
        if newest is None:
            return _Seen(stable)
        counts = self._store.trial_counts(newest.number)
        devices = self._store.born_devices() if newest.ended_at is None else ()
        return _Seen(
            stable,
            newest,
            self._version(newest.version),
            (counts[TrialOutcome.ACTIVE], counts[TrialOutcome.ROLLED_BACK]),
            devices,
        )

    def _version(self, number: int | None) -> _Version:
        record = None if number is None else self._store.version(number)
        plan = None if record is None else self._store.plan(record.plan_sha256)
        if record is None or plan is None:
            raise StoreError(f"version {number}, which a rollout is about, is not there")
        if record.number not in self._versions:
            manifest = PlanManifest.decode(self._store.blobs.read(plan.ref.sha256))
            blobs = (*plan_blobs(manifest, plan.ref), record.weights, record.golden)
            self._versions = {record.number: _Version(record, plan.ref, blobs), **self._versions}
            self._versions = dict(islice(self._versions.items(), 2))
        return self._versions[record.number]

    async def _begin_the_newest(self, seen: _Seen) -> bool:
        if self._mode is not ServingMode.STAGED:
            return False
        if seen.newest is not None and seen.newest.ended_at is None:
            return False
        number, at = self._newest().number, self._wall_clock()
        if number <= await self._workers.durable(self._store.newest_tried):
            return False
        try:
            record = await self._workers.durable(
                lambda: self._store.start_rollout(number, self._terms, at=at)
            )
        except ConfigError as error:
            # A command was quicker, or the version has no files: there will be a newer one.
            log.warning("rollout_not_begun", version=number, reason=str(error))
            return False
        log.info("rollout_asked", rollout=record.number, version=number)
        return True

    async def _carry_on(self, record: RolloutRecord, seen: _Seen) -> RolloutRecord | None:
        """What was kept; None if a command wished something else meanwhile."""
        policy, now = record.terms.policy, self._clock()
        if self._state is None or self._state[0] != record.number:
            self._state = (record.number, _state_of(record))
            self._known_terms = (record.number, record.terms)
            self._kept_at = now
            log.info(
                "rollout_taken_up",
                rollout=record.number,
                version=record.version,
                stable=record.stable,
                stage=record.stage + 1,
                share=record.share,
            )
        before = after = self._state[1]
        if rollouts.WISHED[record.wish] is not before.phase:
            reason = record.reason or "aborted by the operator"
            after = rollouts.step(after, Wished(record.wish, reason), policy, now)
        active, failed = seen.counts
        after = rollouts.step(
            after, Looked(active, failed, await self._fleet_of(record, seen.devices)), policy, now
        )
        kept = replace(
            record,
            phase=after.phase,
            stage=after.stage,
            share=after.share,
            reached=after.reached,
            soaked_s=rollouts.soaked(after, now),
            reason="" if after.phase.is_open else after.reason,
            ended_at=None if after.phase.is_open else self._wall_clock(),
        )
        changed = _told_of(before) != _told_of(after) or before.reached != after.reached
        if changed or (after.since is not None and now - self._kept_at >= KEEP_S):
            # First on disk, then in the world.
            if not await self._workers.durable(lambda: self._store.keep_rollout(kept)):
                return None
            self._kept_at = now
        self._state = (record.number, after)
        if _told_of(before) != _told_of(after):
            _log_change(kept, before.phase, after, policy.stages)
        return kept

    async def _fleet_of(
        self, record: RolloutRecord, devices: tuple[KnownDevice, ...]
    ) -> Fleet | None:
        if not self._all_known():
            return None
        if self._listens_since is None:
            self._listens_since = self._clock()
        if self._fleet is None or self._fleet.number != record.number:
            self._fleet = RolloutFleet(self._population, record.number, record.started_at)
        return await asyncio.to_thread(
            self._fleet.look,
            devices,
            now=self._wall_clock(),
            listened_s=self._clock() - self._listens_since,
        )

    def _terms_of(self, number: int) -> Terms:
        known, terms = self._known_terms
        return terms if known == number else self._terms

    # ------------------------------------------------------------ saying

    def _say(self, seen: _Seen) -> bool:
        stable, record, candidate = seen.stable, seen.newest, seen.candidate
        if record is not None and record.phase is Phase.DONE:
            # It was done before each newest version was served for a while: that is over.
            record = record if record.version == stable.record.number else None
        if record is None or candidate is None:
            said = CandidateAnnouncement(**stable.facts, rollout=0, phase=CandidatePhase.DONE)
        else:
            said = CandidateAnnouncement(
                **candidate.facts,
                rollout=record.number,
                phase=_SAID[record.phase],
                share=record.share,
                checks=record.terms.checks,
            )
        both = (StableAnnouncement(**stable.facts), said)
        changed = self._said is None or [_content(m) for m in both] != [
            _content(m) for m in self._said
        ]
        self._said = both
        in_use = (stable,) if candidate is None or not _is_used(record) else (stable, candidate)
        self._distribution.keep(ref for one in in_use for ref in one.blobs)
        return changed


def _state_of(record: RolloutRecord) -> Rollout:
    return Rollout(
        phase=record.phase,
        stage=record.stage,
        share=record.share,
        reached=record.reached,
        soaked_s=record.soaked_s,
    )


def _told_of(state: Rollout) -> tuple[object, ...]:
    return (state.phase, state.stage, state.share)


def _is_used(record: RolloutRecord | None) -> bool:
    return record is not None and (record.phase.is_open or record.phase is Phase.DONE)


def _content(message: StableAnnouncement | CandidateAnnouncement) -> dict[str, object]:
    return message.model_dump(exclude={"id", "ts"})


def _log_change(
    record: RolloutRecord, before: Phase, state: Rollout, stages: tuple[float, ...]
) -> None:
    facts = {
        "rollout": record.number,
        "version": record.version,
        "active": state.active,
        "rolled_back": state.failed,
    }
    match state.phase:
        case Phase.RUNNING:
            log.info(
                "rollout_resumed" if before is Phase.PAUSED else "rollout_reaches",
                **facts,
                stage=f"{state.stage + 1}/{len(stages)}",
                share=state.share,
                devices=state.reached,
            )
        case Phase.HALTED:
            log.error("rollout_halted", **facts, reason=state.reason, serves=record.stable)
        case Phase.PAUSED:
            log.info("rollout_paused", **facts)
        case Phase.DONE:
            log.info("rollout_done", **facts)
        case Phase.ABORTED:
            log.warning("rollout_aborted", **facts, reason=state.reason, serves=record.stable)
