"""A world in virtual time: a broker in memory, and processes whose callbacks are interleaved.

One generator decides which process runs its next callback and how long its threads take, one clock
(the broker's) is moved by `pass_time`, and nothing else happens. A process is killed by never being
asked again; the broker notices, and publishes its will.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fedge.schemas.link.memory import MemoryBroker, MemoryLink
from fedge.schemas.link.protocol import Will
from tests.model.virtual_time import VirtualLoop

LATE_S = 1e-6
"""Timers go off so much late, so that whoever looks at the clock finds that it is time."""
MOST_CALLBACKS = 30_000
"""Between two movements of the clock. More is a loop that feeds itself."""


class Killed(SystemExit):
    """kill -9 in the middle of a callback: asyncio lets this one through, and so does our code."""


class Process:
    """One life of a simulated process: its loop, and its sessions at the broker.

    `steps_to_live`: durable steps until it is killed in the middle of one, None: it is not;
    `callbacks_to_live`: the same between two callbacks. `disk_refuses`: whether its disk is full.
    `on_death`: called when it was killed.
    """

    steps_to_live: int | None = None
    callbacks_to_live: int | None = None
    disk_refuses = False

    def __init__(self, world: World, *, offset_s: float = 0.0, work_s: float = 0.0) -> None:
        self._world = world
        rng = world.rng
        self.loop = VirtualLoop(
            world.broker, offset_s=offset_s, work_s=lambda: rng.choice((0.0, 0.0, work_s))
        )
        self.links: list[MemoryLink] = []
        self.alive = True
        self.on_death: Callable[[], None] = lambda: None

    def link(
        self, client_id: str, *, will: Will | None = None, receive_maximum: int = 32
    ) -> MemoryLink:
        """A session of this process."""
        link = self._world.broker.link(client_id, will=will, receive_maximum=receive_maximum)
        self.links.append(link)
        return link

    def spare(self) -> None:
        """Nobody kills it any more."""
        self.steps_to_live = self.callbacks_to_live = None

    def is_due(self) -> bool:
        """Whether it is killed before its next callback."""
        if self.callbacks_to_live is None:
            return False
        self.callbacks_to_live -= 1
        return self.callbacks_to_live < 0


class World:
    """The broker, its clock and all processes. `rng` decides whatever is not decided by a rule."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.broker = MemoryBroker(random.Random(rng.random()))
        self._processes: list[Process] = []
        self._dead: list[Process] = []
        self._cut_off: set[str] = set()
        self.running: Process | None = None
        """Whose code runs now; None while it is the test's."""

    @property
    def now_s(self) -> float:
        """Seconds since the beginning."""
        return self.broker.now_s

    def process(self, *, offset_s: float = 0.0, work_s: float = 0.0) -> Process:
        """A new one. `offset_s`: of its clock; `work_s`: what its threads take now and then."""
        process = Process(self, offset_s=offset_s, work_s=work_s)
        self._processes.append(process)
        return process

    # ------------------------------------------------------------ faults

    def kill(self, process: Process) -> None:
        """kill -9: nothing of it runs any more, and its connections are gone."""
        process.alive = False
        self._processes.remove(process)
        self._dead.append(process)
        for link in process.links:
            self.broker.partition(link.client_id)
            # It will never connect again, but its successor under the same name will.
            self.broker.leave(link)
            if link.client_id not in self._cut_off:
                self.broker.heal(link.client_id)
        process.on_death()

    def cut_off(self, *client_ids: str) -> None:
        """These sessions lose their network."""
        self._cut_off.update(client_ids)
        self.broker.partition(*client_ids)

    def reconnect(self, *client_ids: str) -> None:
        """They have it again, all of them if none is named."""
        healed = client_ids or tuple(sorted(self._cut_off))
        self._cut_off.difference_update(healed)
        self.broker.heal(*healed)

    def end(self) -> None:
        """Lets go of every process."""
        for process in [*self._processes, *self._dead]:
            process.loop.bury()

    @contextmanager
    def as_process(self, process: Process) -> Iterator[None]:
        """What runs here is the process's, and may be its end."""
        self.running = process
        try:
            yield
        except Killed:
            self.kill(process)
        finally:
            self.running = None

    # ------------------------------------------------------------ time

    def settle(self) -> None:
        """Runs callbacks, of all processes in turns, until none is ready now."""
        for _ in range(MOST_CALLBACKS):
            ready = [each for each in self._processes if each.loop.has_work]
            if not ready:
                return
            process = ready[0] if len(ready) == 1 else self.rng.choice(ready)
            with self.as_process(process):
                if process.is_due():
                    raise Killed(0)
                process.loop.run_one()
        raise AssertionError(f"{MOST_CALLBACKS} callbacks, and the clock still stands")

    def pass_time(self, seconds: float) -> None:
        """Moves the clock, from one thing that is due to the next."""
        end_s = self.now_s + seconds
        self.settle()
        while (next_s := min(self._due(), default=end_s)) < end_s:
            self.broker.advance(max(0.0, next_s - self.now_s) + LATE_S)
            self.settle()
        self.broker.advance(max(0.0, end_s - self.now_s))
        self.settle()

    def _due(self) -> Iterator[float]:
        for process in self._processes:
            if process.loop.next_timer_s is not None:
                yield process.loop.next_timer_s
            yield from (link.retry_at_s for link in process.links)
        if self.broker.held:
            # The broker tells how many copies it holds, and not until when.
            yield self.broker._held[0][0]
