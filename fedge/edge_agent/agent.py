"""The agent of one device: events in from two sessions, decisions by the machine, acts out.

Control messages and chunks travel over separate sessions, so that a download never delays an
assignment. Training and activation run in the trainer's process; this one never loads a model.
What the coordinator may ask twice is done once: the machine knows what is under way, the state
file knows what was done.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from fedge import __version__
from fedge.edge_agent import machine
from fedge.edge_agent.activator import Activator
from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.download import Downloads
from fedge.edge_agent.engines import EngineName
from fedge.edge_agent.library import Library
from fedge.edge_agent.settings import Settings
from fedge.edge_agent.state import AgentState
from fedge.edge_agent.trainer.jobs import CountJob, Progressed, Trained, TrainJob
from fedge.edge_agent.trainer.process import Trainer
from fedge.edge_agent.training_settings import TrainingSettings
from fedge.edge_agent.upload import Uploads
from fedge.schemas import messages, topics
from fedge.schemas.errors import (
    FedgeError,
    LinkClosed,
    LinkError,
    PeerError,
    StoreError,
    TrainingFailed,
)
from fedge.schemas.ids import new_message_id
from fedge.schemas.link.protocol import Delivery, Link, LinkDown, LinkUp, Will
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import Assignment, Message, Offer, ReportKind, VersionAnnouncement
from fedge.schemas.state_lock import StateLock
from fedge.schemas.topics import Address, Channel, Topics

log = EventLog(__name__)

OFFER_AGAIN_S = 30.0
"""An offer that has no receipt after so long is said again: brokers drop what they acknowledged."""


class EdgeAgent:
    """One device. `run` ends when it is cancelled; what was begun goes on at the next start.

    `trainer` may be shared by the virtual devices of a fleet. `rng`: jitter.
    """

    def __init__(self, settings: Settings, trainer: Trainer, rng: random.Random) -> None:
        self._device = settings.device
        self._engine: EngineName = settings.engine
        self._threads = settings.trainer.threads
        self._data: DataConfig | None = settings.data
        self._trainer = trainer
        self._rng = rng
        self._topics = Topics(settings.population)

        settings.state_dir.mkdir(parents=True, exist_ok=True)
        self._lock = StateLock(settings.state_dir, "agent")
        self._outbox_dir = settings.state_dir / "outbox"
        self._outbox_dir.mkdir(exist_ok=True)
        self._library = Library(settings.state_dir)
        self._memory = AgentState(settings.state_dir / "agent.sqlite")
        self._boot = self._memory.next_boot()
        self._outbox: dict[int, Offer] = self._memory.outbox()
        self._held = self._memory.announcement()

        # Dots are in no name, so no two sessions of a broker can have one identifier.
        prefix = f"fedge.{settings.population}.device.{settings.device}"
        self._control = settings.broker.link(f"{prefix}.control", rng, will=self._will())
        self._bulk = settings.broker.link(f"{prefix}.bulk", rng)
        self._downloads = Downloads(self._bulk, self._topics, self._library.blobs, self._send)
        self._uploads = Uploads(self._bulk, self._topics, self._device)

        self._state = machine.Agent(outbox=frozenset(self._outbox))
        self._fetching: asyncio.Task[None] | None = None
        self._training: asyncio.Task[None] | None = None
        self._resting: asyncio.Task[None] | None = None
        self._activator = Activator(self._activate)
        self._group: asyncio.TaskGroup

    async def run(self) -> None:
        """Serves until cancelled."""
        self._recover()
        log.info("agent_started", device=self._device, boot=self._boot, version=self._state.active)
        try:
            async with asyncio.TaskGroup() as self._group:
                await self._control.subscribe(*self._topics.device_control(self._device))
                await self._control.start()
                await self._bulk.start()
                for work, name in (
                    (self._read(self._control), "read-control"),
                    (self._read(self._bulk), "read-bulk"),
                    (self._activator.run(), "activate"),
                    (self._keep_offering(), "offer"),
                ):
                    self._group.create_task(work, name=f"{name}-{self._device}")
                self._start(self._count_examples(), "count")
                if self._state.announced is not None:
                    # A version that was fetched and not yet in use needs no network to be.
                    self._feed(machine.VersionSeen(self._state.announced))
        finally:
            await self._uploads.close()
            await self._say_goodbye()
            await self._control.close()
            await self._bulk.close()
            self._memory.close()
            self._lock.release()

    def _recover(self) -> None:
        # What is damaged is treated as absent: it is fetched or made again.
        try:
            active = self._library.active()
        except StoreError as error:
            log.error("active_version_lost", device=self._device, reason=str(error))
            active = None
        try:
            held = self._held if self._held and self._library.holds(self._held) else None
        except FedgeError as error:
            log.error("version_lost", device=self._device, reason=str(error))
            held = None
        self._held = held
        self._state = machine.Agent(
            announced=held,
            held=None if held is None else held.number,
            active=None if active is None else active.version,
            outbox=frozenset(self._outbox),
        )

    def _will(self) -> Will:
        death = messages.Presence(boot=self._boot, online=False)
        return Will(self._topics.presence(self._device), messages.encode(death))

    async def _say_goodbye(self) -> None:
        # A will is for those who cannot say it themselves.
        if self._control.connected:
            death = messages.Presence(boot=self._boot, online=False)
            try:
                async with asyncio.timeout(2):
                    await self._publish_presence(death)
            except (LinkError, TimeoutError) as error:
                log.warning("goodbye_not_sent", device=self._device, reason=str(error))

    # ------------------------------------------------------------ reading

    async def _read(self, link: Link) -> None:
        while True:
            event = await link.next_event()
            match event:
                case LinkUp():
                    if link is self._control:
                        self._start(self._announce_birth(), "birth")
                        self._feed(machine.Connected())
                case LinkDown():
                    if link is self._control:
                        self._feed(machine.Disconnected())
                case Delivery():
                    self._receive(event)
                    link.ack(event)

    def _receive(self, delivery: Delivery) -> None:
        """The one place where what peers send can fail: logged, and the loop goes on."""
        try:
            address = topics.parse(delivery.topic)
            if address.channel is Channel.BLOB:
                self._receive_chunk(address, delivery.payload)
            elif address.message is not None:
                self._dispatch(messages.decode(address.message, delivery.payload))
        except PeerError as error:
            log.warning(
                "refused", device=self._device, topic=delivery.topic[:200],
                reason=error.reason.value, detail=error.detail,
            )  # fmt: skip

    def _receive_chunk(self, address: Address, payload: bytes) -> None:
        if address.sha256 is not None and address.chunk is not None:
            self._downloads.received(address.sha256, address.chunk, payload)

    def _dispatch(self, message: Message) -> None:
        match message:
            case messages.VersionAnnouncement():
                self._feed(machine.VersionSeen(message))
            case messages.RoundAnnouncement():
                self._feed(machine.RoundSeen(message))
            case messages.Assignment():
                self._feed(machine.Assigned(message))
            case messages.Retry():
                self._feed(machine.Deferred(message))
            case messages.Grant():
                offer = self._outbox.get(message.round)
                if offer is not None and offer.update.sha256 == message.sha256:
                    path = self._update_path(message.round)
                    self._uploads.granted(message, offer.update, path)
            case messages.Have():
                self._uploads.acknowledged(message)
            case messages.Receipt():
                offer = self._outbox.get(message.round)
                if offer is not None and offer.update.sha256 == message.sha256:
                    self._settle(message)
            case messages.Abort():
                log.info(
                    "round_aborted",
                    device=self._device,
                    round=message.round,
                    reason=message.reason.value,
                )
                self._feed(machine.Aborted(message.round))

    # ------------------------------------------------------------ acting

    def _feed(self, event: machine.Event) -> None:
        self._state, commands = machine.step(self._state, event)
        for command in commands:
            self._act(command)

    def _act(self, command: machine.Command) -> None:
        match command:
            case machine.Fetch(version):
                self._cancel(self._fetching)
                self._fetching = self._start(self._fetch(version), f"fetch-{version.number}")
            case machine.Activate(version):
                self._activator.wanted(version)
            case machine.CheckIn(number, spread_s):
                self._start(self._check_in(number, spread_s), f"checkin-{number}")
            case machine.Rest(after_s):
                self._cancel(self._resting)
                self._resting = self._start(self._rest(after_s), "rest")
            case machine.Train(assignment):
                self._cancel(self._training)
                self._training = self._start(self._train(assignment), f"train-{assignment.round}")
            case machine.StopTraining():
                self._cancel(self._training)
            case machine.SendOffer(number):
                if number in self._outbox:
                    offer = self._outbox[number]
                    fresh = offer.model_copy(update={"id": new_message_id()})
                    self._start(self._send(fresh), f"offer-{number}")
            case machine.Forget(number):
                self._forget(number)
            case machine.SayTrainingFailed(number, reason):
                report = messages.Report(
                    kind=ReportKind.TRAINING_FAILED, round=number, detail=reason[:500]
                )
                self._start(self._send(report), f"report-{number}")

    async def _keep_offering(self) -> None:
        while True:
            await asyncio.sleep(OFFER_AGAIN_S * self._rng.uniform(0.75, 1.25))
            if self._control.connected:
                for number in sorted(self._outbox):
                    self._act(machine.SendOffer(number))

    async def _count_examples(self) -> None:
        if self._data is None:
            self._feed(machine.Counted(0))
            return
        try:
            examples = (await self._trainer.run(CountJob(data=self._data))).examples
        except (StoreError, TrainingFailed) as error:
            # Without its examples the device can still follow the versions and predict.
            log.error("examples_not_counted", device=self._device, reason=str(error))
            examples = 0
        log.info("examples_counted", device=self._device, examples=examples)
        self._feed(machine.Counted(examples))

    async def _check_in(self, number: int, spread_s: float) -> None:
        if spread_s > 0:
            await asyncio.sleep(self._rng.uniform(0, spread_s))
        checkin = messages.Checkin(
            round=number,
            version=self._state.held,
            examples=self._state.examples or 0,
            boot=self._boot,
        )
        await self._send(checkin)

    async def _rest(self, after_s: float) -> None:
        # Up to a quarter more, so that devices deferred together do not come back together.
        await asyncio.sleep(after_s * self._rng.uniform(1.0, 1.25))
        self._feed(machine.RetryDue())

    async def _fetch(self, version: VersionAnnouncement) -> None:
        try:
            await self._downloads.fetch([version.plan])
            manifest = self._library.manifest(version.plan)
            await self._downloads.fetch(self._library.needed(version, manifest))
        except FedgeError as error:
            self._feed(machine.FetchFailed(version.number, str(error)))
            await self._report_activation_failed(version, error)
            return
        before, self._held = self._held, version
        self._memory.keep_announcement(version)
        log.info(
            "version_fetched",
            device=self._device,
            version=version.number,
            received_bytes=self._downloads.received_bytes,
        )
        self._feed(machine.Fetched(version.number))
        self._library.forget_all_but([version] if before is None else [before, version])

    async def _activate(self, version: VersionAnnouncement) -> None:
        if version.number == self._state.active:
            return
        try:
            activated = await self._trainer.run(self._library.activation_of(version))
            self._library.activate(version)
        except FedgeError as error:
            await self._report_activation_failed(version, error)
            return
        log.info(
            "version_activated",
            device=self._device,
            version=version.number,
            latency_ms=activated.latency_ms,
            largest_difference=activated.largest_difference,
        )
        self._feed(machine.Activated(version.number))
        await self._send(messages.Report(kind=ReportKind.ACTIVATED, version=version.number))

    async def _report_activation_failed(
        self, version: VersionAnnouncement, error: FedgeError
    ) -> None:
        log.error("version_refused", device=self._device, version=version.number, reason=str(error))
        await self._send(
            messages.Report(
                kind=ReportKind.ACTIVATION_FAILED, version=version.number, detail=str(error)[:500]
            )
        )

    # ------------------------------------------------------------ training and its update

    async def _train(self, assignment: Assignment) -> None:
        self._activator.training(under_way=True)
        try:
            await self._train_and_keep(assignment)
        finally:
            self._activator.training(under_way=False)

    async def _train_and_keep(self, assignment: Assignment) -> None:
        number = assignment.round
        try:
            async with asyncio.timeout(assignment.deadline_s):
                trained = await self._trainer.run(self._job(assignment), self._log_progress)
            offer = Offer(
                round=number,
                base=assignment.base,
                update=trained.update,
                examples=trained.examples,
                steps=trained.steps,
                training_s=trained.training_s,
                loss=trained.loss,
                metrics=trained.metrics,
            )
            self._memory.put_in_outbox(offer)
        except (FedgeError, TimeoutError) as error:
            reason = str(error) or f"not done by the deadline, {assignment.deadline_s:.0f} s"
            log.warning("training_failed", device=self._device, round=number, reason=reason)
            self._feed(machine.TrainingStopped(number, reason))
            return
        self._outbox[number] = offer
        self._log_trained(number, trained)
        self._feed(machine.Trained(number))

    def _job(self, assignment: Assignment) -> TrainJob:
        # The machine trains from a version that is held, and only a device with data checks in.
        if self._held is None or self._data is None:
            raise RuntimeError("an assignment without a version or without data")
        wanted = (assignment.base, assignment.plan_sha256)
        if (self._held.number, self._held.plan.sha256) != wanted:
            raise TrainingFailed(f"version {assignment.base} of the assignment's plan is not here")
        path = self._library.blobs.path
        manifest = self._library.manifest(self._held.plan)
        return TrainJob(
            manifest=path(self._held.plan.sha256),
            train_graph=path(manifest.graphs.train.sha256),
            weights=path(self._held.weights.sha256),
            data=self._data,
            settings=TrainingSettings.of(assignment),
            output=self._update_path(assignment.round),
            engine=self._engine,
            threads=self._threads,
            # As the coordinator cuts its own blobs: what its broker is known to carry.
            chunk_bytes=self._held.weights.chunk_bytes,
        )

    def _log_progress(self, progress: Progressed) -> None:
        log.info(
            "training",
            device=self._device,
            epoch=progress.epoch + 1,
            step=progress.step,
            steps=progress.steps,
            loss=progress.loss,
        )

    def _log_trained(self, number: int, trained: Trained) -> None:
        log.info(
            "trained",
            device=self._device,
            round=number,
            examples=trained.examples,
            steps=trained.steps,
            training_s=trained.training_s,
            engine=None if trained.engine is None else trained.engine.value,
            peak_rss_bytes=trained.peak_rss_bytes,
        )

    def _settle(self, receipt: messages.Receipt) -> None:
        reason = None if receipt.reason is None else receipt.reason.value
        log.info(
            "receipt",
            device=self._device,
            round=receipt.round,
            status=receipt.status.value,
            reason=reason,
        )
        self._uploads.stop(receipt.sha256)
        self._memory.settle(receipt.round, receipt.status, reason)
        self._feed(machine.Receipted(receipt))

    def _forget(self, number: int) -> None:
        self._outbox.pop(number, None)
        self._update_path(number).unlink(missing_ok=True)

    def _update_path(self, number: int) -> Path:
        return self._outbox_dir / f"{number}.safetensors"

    # ------------------------------------------------------------ carrying

    async def _announce_birth(self) -> None:
        await self._publish_presence(
            messages.Presence(boot=self._boot, online=True, agent_version=__version__)
        )

    async def _publish_presence(self, presence: messages.Presence) -> None:
        topic = self._topics.presence(self._device)
        await self._control.publish(topic, messages.encode(presence), retain=True)

    async def _send(self, message: Message) -> None:
        topic = self._topics.up(self._device, type(message))
        await self._control.publish(topic, messages.encode(message))

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        return self._group.create_task(self._carried(work, name), name=f"{name}-{self._device}")

    async def _carried(self, work: Coroutine[Any, Any, None], name: str) -> None:
        try:
            await work
        except LinkClosed:
            return
        except LinkError as error:
            log.error("not_sent", device=self._device, what=name, reason=str(error))

    def _cancel(self, task: asyncio.Task[None] | None) -> None:
        if task is not None and task is not asyncio.current_task():
            task.cancel()
