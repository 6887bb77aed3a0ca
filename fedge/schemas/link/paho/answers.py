"""Whether a broker still answers: pings are no proof, if publishes and subscriptions are not.

A timer that is set once and looks back when it is due, so that an answer costs no timer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class AnswerWatch:
    """Calls `on_late` once if something asked has had no answer for `limit_s`, nor anything else.

    Any answer shows that the broker works: only its silence counts, not its pace.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, limit_s: float, on_late: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._limit_s = limit_s
        self._on_late = on_late
        self._unanswered = 0
        self._since_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def asked(self) -> None:
        """Something was sent that has to be answered."""
        if not self._unanswered:
            self._since_s = self._loop.time()
        self._unanswered += 1
        if self._timer is None:
            self._timer = self._loop.call_later(self._limit_s, self._due)

    def answered(self) -> None:
        """One of these was answered."""
        self._unanswered -= 1
        self._since_s = self._loop.time()

    def stop(self) -> None:
        """Never calls any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _due(self) -> None:
        self._timer = None
        if not self._unanswered:
            return
        due_s = self._since_s + self._limit_s
        if self._loop.time() < due_s:
            self._timer = self._loop.call_at(due_s, self._due)
        else:
            self._on_late()
