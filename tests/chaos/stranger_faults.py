"""When the stranger does what (see `stranger`)."""

from __future__ import annotations

import random

from tests.chaos.fault import Fault, Missed
from tests.chaos.schedule import Aim, Drawn
from tests.chaos.stranger import LIES, Stranger


class Misdeed(Fault):
    """Something that the stranger does."""

    aim = Aim.FLEET

    @property
    def stranger(self) -> Stranger:
        """There is one. Raises `Missed` while it has no connection to the broker."""
        found = self.world.stranger
        if not found.client.connected.is_set():
            raise Missed("the stranger is not connected")
        return found


class Garbage(Misdeed):
    """What nobody can read."""

    name, weight = "stranger_garbage", 2.0

    @staticmethod
    def draw(rng: random.Random) -> Drawn:
        """A few messages."""
        return Drawn(0.0, {"count": rng.randrange(5, 60)})

    async def strike(self) -> None:
        """Says it."""
        await self.stranger.talk_garbage(self.planned.parameters["count"], self.rng)


class Flood(Misdeed):
    """More than anybody reads."""

    name, weight = "stranger_flood", 1.5

    @staticmethod
    def draw(rng: random.Random) -> Drawn:
        """Up to two thousand messages, or a few large ones."""
        payload_bytes = rng.choice([10, 1000, 50_000])
        return Drawn(0.0, {"count": 2000 // (1 + payload_bytes // 2000), "bytes": payload_bytes})

    async def strike(self) -> None:
        """Says it."""
        parameters = self.planned.parameters
        await self.stranger.flood(parameters["count"], parameters["bytes"], self.rng)


class Replay(Misdeed):
    """Old offers, chunks, check-ins, reports and births of the others, under their names."""

    name, weight = "stranger_replay", 4.0

    @staticmethod
    def draw(rng: random.Random) -> Drawn:
        """A few or many."""
        return Drawn(0.0, {"count": rng.randrange(5, 150)})

    async def strike(self) -> None:
        """Says it."""
        await self.stranger.replay(self.planned.parameters["count"], self.rng)


class Impersonation(Misdeed):
    """Offers and check-ins of the others, under its own name."""

    name, weight = "stranger_impersonates", 2.0

    @staticmethod
    def draw(rng: random.Random) -> Drawn:
        """A few."""
        return Drawn(0.0, {"count": rng.randrange(3, 30)})

    async def strike(self) -> None:
        """Says it."""
        await self.stranger.impersonate(self.planned.parameters["count"], self.rng)


class Silence(Misdeed):
    """It checks in, is asked, and is never heard of again."""

    name, weight = "stranger_silent", 2.0

    @staticmethod
    def draw(rng: random.Random) -> Drawn:
        """In the next round."""
        return Drawn(0.0)

    async def strike(self) -> None:
        """Joins."""
        if not await self.stranger.promise_and_be_silent():
            raise Missed("not chosen")


class Lying(Misdeed):
    """A bad update, or a stolen one."""

    name, weight = "stranger_lies", 5.0

    @staticmethod
    def draw(rng: random.Random) -> Drawn:
        """One of its lies."""
        return Drawn(0.0, {"lie": rng.choice(sorted(LIES))})

    async def strike(self) -> None:
        """Joins and lies."""
        if not await self.stranger.lie(self.planned.parameters["lie"], self.rng):
            raise Missed("not chosen")
