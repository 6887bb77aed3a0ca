"""The coordinator's threads, each with one job, so that the event loop never waits for a disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Workers:
    """Three threads. What is given to one runs in the order in which it was given.

    `durable`: everything that must be on disk before somebody is told. `compute`: averaging and
    exporting. `measure`: evaluations, which no round waits for.
    """

    def __init__(self) -> None:
        self._durable = ThreadPoolExecutor(1, thread_name_prefix="durable")
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._measure = ThreadPoolExecutor(1, thread_name_prefix="measure")

    async def durable(self, work: Callable[[], T]) -> T:
        """The result of `work`, run after all durable work that was given before."""
        return await _run(self._durable, work)

    async def compute(self, work: Callable[[], T]) -> T:
        """The result of `work` on the computing thread."""
        return await _run(self._compute, work)

    async def measure(self, work: Callable[[], T]) -> T:
        """The result of `work` on the measuring thread."""
        return await _run(self._measure, work)

    def close(self) -> None:
        """Waits for what runs and forgets what has not begun."""
        for executor in (self._compute, self._durable, self._measure):
            executor.shutdown(wait=True, cancel_futures=True)


async def _run(executor: Executor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(executor, work)
