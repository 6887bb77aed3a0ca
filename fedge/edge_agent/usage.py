"""What training costs this device, written down as it is spent: the ledger of the daily limits.

A line for each stretch of training, whether or not an update came of it, and what its update
weighs. It is written every half a minute, so a kill or a power cut hides no more than that. Lines
are not keyed by round: a coordinator that begins again with round 1 does not give a device a new
day. Knows no limit; `fedge.edge_agent.participation` has them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fedge.edge_agent.participation import DAY_S, Usage
from fedge.edge_agent.state import AgentState
from fedge.edge_agent.storage_watch import StorageWatch

WRITE_EVERY_S = 30.0


class UsageMeter:
    """Measures the training of one device, a stretch at a time. `wall_clock`: since the epoch."""

    def __init__(
        self, memory: AgentState, storage: StorageWatch, wall_clock: Callable[[], float]
    ) -> None:
        self._memory = memory
        self._storage = storage
        self._wall_clock = wall_clock
        self._line: int | None = None
        self._since_s: float | None = None
        self._owed_s = 0.0
        self._owed_bytes = 0

    def begin(self) -> None:
        """Training begins now."""
        self._line = None
        self._since_s = asyncio.get_running_loop().time()

    def goes_on(self) -> None:
        """Training goes on: writes now and then."""
        if self._unwritten_s() >= WRITE_EVERY_S:
            self._write()

    def end(self, upload_bytes: int = 0) -> None:
        """It has ended; `upload_bytes`: of its update, if there is one."""
        if self._since_s is not None:
            self._owed_bytes += upload_bytes
            self._write()
            self._since_s = None

    def lines(self) -> list[Usage]:
        """Everything used, with what is not written yet. Raises `StoreError`.

        Lines of the future are dated now, once: the clock was set back, and what was used in the
        meantime must count for a day from now, neither for ever nor not at all.
        """
        now_s = self._wall_clock()
        found = self._memory.usage(now_s - DAY_S)
        if any(line.at_s > now_s for line in found):
            self._storage.attempt("usage", lambda: self._memory.redate_usage(now_s))
        return [*found, self.unwritten()]

    def unwritten(self) -> Usage:
        """What this meter has measured and not written yet, dated now."""
        return Usage(self._wall_clock(), self._unwritten_s(), self._owed_bytes)

    def _unwritten_s(self) -> float:
        if self._since_s is None:
            return self._owed_s
        return self._owed_s + asyncio.get_running_loop().time() - self._since_s

    def _write(self) -> None:
        self._owed_s = self._unwritten_s()
        self._since_s = asyncio.get_running_loop().time()
        used = Usage(self._wall_clock(), self._owed_s, self._owed_bytes)

        def write() -> None:
            self._line = self._memory.add_usage(used, self._line)
            self._owed_s, self._owed_bytes = 0.0, 0

        # What cannot be written now is still counted, and written with the next.
        self._storage.attempt("usage", write)
