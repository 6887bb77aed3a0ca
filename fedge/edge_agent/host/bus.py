"""What the system's services know: logind whether anybody uses the host, NetworkManager who pays.

Asked through `busctl`, which is installed wherever systemd is: a D-Bus library would be one more
dependency on every device for two properties. No service is started by asking.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from fedge.edge_agent.eligibility import Reading
from fedge.edge_agent.host.program import NotRead, answer_of

_LOGIND = (
    *("org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager"),
    *("IdleHint", "IdleSinceHintMonotonic"),
)
_NETWORK_MANAGER = (
    *("org.freedesktop.NetworkManager", "/org/freedesktop/NetworkManager"),
    *("org.freedesktop.NetworkManager", "Metered"),
)
_METERED = {1: True, 2: False, 3: True, 4: False}
"""NMMetered: yes, no, guessed yes, guessed no. 0 is unknown: no active connection, mostly."""


class _Property(BaseModel):
    type: str
    data: Any


_PROPERTY: TypeAdapter[_Property] = TypeAdapter(_Property)


async def idle_reading(monotonic: Callable[[], float] = time.monotonic) -> Reading:
    """For how many seconds no session has been used. `monotonic`: CLOCK_MONOTONIC, as logind's."""
    try:
        idle, since_us = await _properties(_LOGIND)
    except NotRead as error:
        return Reading(None, f"logind: {error}")
    if not isinstance(idle, bool) or not isinstance(since_us, int):
        return Reading(None, "logind gave another answer than was asked for")
    # Nobody has logged in since the start: logind knows no moment, and says 0.
    return Reading(max(monotonic() - since_us / 1e6, 0.0) if idle else 0.0, "logind")


async def metered_reading() -> Reading:
    """Whether the network is metered, as NetworkManager was told or guesses."""
    try:
        (metered,) = await _properties(_NETWORK_MANAGER)
    except NotRead as error:
        return Reading(None, f"NetworkManager: {error}")
    known = _METERED.get(metered) if isinstance(metered, int) else None
    if known is None:
        return Reading(None, f"NetworkManager does not know (Metered is {metered!r})")
    return Reading(known, "NetworkManager")


async def _properties(asked: tuple[str, ...]) -> list[Any]:
    """The values of the properties that `asked` names after service, object and interface."""
    command = ("busctl", "--system", "--json=short", "--auto-start=no", "get-property", *asked)
    lines = (await answer_of(command)).splitlines()
    if len(lines) != len(asked) - 3:
        raise NotRead(f"busctl gave {len(lines)} lines")
    try:
        return [_PROPERTY.validate_json(line).data for line in lines]
    except ValidationError as error:
        raise NotRead("busctl gave no JSON: it is older than systemd 240, perhaps") from error
