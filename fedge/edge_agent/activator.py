"""When a fetched version is put into use: soon, and never in the way of training.

A round usually follows a version at once, and the coordinator waits for the training; nobody waits
for the activation. In a quick series of rounds a device has better things to do than to check
versions that are replaced before anybody could ask them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from fedge.schemas.messages import VersionAnnouncement

GRACE_S = 2.0
"""A version is put into use when no newer one has come for so long…"""
LATEST_S = 20.0
"""…and at the latest so long after the first that waits."""


class Activator:
    """Calls `activate` with the newest version, one at a time, while `run` runs."""

    def __init__(
        self,
        activate: Callable[[VersionAnnouncement], Awaitable[None]],
        *,
        grace_s: float = GRACE_S,
        latest_s: float = LATEST_S,
    ) -> None:
        self._activate = activate
        self._grace_s = grace_s
        self._latest_s = latest_s
        self._newest: VersionAnnouncement | None = None
        self._due = asyncio.Event()
        self._not_training = asyncio.Event()
        self._not_training.set()

    def wanted(self, version: VersionAnnouncement) -> None:
        """This version is here and checked nowhere yet."""
        self._newest = version
        self._due.set()

    def training(self, *, under_way: bool) -> None:
        """Training has begun or ended; activation waits for its end."""
        (self._not_training.clear if under_way else self._not_training.set)()

    async def until_not_training(self) -> None:
        """Returns when no training is under way."""
        await self._not_training.wait()

    async def run(self) -> None:
        """Activates what is wanted, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._due.wait()
            latest = loop.time() + self._latest_s
            while self._due.is_set() and loop.time() < latest:
                self._due.clear()
                try:
                    async with asyncio.timeout(min(self._grace_s, latest - loop.time())):
                        await self._due.wait()
                except TimeoutError:
                    break
            await self._not_training.wait()
            self._due.clear()
            version, self._newest = self._newest, None
            if version is not None:
                await self._activate(version)
