"""That a device is there, and its boot number: which of its lives said so.

A birth is published when the agent connects, a death when it ends; the broker publishes the death
of an agent that cannot. A death may come late, so each carries the number of its life, and one of
an earlier life is ignored. That number must rise with each start, also when the state is lost.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from fedge import __version__
from fedge.edge_agent.durable import replace_file
from fedge.edge_agent.state import AgentState
from fedge.schemas import messages
from fedge.schemas.errors import LinkError
from fedge.schemas.link.protocol import Link, Will
from fedge.schemas.logs import EventLog
from fedge.schemas.topics import Topics

log = EventLog(__name__)

LATEST_CLOCK_S = 2**36
"""A clock beyond this (the year 4147) is wrong, and would leave few numbers to count on."""
GOODBYE_LIMIT_S = 2.0


def next_boot(memory: AgentState, copy: Path, clock_s: float) -> int:
    """The boot number of this start, durable: above every one that this device has used.

    `copy`: a file with the number once more. `clock_s`: the wall clock, seconds since the epoch.
    Raises `StoreError`.

    The state file has the last number, and so has its copy: one of them may be damaged or begun
    anew. If both are gone (a new SD card), only the clock can say a number above the last one:
    numbers are seconds since the epoch or, where that is not above the last, one more than it. So
    a clock that is wrong (a Raspberry Pi without a battery starts in 1970, or in 2100) never takes
    the number back: it only counts where nothing else is known, and a later start with the right
    time leaves a number that was too low behind. An agent starts less than once a second, so the
    clock stays ahead of the count.
    """
    stored, copied = memory.boot(), _read(copy)
    if copied > stored:
        log.error("agent_state_lost", path=str(copy), boot=copied, known=stored)
    clock = int(clock_s) if 0 <= clock_s <= LATEST_CLOCK_S else 0
    boot = max(stored + 1, copied + 1, clock)
    replace_file(copy, f"{boot}\n".encode())
    memory.keep_boot(boot)
    return boot


def _read(copy: Path) -> int:
    try:
        return int(copy.read_bytes()[:20])
    except (OSError, ValueError):
        # Never written yet, or damaged: the state file has it.
        return 0


class Presence:
    """The presence of one device over its control link, in the life `boot`."""

    def __init__(self, topics: Topics, device: str, boot: int) -> None:
        self._topic = topics.presence(device)
        self._device = device
        self.boot = boot

    @property
    def will(self) -> Will:
        """The death that the broker publishes for us."""
        return Will(self._topic, messages.encode(self._death()))

    async def announce_birth(self, link: Link) -> None:
        """Says that we are here. Raises `LinkError`."""
        birth = messages.Presence(boot=self.boot, online=True, agent_version=__version__)
        await link.publish(self._topic, messages.encode(birth), retain=True)

    async def say_goodbye(self, link: Link) -> None:
        """Says that we go, if the broker can be told now: a will is for those who cannot."""
        if not link.connected:
            return
        try:
            async with asyncio.timeout(GOODBYE_LIMIT_S):
                await link.publish(self._topic, messages.encode(self._death()), retain=True)
        except (LinkError, TimeoutError) as error:
            log.warning("goodbye_not_sent", device=self._device, reason=str(error))

    def _death(self) -> messages.Presence:
        return messages.Presence(boot=self.boot, online=False)
