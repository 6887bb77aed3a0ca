"""The coordinator's threads, each with one job, so that the event loop never waits for a disk."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeVar

from fedge.schemas.errors import StoreUnavailable
from fedge.schemas.logs import EventLog

log = EventLog(__name__)

T = TypeVar("T")

FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 10.0
SAY_AGAIN_S = 60.0
"""While the storage cannot be used, it is said so often."""


class StorageWatch:
    """Whether the disk and the database can be used, told once when it changes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: float | None = None
        self._said_at = 0.0

    @property
    def available(self) -> bool:
        """Whether the last use worked."""
        return self._since is None

    def failed(self, error: StoreUnavailable) -> None:
        """A write was refused."""
        now = self._clock()
        if self._since is None:
            self._since = now
        elif now - self._said_at < SAY_AGAIN_S:
            return
        self._said_at = now
        log.error(
            "storage_unavailable",
            reason=str(error),
            seconds=now - self._since,
            advice="rounds wait until it can be written again: free space, remount, start it",
        )

    def worked(self) -> None:
        """A write was done."""
        if self._since is not None:
            log.info("storage_available", seconds=self._clock() - self._since)
            self._since = None


class Workers:
    """Three threads. What is given to one runs in the order in which it was given.

    `durable`: everything that must be on disk before somebody is told. `compute`: averaging and
    exporting. `measure`: evaluations, which no round waits for.
    """

    def __init__(self) -> None:
        self.storage = StorageWatch()
        self._worked = asyncio.Event()
        self._durable = ThreadPoolExecutor(1, thread_name_prefix="durable")
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._measure = ThreadPoolExecutor(1, thread_name_prefix="measure")

    async def durable(self, work: Callable[[], T]) -> T:
        """The result of `work`, run after all durable work that was given before.

        Raises `StoreUnavailable` if the storage refused; nothing was changed then.
        """
        try:
            result = await _run(self._durable, work)
        except StoreUnavailable as error:
            self.storage.failed(error)
            raise
        self.storage.worked()
        self._worked.set()
        return result

    async def compute(self, work: Callable[[], T]) -> T:
        """The result of `work` on the computing thread."""
        return await _run(self._compute, work)

    async def measure(self, work: Callable[[], T]) -> T:
        """The result of `work` on the measuring thread."""
        return await _run(self._measure, work)

    async def insist(self, work: Callable[[], T], *, on_compute: bool = False) -> T:
        """The result of `work`, tried again for as long as the storage is unavailable.

        `work` is done again as a whole, after what was given meanwhile. `on_compute`: on the
        computing thread, for work that computes and writes.
        """
        wait_s = FIRST_WAIT_S
        while True:
            try:
                if not on_compute:
                    return await self.durable(work)
                return await self.compute(work)
            except StoreUnavailable as error:
                self.storage.failed(error)
            # What somebody else could write, this may be able to write, too.
            self._worked.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._worked.wait()
            wait_s = min(LONGEST_WAIT_S, 2 * wait_s)

    def close(self) -> None:
        """Waits for what runs and forgets what has not begun."""
        for executor in (self._compute, self._durable, self._measure):
            executor.shutdown(wait=True, cancel_futures=True)


async def _run(executor: Executor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(executor, work)
