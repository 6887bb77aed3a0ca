"""Faults of the network between one program and the broker, and of a broker's word."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from tests.chaos.fault import Fault, Missed
from tests.chaos.proxy import (
    Bandwidth,
    BlackHole,
    Condition,
    Connection,
    Latency,
    Proxy,
    Refuse,
    Stall,
)
from tests.chaos.schedule import Aim, Drawn
from tests.chaos.tampering import Mischief, Rule, Side


class NetworkFault(Fault):
    """A fault of the target's proxy."""

    aim = Aim.PROGRAM

    @property
    def proxy(self) -> Proxy:
        """The target's."""
        return self.world.proxies[self.target]

    async def hold(self, condition: Condition) -> None:
        """The condition holds as long as the fault lasts."""
        with self.proxy.during(condition):
            await self.last()

    async def until_ended(self, connections: Sequence[Connection]) -> None:
        """Waits until all of them have ended, and ends them when the fault's time is over.

        Raises `Missed` if there are none.
        """
        if not connections:
            raise Missed("no connection")
        try:
            async with asyncio.timeout(self.planned.duration_s):
                for each in connections:
                    await each.ended.wait()
        except TimeoutError:
            for each in connections:
                each.abort()


class Slow(NetworkFault):
    """Packets take long."""

    name, weight = "latency", 7.0

    @staticmethod
    def draw(rng: random.Random) -> Drawn:
        """Up to 0.8 s each way."""
        delay_s = round(rng.uniform(0.05, 0.8), 2)
        return Drawn(rng.uniform(0.5, 4), {"delay_s": delay_s, "jitter_s": round(delay_s / 2, 2)})

    async def strike(self) -> None:
        """Holds."""
        await self.hold(Latency(**self.planned.parameters))


class Narrow(NetworkFault):
    """Little fits through."""

    name, weight = "bandwidth", 5.0

    @staticmethod
    def draw(rng: random.Random) -> Drawn:
        """0.5 to 20 KB/s."""
        return Drawn(rng.uniform(0.5, 4), {"bytes_per_s": round(500 * 40 ** rng.random())})

    async def strike(self) -> None:
        """Holds."""
        await self.hold(Bandwidth(**self.planned.parameters))


class Silent(NetworkFault):
    """What is sent vanishes; the connections stay, and are reset in the end."""

    name, weight = "black_hole", 6.0

    @staticmethod
    def draw(rng: random.Random) -> Drawn:
        """Sometimes longer than the keep-alive."""
        return Drawn(rng.choice([rng.uniform(0.3, 3), rng.uniform(3, 10)]))

    async def strike(self) -> None:
        """Holds."""
        await self.hold(BlackHole())


class Stalled(NetworkFault):
    """Nothing moves for a while, and then goes on."""

    name, weight = "stall", 5.0

    @staticmethod
    def draw(rng: random.Random) -> Drawn:
        """Sometimes longer than the keep-alive."""
        return Drawn(rng.choice([rng.uniform(0.3, 3), rng.uniform(3, 10)]))

    async def strike(self) -> None:
        """Holds."""
        await self.hold(Stall())


class Reset(NetworkFault):
    """All connections end at once."""

    name, weight = "reset", 7.0

    @staticmethod
    def draw(rng: random.Random) -> Drawn:
        """At once."""
        return Drawn(0.0)

    async def strike(self) -> None:
        """Resets."""
        if not self.proxy.reset():
            raise Missed("no connection")


class Cut(NetworkFault):
    """The connections end in the midst of what is sent; the idle ones after a while."""

    name, weight = "cut", 9.0

    @staticmethod
    def draw(rng: random.Random) -> Drawn:
        """1 to about 6,000 bytes later."""
        side = rng.choice(list(Side)).value
        return Drawn(10.0, {"side": side, "after_bytes": round(6000 ** rng.random())})

    async def strike(self) -> None:
        """Arms the cut, and waits for it."""
        parameters = self.planned.parameters
        armed = self.proxy.cut_after(Side(parameters["side"]), parameters["after_bytes"])
        await self.until_ended(armed)


class Refused(NetworkFault):
    """The broker's port is closed."""

    name, weight = "refuse", 5.0

    @staticmethod
    def draw(rng: random.Random) -> Drawn:
        """A few seconds."""
        return Drawn(rng.uniform(0.3, 4))

    async def strike(self) -> None:
        """Holds."""
        await self.hold(Refuse())


class HalfOpen(NetworkFault):
    """One end is gone, and the other does not know."""

    name, weight = "half_open", 6.0

    @staticmethod
    def draw(rng: random.Random) -> Drawn:
        """Until somebody's keep-alive finds out."""
        return Drawn(20.0, {"lost": rng.choice(list(Side)).value})

    async def strike(self) -> None:
        """Loses one leg of each connection, and waits for the other to be given up."""
        await self.until_ended(self.proxy.half_open(Side(self.planned.parameters["lost"])))


class BrokenWord(NetworkFault):
    """A broker that treats messages as it should not. `mischief`: how."""

    mischief: Mischief
    kinds = (
        ("/dn/", "/up/"), ("/upb/", "/blob/"), ("/all/", "/state/"), ("/receipt",), ("/offer",),
        ("/assignment",), ("/grant", "/have"), (),
    )  # fmt: skip

    @classmethod
    def draw(cls, rng: random.Random) -> Drawn:  # type: ignore[override] # it needs its kinds
        """Some or all messages of some kinds, in one direction."""
        return Drawn(
            rng.uniform(0.5, 5),
            {
                "side": rng.choice(list(Side)).value,
                "share": rng.choice([0.2, 0.5, 1.0]),
                "kinds": rng.choice(cls.kinds),
                "delay_s": round(rng.uniform(0.05, 3), 2),
            },
        )

    async def strike(self) -> None:
        """Holds."""
        parameters = self.planned.parameters
        await self.hold(
            Rule(
                self.mischief,
                Side(parameters["side"]),
                parameters["share"],
                self.rng,
                parameters["delay_s"],
                tuple(parameters["kinds"]),
            )
        )


class Swallowed(BrokenWord):
    """Acknowledged and lost."""

    name, weight, mischief = "publish_swallowed", 9.0, Mischief.SWALLOW


class Doubled(BrokenWord):
    """Delivered twice."""

    name, weight, mischief = "publish_doubled", 5.0, Mischief.DOUBLE


class Belated(BrokenWord):
    """Delivered after what came later."""

    name, weight, mischief = "publish_delayed", 5.0, Mischief.DELAY
