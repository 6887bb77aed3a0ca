"""The device's part of a word count: one noisy word, if its owner agreed, and never a second.

Without `epsilon_limit` in `[word_counts]` nothing here reads a text or says a word. With it, the
device answers each campaign once, when it is idle, as long as the costs of all its answers stay
within the limit; the answer is kept before it is sent, and said until the coordinator has it. That
it answers says nothing: a device with no word to tell answers, too. What was told stays told, also
when the text is forgotten: nobody can say any more of what it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Container
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.typed_texts import TypedTexts
from fedge.edge_agent.word_ledger import Told, WordLedger
from fedge.edge_agent.word_sample import answer_to, words_typed
from fedge.schemas.errors import ConfigError, FedgeError, LinkClosed, LinkError, StoreUnavailable
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import WordCountAnnouncement, WordCountAnswer, WordCountHeard

log = EventLog(__name__)

AGAIN_S = 30.0
"""After a disk that is full, or texts that were changed while they were read."""
FIRST_SAY_AGAIN_S = 60.0
DEFAULT_LEAST_TYPED = 3
LONGEST_SAY_AGAIN_S = 3600.0
"""An answer that was not heard is said again after a minute, then ever more rarely."""


class WordCountSettings(BaseModel):
    """`[word_counts]`: whether this device tells noisy words, and how much all of them may say.

    `epsilon_limit`: the sum of the epsilons of all answers in the life of the state folder; 0:
    it never takes part. `least_typed`: a word that was typed less often is never drawn, also where
    whoever asks would have it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epsilon_limit: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.0
    least_typed: Annotated[int, Field(ge=1, le=1_000_000)] = DEFAULT_LEAST_TYPED


class WordCounts:
    """The word counts that `device` is asked for while `run` runs.

    `limit`: above 0. `least_typed`: as in `WordCountSettings`. `known`: the words of the plan's
    vocabulary, None while no plan is here. `send`: returns when the broker has it.
    """

    def __init__(
        self,
        device: str,
        *,
        limit: float,
        state_dir: Path,
        data: DataConfig | None,
        typed: TypedTexts | None,
        known: Callable[[], Container[str] | None],
        send: Callable[[WordCountAnswer], Awaitable[None]],
        rng: random.Random,
        least_typed: int = DEFAULT_LEAST_TYPED,
    ) -> None:
        self._device = device
        self._limit = limit
        self._least_typed = least_typed
        self._state_dir = state_dir
        self._data = data
        self._typed = typed
        self._known = known
        self._send = send
        self._rng = rng
        self._ledger: WordLedger | None = None
        self._free = False
        self._due = asyncio.Event()
        self._asked: WordCountAnnouncement | None = None
        self._declined: str | None = None
        self._not_before = 0.0
        self._say_at = 0.0
        self._say_again_s = FIRST_SAY_AGAIN_S

    def asked(self, announcement: WordCountAnnouncement) -> None:
        """A word count is under way, perhaps not for the first time."""
        before = self._asked
        if before is None or before.campaign != announcement.campaign:
            wait_s = self._rng.uniform(0.0, announcement.spread_s)
            self._not_before = asyncio.get_running_loop().time() + wait_s
        self._asked = announcement
        self.say_again()

    def withdrawn(self) -> None:
        """None is."""
        self._asked = None

    def heard(self, heard: WordCountHeard) -> None:
        """The coordinator has the answer, or does not want it any more."""
        if self._ledger is not None:
            try:
                self._ledger.heard(heard.campaign)
            except FedgeError as error:
                # It is said again, and this comes again.
                log.warning("word_ledger_failed", device=self._device, reason=str(error))
            self._due.set()

    def say_again(self) -> None:
        """What was said may have been lost."""
        self._say_at, self._say_again_s = 0.0, FIRST_SAY_AGAIN_S
        self._due.set()

    def see(self, *, free: bool) -> None:
        """Whether the device has nothing to do that a round waits for, and may work at all."""
        if free and not self._free:
            self._due.set()
        self._free = free

    async def run(self) -> None:
        """Answers what is asked, until cancelled."""
        try:
            while True:
                self._due.clear()
                wait_s = await self._step()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._due.wait()
        finally:
            if self._ledger is not None:
                self._ledger.close()

    # ------------------------------------------------------------ answering

    async def _step(self) -> float | None:
        """Does what can be done now; after how long there may be more, None: not by waiting."""
        asked = self._asked
        if asked is None or asked.campaign == self._declined:
            return None
        try:
            told = self._opened().told(asked.campaign)
            if told is None:
                return await self._make(asked)
        except StoreUnavailable as error:
            return self._later(error)
        except FedgeError as error:
            self._declined = asked.campaign
            log.warning("word_count_declined", device=self._device, reason=str(error))
            return None
        return await self._say(told)

    async def _make(self, asked: WordCountAnnouncement) -> float | None:
        self._opened().check(asked.epsilon, self._limit)
        wait_s = self._not_before - asyncio.get_running_loop().time()
        if wait_s > 0:
            return wait_s
        if not self._free:
            return None
        known = self._known() if asked.new_only else ()
        counts = None if known is None else await self._counted()
        if known is None or counts is None:
            log.info("word_count_again", device=self._device)
            return AGAIN_S
        if self._asked is None or self._asked.campaign != asked.campaign:
            # Nobody waits for it any more, and it would cost as much.
            return None
        ledger = self._opened()
        answer = answer_to(asked, counts, known, least_typed=self._least_typed)
        ledger.keep(answer, asked.epsilon, self._limit)
        log.info(
            "word_told",
            device=self._device,
            epsilon=asked.epsilon,
            spent=ledger.spent(),
            limit=self._limit,
        )
        self._due.set()
        return None

    async def _counted(self) -> Counter[str] | None:
        """The words of this device; None if a text was forgotten meanwhile."""
        if self._data is None:
            raise ConfigError("no [data]: there are no texts to count words of")
        limits = None if self._typed is None else self._typed.limits
        generation, counts = await asyncio.to_thread(words_typed, self._data, limits)
        if self._typed is not None and generation != await asyncio.to_thread(
            self._typed.generation
        ):
            return None
        return counts

    async def _say(self, told: Told) -> float | None:
        if told.heard:
            return None
        now = asyncio.get_running_loop().time()
        if now < self._say_at:
            return self._say_at - now
        try:
            await self._send(told.answer)
        except LinkClosed:
            return None
        except LinkError as error:
            log.error("not_sent", device=self._device, what="words", reason=str(error))
        wait_s = self._say_again_s
        self._say_again_s = min(2 * wait_s, LONGEST_SAY_AGAIN_S)
        self._say_at = asyncio.get_running_loop().time() + wait_s
        return wait_s

    def _opened(self) -> WordLedger:
        if self._ledger is None:
            self._ledger = WordLedger(self._state_dir)
        return self._ledger

    def _later(self, error: StoreUnavailable) -> float:
        log.warning("word_count_waits", device=self._device, reason=str(error))
        return AGAIN_S
