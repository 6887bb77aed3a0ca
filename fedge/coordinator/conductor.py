"""The conductor: carries out what the round machines decide, one round after the other.

Every decision is the course's (`rounds.step` or, in asynchronous mode, `buffer.step`); what must be
durable is durable before anybody is told, and while the disk is full or the database away, the
round waits for it. It knows devices by name and messages by type, and leaves topics and sessions to
the service that gave it `tell`.
"""

from __future__ import annotations

import numpy as np

from fedge.coordinator import pace, rounds
from fedge.coordinator.answers import Answers
from fedge.coordinator.asking import Asking
from fedge.coordinator.course import AnyRound, Awaited, Course
from fedge.coordinator.intake import Intake, rejected_receipt
from fedge.coordinator.journal import Journal
from fedge.coordinator.over_selection import OverSelection, decode_belief, encode_belief
from fedge.coordinator.recovery import (
    flights_of,
    last_visited,
    resumed_buffer,
    resumed_round,
)
from fedge.coordinator.rounds import Mode, Round, Strategy
from fedge.coordinator.settings import ResolvedTraining, RoundSettings
from fedge.coordinator.store import RoundRecord, Store
from fedge.coordinator.succession import Succession
from fedge.coordinator.surroundings import Surroundings
from fedge.coordinator.uploads import UploadDesk
from fedge.coordinator.workers import Workers
from fedge.schemas import messages
from fedge.schemas.errors import FedgeError, PeerError, RejectReason
from fedge.schemas.ids import Digest
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import RoundAnnouncement

log = EventLog(__name__)

LONGEST_REST_S = 60.0
"""Between an abandoned round and the next: 1 s after the first, doubling, and never more."""
BELIEF = "over_selection"
"""The note under which the store keeps what was learned of who delivers."""


class Conductor:
    """The rounds of one population. `recover` comes first."""

    def __init__(
        self,
        *,
        store: Store,
        succession: Succession,
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
        self._succession = succession
        self._intake = intake
        self._desk = desk
        self._workers = workers
        self._versions_limit = round_settings.versions
        self._checkins_per_s = round_settings.checkins_per_s
        self._seed = seed
        self._around = around
        self._course = Course(
            round_settings.policy,
            checkins_per_s=round_settings.checkins_per_s,
            least_spread_s=round_settings.checkin_spread_s,
        )
        self._asking = Asking(
            store=store,
            workers=workers,
            course=self._course,
            training=training,
            plan_sha256=plan_sha256,
            around=around,
        )
        self.answers = Answers(
            store=store,
            intake=intake,
            desk=desk,
            journal=journal,
            workers=workers,
            course=self._course,
            feed=self._feed,
            around=around,
        )
        self._abandoned_in_a_row = 0
        self._rests_until = 0.0
        self._limit_told = False

    # ------------------------------------------------------------ looking

    @property
    def round_number(self) -> int | None:
        """The number of the round that is under way, None between two."""
        return self._course.number

    def awaited(self, device: str, asked_in: int) -> Awaited | None:
        """What the device was asked for in that round, None if nothing is waited for."""
        return self._course.awaited(device, asked_in)

    def announcement(self) -> RoundAnnouncement | None:
        """What devices should be told about the newest round, None before the first."""
        online = len(self._around.online())
        return self._course.announcement(self._succession.newest.number, online)

    @property
    def waits_for_devices(self) -> bool:
        """Whether the round only goes on when a device speaks, and nobody is known to be at it."""
        return self._course.waits_for_devices(self._around.clock())

    def next_deadline(self) -> float | None:
        """When `time_passed` should be called, in `clock` seconds."""
        if self._course.round is None:
            return self._rests_until or None
        return self._course.next_deadline()

    # ------------------------------------------------------------ what happens

    def checked_in(self, device: str, round_number: int, examples: int) -> None:
        """A device is ready. Raises `PeerError` (stale_round) for another round than this one."""
        if round_number != self.round_number:
            raise PeerError(
                RejectReason.STALE_ROUND,
                f"check-in for round {round_number}; open: {self.round_number or 'none'}",
            )
        self._course.claims(device, examples)
        self._feed(rounds.CheckedIn(device, self._online_count()))

    def time_passed(self) -> None:
        """The clock reached the next deadline, or the coordinator has just started."""
        if self._course.round is None and 0 < self._rests_until <= self._around.clock():
            self._rests_until = 0.0
            # Perhaps the last one failed because devices never heard of its version.
            self._around.publish_again()
        self._feed(rounds.TimePassed(self._online_count()))

    async def adopt_newest(self) -> None:
        """Looks at the store again: another process (a rollback) may have added a version."""
        found = await self._succession.overtaken()
        if found is None:
            return
        self._feed(rounds.Superseded(found.number))
        if self._course.round is None:
            # Between two rounds: what flies comes from versions that were taken back.
            for asked_in, device in self._course.call_back_all():
                self._dismiss((device,), RejectReason.ROUND_ABANDONED, asked_in)
        await self._succession.take_up(found)
        self._around.publish()

    # ------------------------------------------------------------ beginnings

    async def recover(self) -> None:
        """Takes up what the store says was under way; makes version 0 if there is none."""
        await self._succession.recover(self._around.wall_clock())
        resumed = await self._workers.durable(self._recover_rounds)
        if resumed is not None:
            self._course.resume(resumed)
            self.answers.count()
            log.info(
                "round_resumed",
                round=resumed.number,
                phase=resumed.phase.value,
                accepted=len(resumed.accepted),
            )
        kept = self._course.rounds_with_files()
        await self._workers.durable(lambda: self._desk.keep_only(kept))
        await self._workers.durable(self._store.blobs.sweep)

    def _recover_rounds(self) -> AnyRound | None:
        store, policy, newest = self._store, self._course.policy, self._succession.newest.number
        now, wall_now = self._around.clock(), self._around.wall_clock()
        last = store.newest_round()
        flights = flights_of(store, newest, policy, now, wall_now)
        number = 0 if last is None else last.number
        self._course.recover(number, flights, self._kept_belief())
        resumed: AnyRound | None = None
        for record in store.open_rounds():
            if record.base != newest:
                reason = "its base is not the newest version"
            elif record.mode != policy.mode.value:
                reason = f"the coordinator was started again in mode {policy.mode.value}"
            elif policy.mode is Mode.ASYNC:
                resumed = resumed_buffer(store, record, policy, flights, now=now, wall_now=wall_now)
                continue
            else:
                previous = self._last_visited(record.number)
                resumed = resumed_round(
                    store, record, policy, now=now, wall_now=wall_now, previous=previous
                )
                continue
            store.abandon_round(record.number, reason, at=wall_now)
        return resumed

    def _kept_belief(self) -> OverSelection | None:
        text = self._store.note(BELIEF)
        try:
            return None if text is None else decode_belief(text)
        except ValueError as error:
            log.warning("note_not_understood", note=BELIEF, reason=str(error))
            return None

    def take_up(self) -> None:
        """Goes on with the round that `recover` found, now that messages can be sent.

        It may have reached its goal before the restart; if not, assignments may have been recorded
        and never sent, and a device that has its own already takes no second one.
        """
        self.time_passed()
        if self._course.round is not None:
            self._act(self._course.round, rounds.Assign(self._course.waiting_for()))

    async def open_next_round(self) -> None:
        """Opens the next round, unless the operator's number of versions is reached.

        Raises `StoreUnavailable` if it cannot be recorded now.
        """
        if self._course.round is not None or self._around.clock() < self._rests_until:
            return
        newest = self._succession.newest.number
        if self._versions_limit is not None and newest >= self._versions_limit:
            self._stop_at_the_limit(newest)
            return
        number = self._course.last_number + 1
        seed = int(np.random.default_rng([self._seed, number]).integers(2**32))
        previous = await self._workers.durable(lambda: self._last_visited(number))
        await self._workers.durable(lambda: self._record_round(number, newest, seed))
        if self._succession.newest.number != newest:
            # Somebody rolled back meanwhile: there is no such base any more.
            at, reason = self._around.wall_clock(), "its base is not the newest version"
            await self._workers.insist(lambda: self._record_abandoned(number, reason, at))
            self._course.last_number = number
            self._around.publish()
            return
        now = self._around.clock()
        commands = self._course.begin(number, newest, seed=seed, previous=previous, now=now)
        self.answers.count()
        self._around.wake()
        log.info("round_gathering", round=number, base=newest, ask=self._course.policy.cohort_size)
        if self._course.round is not None:
            for command in commands:
                self._act(self._course.round, command)

    def _stop_at_the_limit(self, newest: int) -> None:
        if self._limit_told:
            return
        self._limit_told = True
        log.info("goal_reached", version=newest)
        for asked_in, device in self._course.call_back_all():
            self._dismiss((device,), RejectReason.NOT_NEEDED, asked_in)
        # What still waits for a buffer to open is told that none will.
        self.answers.count()

    def _record_round(self, number: int, base: int, seed: int) -> None:
        now, policy = self._around.wall_clock(), self._course.policy
        record = RoundRecord(
            number=number,
            base=base,
            goal=policy.goal,
            quorum=policy.quorum,
            seed=seed,
            opened_at=now,
            gather_until=now + policy.gather_s,
            mode=policy.mode.value,
        )
        newest = self._store.newest_round()
        if newest is not None and (newest.number, newest.base, newest.seed) == (number, base, seed):
            # The database was lost in the moment of a commit that it had done.
            return
        self._store.open_round(record)

    def _record_abandoned(self, number: int, reason: str, at: float) -> None:
        if any(record.number == number for record in self._store.open_rounds()):
            self._store.abandon_round(number, reason, at=at)

    def _last_visited(self, number: int) -> str | None:
        cyclic = self._course.policy.strategy is Strategy.CYCLIC
        return last_visited(self._store, number) if cyclic else None

    # ------------------------------------------------------------ carrying out

    def _online_count(self) -> int | None:
        if not self._around.all_known():
            return None
        return self._course.online_at_least(len(self._around.online()))

    def _feed(self, event: rounds.Event) -> None:
        turn = self._course.feed(event, self._around.clock())
        if turn is None:
            return
        self._around.wake()
        if not turn.state.is_open:
            self.answers.hold()
        for command in turn.commands:
            if not isinstance(command, rounds.Assign):
                self._act(turn.state, command)
        # Assignments may be sent only once it is on disk who was asked.
        if turn.asked:
            self._around.start(self._ask(turn.state, turn.asked), "ask")
            return
        for command in turn.commands:
            if isinstance(command, rounds.Assign):
                self._asking.assign_again(turn.state, command.devices)

    async def _ask(self, state: AnyRound, asked: frozenset[str]) -> None:
        if await self._asking.ask(state, asked) and isinstance(state, Round):
            self._around.publish()

    def _act(self, state: AnyRound, command: rounds.Command) -> None:
        tell = self._around.tell
        match command:
            case rounds.Assign(devices):
                self._asking.assign(state, devices)
            case rounds.Defer(devices, after_s):
                rate = self._checkins_per_s
                spread_s = pace.return_spread_s(len(devices), after_s, checkins_per_s=rate)
                for device in devices:
                    retry = messages.Retry(round=state.number, after_s=after_s, spread_s=spread_s)
                    tell(device, retry)
            case rounds.Dismiss(devices, reason, asked_in):
                self._dismiss(devices, reason, state.number if asked_in is None else asked_in)
            case rounds.Aggregate():
                self._around.start(self._aggregate(state), f"aggregate-{state.number}")
            case rounds.Abandon(reason, needed):
                if needed is None:
                    ending = self._abandon(state, reason)
                else:
                    ending = self._fall_short(state, reason, needed)
                self._around.start(ending, f"abandon-{state.number}")

    def _dismiss(self, devices: tuple[str, ...], reason: RejectReason, asked_in: int) -> None:
        for device in devices:
            dropped = self._desk.drop(device)
            if dropped is None:
                self._around.tell(device, messages.Abort(round=asked_in, reason=reason))
            else:
                self._around.tell(device, rejected_receipt(dropped, PeerError(reason, "")))
        # Slots may be free now.
        self._around.wake()
        if self._course.policy.mode is Mode.ASYNC:
            self._around.start(self._asking.silence(asked_in, devices), f"silence-{asked_in}")

    # ------------------------------------------------------------ endings

    async def _aggregate(self, state: AnyRound) -> None:
        updates = await self._workers.insist(
            lambda: self._intake.accepted_updates(state.number, state.base)
        )
        now = self._around.wall_clock()
        try:
            version = await self._succession.make_next(state.base, state.number, updates, now)
        except (FedgeError, ValueError) as error:
            # A version that cannot be exported, verified or recorded is not published; the fleet
            # goes on from the one that was.
            log.error("version_refused", round=state.number, reason=str(error))
            await self._abandon(state, f"no version could be made: {error}")
            return
        self._abandoned_in_a_row = 0
        log.info(
            "version_made",
            version=version.number,
            round=state.number,
            updates=len(updates),
            examples=sum(update.examples for update in updates),
            stale=sum(update.scale < 1 for update in updates),
        )
        await self._end_round(state)

    async def _fall_short(self, state: AnyRound, why: str, needed: int) -> None:
        # Behind whatever was being decided when the machine gave up: that counts, too.
        accepted = await self._workers.insist(lambda: self._store.accepted_in(state.number))
        if len(accepted) >= needed:
            await self._aggregate(state)
        else:
            reason = f"{why} with {len(accepted)} updates; the quorum is {needed}"
            await self._abandon(state, reason)

    async def _abandon(self, state: AnyRound, reason: str) -> None:
        at = self._around.wall_clock()
        await self._workers.insist(lambda: self._record_abandoned(state.number, reason, at))
        log.warning("round_abandoned", round=state.number, reason=reason)
        self._abandoned_in_a_row += 1
        # Whatever made it fail may make the next one fail: a fleet is not asked again at once.
        rest_s = min(LONGEST_REST_S, 2.0 ** min(self._abandoned_in_a_row - 1, 16))
        self._rests_until = self._around.clock() + rest_s
        await self._end_round(state)
        self._around.wake()
        await self.adopt_newest()

    async def _end_round(self, state: AnyRound) -> None:
        asked_before, believed_before = self._course.devices_to_ask, self._course.belief
        self._course.end()
        if self._course.devices_to_ask != asked_before:
            log.info("over_selection", ask=self._course.devices_to_ask, before=asked_before)
        changed = self._course.belief != believed_before
        belief = encode_belief(self._course.belief) if changed else None
        self.answers.forget_ended()
        if isinstance(state, Round):
            for device, offer in self._desk.drop_all():
                late = PeerError(RejectReason.LATE, f"round {state.number} has closed")
                self._around.tell(device, rejected_receipt(offer, late))
        kept = self._course.rounds_with_files()
        # On the durable thread, after whatever upload is still being decided there.
        await self._workers.insist(lambda: self._desk.keep_only(kept))
        if belief is not None:
            await self._workers.insist(lambda: self._store.keep_note(BELIEF, belief))
        self._around.publish()
