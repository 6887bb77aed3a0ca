"""What rounds need of the service around them: somebody to tell, a clock, and that is all."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from fedge.schemas.messages import Message


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the parts that carry out rounds ask of the service around them.

    `tell`: sends a message to one device, soon. `start`: runs work beside everything else.
    `publish`: has the newest version and the round announced, soon; a next round is opened then.
    `publish_again`: the same, also what was announced before and may have been lost.
    `wake`: the time of the next deadline may have changed. `online`: the devices that are
    connected now. `all_known`: whether those are all, as far as anybody can know. `clock`:
    monotonic seconds; `wall_clock`: seconds since the epoch.
    """

    tell: Callable[[str, Message], None]
    start: Callable[[Coroutine[Any, Any, Any], str], None]
    publish: Callable[[], None]
    publish_again: Callable[[], None]
    wake: Callable[[], None]
    online: Callable[[], frozenset[str]]
    all_known: Callable[[], bool]
    clock: Callable[[], float]
    wall_clock: Callable[[], float]
