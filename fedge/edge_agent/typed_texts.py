"""The agent's look at the example store: how much was typed, and whether something was forgotten.

Short reads of one small file, in the agent's own process: an app may add or forget at any moment,
and nobody tells. What the texts say is read by the training process alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

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

    def count(self) -> int:
        """The texts to train on. Raises as `ExampleStore`."""
        with ExampleStore(self._data.path, self.limits) as store:
            return min(store.count().training.examples, self._data.limit or MAX_TEXTS)

    def generation(self) -> int:
        """Changes when something is forgotten. Raises as `ExampleStore`."""
        with ExampleStore(self._data.path, self.limits) as store:
            return store.generation()

    async def keep_counting(self, counted: Callable[[int], None]) -> None:
        """Tells the number of texts whenever it has changed, until cancelled."""
        known: int | None = None
        while True:
            try:
                # It may wait for an app's transaction, or make the file smaller.
                found = await asyncio.to_thread(self.count)
            except FedgeError as error:
                log.warning("examples_not_counted", device=self._device, reason=str(error))
            else:
                if found != known:
                    log.info("examples_counted", device=self._device, examples=found)
                    known = found
                    counted(found)
            await asyncio.sleep(COUNT_AGAIN_S)
