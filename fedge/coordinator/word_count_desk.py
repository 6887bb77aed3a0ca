"""The word count desk: has the broker keep what devices are asked, and keeps what they tell.

A command puts a request into the store and wakes the coordinator; this takes up the oldest one that
is open, one at a time, announces it to all, and ends it at its deadline. Who takes part is every
device's own business: nobody is chosen or asked by name, and who does not is silent. An answer is
acknowledged when it is durable, and one that is not wanted any more, too, so that the device stops
saying it. What the answers mean is `word_estimates`' business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from fedge.coordinator.evaluations import DEADLINE, left_s
from fedge.coordinator.journal import Journal
from fedge.coordinator.latest import LatestOnly
from fedge.coordinator.publisher import Publisher
from fedge.coordinator.store import Store, WordCountRecord
from fedge.coordinator.surroundings import Surroundings
from fedge.coordinator.workers import Workers
from fedge.schemas.errors import LinkClosed, LinkError, PeerError
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import WordCountAnnouncement, WordCountAnswer, WordCountHeard

log = EventLog(__name__)

TOLD = "word_count_announced"
"""The note that says that an announcement may lie on the broker."""
REFUSED_AGAIN_S = 60.0
"""What the broker refused is tried again after so long."""
KNOWN_SOON_S = 0.5
"""It is looked so often whether all devices have answered the roll."""


class WordCountDesk:
    """The word counts of one population.

    `answers_per_s`: how many answers are wanted at most. `is_up`: whether the broker is there.
    """

    def __init__(
        self,
        *,
        store: Store,
        publisher: Publisher,
        journal: Journal,
        workers: Workers,
        around: Surroundings,
        answers_per_s: float,
        is_up: Callable[[], bool],
    ) -> None:
        self._store = store
        self._publisher = publisher
        self._journal = journal
        self._workers = workers
        self._around = around
        self._answers_per_s = answers_per_s
        self._is_up = is_up
        self._one_at_a_time = asyncio.Lock()
        self._under_way: WordCountRecord | None = None
        self._until = 0.0
        self._answers = LatestOnly(self._record, around.start, "words")

    @property
    def next_deadline(self) -> float | None:
        """When `time_passed` should be called, in `clock` seconds."""
        return None if self._under_way is None else self._until

    def time_passed(self) -> None:
        """The clock may have reached `next_deadline`."""
        now = self._under_way
        if now is not None and self._around.clock() >= self._until:
            self._under_way = None
            self._around.start(self._close(now), f"words-close-{now.number}")

    def answered(self, device: str, answer: WordCountAnswer) -> None:
        """A device's answer, perhaps not for the first time."""
        self._answers.put(device, answer)

    async def look(self) -> None:
        """Takes up the oldest request in the store, or finds that a command has closed one."""
        async with self._one_at_a_time:
            at = self._around.wall_clock()
            found = await self._workers.insist(partial(self._store.open_word_count, at=at))
            before, self._under_way = self._under_way, found
            if found is not None and (before is None or before.number != found.number):
                until = at if found.until is None else found.until
                self._until = self._around.clock() + left_s(until, found.deadline_s, at)
                log.info("word_count_under_way", word_count=found.number, epsilon=found.epsilon)
            self._around.wake()
        await self.announce()

    async def announce(self) -> None:
        """Has the broker keep what is under way, or forget what was. Without one: nothing yet."""
        while self._is_up():
            if not self._around.all_known():
                # Over how long the answers are spread is said once, for as many as there are.
                await asyncio.sleep(KNOWN_SOON_S)
                continue
            try:
                await self._announce()
            except LinkClosed:
                raise
            except LinkError as error:
                log.error("word_count_not_announced", reason=str(error))
                await asyncio.sleep(REFUSED_AGAIN_S)
            else:
                return

    async def _announce(self) -> None:
        async with self._one_at_a_time:
            now = self._under_way
            if now is not None:
                await self._workers.insist(lambda: self._store.keep_note(TOLD, "yes"))
                spread_s = max(1.0, len(self._around.online()) / self._answers_per_s)
                await self._publisher.announce(
                    WordCountAnnouncement(
                        campaign=now.campaign,
                        epsilon=now.epsilon,
                        least_typed=now.least_typed,
                        new_only=now.new_only,
                        spread_s=spread_s,
                    )
                )
            elif await self._workers.insist(lambda: self._store.note(TOLD)):
                await self._publisher.withdraw(WordCountAnnouncement)
                await self._workers.insist(lambda: self._store.keep_note(TOLD, ""))

    async def _close(self, now: WordCountRecord) -> None:
        at = self._around.wall_clock()
        close = partial(self._store.close_word_count, now.number, DEADLINE, at=at)
        if await self._workers.insist(close):
            log.info("word_count_closed", word_count=now.number, reason=DEADLINE)
        await self.look()

    async def _record(self, device: str, answer: WordCountAnswer) -> None:
        record = partial(
            self._store.record_word_report, device, answer, at=self._around.wall_clock()
        )
        try:
            fresh = await self._workers.durable(record)
        except PeerError as error:
            self._journal.refused(device, error, None)
        else:
            if fresh:
                log.info("word_told", device=device)
        self._around.tell(device, WordCountHeard(campaign=answer.campaign))
