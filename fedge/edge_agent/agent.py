"""The agent of one device: events in from two sessions, decisions by the machine, acts out.

Control messages and chunks travel over separate sessions, so that a download never delays an
assignment. Training and activation run in the trainer's process; this one never loads a model.
What the coordinator may ask twice is done once: the machine knows what is under way, the state
file knows what was done. A disk that is full, a broker that is away or a process that was killed
ends nothing here: each is waited for where it matters.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from fedge.edge_agent import commands, events, machine
from fedge.edge_agent.activator import Activator
from fedge.edge_agent.beside_rounds import BesideRounds
from fedge.edge_agent.checkpoints import FOLDER as CHECKPOINTS
from fedge.edge_agent.checkpoints import Checkpoints
from fedge.edge_agent.contributor import Contributor
from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.download import Downloads
from fedge.edge_agent.durable import disk
from fedge.edge_agent.eligibility_watch import Pace, watch_for
from fedge.edge_agent.example_count import count_in
from fedge.edge_agent.library import Library
from fedge.edge_agent.offers import Offers
from fedge.edge_agent.outbox import Outbox
from fedge.edge_agent.pacing import Pacing
from fedge.edge_agent.participation import ParticipationSettings, first_round_after, is_sampled
from fedge.edge_agent.presence import Presence, next_boot
from fedge.edge_agent.settings import Settings
from fedge.edge_agent.state import AgentState
from fedge.edge_agent.storage_watch import StorageWatch
from fedge.edge_agent.trainer.process import Trainer
from fedge.edge_agent.typed_texts import TypedTexts
from fedge.edge_agent.upload import Uploads
from fedge.edge_agent.usage import UsageMeter
from fedge.edge_agent.versions import Versions
from fedge.schemas import messages, topics
from fedge.schemas.errors import (
    FedgeError,
    LinkClosed,
    LinkError,
    PeerError,
    StoreUnavailable,
)
from fedge.schemas.link.protocol import Delivery, Link, LinkDown, LinkUp
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import Assignment, Message, ReportKind
from fedge.schemas.state_lock import StateLock
from fedge.schemas.topics import Address, Channel, Topics

log = EventLog(__name__)

CHECKIN_EXPIRY_S = 3600.0
"""A check-in that the broker still has after so long is delivered to nobody."""


class EdgeAgent:
    """One device. `run` ends when it is cancelled; what was begun goes on at the next start.

    `trainer` may be shared by the virtual devices of a fleet. `rng`: jitter. `wall_clock`: seconds
    since the epoch, for the boot number, the hours and the daily limits alone.
    Raises `StoreError` for a state folder that cannot be used, and `ConfigError` if another agent
    uses it.
    """

    def __init__(
        self,
        settings: Settings,
        trainer: Trainer,
        rng: random.Random,
        *,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._device = settings.device
        self._population = settings.population
        self._policies: ParticipationSettings = settings.participation
        self._data: DataConfig | None = settings.data
        self._trainer = trainer
        self._rng = rng
        self._topics = Topics(settings.population)

        state_dir = settings.state_dir
        self._lock = _lock(state_dir)
        try:
            library = Library(state_dir, settings.storage.cache_limit_bytes)
            self._memory = _open_memory(state_dir, settings.population)
        except FedgeError:
            self._lock.close()
            raise
        boot = next_boot(self._memory, state_dir / "boot", wall_clock())
        self._outbox = Outbox(self._memory, state_dir / "outbox", self._device)
        self._storage = StorageWatch(self._device)
        self._presence = Presence(self._topics, self._device, boot)

        # Dots are in no name, so no two sessions of a broker can have one identifier.
        prefix = f"fedge.{settings.population}.device.{settings.device}"
        self._control = settings.broker.link(f"{prefix}.control", rng, will=self._presence.will)
        self._bulk = settings.broker.link(f"{prefix}.bulk", rng)
        self._downloads = Downloads(self._bulk, self._topics, library.blobs, self._send)
        self._uploads = Uploads(self._bulk, self._topics, self._device)
        self._versions = Versions(
            self._device,
            library=library,
            downloads=self._downloads,
            memory=self._memory,
            trainer=trainer,
            storage=self._storage,
            feed=self._feed,
            report=self._send,
        )
        self._typed: TypedTexts | None = None
        if settings.data is not None and settings.data.is_store:
            self._typed = TypedTexts(self._device, settings.data, settings.examples.limits)
        self._checkpoints = Checkpoints(state_dir / CHECKPOINTS)
        meter = UsageMeter(self._memory, self._storage, wall_clock)
        # Of its own: it may end when the training for a round has begun.
        personal_meter = UsageMeter(self._memory, self._storage, wall_clock)
        self._watch = watch_for(
            self._device,
            rules=settings.eligibility,
            policies=self._policies,
            own_pids=lambda: trainer.pids,
            used=lambda: [*meter.lines(), personal_meter.unwritten()],
            examples=lambda: self._state.examples,
            changed=lambda standing: self._feed(events.EligibilityChanged(standing.eligible)),
            wall_clock=wall_clock,
        )
        self._contributor = Contributor(
            self._device,
            data=settings.data,
            engine=settings.engine,
            threads=settings.trainer.threads,
            trainer=trainer,
            library=library,
            outbox=self._outbox,
            held=lambda: self._versions.held,
            checkpoints=None if self._watch is None else self._checkpoints,
            meter=meter if self._policies.has_limits else None,
            typed=self._typed,
        )
        self._offers = Offers(
            self._device,
            self._outbox,
            storage=self._storage,
            rng=rng,
            connected=lambda: self._control.connected,
            fitting=self._uploads.fitting,
            send=self._send,
            stop=self._uploads.stop,
            feed=self._feed,
            typed=self._typed,
        )
        self._activator = Activator(self._versions.activate)
        self._pacing = Pacing(settings.population, self._device, rng, self._feed, self._start)
        self._beside = BesideRounds(
            settings,
            library=library,
            versions=self._versions,
            downloads=self._downloads,
            activator=self._activator,
            trainer=trainer,
            memory=self._memory,
            storage=self._storage,
            typed=self._typed,
            watch=self._watch,
            meter=personal_meter,
            state=lambda: self._state,
            feed=self._feed,
            send=self._send,
            pace_changed=self._set_pace,
            rng=rng,
            wall_clock=wall_clock,
        )

        self._state = machine.Agent()
        self._fetching: asyncio.Task[None] | None = None
        self._training: asyncio.Task[None] | None = None
        self._suspending: asyncio.Task[None] | None = None
        self._overdue: asyncio.Task[None] | None = None
        self._takes_no_part: str | None = None
        self._roll: asyncio.Task[None] | None = None
        self._group: asyncio.TaskGroup

    async def run(self) -> None:
        """Serves until cancelled."""
        self._recover()
        log.info(
            "agent_started",
            device=self._device,
            boot=self._presence.boot,
            version=self._state.active,
        )
        try:
            async with asyncio.TaskGroup() as self._group:
                await self._control.subscribe(*self._topics.device_control(self._device))
                await self._control.start()
                await self._bulk.start()
                for work, name in (
                    (self._read(self._control), "read-control"),
                    (self._read(self._bulk), "read-bulk"),
                    (self._activator.run(), "activate"),
                    (self._offers.run(), "offer"),
                    *self._beside.works(),
                ):
                    self._group.create_task(work, name=f"{name}-{self._device}")
                if self._watch is not None:
                    self._group.create_task(self._watch.run(), name=f"look-{self._device}")
                self._start(self._count_examples(), "count")
                self._feed(events.Recovered(self._memory.failures()))
                if self._state.announced is not None:
                    # A version that was fetched and not yet in use needs no network to be.
                    self._feed(events.VersionSeen(self._state.announced))
        finally:
            await self._uploads.close()
            await self._presence.say_goodbye(self._control)
            await self._control.close()
            await self._bulk.close()
            self._memory.close()
            self._lock.close()

    def _recover(self) -> None:
        self._storage.attempt("sweep", self._outbox.sweep)
        self._beside.recover()
        active = self._versions.recover()
        held = self._versions.held
        waiting = self._outbox.rounds
        took_part = self._memory.newest_round()
        self._state = machine.Agent(
            # Until the first look nobody knows.
            eligible=self._watch is None,
            every_rounds=self._policies.every_rounds,
            took_part=took_part,
            announced=held,
            held=None if held is None else held.number,
            active=None if active is None else active.version,
            assigned=max([*waiting, took_part]),
            outbox=waiting,
        )

    # ------------------------------------------------------------ reading

    async def _read(self, link: Link) -> None:
        while True:
            event = await link.next_event()
            match event:
                case LinkUp():
                    # They have one broker, and each has a wait of its own.
                    (self._bulk if link is self._control else self._control).hurry()
                    if link is self._control:
                        self._start(self._presence.announce_birth(self._control), "birth")
                        self._beside.came_up()
                        self._feed(events.Connected())
                case LinkDown():
                    if link is self._control:
                        self._feed(events.Disconnected())
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
                if not delivery.payload and self._beside.withdrawn(address.message):
                    return
                self._dispatch(messages.decode(address.message, delivery.payload))
        except PeerError as error:
            log.warning(
                "refused", device=self._device, topic=delivery.topic[:200],
                reason=error.reason.value, detail=error.detail,
            )  # fmt: skip

    def _receive_chunk(self, address: Address, payload: bytes) -> None:
        if address.sha256 is not None and address.chunk is not None:
            self._downloads.received(address.sha256, address.chunk, payload)

    def _dispatch(self, message: Message) -> None:  # noqa: PLR0912 -- one for each message
        self._beside.hears(message)
        match message:
            case messages.VersionAnnouncement():
                self._versions.announced(message)
                newest = self._state.announced
                if newest is not None and message.number < newest.number:
                    self._start(self._versions.complain(message, newest.number), "complain")
                self._feed(events.VersionSeen(message))
            case messages.RoundAnnouncement():
                self._checkpoints.forget_before(message.oldest_wanted)
                self._feed(events.RoundSeen(message, self._is_sampled(message.round)))
            case messages.RollCall():
                if self._roll is None or self._roll.done():
                    self._roll = self._start(self._answer_roll(message.spread_s), "roll")
            case messages.Assignment():
                self._contributor.asked(message)
                self._feed(events.Assigned(message))
            case messages.Retry():
                self._feed(events.Deferred(message))
            case messages.Grant():
                offer = self._outbox.offer(message.round)
                if offer is not None and offer.update.sha256 == message.sha256:
                    path = self._outbox.path(message.round)
                    self._uploads.granted(message, offer.update, path)
            case messages.Have():
                self._uploads.acknowledged(message)
            case messages.Receipt():
                offer = self._outbox.offer(message.round)
                if offer is not None and offer.update.sha256 == message.sha256:
                    self._settle(message)
            case messages.Abort():
                log.info(
                    "round_aborted",
                    device=self._device,
                    round=message.round,
                    reason=message.reason.value,
                )
                self._feed(events.Aborted(message.round))

    def _settle(self, receipt: messages.Receipt) -> None:
        number, status = receipt.round, receipt.status
        reason = None if receipt.reason is None else receipt.reason.value
        log.info("receipt", device=self._device, round=number, status=status.value, reason=reason)
        self._uploads.stop(receipt.sha256)
        # If it cannot be written down, the update is offered again, and the answer comes again.
        if self._storage.attempt("receipt", lambda: self._outbox.settle(number, status, reason)):
            self._feed(events.Receipted(receipt))

    def _is_sampled(self, number: int) -> bool:
        policies, reason = self._policies, None
        period_rounds, last = policies.sampling_period_rounds, self._state.took_part
        sampled = is_sampled(self._population, self._device, number, period_rounds)
        if not sampled:
            reason = f"sampling_period_rounds: one round in {period_rounds}"
        elif last < number < first_round_after(last, policies.every_rounds):
            reason = f"every_rounds: {policies.every_rounds} from the last one, {last}"
        if reason not in (None, self._takes_no_part):
            log.info("takes_no_part", device=self._device, round=number, reason=reason)
        self._takes_no_part = reason
        return sampled

    # ------------------------------------------------------------ acting

    def _feed(self, event: events.Event) -> None:
        self._state, wanted = machine.step(self._state, event)
        for command in wanted:
            self._act(command)
        self._beside.see()

    def _set_pace(self) -> None:
        if self._watch is not None:
            trains = self._beside.is_working
            self._watch.set_pace(Pace.TRAINING if trains else _pace_of(self._state))

    def _act(self, command: commands.Command) -> None:  # noqa: PLR0912 -- one for each command
        match command:
            case commands.Fetch(version):
                self._cancel(self._fetching)
                self._fetching = self._start(
                    self._versions.fetch(version), f"fetch-{version.number}"
                )
            case commands.Activate(version):
                self._activator.wanted(version)
            case commands.CheckIn():
                self._pacing.check_in(command)
            case commands.SendCheckIn(number):
                self._start(self._check_in(number), f"checkin-{number}")
            case commands.Rest(after_s):
                if self._state.failures > 0:
                    log.warning(
                        "rests_after_failures",
                        device=self._device,
                        failures=self._state.failures,
                        at_least_s=after_s,
                    )
                self._pacing.rest(command)
            case commands.KeepFailures(failures):
                self._storage.attempt("failures", lambda: self._memory.keep_failures(failures))
            case commands.Train(assignment):
                self._cancel(self._overdue)
                if self._training is not self._suspending:
                    self._cancel(self._training)
                self._training = self._start(
                    self._contribute(assignment, self._suspending), f"train-{assignment.round}"
                )
            case commands.Suspend(assignment):
                self._suspending = self._training
                self._contributor.suspend()
                self._cancel(self._overdue)
                self._overdue = self._start(
                    self._wait_until_due(assignment), f"due-{assignment.round}"
                )
            case commands.StopTraining(number):
                self._cancel(self._overdue)
                self._cancel(self._training)
                self._checkpoints.forget(number)
            case commands.SendOffer(number):
                self._start(self._offers.offer(number), f"offer-{number}")
            case commands.Forget(number):
                self._outbox.forget(number)
            case commands.SayTrainingFailed(number, reason):
                report = messages.Report(
                    kind=ReportKind.TRAINING_FAILED, round=number, detail=reason[:500]
                )
                self._start(self._send(report), f"report-{number}")

    async def _contribute(
        self, assignment: Assignment, suspending: asyncio.Task[None] | None
    ) -> None:
        self._activator.training(under_way=True)
        try:
            if suspending is not None and not suspending.done():
                # It leaves what this one goes on from, or was done before it could be stopped.
                await asyncio.wait([suspending])
                if not machine.trains(self._state, assignment.round):
                    return
            event = await self._contributor.contribute(assignment)
        finally:
            # One that was stopped may end after the next one has begun.
            if self._training is asyncio.current_task():
                self._activator.training(under_way=False)
        if event is not None:
            self._feed(event)

    async def _wait_until_due(self, assignment: Assignment) -> None:
        due_s = self._contributor.due_s(assignment)
        await asyncio.sleep(due_s - asyncio.get_running_loop().time())
        standing = None if self._watch is None else self._watch.standing
        waited_for = "" if standing is None else "; ".join(standing.reasons)
        reason = (
            f"not done by the deadline, {assignment.deadline_s:.0f} s: the device is not eligible "
            f"({waited_for})"
        )
        log.info("training_overdue", device=self._device, round=assignment.round, reason=reason)
        self._feed(events.Overdue(assignment.round, reason))

    async def _count_examples(self) -> None:
        if self._data is None:
            self._feed(events.Counted(0))
        elif self._typed is not None:
            await self._typed.keep_counting(self._counted, self._forgotten)
        else:
            self._counted(await count_in(self._trainer, self._device, self._data))

    def _counted(self, examples: int) -> None:
        self._feed(events.Counted(examples))
        self._beside.counted()
        if self._watch is not None:
            self._watch.look_again()

    async def _forgotten(self) -> None:
        await self._beside.forgotten()
        await self._offers.withdraw()

    # ------------------------------------------------------------ carrying

    async def _check_in(self, number: int) -> None:
        checkin = messages.Checkin(
            round=number,
            version=self._state.held,
            examples=self._state.examples or 0,
            boot=self._presence.boot,
        )
        await self._send(checkin)

    async def _answer_roll(self, spread_s: float) -> None:
        await asyncio.sleep(self._rng.uniform(0.0, spread_s))
        await self._presence.announce_birth(self._control)

    async def _send(self, message: Message) -> None:
        topic = self._topics.up(self._device, type(message))
        # A round may be over in an hour; an offer or a report is of use however late.
        expiry_s = CHECKIN_EXPIRY_S if isinstance(message, messages.Checkin) else None
        await self._control.publish(topic, messages.encode(message), expiry_s=expiry_s)

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


def _lock(state_dir: Path) -> StateLock:
    with disk(f"use the state folder {state_dir}"):
        state_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(state_dir, os.W_OK):
            raise StoreUnavailable(f"the state folder {state_dir} cannot be written")
        return StateLock(state_dir, "agent")


def _open_memory(state_dir: Path, population: str) -> AgentState:
    memory = AgentState.open_whole(state_dir / "agent.sqlite")
    try:
        memory.bind_population(population)
    except FedgeError:
        memory.close()
        raise
    return memory


def _pace_of(state: machine.Agent) -> Pace:
    """What the readings are needed for."""
    match None if state.work is None else state.work.stage:
        case machine.Stage.TRAINING:
            return Pace.TRAINING
        case machine.Stage.SUSPENDED:
            return Pace.WAITING
        case _:
            return Pace.IDLE
