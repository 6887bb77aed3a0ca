"""When a device says that it is ready: drawn at random, so that a fleet does not come at once.

Pace steering (Bonawitz et al. 2019, section 2.3): a round's announcement says which share of the
devices should check in, and over how long; a `Retry` says how long to stay away. Whether the device
may check in when its moment has come is the machine's decision.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable, Coroutine
from typing import Any

from fedge.edge_agent.commands import CheckIn, Rest
from fedge.edge_agent.events import CheckInDue, Event, RetryDue

SHORTEST_WAIT_S = 1.0
"""Of a device outside the share: time for the coordinator to say that it has enough."""
DEFAULT_JITTER = 0.25
"""Of a rest that came without a spread, so that devices deferred together come back apart."""


def draw(population: str, device: str, round_number: int) -> float:
    """A device's number in a round, uniform in [0, 1): it is in every share above this.

    Drawn by hashing, not from a generator: the draw is the same after a restart or a reconnect, so
    no device gets a second chance, and one that lost its assignment asks for it again. If the
    coordinator raises the share, only the additional devices change their mind.
    """
    digest = hashlib.sha256(f"{population}/{device}/{round_number}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def checkin_delay_s(spread_s: float, *, drawn: bool, rng: random.Random) -> float:
    """Seconds until the check-in: within the spread for the share, in the next one for others."""
    if drawn:
        return rng.uniform(0.0, spread_s)
    wait_s = max(spread_s, SHORTEST_WAIT_S)
    return rng.uniform(wait_s, 2 * wait_s)


def rest_s(rest: Rest, rng: random.Random) -> float:
    """Seconds to stay away."""
    spread_s = rest.spread_s or rest.after_s * DEFAULT_JITTER
    return rest.after_s + rng.uniform(0.0, spread_s)


class Pacing:
    """The timers of one device: one for its check-in, one for its rest.

    `feed` takes the events when they are due, `start` runs a coroutine beside everything else.
    """

    def __init__(
        self,
        population: str,
        device: str,
        rng: random.Random,
        feed: Callable[[Event], None],
        start: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]],
    ) -> None:
        self._population = population
        self._device = device
        self._rng = rng
        self._feed = feed
        self._start = start
        self._check_in: asyncio.Task[None] | None = None
        self._rest: asyncio.Task[None] | None = None
        self._rest_until_s = 0.0

    def check_in(self, command: CheckIn) -> None:
        """Feeds `CheckInDue` at this device's moment; a check-in that still waits is dropped."""
        drawn = draw(self._population, self._device, command.round) < command.share
        delay_s = checkin_delay_s(command.spread_s, drawn=drawn, rng=self._rng)
        _cancel(self._check_in)
        work = self._after(delay_s, CheckInDue(command.round, drawn))
        self._check_in = self._start(work, f"checkin-{command.round}")

    def rest(self, command: Rest) -> None:
        """Feeds `RetryDue` when the rest is over: the longest of all that were asked for."""
        now_s = asyncio.get_running_loop().time()
        self._rest_until_s = max(self._rest_until_s, now_s + rest_s(command, self._rng))
        _cancel(self._rest)
        self._rest = self._start(self._after(self._rest_until_s - now_s, RetryDue()), "rest")

    async def _after(self, delay_s: float, event: Event) -> None:
        await asyncio.sleep(delay_s)
        self._feed(event)


def _cancel(task: asyncio.Task[None] | None) -> None:
    # A timer whose event asks for the next one is the running task itself.
    if task is not None and task is not asyncio.current_task():
        task.cancel()
