"""Work for each device, of which only the newest matters.

A device may say something again, or something else, faster than the store can look at it. What is
being done is finished; of what comes meanwhile only the newest is kept, so a flood of one device
costs one piece of work at a time and the memory of one message. Knows nothing of the work.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

from fedge.schemas.errors import StoreError, StoreUnavailable
from fedge.schemas.logs import EventLog

log = EventLog(__name__)

T = TypeVar("T")


class LatestOnly(Generic[T]):
    """Does `work` for a device and what it said. `start`: runs a coroutine beside everything else.

    What `work` raises ends that device's turn, and is whoever's `start` carries it; but what the
    store refuses for good is logged here: no device may end the coordinator by what it says.
    """

    def __init__(
        self,
        work: Callable[[str, T], Awaitable[None]],
        start: Callable[[Coroutine[Any, Any, Any], str], None],
        name: str,
    ) -> None:
        self._work = work
        self._start = start
        self._name = name
        self._next: dict[str, T] = {}
        self._busy: set[str] = set()

    def put(self, device: str, said: T) -> None:
        """Has the work done for this, now or after what is being done; older waiting is dropped."""
        self._next[device] = said
        if device not in self._busy:
            self._busy.add(device)
            self._start(self._do(device), f"{self._name}-{device}")

    async def _do(self, device: str) -> None:
        try:
            while device in self._next:
                try:
                    await self._work(device, self._next.pop(device))
                except StoreUnavailable:
                    raise
                except StoreError as error:
                    # What the database refuses of one device is no reason to stop for all.
                    log.error(
                        "not_carried_out",
                        what=self._name,
                        device=device,
                        reason=str(error),
                    )
        finally:
            self._busy.discard(device)
            self._next.pop(device, None)
