"""The agent's look at the example store: how much was typed, and whether something was forgotten.

Short reads of one small file, in the agent's own process: an app may add or forget at any moment,
and nobody tells. What the texts say is read by the training process alone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.example_limits import ExampleLimits
from fedge.edge_agent.example_store import MAX_TEXTS, ExampleStore
from fedge.schemas.errors import FedgeError
from fedge.schemas.logs import EventLog

log = EventLog(__name__)

COUNT_AGAIN_S = 30.0
"""An app that adds the first text is noticed within this."""


class TypedTexts:
    """The example store that `data` names. `limits`: its `[examples]`."""

    def __init__(self, device: str, data: DataConfig, limits: ExampleLimits) -> None:
        self._device = device
        self._data = data
        self.limits = limits
        self._woken = asyncio.Event()

    def look_again(self) -> None:
        """Texts were added or forgotten in this process: the next count is at once."""
        self._woken.set()

    def count(self) -> int:
        """The texts to train on. Raises as `ExampleStore`."""
        with ExampleStore(self._data.path, self.limits) as store:
            return min(store.count().training.examples, self._data.limit or MAX_TEXTS)

    def generation(self) -> int:
        """Changes when something is forgotten. Raises as `ExampleStore`."""
        with ExampleStore(self._data.path, self.limits) as store:
            return store.generation()

    async def keep_counting(
        self, counted: Callable[[int], None], forgotten: Callable[[], Awaitable[None]]
    ) -> None:
        """Tells the number of texts whenever it has changed, until cancelled.

        `forgotten`: called when something was forgotten since the last look.
        """
        known: int | None = None
        generation: int | None = None
        while True:
            self._woken.clear()
            try:
                # It may wait for an app's transaction, or make the file smaller.
                found = await asyncio.to_thread(self.count)
                before, generation = generation, await asyncio.to_thread(self.generation)
            except FedgeError as error:
                log.warning("examples_not_counted", device=self._device, reason=str(error))
            else:
                if found != known:
                    log.info("examples_counted", device=self._device, examples=found)
                    known = found
                    counted(found)
                if before not in (None, generation):
                    await forgotten()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(COUNT_AGAIN_S):
                    await self._woken.wait()
