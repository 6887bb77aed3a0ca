"""The conductor: carries out what the round machine decides, one round after the other.

It owns the round and the newest version. Every decision is `rounds.step`'s; what must be durable is
durable before anybody is told; averaging runs on another thread. It knows devices by name and
messages by type, and leaves topics and sessions to the service that gave it `tell`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedge.coordinator import rounds
from fedge.coordinator.intake import Intake, OpenRound, contribution_of, rejected_receipt
from fedge.coordinator.journal import Journal
from fedge.coordinator.recovery import last_visited, resumed_round
from fedge.coordinator.rounds import Phase, Round
from fedge.coordinator.settings import ResolvedTraining, RoundSettings
from fedge.coordinator.store import RoundRecord, Store, VersionRecord
from fedge.coordinator.uploads import Reply, Upload, UploadDesk
from fedge.coordinator.version_maker import VersionMaker
from fedge.coordinator.workers import Workers
from fedge.schemas import messages
from fedge.schemas.errors import FedgeError, PeerError, RejectReason, StoreError
from fedge.schemas.ids import Digest
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import Message, RoundPhase

log = EventLog(__name__)

LONGEST_REST_S = 60.0
"""Between an abandoned round and the next: 1 s after the first, doubling, and never more."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the conductor asks of the service around it.

    `tell`: sends a message to one device, soon. `start`: runs work beside everything else.
    `publish`: publishes the newest version and the round's announcement. `wake`: the time of the
    next deadline may have changed. `online`: the devices that are connected now.
    `clock`: monotonic seconds; `wall_clock`: seconds since the epoch.
    """

    tell: Callable[[str, Message], None]
    start: Callable[[Coroutine[Any, Any, Any], str], None]
    publish: Callable[[], Coroutine[Any, Any, None]]
    announce_round: Callable[[RoundPhase], Coroutine[Any, Any, None]]
    wake: Callable[[], None]
    online: Callable[[], frozenset[str]]
    clock: Callable[[], float]
    wall_clock: Callable[[], float]


class Conductor:
    """The rounds of one population. `newest` is set by `recover`, which comes first."""

    newest: VersionRecord

    def __init__(
        self,
        *,
        store: Store,
        maker: VersionMaker,
        intake: Intake,
        desk: UploadDesk,
        journal: Journal,
        workers: Workers,
        round_settings: RoundSettings,
        training: ResolvedTraining,
        plan_sha256: Digest,
        seed: int,
        around: Surroundings,
    ) -> None:
        self._store = store
        self._maker = maker
        self._intake = intake
        self._desk = desk
        self._journal = journal
        self._workers = workers
        self._versions_limit = round_settings.versions
        self._policy = round_settings.policy
        self._training = training
        self._plan_sha256 = plan_sha256
        self._seed = seed
        self._around = around
        self._round: Round | None = None
        self._claims: dict[str, int] = {}
        self._offered: dict[str, Digest] = {}
        self._abandoned_in_a_row = 0
        self._rests_until = 0.0

    # ------------------------------------------------------------ looking

    @property
    def round(self) -> Round | None:
        """The round that is under way, None between two."""
        return self._round

    @property
    def round_number(self) -> int | None:
        """Its number."""
        return None if self._round is None else self._round.number

    @property
    def announced_phase(self) -> RoundPhase:
        """What devices should be told about the newest round."""
        if self._round is None:
            return RoundPhase.CLOSED
        gathering = self._round.phase is Phase.GATHERING
        return RoundPhase.GATHERING if gathering else RoundPhase.TRAINING

    def open_round(self) -> OpenRound | None:
        """What the intake must know, None while no round takes updates."""
        state = self._round
        if state is None or state.phase is not Phase.TRAINING:
            return None
        return OpenRound(state.number, state.base, state.cohort - state.accepted, self._claims)

    def next_deadline(self) -> float | None:
        """When `time_passed` should be called, in `clock` seconds."""
        state = self._round
        if state is None or not state.is_open:
            return None
        # A round that gathers beyond its time waits for a device, not for the clock.
        waits = state.phase is Phase.GATHERING and self._around.clock() >= state.until
        return None if waits else state.until

    # ------------------------------------------------------------ what happens

    def checked_in(self, device: str, round_number: int, examples: int) -> None:
        """A device is ready. Raises `PeerError` (stale_round) for another round than this one."""
        if round_number != self.round_number:
            raise PeerError(
                RejectReason.STALE_ROUND,
                f"check-in for round {round_number}; open: {self.round_number or 'none'}",
            )
        if self._round is not None and self._round.phase is Phase.GATHERING:
            self._claims[device] = examples
        self._feed(rounds.CheckedIn(device, self._online_count()))

    def offered(self, device: str, offer: messages.Offer) -> None:
        """An offer was taken: kept in the record, for whoever asks why a device fell silent."""
        state = self._round
        if state is None or device in state.failed:
            return
        if self._offered.get(device) == offer.update.sha256:
            return
        self._offered[device] = offer.update.sha256
        at = self._around.wall_clock()

        def record() -> None:
            self._store.record_offer(offer.round, device, contribution_of(offer), at=at)

        self._around.start(self._workers.durable(record), f"offered-{device}")

    def training_failed(self, device: str, round_number: int | None, detail: str) -> None:
        """A device says that no update will come. Raises `PeerError` if nobody asked it."""
        state = self._round
        if state is None or round_number != state.number:
            return
        if device not in state.cohort:
            raise PeerError(RejectReason.NOT_IN_COHORT, f"{device} was not asked")
        if device in state.failed:
            return
        at = self._around.wall_clock()

        def record() -> None:
            self._store.record_failed(state.number, device, detail, at=at)

        self._around.start(self._workers.durable(record), f"failed-{device}")
        self._feed(rounds.Failed(device))

    def time_passed(self) -> None:
        """The clock reached the next deadline, or the coordinator has just started."""
        self._feed(rounds.TimePassed(self._online_count()))

    def reject(self, device: str, offer: messages.Offer, error: PeerError) -> None:
        """An offer or its update is refused: recorded, counted, and the device told."""
        state = self._round
        # What came after its round's end belongs to that round's record, else to the open one's.
        belated = error.reason in (RejectReason.REPLAY, RejectReason.LATE)
        self._journal.refused(device, error, offer.round if belated else self.round_number)
        self._around.tell(device, rejected_receipt(offer, error))
        if state is None or offer.round != state.number:
            return
        if device not in state.cohort or device in state.accepted | state.failed:
            return
        at = self._around.wall_clock()

        def record() -> None:
            self._store.record_rejected(offer.round, device, error.reason, error.detail, at=at)

        self._around.start(self._workers.durable(record), f"rejected-{device}")
        self._feed(rounds.Failed(device))

    async def finish(self, upload: Upload) -> Sequence[Reply]:
        """Decides a complete upload, durably, and tells its device. Returns grants for others."""
        device, offer = upload.device, upload.offer
        try:
            receipt = await self._accept(upload)
        except PeerError as error:
            others = self._desk.taken(upload, self._around.clock())
            self.reject(device, offer, error)
            return others
        others = self._desk.taken(upload, self._around.clock())
        self._around.tell(device, receipt)
        log.info(
            "update_accepted",
            round=offer.round,
            device=device,
            examples=offer.examples,
            bytes=offer.update.size_bytes,
            training_s=offer.training_s,
            loss=offer.loss.by_epoch[-1] if offer.loss.by_epoch else None,
        )
        if offer.round == self.round_number:
            self._feed(rounds.Accepted(device))
        return others

    async def adopt_newest(self) -> None:
        """Looks at the store again: another process (a rollback) may have added a version."""
        newest = await self._workers.durable(self._store.newest_version)
        if newest is None or newest.number <= self.newest.number:
            return
        # Before anything is awaited: no update to the old version may close its round now.
        self.newest = newest
        self._feed(rounds.Superseded(newest.number))
        await self._workers.compute(lambda: self._maker.adopt(newest))
        log.info("version_adopted", version=newest.number, note=newest.note)
        await self._around.publish()

    def measured(self, version: VersionRecord) -> None:
        """A version's metrics are known now."""
        if version.number == self.newest.number:
            self.newest = version

    # ------------------------------------------------------------ beginnings

    async def recover(self) -> None:
        """Takes up what the store says was under way; makes version 0 if there is none."""
        now = self._around.wall_clock()
        newest = self._store.newest_version()
        if newest is None:
            newest = await self._workers.compute(lambda: self._maker.make_first(now))
            self._store.record_version(newest)
            log.info("version_made", version=newest.number, model_bytes=newest.model_bytes)
        self.newest = newest
        await self._workers.compute(lambda: self._maker.adopt(newest))
        for record in self._store.open_rounds():
            if record.base == newest.number and self._round is None:
                self._resume(record)
            else:
                reason = "its base is not the newest version"
                self._store.abandon_round(record.number, reason, at=now)
        self._desk.keep_only(self.round_number)
        self._store.blobs.sweep()

    def _resume(self, record: RoundRecord) -> None:
        self._round = resumed_round(
            self._store,
            record,
            now=self._around.clock(),
            wall_now=self._around.wall_clock(),
            previous=self._last_visited(record.number),
        )
        log.info(
            "round_resumed",
            round=record.number,
            phase=self._round.phase.value,
            accepted=len(self._round.accepted),
        )

    def take_up(self) -> None:
        """Goes on with the round that `recover` found, now that messages can be sent.

        It may have reached its goal before the restart; if not, assignments may have been recorded
        and never sent, and a device that has its own already takes no second one.
        """
        self.time_passed()
        state = self._round
        if state is not None and state.phase is Phase.TRAINING:
            waiting = state.cohort - state.accepted - state.failed
            self._act(state, rounds.Assign(tuple(sorted(waiting))))

    async def open_next_round(self) -> None:
        """Opens the next round, unless the operator's number of versions is reached."""
        if self._round is not None or self._around.clock() < self._rests_until:
            return
        limit = self._versions_limit
        if limit is not None and self.newest.number >= limit:
            log.info("goal_reached", version=self.newest.number)
            return
        last = self._store.newest_round()
        number = 1 if last is None else last.number + 1
        seed = int(np.random.default_rng([self._seed, number]).integers(2**32))
        state = rounds.open_round(
            number,
            self.newest.number,
            seed=seed,
            policy=self._policy,
            now=self._around.clock(),
            previous=self._last_visited(number),
        )
        now = self._around.wall_clock()
        record = RoundRecord(
            number=number,
            base=state.base,
            goal=self._policy.goal,
            quorum=self._policy.quorum,
            seed=seed,
            opened_at=now,
            gather_until=now + self._policy.gather_s,
        )
        await self._workers.durable(lambda: self._store.open_round(record))
        self._round = state
        self._around.wake()
        log.info("round_gathering", round=number, base=state.base)

    def _last_visited(self, number: int) -> str | None:
        cyclic = self._policy.strategy is rounds.Strategy.CYCLIC
        return last_visited(self._store, number) if cyclic else None

    # ------------------------------------------------------------ carrying out

    def _online_count(self) -> int:
        ready = frozenset() if self._round is None else self._round.ready
        return len(self._around.online() | ready)

    def _feed(self, event: rounds.Event) -> None:
        if self._round is None:
            return
        before = self._round
        self._round, commands = rounds.step(before, event, self._policy, self._around.clock())
        self._around.wake()
        if before.phase is Phase.GATHERING and self._round.phase is Phase.TRAINING:
            # Assignments may be sent only once it is on disk who was asked.
            self._around.start(self._begin_training(self._round, commands), "begin-training")
            return
        for command in commands:
            self._act(self._round, command)

    def _act(self, state: Round, command: rounds.Command) -> None:
        tell = self._around.tell
        match command:
            case rounds.Assign(devices):
                for device in devices:
                    tell(device, self._assignment(state, device))
            case rounds.Defer(devices, after_s):
                for device in devices:
                    tell(device, messages.Retry(round=state.number, after_s=after_s))
            case rounds.Dismiss(devices, reason):
                for device in devices:
                    dropped = self._desk.drop(device)
                    if dropped is None:
                        tell(device, messages.Abort(round=state.number, reason=reason))
                    else:
                        tell(device, rejected_receipt(dropped, PeerError(reason, "")))
            case rounds.Aggregate():
                self._around.start(self._aggregate(state), f"aggregate-{state.number}")
            case rounds.Abandon(reason):
                self._around.start(self._abandon(state, reason), f"abandon-{state.number}")

    async def _begin_training(self, state: Round, commands: Sequence[rounds.Command]) -> None:
        at = self._around.wall_clock()
        train_until = at + max(0.0, state.until - self._around.clock())
        cohort = sorted(state.cohort)

        def record() -> None:
            self._store.record_assignment(state.number, cohort, train_until=train_until, at=at)

        await self._workers.durable(record)
        log.info("round_training", round=state.number, base=state.base, cohort=len(cohort))
        for command in commands:
            self._act(state, command)
        await self._around.announce_round(RoundPhase.TRAINING)

    def _assignment(self, state: Round, device: str) -> messages.Assignment:
        training = self._training
        return messages.Assignment(
            round=state.number,
            base=state.base,
            plan_sha256=self._plan_sha256,
            deadline_s=max(0.0, state.until - self._around.clock()),
            seed=rounds.device_seed(state.seed, device),
            batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            local_epochs=training.local_epochs,
            local_steps=training.local_steps,
            proximal_mu=training.proximal_mu,
        )

    async def _accept(self, upload: Upload) -> messages.Receipt:
        # From this check to the durable thread's queue there is no await: what is queued while the
        # round trains is decided before `_aggregate` asks, in the same queue, what was accepted.
        now_open = self.open_round()
        if now_open is None or now_open.number != upload.offer.round:
            raise PeerError(RejectReason.LATE, f"round {upload.offer.round} has closed")
        return await self._workers.durable(lambda: self._intake.finish(upload))

    async def _aggregate(self, state: Round) -> None:
        updates = await self._workers.durable(lambda: self._intake.accepted_updates(state.number))
        now = self._around.wall_clock()
        base = self.newest
        try:
            if base.number != state.base:
                raise StoreError(f"version {base.number} took the place of its base")
            version = await self._workers.compute(
                lambda: self._maker.make_next(base, state.number, updates, now)
            )
            await self._workers.durable(lambda: self._record(version))
        except (FedgeError, ValueError) as error:
            # A version that cannot be exported, verified or recorded is not published; the fleet
            # goes on from the one that was.
            log.error("version_refused", round=state.number, reason=str(error))
            await self._abandon(state, f"no version could be made: {error}")
            return
        self.newest = version
        self._maker.commit()
        self._abandoned_in_a_row = 0
        log.info(
            "version_made",
            version=version.number,
            round=state.number,
            updates=len(updates),
            examples=sum(examples for _, examples in updates),
        )
        await self._end_round(state)

    def _record(self, version: VersionRecord) -> None:
        newest = self._store.newest_version()
        if newest is not None and newest.number >= version.number:
            raise StoreError(f"version {newest.number} was made meanwhile ({newest.note})")
        self._store.record_version(version)

    async def _abandon(self, state: Round, reason: str) -> None:
        at = self._around.wall_clock()
        await self._workers.durable(lambda: self._store.abandon_round(state.number, reason, at=at))
        log.warning("round_abandoned", round=state.number, reason=reason)
        self._abandoned_in_a_row += 1
        # Whatever made it fail may make the next one fail: a fleet is not asked again at once.
        rest_s = min(LONGEST_REST_S, 2.0 ** min(self._abandoned_in_a_row - 1, 16))
        self._rests_until = self._around.clock() + rest_s
        await self._end_round(state)
        await self.adopt_newest()
        await asyncio.sleep(rest_s)
        await self._around.publish()

    async def _end_round(self, state: Round) -> None:
        for device, offer in self._desk.drop_all():
            late = PeerError(RejectReason.LATE, f"round {state.number} has closed")
            self._around.tell(device, rejected_receipt(offer, late))
        self._round = None
        self._claims.clear()
        self._offered.clear()
        # On the durable thread, after whatever upload is still being decided there.
        await self._workers.durable(lambda: self._desk.clear(state.number))
        await self._around.publish()
