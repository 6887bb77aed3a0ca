"""The coordinator as a service: events in from two sessions, and their answers out.

One event loop owns everything here. What must be durable, and what computes, runs on threads of
its own; on the loop are only short reads of the store and writes of single chunks. This module
parses what comes, hands it to the part that decides (`Intake` for offers and chunks, `Conductor`
for rounds), and publishes. It is the one place where a bad message becomes a counted refusal.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, replace
from typing import Any

from fedge.coordinator.conductor import Conductor, Surroundings
from fedge.coordinator.evaluation import Evaluation
from fedge.coordinator.intake import Intake
from fedge.coordinator.journal import Journal
from fedge.coordinator.publisher import Publisher, announcement_of, plan_blobs
from fedge.coordinator.settings import ResolvedTraining, RoundSettings
from fedge.coordinator.store import Store, VersionRecord
from fedge.coordinator.uploads import Upload, UploadDesk
from fedge.coordinator.version_maker import VersionMaker
from fedge.coordinator.workers import Workers
from fedge.schemas import messages, topics
from fedge.schemas.blobs import BlobRef, ChunkSet
from fedge.schemas.errors import FedgeError, LinkClosed, LinkError, PeerError, RejectReason
from fedge.schemas.ids import Digest
from fedge.schemas.link.protocol import Delivery, Link, LinkDown, LinkUp
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import Message, RoundPhase
from fedge.schemas.plan import PlanManifest
from fedge.schemas.topics import Address, Channel, Topics

log = EventLog(__name__)

Evaluate = Callable[[VersionRecord], Evaluation]


@dataclass(frozen=True, slots=True)
class Plan:
    """The population's plan and where its manifest lies."""

    manifest: PlanManifest
    ref: BlobRef


class Coordinator:
    """One population's coordinator. `run` ends when it is cancelled.

    `evaluate`: measures a version, or None where there is no test set; `evaluate_every`: only
    versions whose number it divides. `wall_clock`: seconds since the epoch, for records; `clock`:
    monotonic seconds, for deadlines. `look_again`: set when another process may have added a
    version to the store.
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
        look_again: asyncio.Event,
        evaluate: Evaluate | None = None,
        evaluate_every: int = 1,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._plan = plan
        self._desk = desk
        self._look_again = look_again
        self._control = control
        self._bulk = bulk
        self._checkin_spread_s = round_settings.checkin_spread_s
        self._evaluate = evaluate
        self._evaluate_every = evaluate_every
        self._clock = clock

        self._topics = Topics(population)
        self._workers = Workers()
        self._publisher = Publisher(control, bulk, self._topics, store.blobs)
        self._intake = Intake(
            store,
            plan.manifest,
            desk,
            max_update_norm=round_settings.max_update_norm,
            wall_clock=wall_clock,
        )
        self._journal = Journal(store, self._workers, wall_clock)
        self._boots: dict[str, int] = {}
        self._online: set[str] = set()
        self._timer_due = asyncio.Event()
        self._complete: asyncio.Queue[Upload] = asyncio.Queue()
        self._to_seed = asyncio.Event()
        self._publishing = asyncio.Lock()
        self._group: asyncio.TaskGroup
        self._conductor = Conductor(
            store=store,
            maker=maker,
            intake=self._intake,
            desk=desk,
            journal=self._journal,
            workers=self._workers,
            round_settings=round_settings,
            training=training,
            plan_sha256=plan.ref.sha256,
            seed=seed,
            around=Surroundings(
                tell=self._tell,
                start=self._start,
                publish=self._publish,
                announce_round=self._announce_round,
                wake=self._timer_due.set,
                online=lambda: frozenset(self._online),
                clock=clock,
                wall_clock=wall_clock,
            ),
        )

    async def run(self) -> None:
        """Serves until cancelled; what was begun is taken up again by the next start."""
        await self._conductor.recover()
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
                    (self._finish_uploads(), "finish"),
                    (self._journal.keep(), "journal"),
                    (self._keep_looking(), "look-again"),
                ):
                    self._group.create_task(work, name=name)
                self._conductor.take_up()
        finally:
            await self._control.close()
            await self._bulk.close()
            await self._journal.flush()
            self._workers.close()

    async def _keep_looking(self) -> None:
        while True:
            await self._look_again.wait()
            self._look_again.clear()
            await _carried(self._conductor.adopt_newest(), "adopt")

    # ------------------------------------------------------------ reading

    async def _read(self, link: Link) -> None:
        while True:
            event = await link.next_event()
            match event:
                case LinkUp():
                    if link is self._bulk:
                        self._publisher.forget()
                    if self._both_are_up():
                        self._desk.heard_again(self._clock())
                        self._to_seed.set()
                case LinkDown():
                    continue
                case Delivery():
                    self._receive(event)
                    link.ack(event)

    def _receive(self, delivery: Delivery) -> None:
        try:
            address = topics.parse(delivery.topic)
            if delivery.retained and address.channel is not Channel.STATE:
                # Only presence is kept by the broker: anything else was put there by a stranger.
                raise PeerError(  # noqa: TRY301 -- this is the place where refusals are counted
                    RejectReason.FOREIGN_TOPIC, "a retained message to the coordinator"
                )
            if address.channel is Channel.UP_BULK:
                self._receive_chunk(address, delivery.payload)
            elif address.message is not None and address.device is not None:
                message = messages.decode(address.message, delivery.payload)
                self._dispatch(address.device, message)
        except PeerError as error:
            device = topics.device_in(delivery.topic)
            self._journal.refused(device, error, self._conductor.round_number)

    def _dispatch(self, device: str, message: Message) -> None:
        match message:
            case messages.Checkin():
                self._journal.saw(device, examples=message.examples, version=message.version)
                self._conductor.checked_in(device, message.round, message.examples)
            case messages.Offer():
                self._offered(device, message)
            case messages.Need():
                missing = ChunkSet.decode(message.missing, message.chunk_count)
                self._start(self._repeat(message.sha256, missing), f"repeat-{device}")
            case messages.Report():
                self._reported(device, message)
            case messages.Presence():
                self._present(device, message)

    def _offered(self, device: str, offer: messages.Offer) -> None:
        now_open = self._conductor.open_round()
        try:
            replies = self._intake.offered(device, offer, now_open, self._clock())
        except PeerError as error:
            self._conductor.reject(device, offer, error)
            return
        self._conductor.offered(device, offer)
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
            self._complete.put_nowait(complete)

    def _reported(self, device: str, report: messages.Report) -> None:
        log.info(
            "device_report",
            device=device,
            kind=report.kind.value,
            version=report.version,
            round=report.round,
            detail=report.detail,
        )
        if report.kind is messages.ReportKind.ACTIVATED:
            self._journal.saw(device, version=report.version)
        if report.kind is messages.ReportKind.TRAINING_FAILED:
            self._conductor.training_failed(device, report.round, report.detail)

    def _present(self, device: str, presence: messages.Presence) -> None:
        if not presence.online and presence.boot < self._boots.get(device, 0):
            # The will of an earlier life: the device has started again since.
            return
        self._boots[device] = presence.boot
        (self._online.add if presence.online else self._online.discard)(device)
        self._journal.saw(
            device,
            boot=presence.boot,
            online=presence.online,
            agent_version=presence.agent_version or None,
        )
        log.info("device_online" if presence.online else "device_offline", device=device)

    async def _finish_uploads(self) -> None:
        while True:
            self._tell_all(await self._conductor.finish(await self._complete.get()))

    async def _keep_time(self) -> None:
        while True:
            times = [self._desk.next_expiry(), self._conductor.next_deadline()]
            wake = min((t for t in times if t is not None), default=None)
            delay_s = None if wake is None else max(0.0, wake - self._clock())
            try:
                async with asyncio.timeout(delay_s):
                    await self._timer_due.wait()
            except TimeoutError:
                if self._both_are_up():
                    self._tell_all(self._desk.expired(self._clock()))
                else:
                    self._desk.heard_again(self._clock())
                self._conductor.time_passed()
            self._timer_due.clear()

    # ------------------------------------------------------------ publishing

    async def _keep_seeded(self) -> None:
        while True:
            await self._to_seed.wait()
            self._to_seed.clear()
            try:
                await self._publish()
            except LinkClosed:
                raise
            except LinkError as error:
                # The next connection tries again; what is wrong until then is the operator's.
                log.error("not_published", reason=str(error))

    def _both_are_up(self) -> bool:
        return self._control.connected and self._bulk.connected

    async def _publish(self) -> None:
        """The newest version, then the round: the next one is opened if there is none."""
        async with self._publishing:
            version = self._conductor.newest
            plan = plan_blobs(self._plan.manifest, self._plan.ref)
            await self._publisher.seed((*plan, version.weights, version.golden))
            await self._publisher.announce(announcement_of(version, self._plan.ref))
            log.info(
                "version_published",
                version=version.number,
                weights_bytes=version.weights.size_bytes,
                published_bytes=self._publisher.chunk_bytes_published,
            )
            await self._conductor.open_next_round()
            await self._announce_round(self._conductor.announced_phase)
        due = version.number % self._evaluate_every == 0
        if self._evaluate is not None and due and "loss" not in version.metrics:
            self._start(self._measure(version, self._evaluate), f"measure-{version.number}")
        await self._clear_old(version)

    async def _announce_round(self, phase: RoundPhase) -> None:
        state = self._conductor.round
        last = self._store.newest_round() if state is None else None
        number = state.number if state is not None else last.number if last is not None else None
        if number is not None:
            await self._publisher.announce(
                messages.RoundAnnouncement(
                    round=number,
                    base=self._conductor.newest.number if state is None else state.base,
                    phase=phase,
                    checkin_spread_s=self._checkin_spread_s,
                )
            )

    async def _clear_old(self, newest: VersionRecord) -> None:
        """Devices fetch the newest; the one before stays for those that are in the middle of it."""
        old, before = (self._store.version(newest.number - age) for age in (2, 1))
        if old is None or before is None:
            return
        kept = {ref.sha256 for one in (newest, before) for ref in (one.weights, one.golden)}
        await self._publisher.clear(
            ref for ref in (old.weights, old.golden) if ref.sha256 not in kept
        )

    async def _repeat(self, sha256: Digest, missing: ChunkSet) -> None:
        version = self._conductor.newest
        plan = plan_blobs(self._plan.manifest, self._plan.ref)
        for ref in (*plan, version.weights, version.golden):
            if ref.sha256 == sha256 and ref.chunk_count == missing.chunk_count:
                await self._publisher.repeat(ref, missing)

    async def _measure(self, version: VersionRecord, evaluate: Evaluate) -> None:
        try:
            found = await self._workers.measure(lambda: evaluate(version))
        except FedgeError as error:
            log.error("evaluation_failed", version=version.number, reason=str(error))
            return
        metrics = {"loss": found.loss, **found.metrics}
        await self._workers.durable(lambda: self._store.record_metrics(version.number, metrics))
        self._conductor.measured(replace(version, metrics=metrics))
        log.info("version_evaluated", version=version.number, examples=found.examples, **metrics)

    # ------------------------------------------------------------ carrying

    def _tell_all(self, replies: Iterable[tuple[str, Message]]) -> None:
        for device, message in replies:
            self._tell(device, message)

    def _tell(self, device: str, message: Message) -> None:
        topic = self._topics.down(device, type(message))
        self._start(self._control.publish(topic, messages.encode(message)), f"tell-{device}")

    def _start(self, work: Coroutine[Any, Any, Any], name: str) -> None:
        self._group.create_task(_carried(work, name), name=name)


async def _carried(work: Coroutine[Any, Any, Any], name: str) -> None:
    try:
        await work
    except LinkClosed:
        # The links close last; what still wanted to send has nobody to send it for.
        return
    except (LinkError, PeerError) as error:
        log.error("not_carried_out", what=name, reason=str(error))
