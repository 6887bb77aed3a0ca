"""The malicious device: it has a name of its own, a connection of its own, and no manners.

It floods, lies, falls silent in the midst of a round, and says again what others said. What it
repeats under other names is what a late or doubled message would be. It never writes what others
would believe to be the coordinator's: a broker's access rules keep devices from that.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Callable

import numpy as np
import safetensors.numpy

from fedge.schemas import messages
from fedge.schemas.blobs import BlobRef, chunks_of, describe
from tests.chaos.client import BareClient
from tests.chaos.evidence import Evidence, kind_of
from tests.chaos.mqtt_wire import Publish

NAME = "stranger"
CHUNK_BYTES = 1024
PATIENCE_S, ANSWER_S = 4.0, 0.7
CLAIMED_EXAMPLES = 50

READ_KINDS = ("offer", "checkin", "need", "report")

Lie = Callable[[bytes, random.Random], bytes]


def _with_nan(update: bytes, rng: random.Random) -> bytes:
    return _changed(update, rng, float("nan"))


def _with_infinity(update: bytes, rng: random.Random) -> bytes:
    return _changed(update, rng, float("inf"))


def _absurd(update: bytes, rng: random.Random) -> bytes:
    return _changed(update, rng, 1e30)


def _changed(update: bytes, rng: random.Random, value: float) -> bytes:
    tensors = {name: np.array(each) for name, each in safetensors.numpy.load(update).items()}
    name = rng.choice(sorted(tensors))
    tensors[name].reshape(-1)[rng.randrange(tensors[name].size)] = value
    return safetensors.numpy.save(tensors)


def _renamed(update: bytes, rng: random.Random) -> bytes:
    tensors = safetensors.numpy.load(update)
    tensors["stranger"] = tensors.pop(rng.choice(sorted(tensors)))
    return safetensors.numpy.save(tensors)


LIES: dict[str, Lie] = {
    "nan": _with_nan,
    "infinity": _with_infinity,
    "absurd": _absurd,
    "renamed": _renamed,
    "garbage": lambda update, rng: rng.randbytes(len(update)),
    "truncated": lambda update, rng: update[: rng.randrange(1, len(update))],
    "wrong_chunks": lambda update, _rng: update,
    "stolen": lambda update, _rng: update,
}
"""What it sends for an update. A stolen one is another device's, and valid."""


class Stranger:
    """One at the broker on `port`; somebody has to run its `client`."""

    def __init__(self, population: str, port: int, evidence: Evidence) -> None:
        self.population = population
        self.evidence = evidence
        filters = (f"fedge/1/{population}/all/+", f"fedge/1/{population}/dn/{NAME}/+")
        self.client = BareClient(port, NAME, filters, self._heard)
        self._inbox: dict[str, asyncio.Queue[bytes]] = {}
        self._round: dict[str, object] = {}
        self._announced = asyncio.Event()

    def _heard(self, message: Publish) -> None:
        kind, device = kind_of(message.topic)
        if device is None:
            if kind == "round" and message.payload:
                self._round = json.loads(message.payload)
                self._announced.set()
            return
        inbox = self._inbox.setdefault(kind, asyncio.Queue(100))
        if not inbox.full():
            inbox.put_nowait(message.payload)

    # ------------------------------------------------------------ misdeeds

    async def talk_garbage(self, count: int, rng: random.Random) -> None:
        """Messages that nobody can read, on topics that are read and on others."""
        for _ in range(count):
            topic = rng.choice(
                [
                    *(self._up(kind) for kind in (*READ_KINDS, "nonsense")),
                    f"fedge/1/{self.population}/upb/{NAME}/{'a' * 64}/{rng.choice([0, 1, 99999])}",
                    f"fedge/1/{self.population}/upb/{NAME}/{'z' * 64}/0",
                    f"fedge/1/{self.population}/state/{NAME}",
                ]
            )
            await self.client.say(topic, _garbage(rng), retain=rng.random() < 0.1)

    async def flood(self, count: int, payload_bytes: int, rng: random.Random) -> None:
        """As much as the broker takes."""
        topics = [self._up("offer"), self._up("report"), self._chunk_topic("b" * 64, 0)]
        for _ in range(count):
            await self.client.say(rng.choice(topics), rng.randbytes(payload_bytes))

    async def replay(self, count: int, rng: random.Random) -> None:
        """What devices said before, again, in any order, as late deliveries would be."""
        said = [
            each
            for kind, recorded in sorted(self.evidence.recorded.items())
            for each in recorded
            if kind != "presence" or b'"online":false' not in each[1]
        ]
        for _ in range(min(count, len(said))):
            topic, payload = rng.choice(said)
            await self.client.say(topic, payload)

    async def impersonate(self, count: int, rng: random.Random) -> None:
        """What other devices said, under its own name."""
        said = [each for kind in ("offer", "checkin") for each in self.evidence.recorded[kind]]
        for _ in range(min(count, len(said))):
            topic, payload = rng.choice(said)
            kind, _device = kind_of(topic)
            if kind == "offer":
                self.evidence.note_offer(NAME, payload)
            await self.client.say(self._up(kind), payload)

    async def promise_and_be_silent(self) -> bool:
        """Checks in for the round that gathers and does nothing; whether it was chosen."""
        return await self._join() is not None

    async def lie(self, lie: str, rng: random.Random) -> bool:
        """Takes part in a round with a bad update; whether it was chosen."""
        assignment = await self._join()
        others = sorted(
            digest
            for (device, _), digests in self.evidence.made.items()
            for digest in digests
            if device != NAME
        )
        if assignment is None or not others:
            return False
        honest = self.evidence.updates[rng.choice(others)]
        data = LIES[lie](honest, rng)
        ref = describe(data, CHUNK_BYTES)
        offer = messages.Offer(
            round=assignment.round,
            base=assignment.base,
            update=ref,
            examples=CLAIMED_EXAMPLES,
            steps=1,
            training_s=0.1,
            loss=messages.LossCurve(by_epoch=(1.0,)),
            metrics={},
        )
        payload = messages.encode(offer)
        self.evidence.keep_update(NAME, assignment.round, data)
        self.evidence.note_offer(NAME, payload)
        await self.client.say(self._up("offer"), payload)
        if await self._next("grant") is not None:
            await self._send_chunks(ref, data, spoil=lie == "wrong_chunks")
            await self._next("receipt")
        return True

    # ------------------------------------------------------------ the protocol

    async def _join(self) -> messages.Assignment | None:
        """Its assignment in one of the next rounds, None if it was not chosen in any."""
        self._inbox.pop("assignment", None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    await self._announced.wait()
                    self._announced.clear()
                    number = int(str(self._round["round"]))
                    checkin = messages.Checkin(round=number, examples=CLAIMED_EXAMPLES, boot=1)
                    await self.client.say(self._up("checkin"), messages.encode(checkin))
                    payload = await self._next("assignment", ANSWER_S)
                    if payload is not None:
                        return messages.decode(messages.Assignment, payload)
        return None

    async def _next(self, kind: str, within_s: float = PATIENCE_S) -> bytes | None:
        inbox = self._inbox.setdefault(kind, asyncio.Queue(100))
        try:
            async with asyncio.timeout(within_s):
                return await inbox.get()
        except TimeoutError:
            return None

    async def _send_chunks(self, ref: BlobRef, data: bytes, *, spoil: bool) -> None:
        for index, chunk in enumerate(chunks_of(data, ref.chunk_bytes)):
            payload = bytes(len(chunk)) if spoil else bytes(chunk)
            await self.client.say(self._chunk_topic(ref.sha256, index), payload)

    def _up(self, kind: str) -> str:
        return f"fedge/1/{self.population}/up/{NAME}/{kind}"

    def _chunk_topic(self, sha256: str, index: int) -> str:
        return f"fedge/1/{self.population}/upb/{NAME}/{sha256}/{index}"


def _garbage(rng: random.Random) -> bytes:
    return rng.choice(
        [
            b"",
            b"{}",
            b"null",
            b"[" * 5000,
            b'{"v":1,"round":1e999}',
            b'{"v":1,"round":-1,"base":0}',
            b"\xff\xfe" * 30,
            rng.randbytes(rng.randrange(1, 2000)),
            b'{"v":1,"id":"0123456789abcdef","ts":1,"round":1,"examples":99999999999999999999,"boot":0}',
        ]
    )
