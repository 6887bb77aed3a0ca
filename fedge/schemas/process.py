"""How both programs run and end: one event loop, one way to stop, one place for errors.

SIGTERM and SIGINT cancel the main task, which closes its links and files and ends with status 0.
An error that Fedge raised on purpose becomes one line on stderr and an exit status; anything else
keeps its traceback.

    0  done, or stopped by a signal
    1  it failed: the network, the disk, a plan, a peer
    2  it was asked wrongly: the command line or the configuration
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from fedge.schemas.errors import ConfigError, FedgeError
from fedge.schemas.logs import EventLog

log = EventLog(__name__)

EXIT_FAILED = 1
EXIT_USAGE = 2


@contextlib.contextmanager
def errors_as_exit_status() -> Iterator[None]:
    """Turns a `FedgeError`, alone or in groups of tasks, into a line on stderr and an exit."""
    try:
        yield
    except FedgeError as error:
        _exit_with(error)
    except BaseExceptionGroup as group:
        known, unknown = group.split(FedgeError)
        if known is None or unknown is not None:
            raise
        first: BaseException = known
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        _exit_with(first)


def keep_memory_together() -> None:
    """Has glibc use two allocation arenas, not eight a core: threads then share what they free.

    A coordinator averages on one thread and stores on another; without this, each keeps the copies
    of a model that it once held. Elsewhere than on glibc it does nothing. Call it before the first
    thread.
    """
    arena_max = -8  # M_ARENA_MAX in malloc.h
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(arena_max, 2)


def run_until_stopped(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs `work()` on an event loop until it ends or a signal stops it."""
    asyncio.run(_stoppable(work))


async def _stoppable(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    task = asyncio.ensure_future(work())
    loop = asyncio.get_running_loop()
    stopped = False

    def stop(number: signal.Signals) -> None:
        nonlocal stopped
        stopped = True
        log.info("stopping", signal=number.name)
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    try:
        await task
    except asyncio.CancelledError:
        if not stopped:
            raise


def _exit_with(error: BaseException) -> None:
    print(f"error: {error}", file=sys.stderr)  # noqa: T201 -- the program's last word
    sys.exit(EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED)
