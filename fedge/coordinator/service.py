"""The coordinator as a service: events in from two sessions, decisions by the pure parts, acts out.

One event loop owns the round, the upload desk and the announcements; nothing here blocks it. What
must be durable goes through one thread, in order; averaging and exporting run in another, and the
evaluation in a third, so that a round never waits for a measurement. Every decision is taken by
`rounds.step`, `Intake` or `VersionMaker`; this module only carries.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from fedge.coordinator import rounds
from fedge.coordinator.evaluation import Evaluation
from fedge.coordinator.intake import Intake, OpenRound, rejected_receipt
from fedge.coordinator.publisher import Publisher, announcement_of, plan_blobs
from fedge.coordinator.rounds import Phase, Round
from fedge.coordinator.settings import ResolvedTraining, RoundSettings
from fedge.coordinator.store import (
    DeviceSighting,
    ParticipantStatus,
    Refusal,
    RoundRecord,
    Store,
    VersionRecord,
)
from fedge.coordinator.uploads import Upload, UploadDesk
from fedge.coordinator.version_maker import VersionMaker
from fedge.schemas import messages, topics
from fedge.schemas.blobs import BlobRef, ChunkSet
from fedge.schemas.errors import FedgeError, LinkClosed, LinkError, PeerError, RejectReason
from fedge.schemas.link.protocol import Delivery, Link, LinkDown, LinkUp
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import Message, RoundPhase
from fedge.schemas.plan import PlanManifest
from fedge.schemas.topics import Address, Channel, Topics

log = EventLog(__name__)

T = TypeVar("T")

Evaluate = Callable[[VersionRecord], Evaluation]

MAX_PENDING_REFUSALS = 10_000
"""Refusals not yet written; a flood beyond this is counted in the log line only."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The population's plan and where its manifest lies."""

    manifest: PlanManifest
    ref: BlobRef


class Coordinator:
    """One population's coordinator. `run` ends when it is cancelled.

    `evaluate`: measures a version, or None where there is no test set. `wall_clock`: seconds since
    the epoch, for records; `clock`: monotonic seconds, for deadlines.
    """

    def __init__(
        self,
        *,
        population: str,
        store: Store,
        plan: Plan,
        maker: VersionMaker,
        desk: UploadDesk,
        control: Link,
        bulk: Link,
        round_settings: RoundSettings,
        training: ResolvedTraining,
        seed: int,
        evaluate: Evaluate | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._plan = plan
        self._maker = maker
        self._desk = desk
        self._control = control
        self._bulk = bulk
        self._round_settings = round_settings
        self._policy = round_settings.policy
        self._training = training
        self._seed = seed
        self._evaluate = evaluate
        self._clock = clock
        self._wall_clock = wall_clock

        self._topics = Topics(population)
        self._publisher = Publisher(control, bulk, self._topics, store.blobs)
        self._intake = Intake(store, plan.manifest, desk, wall_clock)
        self._round: Round | None = None
        self._newest: VersionRecord
        self._boots: dict[str, int] = {}
        self._online: set[str] = set()
        self._refusals: list[Refusal] = []
        self._dropped_refusals = 0
        self._sightings: dict[str, DeviceSighting] = {}
        self._records_due = asyncio.Event()
        self._timer_due = asyncio.Event()
        self._finished: asyncio.Queue[Upload] = asyncio.Queue()
        self._to_seed = asyncio.Event()
        self._seeding = asyncio.Lock()
        self._durable = ThreadPoolExecutor(1, thread_name_prefix="durable")
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._measure = ThreadPoolExecutor(1, thread_name_prefix="measure")
        self._group: asyncio.TaskGroup

    # ------------------------------------------------------------ running

    async def run(self) -> None:
        """Serves until cancelled; what was begun is taken up again by the next start."""
        await self._recover()
        try:
            async with asyncio.TaskGroup() as self._group:
                await self._control.subscribe(*self._topics.coordinator_control)
                await self._bulk.subscribe(*self._topics.coordinator_bulk)
                await self._control.start()
                await self._bulk.start()
                for work, name in (
                    (self._read(self._control), "read-control"),
                    (self._read(self._bulk), "read-bulk"),
                    (self._keep_seeded(), "seed"),
                    (self._keep_time(), "time"),
                    (self._keep_records(), "records"),
                    (self._finish_uploads(), "finish"),
                ):
                    self._group.create_task(work, name=name)
                # A round that was taken up again may have reached its goal before the restart.
                self._feed(rounds.TimePassed(self._online_count()))
        finally:
            await self._control.close()
            await self._bulk.close()
            await self._flush_records()
            for executor in (self._compute, self._durable, self._measure):
                executor.shutdown(wait=True, cancel_futures=True)

    @property
    def newest_version(self) -> int:
        """The number of the newest version."""
        return self._newest.number

    async def adopt_newest(self) -> None:
        """Looks at the store again: another process (a rollback) may have added a version."""
        newest = await self._in(self._durable, self._store.newest_version)
        if newest is None or newest.number <= self._newest.number:
            return
        self._newest = newest
        await self._in(self._compute, lambda: self._maker.adopt(newest))
        log.info("version_adopted", version=newest.number, note=newest.note)
        if self._round is not None:
            self._feed(rounds.Superseded(newest.number))
        self._start(self._publish_newest(), "publish")

    async def _recover(self) -> None:
        newest = self._store.newest_version()
        if newest is None:
            newest = await self._in(
                self._compute, lambda: self._maker.make_first(self._wall_clock())
            )
            await self._in(self._durable, lambda: self._store.record_version(newest))
            log.info("version_made", version=newest.number, parameters_bytes=newest.model_bytes)
        self._newest = newest
        await self._in(self._compute, lambda: self._maker.adopt(newest))
        for record in self._store.open_rounds():
            if record.base == newest.number and self._round is None:
                self._resume(record)
            else:
                self._store.abandon_round(
                    record.number, "its base is not the newest version", at=self._wall_clock()
                )

    def _resume(self, record: RoundRecord) -> None:
        participants = self._store.participants(record.number)
        accepted = [p.device for p in participants if p.status is ParticipantStatus.ACCEPTED]
        failed = (ParticipantStatus.REJECTED, ParticipantStatus.FAILED)
        training = record.phase is RoundPhase.TRAINING
        until = record.train_until if training else record.gather_until
        self._round = Round(
            number=record.number,
            base=record.base,
            seed=record.seed,
            until=self._clock() + max(0.0, (until or 0.0) - self._wall_clock()),
            phase=Phase.TRAINING if training else Phase.GATHERING,
            cohort=frozenset(p.device for p in participants),
            accepted=frozenset(accepted),
            failed=frozenset(p.device for p in participants if p.status in failed),
            previous=self._last_visited(record.number),
        )
        log.info(
            "round_resumed",
            round=record.number,
            phase=self._round.phase.value,
            accepted=len(accepted),
        )

    # ------------------------------------------------------------ reading

    async def _read(self, link: Link) -> None:
        while True:
            event = await link.next_event()
            match event:
                case LinkUp():
                    if link is self._bulk:
                        self._publisher.forget()
                    if self._control.connected and self._bulk.connected:
                        self._to_seed.set()
                case LinkDown():
                    continue
                case Delivery():
                    self._receive(event)
                    link.ack(event)

    def _receive(self, delivery: Delivery) -> None:
        """The one place where what peers send can fail: refused, counted, and the loop goes on."""
        try:
            address = topics.parse(delivery.topic)
            if delivery.retained and address.channel is not Channel.STATE:
                raise PeerError(RejectReason.FOREIGN_TOPIC, "a retained message to the coordinator")
            if address.channel is Channel.UP_BULK:
                self._receive_chunk(address, delivery.payload)
            elif address.message is not None and address.device is not None:
                message = messages.decode(address.message, delivery.payload)
                self._dispatch(address.device, message)
        except PeerError as error:
            self._refuse(topics.device_in(delivery.topic), error)

    def _dispatch(self, device: str, message: Message) -> None:
        match message:
            case messages.Checkin():
                self._saw(device, examples=message.examples, version=message.version)
                self._checked_in(device, message)
            case messages.Offer():
                self._offered(device, message)
            case messages.Need():
                self._start(self._repeat(message), f"repeat-{device}")
            case messages.Report():
                self._reported(device, message)
            case messages.Presence():
                self._present(device, message)

    def _checked_in(self, device: str, message: messages.Checkin) -> None:
        if self._round is None or message.round != self._round.number:
            current = "none" if self._round is None else str(self._round.number)
            raise PeerError(
                RejectReason.STALE_ROUND, f"check-in for round {message.round}; open: {current}"
            )
        self._feed(rounds.CheckedIn(device, self._online_count()))

    def _offered(self, device: str, offer: messages.Offer) -> None:
        try:
            replies = self._intake.offered(device, offer, self._open_round(), self._clock())
        except PeerError as error:
            self._reject(device, offer, error)
            return
        self._tell_all(replies)
        self._timer_due.set()

    def _receive_chunk(self, address: Address, payload: bytes) -> None:
        if address.device is None or address.sha256 is None or address.chunk is None:
            raise PeerError(RejectReason.FOREIGN_TOPIC, "a chunk without a place")
        replies, complete = self._desk.received(
            address.device, address.sha256, address.chunk, payload, self._clock()
        )
        self._tell_all(replies)
        if complete is not None:
            self._finished.put_nowait(complete)

    def _reported(self, device: str, report: messages.Report) -> None:
        log.info(
            "device_report",
            device=device,
            kind=report.kind.value,
            version=report.version,
            round=report.round,
            detail=report.detail,
        )
        failed = report.kind is messages.ReportKind.TRAINING_FAILED
        state = self._round
        if failed and state is not None and report.round == state.number:
            if device not in state.cohort:
                raise PeerError(RejectReason.NOT_IN_COHORT, f"{device} was not asked")
            number, detail, at = state.number, report.detail, self._wall_clock()
            self._start(
                self._in(
                    self._durable,
                    lambda: self._store.record_failed(number, device, detail, at=at),
                ),
                f"failed-{device}",
            )
            self._feed(rounds.Failed(device))

    def _present(self, device: str, presence: messages.Presence) -> None:
        if presence.boot < self._boots.get(device, 0):
            return
        self._boots[device] = presence.boot
        (self._online.add if presence.online else self._online.discard)(device)
        self._saw(
            device,
            boot=presence.boot,
            online=presence.online,
            agent_version=presence.agent_version or None,
        )
        log.info("device_online" if presence.online else "device_offline", device=device)

    # ------------------------------------------------------------ the round

    def _online_count(self) -> int:
        ready = self._round.ready if self._round is not None else frozenset()
        return len(self._online | ready)

    def _open_round(self) -> OpenRound | None:
        state = self._round
        if state is None or state.phase is not Phase.TRAINING:
            return None
        return OpenRound(state.number, state.base, state.cohort - state.accepted)

    def _feed(self, event: rounds.Event) -> None:
        if self._round is None:
            return
        before = self._round
        self._round, commands = rounds.step(before, event, self._policy, self._clock())
        self._timer_due.set()
        if before.phase is Phase.GATHERING and self._round.phase is Phase.TRAINING:
            # Assignments may be sent only once it is on disk who was asked.
            self._start(self._begin_training(self._round, commands), "begin")
            return
        for command in commands:
            self._act(self._round, command)

    def _act(self, state: Round, command: rounds.Command) -> None:
        match command:
            case rounds.Assign(devices):
                for device in devices:
                    self._tell(device, self._assignment(state, device))
            case rounds.Defer(devices, after_s):
                for device in devices:
                    self._tell(device, messages.Retry(round=state.number, after_s=after_s))
            case rounds.Dismiss(devices, reason):
                for device in devices:
                    self._desk.drop(device)
                    self._tell(device, messages.Abort(round=state.number, reason=reason))
            case rounds.Aggregate():
                self._start(self._aggregate(state), f"aggregate-{state.number}")
            case rounds.Abandon(reason):
                self._start(self._abandon(state, reason), f"abandon-{state.number}")

    async def _begin_training(self, state: Round, commands: Sequence[rounds.Command]) -> None:
        at = self._wall_clock()
        train_until = at + max(0.0, state.until - self._clock())
        await self._in(
            self._durable,
            lambda: self._store.record_assignment(
                state.number, sorted(state.cohort), train_until=train_until, at=at
            ),
        )
        log.info("round_training", round=state.number, base=state.base, cohort=len(state.cohort))
        for command in commands:
            self._act(state, command)
        await self._announce_round(RoundPhase.TRAINING)

    def _assignment(self, state: Round, device: str) -> messages.Assignment:
        training = self._training
        return messages.Assignment(
            round=state.number,
            base=state.base,
            plan_sha256=self._plan.ref.sha256,
            deadline_s=max(0.0, state.until - self._clock()),
            seed=rounds.device_seed(state.seed, device),
            batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            local_epochs=training.local_epochs,
            local_steps=training.local_steps,
            proximal_mu=training.proximal_mu,
        )

    async def _finish_uploads(self) -> None:
        while True:
            upload = await self._finished.get()
            try:
                receipt = await self._finish(upload)
            except PeerError as error:
                self._tell_all(self._desk.taken(upload.device, self._clock()))
                self._reject(upload.device, upload.offer, error)
                continue
            self._tell_all(self._desk.taken(upload.device, self._clock()))
            self._tell(upload.device, receipt)
            offer = upload.offer
            log.info(
                "update_accepted",
                round=offer.round,
                device=upload.device,
                examples=offer.examples,
                bytes=offer.update.size_bytes,
                training_s=offer.training_s,
                loss=offer.loss.by_epoch[-1] if offer.loss.by_epoch else None,
            )
            if self._round is not None and self._round.number == offer.round:
                self._feed(rounds.Accepted(upload.device))

    async def _finish(self, upload: Upload) -> messages.Receipt:
        # From this check to the durable thread's queue there is no await: what is queued while the
        # round trains is decided before `_aggregate` asks, in the same queue, what was accepted.
        now_open = self._open_round()
        if now_open is None or now_open.number != upload.offer.round:
            raise PeerError(RejectReason.LATE, f"round {upload.offer.round} has closed")
        return await self._in(self._durable, lambda: self._intake.finish(upload))

    async def _aggregate(self, state: Round) -> None:
        participants = await self._in(self._durable, lambda: self._store.participants(state.number))
        accepted = [
            (p.device, p.contribution)
            for p in participants
            if p.status is ParticipantStatus.ACCEPTED and p.contribution is not None
        ]
        updates = [
            (self._intake.update_path(state.number, device, found.update.sha256), found.examples)
            for device, found in accepted
        ]
        try:
            version = await self._in(
                self._compute,
                lambda: self._maker.make_next(
                    self._newest, state.number, updates, self._wall_clock()
                ),
            )
        except (FedgeError, ValueError) as error:
            # A version that cannot be exported or verified is not published; the fleet goes on
            # from the version that can.
            log.error("version_refused", round=state.number, reason=str(error))
            await self._abandon(state, f"no version could be made: {error}")
            return
        if self._newest.number >= version.number:
            await self._abandon(state, f"version {self._newest.number} was made meanwhile")
            return
        await self._in(self._durable, lambda: self._store.record_version(version))
        self._newest = version
        self._maker.commit()
        log.info(
            "version_made",
            version=version.number,
            round=state.number,
            updates=len(updates),
            examples=sum(examples for _, examples in updates),
        )
        await self._end_round(state)

    async def _abandon(self, state: Round, reason: str) -> None:
        at = self._wall_clock()
        await self._in(
            self._durable, lambda: self._store.abandon_round(state.number, reason, at=at)
        )
        log.warning("round_abandoned", round=state.number, reason=reason)
        await self._end_round(state)

    async def _end_round(self, state: Round) -> None:
        self._desk.drop_all()
        self._round = None
        await self._publish_newest()
        await self._in(self._durable, lambda: self._intake.clear(state.number))

    async def _open_next_round(self) -> None:
        limit = self._round_settings.versions
        if limit is not None and self._newest.number >= limit:
            await self._announce_round(RoundPhase.CLOSED)
            log.info("goal_reached", version=self._newest.number)
            return
        last = self._store.newest_round()
        number = 1 if last is None else last.number + 1
        seed = int(np.random.default_rng([self._seed, number]).integers(2**32))
        state = rounds.open_round(
            number,
            self._newest.number,
            seed,
            self._policy,
            self._clock(),
            previous=self._last_visited(number),
        )
        now = self._wall_clock()
        record = RoundRecord(
            number=number,
            base=state.base,
            goal=self._policy.goal,
            quorum=self._policy.quorum,
            seed=seed,
            opened_at=now,
            gather_until=now + self._policy.gather_s,
        )
        await self._in(self._durable, lambda: self._store.open_round(record))
        self._round = state
        log.info("round_gathering", round=number, base=state.base)
        await self._announce_round(RoundPhase.GATHERING)

    def _last_visited(self, number: int) -> str | None:
        """The device that the last cyclic round before `number` asked."""
        if self._policy.strategy is rounds.Strategy.CYCLIC:
            for earlier in range(number - 1, 0, -1):
                for participant in self._store.participants(earlier):
                    return participant.device
        return None

    # ------------------------------------------------------------ publishing

    async def _keep_seeded(self) -> None:
        while True:
            await self._to_seed.wait()
            self._to_seed.clear()
            await self._publish_newest()

    async def _publish_newest(self) -> None:
        async with self._seeding:
            version = self._newest
            blobs = (*plan_blobs(self._plan.manifest, self._plan.ref), version.weights)
            await self._publisher.seed((*blobs, version.golden))
            await self._publisher.announce(announcement_of(version, self._plan.ref))
            log.info(
                "version_published",
                version=version.number,
                weights_bytes=version.weights.size_bytes,
                published_bytes=self._publisher.chunk_bytes_published,
            )
            if self._round is None:
                await self._open_next_round()
            else:
                await self._announce_round(
                    RoundPhase.GATHERING
                    if self._round.phase is Phase.GATHERING
                    else RoundPhase.TRAINING
                )
        if self._evaluate is not None and "loss" not in version.metrics:
            self._start(self._measure_version(version, self._evaluate), "measure")
        await self._clear_old(version)

    async def _clear_old(self, newest: VersionRecord) -> None:
        """Devices fetch the newest; the one before stays for those that are in the middle of it."""
        if newest.number < 2:
            return
        old = await self._in(self._durable, lambda: self._store.version(newest.number - 2))
        before = await self._in(self._durable, lambda: self._store.version(newest.number - 1))
        if old is None:
            return
        kept = {newest.weights.sha256, newest.golden.sha256}
        if before is not None:
            kept |= {before.weights.sha256, before.golden.sha256}
        await self._publisher.clear(
            ref for ref in (old.weights, old.golden) if ref.sha256 not in kept
        )

    async def _announce_round(self, phase: RoundPhase) -> None:
        state = self._round
        if state is None:
            last = self._store.newest_round()
            if last is None:
                return
            number, base = last.number, self._newest.number
        else:
            number, base = state.number, state.base
        await self._publisher.announce(
            messages.RoundAnnouncement(
                round=number,
                base=base,
                phase=phase,
                checkin_spread_s=self._round_settings.checkin_spread_s,
            )
        )

    async def _repeat(self, need: messages.Need) -> None:
        version = self._newest
        known = (*plan_blobs(self._plan.manifest, self._plan.ref), version.weights, version.golden)
        for ref in known:
            if ref.sha256 == need.sha256 and ref.chunk_count == need.chunk_count:
                missing = ChunkSet.decode(need.missing, need.chunk_count)
                await self._publisher.repeat(ref, missing)

    async def _measure_version(self, version: VersionRecord, evaluate: Evaluate) -> None:
        try:
            found = await self._in(self._measure, lambda: evaluate(version))
        except FedgeError as error:
            log.error("evaluation_failed", version=version.number, reason=str(error))
            return
        metrics = {"loss": found.loss, **found.metrics}
        await self._in(self._durable, lambda: self._store.record_metrics(version.number, metrics))
        if self._newest.number == version.number:
            self._newest = replace(version, metrics=metrics)
        log.info("version_evaluated", version=version.number, examples=found.examples, **metrics)

    # ------------------------------------------------------------ time and records

    async def _keep_time(self) -> None:
        while True:
            wake = self._next_wake()
            delay = None if wake is None else max(0.0, wake - self._clock())
            try:
                async with asyncio.timeout(delay):
                    await self._timer_due.wait()
            except TimeoutError:
                self._tell_all(self._desk.expired(self._clock()))
                self._feed(rounds.TimePassed(self._online_count()))
            self._timer_due.clear()

    def _next_wake(self) -> float | None:
        times = [self._desk.next_expiry()]
        state = self._round
        if (
            state is not None
            and state.is_open
            and (
                # A round that gathers beyond its time waits for a device, not for the clock.
                state.phase is Phase.TRAINING or self._clock() < state.until
            )
        ):
            times.append(state.until)
        return min((t for t in times if t is not None), default=None)

    def _saw(
        self,
        device: str,
        *,
        boot: int | None = None,
        online: bool | None = None,
        examples: int | None = None,
        version: int | None = None,
        agent_version: str | None = None,
    ) -> None:
        old = self._sightings.get(device)
        seen = DeviceSighting(
            device, self._wall_clock(), boot, online, examples, version, agent_version
        )
        if old is not None:
            merged = {
                name: getattr(seen, name) if getattr(seen, name) is not None else getattr(old, name)
                for name in ("boot", "online", "examples", "version", "agent_version")
            }
            seen = replace(seen, **merged)
        self._sightings[device] = seen
        self._records_due.set()

    def _refuse(
        self, device: str | None, error: PeerError, round_number: int | None = None
    ) -> None:
        if round_number is None and self._round is not None:
            round_number = self._round.number
        log.warning(
            "refused", device=device, round=round_number, reason=error.reason.value,
            detail=error.detail,
        )  # fmt: skip
        if len(self._refusals) >= MAX_PENDING_REFUSALS:
            self._dropped_refusals += 1
            return
        self._refusals.append(
            Refusal(error.reason, error.detail, self._wall_clock(), round_number, device)
        )
        self._records_due.set()

    def _reject(self, device: str, offer: messages.Offer, error: PeerError) -> None:
        state = self._round
        # What came after its round's end belongs to that round's record, else to the open one's.
        known = error.reason in (RejectReason.REPLAY, RejectReason.LATE)
        self._refuse(device, error, offer.round if known else None)
        self._tell(device, rejected_receipt(offer, error))
        if state is None or offer.round != state.number or device not in state.cohort:
            return
        if device in state.accepted:
            return
        at = self._wall_clock()
        self._start(
            self._in(
                self._durable,
                lambda: self._store.record_rejected(
                    offer.round, device, error.reason, error.detail, at=at
                ),
            ),
            f"rejected-{device}",
        )
        self._feed(rounds.Failed(device))

    async def _keep_records(self) -> None:
        while True:
            await self._records_due.wait()
            self._records_due.clear()
            await self._flush_records()

    async def _flush_records(self) -> None:
        refusals, self._refusals = self._refusals, []
        sightings, self._sightings = self._sightings, {}
        if self._dropped_refusals:
            log.warning("refusals_not_recorded", count=self._dropped_refusals)
            self._dropped_refusals = 0
        if refusals:
            await self._in(self._durable, lambda: self._store.count_refusals(refusals))
        if sightings:
            await self._in(self._durable, lambda: self._store.record_devices(sightings.values()))

    # ------------------------------------------------------------ carrying

    def _tell_all(self, replies: Any) -> None:
        for device, message in replies:
            self._tell(device, message)

    def _tell(self, device: str, message: Message) -> None:
        topic = self._topics.down(device, type(message))
        self._start(self._control.publish(topic, messages.encode(message)), f"tell-{device}")

    def _start(self, work: Coroutine[Any, Any, Any], name: str) -> None:
        self._group.create_task(_carried(work, name), name=name)

    async def _in(self, executor: Executor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(executor, work)


async def _carried(work: Coroutine[Any, Any, Any], name: str) -> None:
    try:
        await work
    except LinkClosed:
        # The links close last; what still wanted to send has nobody to send it for.
        return
    except LinkError as error:
        log.error("not_sent", what=name, reason=str(error))
