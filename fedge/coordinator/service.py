"""The coordinator as a service: events in from two sessions, and their answers out.

One event loop owns everything here. What must be durable, and what computes, runs on threads of its
own; on the loop are only short reads of the store, writes of single chunks, and a look at what an
earlier process left of an upload. This module parses what comes, hands it to the part that decides
(`Intake` for offers and chunks, `Conductor` for rounds), and publishes. It is the one place where a
bad message becomes a counted refusal.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedge.coordinator.admission import Admission
from fedge.coordinator.aftercare import Aftercare
from fedge.coordinator.conductor import Conductor
from fedge.coordinator.distribution import Distribution
from fedge.coordinator.evaluation_desk import EvaluationDesk
from fedge.coordinator.intake import Intake
from fedge.coordinator.journal import Journal
from fedge.coordinator.latest import LatestOnly
from fedge.coordinator.postbox import Postbox
from fedge.coordinator.presence import PresenceDesk
from fedge.coordinator.publication import Publication
from fedge.coordinator.publisher import Publisher, plan_blobs
from fedge.coordinator.rollout_desk import RolloutDesk
from fedge.coordinator.settings import ResolvedTraining, RolloutSettings, RoundSettings
from fedge.coordinator.store import Retention, Store, VersionRecord
from fedge.coordinator.succession import Succession
from fedge.coordinator.surroundings import Surroundings
from fedge.coordinator.uploads import Upload, UploadDesk
from fedge.coordinator.version_maker import VersionMaker
from fedge.coordinator.word_count_desk import WordCountDesk
from fedge.coordinator.workers import Workers
from fedge.schemas import messages, topics
from fedge.schemas.blobs import BlobRef, ChunkSet
from fedge.schemas.errors import (
    LinkClosed,
    LinkError,
    PeerError,
    RejectReason,
    StoreUnavailable,
)
from fedge.schemas.link.protocol import Delivery, Link, LinkDown, LinkUp
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import Message
from fedge.schemas.plan import PlanManifest
from fedge.schemas.topics import Address, Channel, Topics

log = EventLog(__name__)

if TYPE_CHECKING:
    from fedge.coordinator.aftercare import Evaluate


@dataclass(frozen=True, slots=True)
class Plan:
    """The population's plan and where its manifest lies."""

    manifest: PlanManifest
    ref: BlobRef


class Coordinator:
    """One population's coordinator. `run` ends when it is cancelled.

    `evaluate`, `evaluate_every`: see `Aftercare`. `wall_clock`: seconds since the epoch, for
    records; `clock`: monotonic seconds, for deadlines. `look_again`: set when another process may
    have added a version to the store.
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
        rollout_settings: RolloutSettings | None = None,
        retention: Retention | None = None,
        evaluate: Evaluate | None = None,
        evaluate_every: int = 1,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._desk = desk
        self._look_again = look_again
        self._control = control
        self._bulk = bulk
        self._clock = clock

        self._topics = Topics(population)
        self._workers = Workers()
        self._publisher = Publisher(control, bulk, self._topics, store.blobs)
        self._distribution = Distribution(
            plan_blobs(plan.manifest, plan.ref),
            publisher=self._publisher,
            store=store,
            workers=self._workers,
            clock=clock,
        )
        self._intake = Intake(
            store,
            plan.manifest,
            desk,
            max_update_norm=round_settings.max_update_norm,
            wall_clock=wall_clock,
        )
        self._journal = Journal(store, self._workers, wall_clock)
        self._timer_due = asyncio.Event()
        self._presence = PresenceDesk(
            self._journal,
            self._publisher,
            self._control,
            self._topics,
            answers_per_s=round_settings.checkins_per_s,
            clock=clock,
            wake=self._timer_due.set,
        )
        self._postbox = Postbox(control, self._topics)
        self._settling = LatestOnly(self._settle, self._start, "settle")
        self._complete: asyncio.Queue[Upload] = asyncio.Queue()
        self._group: asyncio.TaskGroup
        self._succession = Succession(store, maker, self._workers)
        self._admission = Admission((), limit=round_settings.max_devices)
        aftercare = Aftercare(
            store=store,
            workers=self._workers,
            distribution=self._distribution,
            succession=self._succession,
            retention=retention,
            evaluate=evaluate,
            evaluate_every=evaluate_every,
            keep_devices=self._keep_devices,
            start=self._start,
            wall_clock=wall_clock,
        )
        rollout = RolloutSettings() if rollout_settings is None else rollout_settings
        self._rollouts = RolloutDesk(
            population,
            mode=rollout.mode,
            terms=rollout.terms(),
            store=store,
            workers=self._workers,
            distribution=self._distribution,
            publisher=self._publisher,
            newest=lambda: self._succession.newest,
            publish=self._publish,
            all_known=lambda: self._presence.has_called_roll and self._presence.all_known,
            clock=clock,
            wall_clock=wall_clock,
        )
        self._trials = LatestOnly(self._count_trial, self._start, "trial")

        def published(version: VersionRecord) -> None:
            aftercare.published(version)
            self._rollouts.look()

        self._publication = Publication(
            plan=plan.ref,
            publisher=self._publisher,
            distribution=self._distribution,
            succession=self._succession,
            start=self._start,
            is_up=self._both_are_up,
            payload_limit_bytes=lambda: bulk.max_payload_bytes,
            published=published,
            rollouts=self._rollouts,
        )
        around = Surroundings(
            tell=self._postbox.send,
            start=self._start,
            publish=self._publication.soon,
            publish_again=self._publication.again,
            wake=self._timer_due.set,
            online=lambda: self._presence.online,
            all_known=lambda: self._presence.all_known,
            clock=clock,
            wall_clock=wall_clock,
        )
        self._evaluations = EvaluationDesk(
            store=store,
            plan=plan.ref,
            manifest=plan.manifest,
            distribution=self._distribution,
            succession=self._succession,
            journal=self._journal,
            workers=self._workers,
            around=around,
        )
        self._words = WordCountDesk(
            store=store,
            publisher=self._publisher,
            journal=self._journal,
            workers=self._workers,
            around=around,
            answers_per_s=round_settings.checkins_per_s,
            is_up=self._both_are_up,
        )
        self._conductor = Conductor(
            store=store,
            succession=self._succession,
            intake=self._intake,
            desk=desk,
            journal=self._journal,
            workers=self._workers,
            round_settings=round_settings,
            training=training,
            plan_sha256=plan.ref.sha256,
            seed=seed,
            around=around,
        )

    async def run(self) -> None:
        """Serves until cancelled; what was begun is taken up again by the next start."""
        await self._conductor.recover()
        await self._evaluations.recover()
        await self._rollouts.recover()
        devices = await self._workers.durable(self._store.devices)
        self._presence.recover(device.name for device in devices if device.online)
        self._admission.keep_only(device.name for device in devices)
        try:
            async with asyncio.TaskGroup() as self._group:
                await self._control.subscribe(*self._topics.coordinator_control)
                await self._bulk.subscribe(*self._topics.coordinator_bulk)
                await self._control.start()
                await self._bulk.start()
                for work, name in (
                    (self._read(self._control), "read-control"),
                    (self._read(self._bulk), "read-bulk"),
                    (self._publication.keep(self._conductor), "publish"),
                    (self._postbox.run(), "postbox"),
                    (self._keep_time(), "time"),
                    (self._finish_uploads(), "finish"),
                    (self._journal.keep(), "journal"),
                    (self._keep_looking(), "look-again"),
                    (self._rollouts.run(), "rollouts"),
                    (self._publication.keep_reminding(self._conductor), "remind"),
                ):
                    self._group.create_task(work, name=name)
                self._conductor.take_up()
                self._start(self._evaluations.look(), "evaluations")
                self._start(self._words.look(), "words")
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
            self._rollouts.look()
            self._start(self._evaluations.look(), "evaluations")
            self._start(self._words.look(), "words")

    # ------------------------------------------------------------ reading

    async def _read(self, link: Link) -> None:
        while True:
            event = await link.next_event()
            match event:
                case LinkUp():
                    self._came_up(link)
                case LinkDown():
                    continue
                case Delivery():
                    self._receive(event)
                    link.ack(event)

    def _came_up(self, link: Link) -> None:
        # They have one broker, and each has a wait of its own.
        (self._control if link is self._bulk else self._bulk).hurry()
        if link is self._bulk:
            self._publisher.forget()
        else:
            self._start(self._presence.call_roll(), "roll")
        if self._both_are_up():
            self._desk.heard_again(self._clock())
            self._publication.soon()
            self._evaluations.reconnected()
            self._start(self._words.announce(), "words")
            self._timer_due.set()

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
                self._admission.listen(address.device, self._clock())
                message = messages.decode(address.message, delivery.payload)
                if self._is_an_old_death(address.device, message, retained=delivery.retained):
                    return
                self._admission.admit(address.device)
                self._dispatch(address.device, message, retained=delivery.retained)
        except PeerError as error:
            self._refuse(topics.device_in(delivery.topic), error)
        except StoreUnavailable as error:
            # No receipt, no credit: the device says it again, and meanwhile somebody makes space.
            self._workers.storage.failed(error)

    def _is_an_old_death(self, device: str, message: Message, *, retained: bool) -> bool:
        # The broker keeps the last word of devices that the operator's retention has forgotten.
        dead = isinstance(message, messages.Presence) and not message.online
        return retained and dead and not self._admission.is_known(device)

    def _keep_devices(self, names: frozenset[str]) -> None:
        self._admission.keep_only(names)
        self._presence.keep_only(names)

    def _refuse(self, device: str | None, error: PeerError) -> None:
        if device is not None and error.reason is not RejectReason.LIMIT_EXCEEDED:
            try:
                self._admission.listen(device, self._clock())
            except PeerError as too_often:
                error = too_often
        if device is not None and not self._admission.is_known(device):
            device = None
        self._journal.refused(device, error, self._conductor.round_number)

    def _dispatch(self, device: str, message: Message, *, retained: bool) -> None:
        if isinstance(message, messages.Presence):
            self._presence.heard(device, message, retained=retained)
            self._evaluations.presence_changed()
            return
        self._presence.spoke(device)
        match message:
            case messages.Checkin():
                self._journal.saw(device, examples=message.examples, version=message.version)
                self._conductor.checked_in(device, message.round, message.examples)
            case messages.Offer():
                self._offered(device, message)
            case messages.Need():
                missing = ChunkSet.decode(message.missing, message.chunk_count)
                self._start(self._distribution.repeat(message.sha256, missing), f"repeat-{device}")
            case messages.Report():
                self._reported(device, message)
            case messages.TrialReport():
                self._trials.put(device, message)
            case messages.EvaluationResult():
                self._evaluations.answered(device, message)
            case messages.WordCountAnswer():
                self._words.answered(device, message)

    def _offered(self, device: str, offer: messages.Offer) -> None:
        awaited = self._conductor.awaited(device, offer.round)
        if awaited is None:
            self._settling.put(device, offer)
            return
        try:
            replies = self._intake.awaited(device, offer, awaited, self._clock())
        except PeerError as error:
            self._conductor.answers.reject(device, offer, error)
            return
        self._conductor.answers.offered(device, offer)
        self._tell_all(replies)
        whole = self._desk.arrived(device)
        if whole is not None:
            self._complete.put_nowait(whole)
        self._timer_due.set()

    async def _settle(self, device: str, offer: messages.Offer) -> None:
        number = self._conductor.round_number
        try:
            receipt = await self._workers.durable(
                lambda: self._intake.settled(device, offer, number)
            )
        except PeerError as error:
            self._conductor.answers.reject(device, offer, error)
        else:
            self._postbox.send(device, receipt)

    async def _count_trial(self, device: str, report: messages.TrialReport) -> None:
        try:
            counted = await self._rollouts.count(device, report)
        except PeerError as error:
            self._refuse(device, error)
        else:
            self._postbox.send(device, counted)

    def _receive_chunk(self, address: Address, payload: bytes) -> None:
        if address.device is None or address.sha256 is None or address.chunk is None:
            raise PeerError(RejectReason.FOREIGN_TOPIC, "a chunk without a place")
        replies, complete = self._desk.received(
            address.device, address.sha256, address.chunk, payload, self._clock()
        )
        self._tell_all(replies)
        self._timer_due.set()
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
        if report.kind in (messages.ReportKind.ACTIVATED, messages.ReportKind.VERSION_IGNORED):
            self._journal.saw(device, version=report.version)
        if report.kind is messages.ReportKind.VERSION_IGNORED:
            log.error(
                "coordinator_is_behind",
                device=device,
                device_has_seen=report.version,
                newest=self._succession.newest.number,
                advice="devices wait for a higher number: restore a backup with a larger --gap, or "
                "begin anew with a population of another name",
            )
        if report.kind is messages.ReportKind.TRAINING_FAILED:
            self._conductor.answers.training_failed(device, report.round, report.detail)

    async def _finish_uploads(self) -> None:
        while True:
            self._tell_all(await self._conductor.answers.finish(await self._complete.get()))

    async def _keep_time(self) -> None:
        while True:
            times = [
                # While a link is down nobody is silent, and no slot can be given away.
                self._desk.next_expiry() if self._both_are_up() else None,
                self._conductor.next_deadline(),
                self._presence.next_deadline,
                self._evaluations.next_deadline,
                self._words.next_deadline,
            ]
            wake = min((t for t in times if t is not None), default=None)
            delay_s = None if wake is None else max(0.0, wake - self._clock())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._timer_due.wait()
            self._timer_due.clear()
            # By the clock, and not by what ended the wait: both may come in the same moment.
            if wake is not None and self._clock() >= wake:
                self._time_passed()

    def _time_passed(self) -> None:
        if self._both_are_up():
            self._tell_all(self._desk.expired(self._clock()))
        else:
            self._desk.heard_again(self._clock())
        self._presence.time_passed()
        self._conductor.time_passed()
        self._evaluations.time_passed()
        self._words.time_passed()

    # ------------------------------------------------------------ carrying

    def _both_are_up(self) -> bool:
        return self._control.connected and self._bulk.connected

    def _publish(self) -> None:
        self._publication.soon()

    def _tell_all(self, replies: Iterable[tuple[str, Message]]) -> None:
        for device, message in replies:
            self._postbox.send(device, message)

    def _start(self, work: Coroutine[Any, Any, Any], name: str) -> None:
        carried = _carried(work, name)
        try:
            task = self._group.create_task(carried, name=name)
        except RuntimeError:
            # The group is ending: what was begun is taken up by the next start.
            carried.close()
            work.close()
        else:
            # A task that is cancelled before it begins never looks at its work.
            task.add_done_callback(lambda _: work.close())


async def _carried(work: Coroutine[Any, Any, Any], name: str) -> None:
    try:
        await work
    except LinkClosed:
        # The links close last; what still wanted to send has nobody to send it for.
        return
    except (LinkError, PeerError, StoreUnavailable) as error:
        log.error("not_carried_out", what=name, reason=str(error))
