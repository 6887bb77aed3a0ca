"""Asking: who is asked to train is written down first, and told only then.

A coordinator that was killed in between finds in its record whom it meant to ask, and tells them
again; the other way round, a device could train for a round that has never heard of it. Who is
asked is the course's decision, and what becomes of the answers the conductor's.
"""

from __future__ import annotations

from collections.abc import Iterable

from fedge.coordinator.buffer import Buffer
from fedge.coordinator.course import AnyRound, Course
from fedge.coordinator.latest import LatestOnly
from fedge.coordinator.rounds import Round, device_seed
from fedge.coordinator.settings import ResolvedTraining
from fedge.coordinator.store import Store
from fedge.coordinator.surroundings import Surroundings
from fedge.coordinator.workers import Workers
from fedge.schemas.ids import Digest
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import Assignment

log = EventLog(__name__)


class Asking:
    """The assignments of one course of rounds."""

    def __init__(
        self,
        *,
        store: Store,
        workers: Workers,
        course: Course,
        training: ResolvedTraining,
        plan_sha256: Digest,
        around: Surroundings,
    ) -> None:
        self._store = store
        self._workers = workers
        self._course = course
        self._training = training
        self._plan_sha256 = plan_sha256
        self._around = around
        self._repeats = LatestOnly(self._assign_again, around.start, "assign-again")

    async def ask(self, state: AnyRound, asked: frozenset[str]) -> bool:
        """Records that these devices are asked, and tells them; False if the round has ended.

        While the disk is full or the database away, it waits.
        """
        if not await self._workers.insist(lambda: self._record(state, asked)):
            log.warning("round_ended_before_it_was_asked", round=state.number)
            return False
        if isinstance(state, Round):
            log.info("round_training", round=state.number, base=state.base, cohort=len(asked))
        wanted = {d for d in asked if self._course.awaited(d, state.number) is not None}
        self.assign(state, sorted(wanted))
        if isinstance(state, Buffer) and wanted != asked:
            # They were given up before it could be recorded that they were asked.
            await self.silence(state.number, sorted(asked - wanted))
        return True

    def assign_again(self, state: AnyRound, devices: Iterable[str]) -> None:
        """Tells devices that have lost their assignment. Who is not in the record is told later."""
        for device in devices:
            self._repeats.put(device, state)

    async def _assign_again(self, device: str, state: AnyRound) -> None:
        known = await self._workers.durable(lambda: self._store.participant(state.number, device))
        if known is not None and self._course.awaited(device, state.number) is not None:
            self.assign(state, [device])

    def assign(self, state: AnyRound, devices: Iterable[str]) -> None:
        """Tells devices that are in the record what to do."""
        for device in devices:
            self._around.tell(device, self._assignment(state, device))

    async def silence(self, asked_in: int, devices: Iterable[str]) -> None:
        """Those that have not answered are waited for no longer, in the record, too."""
        at = self._around.wall_clock()
        await self._workers.insist(lambda: self._store.silence(asked_in, devices, at=at))

    def _record(self, state: AnyRound, asked: frozenset[str]) -> bool:
        """False if the round has its outcome: the disk was full until after its deadline."""
        if all(record.number != state.number for record in self._store.open_rounds()):
            return False
        at, now = self._around.wall_clock(), self._around.clock()
        if isinstance(state, Round):
            until = at + max(0.0, state.until - now)
            self._store.record_assignment(state.number, sorted(asked), train_until=until, at=at)
        else:
            until = at + self._course.policy.deadline_s
            for device in sorted(asked):
                self._store.record_asked(state.number, device, base=state.base, until=until, at=at)
        return True

    def _assignment(self, state: AnyRound, device: str) -> Assignment:
        training, until = self._training, state.until
        if isinstance(state, Buffer):
            flight = state.flights.get((state.number, device))
            until = until if flight is None else flight.until
        return Assignment(
            round=state.number,
            base=state.base,
            plan_sha256=self._plan_sha256,
            deadline_s=max(0.0, until - self._around.clock()),
            seed=device_seed(state.seed, device),
            batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            local_epochs=training.local_epochs,
            local_steps=training.local_steps,
            proximal_mu=training.proximal_mu,
        )
