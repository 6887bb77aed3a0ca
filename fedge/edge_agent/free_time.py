"""The time in which a device is free: no round waits for it, and its rules allow it to work.

What is done here is cut off as soon as the device is not free any more, and begun anew when it is.
It knows nothing of what is done, nor of why the device is free.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class FreeTime:
    """Not free until `see` says so. `changed`: called when work begins or has ended."""

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        self._changed = changed
        self._is_free = asyncio.Event()
        self._under_way: dict[asyncio.Task[Any], bool] = {}

    @property
    def is_working(self) -> bool:
        """Whether something is done now that takes the processor."""
        return any(self._under_way.values())

    def see(self, *, free: bool) -> None:
        """Whether the device is free now."""
        if free:
            self._is_free.set()
            return
        self._is_free.clear()
        for work in self._under_way:
            work.cancel()

    async def run(self, work: Callable[[], Coroutine[Any, Any, T]], *, computes: bool) -> T:
        """What `work` returns, once it was done in one piece. Cancel it to give up.

        `computes`: it takes the processor; otherwise it waits for a network most of the time.
        Raises what `work` raises.
        """
        while True:
            await self._is_free.wait()
            task = asyncio.create_task(work(), name="in-free-time")
            self._under_way[task] = computes
            self._changed()
            try:
                return await task
            except asyncio.CancelledError:
                own = asyncio.current_task()
                if own is not None and own.cancelling():
                    raise
                # It made way.
            finally:
                del self._under_way[task]
                self._changed()
