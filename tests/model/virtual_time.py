"""Event loops without time: real coroutines, run one callback at a time, on a clock that we move.

A `VirtualLoop` is an asyncio event loop of one simulated process. It has no sockets and no threads:
what is given to an executor is done later, in order, by `do_work`, and its answer arrives later
still. So a seeded driver can put any callback of any process between the two, or end the process
there: a loop that is never asked again is a process that was killed, and none of its `finally`
blocks ran. The idea is FoundationDB's (Zhou et al. 2021, "FoundationDB: A Distributed Unbundled
Transactional Key Value Store", section 4): the code under test is the real one, and everything
around it is decided by one generator.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
import warnings
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Clock:
    """The time of all processes of one world, in seconds."""

    now_s: float = 0.0


@dataclass
class _Lane:
    """What was given to one thread. `busy`: an answer is on its way, the next one waits."""

    waiting: deque[tuple[asyncio.Future[Any], Callable[[], Any]]] = field(default_factory=deque)
    busy: bool = False


class VirtualLoop(asyncio.AbstractEventLoop):
    """See above. `offset_s`: what this process's monotonic clock shows at the world's 0.

    `work_s`: how long the next piece of work for a thread takes, asked once for each.
    """

    def __init__(
        self, clock: Clock, *, offset_s: float = 0.0, work_s: Callable[[], float] = lambda: 0.0
    ) -> None:
        self._clock = clock
        self._offset_s = offset_s
        self._work_s = work_s
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._lanes: dict[object, _Lane] = {}
        self._numbers = itertools.count()
        self._tasks: list[asyncio.Task[Any]] = []
        self._prune_above = 64
        self._unhandled: list[BaseException] = []

    # ------------------------------------------------------------------ the driver's side

    @property
    def has_work(self) -> bool:
        """Whether `run_one` would run something."""
        self._wake_timers()
        return bool(self._ready)

    def run_one(self) -> None:
        """Runs the callback that has waited longest. Raises what it raised, if nobody else saw."""
        self._wake_timers()
        handle = self._ready.popleft()
        if not handle.cancelled():
            with self.running():
                handle._run()
        if self._unhandled:
            raise self._unhandled.pop()

    def run_all(self) -> None:
        """Runs callbacks until none is ready now."""
        while self.has_work:
            self.run_one()

    @property
    def next_timer_s(self) -> float | None:
        """When a timer is due, on the world's clock; None if there is none."""
        while self._timers and self._timers[0][2].cancelled():
            heapq.heappop(self._timers)
        return self._timers[0][0] - self._offset_s if self._timers else None

    def begin(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """The task of a coroutine, from outside of the loop."""
        with self.running():
            return self.create_task(work)

    def finish(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of a coroutine that needs no time."""
        task = self.begin(work)
        self.run_all()
        return task.result()

    def bury(self) -> None:
        """Ends the tasks of a process that was killed, after all: nobody watches any more.

        Python would otherwise complain about each of them when it collects the garbage.
        """
        with warnings.catch_warnings():
            # What it still wanted to begin is never begun.
            warnings.simplefilter("ignore", RuntimeWarning)
            self._cancel_all()
        self._unhandled.clear()
        # What still holds on would wait for ever; it is only told that nobody asks.
        for task in self._tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined] -- asyncio's own flag

    def _cancel_all(self) -> None:
        for _ in range(20):
            alive = [task for task in self._tasks if not task.done()]
            if not alive:
                return
            for task in alive:
                task.cancel()
            for lane in self._lanes.values():
                lane.waiting.clear()
            while self._ready:
                handle = self._ready.popleft()
                # A task that ended with an exit lets it through to whoever waits for that task.
                with self.running(), suppress(SystemExit):
                    if not handle.cancelled():
                        handle._run()

    @contextmanager
    def running(self) -> Iterator[None]:
        """What runs here finds this loop when it asks for the running one."""
        outer = asyncio._get_running_loop()
        asyncio._set_running_loop(None)
        asyncio._set_running_loop(self)
        try:
            yield
        finally:
            asyncio._set_running_loop(outer)

    def _wake_timers(self) -> None:
        while self._timers and self._timers[0][0] <= self.time():
            _, _, handle = heapq.heappop(self._timers)
            handle._scheduled = False  # type: ignore[attr-defined] -- as asyncio's own loops do
            if not handle.cancelled():
                self._ready.append(handle)

    # ------------------------------------------------------------------ asyncio's side

    def time(self) -> float:
        """This process's monotonic clock."""
        return self._clock.now_s + self._offset_s

    def call_soon(
        self,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        """Runs it after what is ready now."""
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_soon_threadsafe(
        self,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        """There are no threads."""
        return self.call_soon(callback, *args, context=context)

    def call_later(
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """Runs it when the clock has moved so far."""
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """Runs it when the clock shows `when`."""
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), handle))
        handle._scheduled = True  # type: ignore[attr-defined] -- as asyncio's own loops do
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is skipped when its time comes."""

    def create_future(self) -> asyncio.Future[Any]:
        """A future of this loop."""
        return asyncio.Future(loop=self)

    def create_task(
        self, coro: Any, *, name: str | None = None, context: contextvars.Context | None = None
    ) -> asyncio.Task[Any]:
        """A task of this loop."""
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name, context=context)
        self._tasks.append(task)
        if len(self._tasks) > self._prune_above:
            self._tasks = [each for each in self._tasks if not each.done()]
            self._prune_above = 64 + 2 * len(self._tasks)
        return task

    def run_in_executor(  # type: ignore[override] -- the base class is typed for *Ts
        self, executor: Executor | None, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """Each executor is one thread: it does one thing after the other, each in its time."""
        future = self.create_future()
        # Without an executor, as of `to_thread`, there are as many threads as one needs.
        lane = self._lanes.setdefault(executor or future, _Lane())
        lane.waiting.append((future, lambda: func(*args)))
        self._next_work(lane)
        return future

    def _next_work(self, lane: _Lane) -> None:
        if lane.busy or not lane.waiting:
            return
        lane.busy = True
        self.call_later(self._work_s(), self._do_work, lane)

    def _do_work(self, lane: _Lane) -> None:
        future, work = lane.waiting.popleft()
        error: BaseException | None = None
        result: Any = None
        try:
            # As a thread pool does: what was cancelled before its turn is never begun.
            result = None if future.cancelled() else work()
        except Exception as raised:
            error = raised
        # The work is done, and its process does not know it yet.
        self.call_later(self._work_s(), self._tell, lane, future, result, error)

    def _tell(
        self, lane: _Lane, future: asyncio.Future[Any], result: Any, error: BaseException | None
    ) -> None:
        lane.busy = False
        if not future.cancelled():
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
        self._next_work(lane)

    def get_debug(self) -> bool:
        """Never: it would look at the real clock."""
        return False

    def is_running(self) -> bool:
        """Always, as far as its callbacks can see."""
        return True

    def is_closed(self) -> bool:
        """Never."""
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """What asyncio would only log is a failure here."""
        error = context.get("exception")
        if isinstance(error, BaseException):
            self._unhandled.append(error)
