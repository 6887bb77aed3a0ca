"""A run that is asked to end: the first SIGINT, SIGTERM or SIGHUP ends the fleet in order.

The handlers stay until the process is gone, so that a second signal does not break the clean-up
that the first one began. Only SIGKILL does; then the programs die on their leashes, and the small
disks with the mount namespace that nobody is in any more.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """The run was asked to end. `number`: by which signal."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


class Interruption:
    """Catches the signals from when it is made on; what was ignored before stays ignored."""

    def __init__(self) -> None:
        self.number: signal.Signals | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._come)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What the work returns. Raises `Interrupted` if a signal ended it, and what it raises."""
        return asyncio.run(self._until_asked(work))

    async def _until_asked(self, work: Coroutine[Any, Any, T]) -> T:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        if self.number is not None:
            self._cancel()
        try:
            return await work
        except BaseException as error:
            # Whatever a fleet that is torn down says: the signal is why.
            if self.number is not None:
                raise Interrupted(self.number) from error
            raise
        finally:
            self._task = None

    def _come(self, number: int, _frame: FrameType | None) -> None:
        if self.number is not None:
            return
        self.number = signal.Signals(number)
        # Not `print`: the signal may have come in the midst of one.
        os.write(sys.stderr.fileno(), f"{self.number.name}: ending the fleet\n".encode())
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
