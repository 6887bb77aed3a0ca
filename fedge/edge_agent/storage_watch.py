"""What a device does while its disk is full, read-only or gone: it says so, waits, and goes on.

Knows nothing of what is written. A write that fails for a cause that may pass is tried again, at
growing intervals; the log says once that the storage is unavailable, reminds ever more rarely, and
says when it works again. Errors that do not pass are the caller's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fedge.schemas.errors import StoreUnavailable
from fedge.schemas.logs import EventLog

log = EventLog(__name__)

T = TypeVar("T")

FIRST_RETRY_S = 1.0
LONGEST_RETRY_S = 60.0
"""A disk that was full for hours is noticed within this when there is room again."""
FIRST_REMINDER_S = 60.0
LONGEST_REMINDER_S = 3600.0


class StorageWatch:
    """The state of one device's disk, as its writers find it.

    `device`: for the log. `first_retry_s`: doubles up to `LONGEST_RETRY_S`.
    """

    def __init__(self, device: str, *, first_retry_s: float = FIRST_RETRY_S) -> None:
        self._device = device
        self._first_retry_s = first_retry_s
        self._failing: set[str] = set()
        self._since_s = 0.0
        self._remind_at_s = 0.0
        self._reminder_s = FIRST_REMINDER_S

    async def until_done(
        self,
        what: str,
        write: Callable[[], Awaitable[T]],
        on_trouble: Callable[[StoreUnavailable], None] = lambda error: None,
    ) -> T:
        """What `write` returns, once the disk lets it. Cancel it to give up.

        `what`: the kind of write, for the log. `on_trouble` is called at the first failure. Raises
        what `write` raises, but for `StoreUnavailable`.
        """
        delay_s, told = self._first_retry_s, False
        while True:
            try:
                done = await write()
            except StoreUnavailable as error:
                self._failed(what, error)
                if not told:
                    told = True
                    on_trouble(error)
            else:
                self._worked(what)
                return done
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, LONGEST_RETRY_S)

    def attempt(self, what: str, write: Callable[[], None]) -> bool:
        """Whether `write` worked, for what is asked for again by itself. Logs if it did not.

        Raises what `write` raises, but for `StoreUnavailable`.
        """
        try:
            write()
        except StoreUnavailable as error:
            self._failed(what, error)
            return False
        self._worked(what)
        return True

    def _failed(self, what: str, error: StoreUnavailable) -> None:
        now_s = asyncio.get_running_loop().time()
        if not self._failing:
            self._since_s, self._reminder_s, self._remind_at_s = now_s, FIRST_REMINDER_S, now_s
        self._failing.add(what)
        if now_s >= self._remind_at_s:
            log.error("storage_unavailable", device=self._device, what=what, reason=str(error))
            self._remind_at_s = now_s + self._reminder_s
            self._reminder_s = min(2 * self._reminder_s, LONGEST_REMINDER_S)

    def _worked(self, what: str) -> None:
        # A kind of write that failed and was given up is still in the set: only its own success
        # shows that the disk takes it again. A small write may fit where a large one does not.
        if what not in self._failing:
            return
        self._failing.discard(what)
        if not self._failing:
            lasted_s = asyncio.get_running_loop().time() - self._since_s
            log.info("storage_available", device=self._device, what=what, after_s=lasted_s)
