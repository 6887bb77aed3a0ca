"""A coordinator that a test plays by hand, for one agent: it says what the test says, when it says.

Its versions are of the hand-made linear plan, so a real agent fetches, activates and trains them.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors.numpy import load

from fedge.edge_agent.agent import EdgeAgent
from fedge.edge_agent.settings import Settings
from fedge.edge_agent.trainer.process import TrainerLimits, TrainerProcess
from fedge.schemas import messages, topics
from fedge.schemas.blobs import BlobRef, ChunkSet, chunks_of, describe
from fedge.schemas.ids import sha256
from fedge.schemas.link.broker import BrokerSettings
from fedge.schemas.link.protocol import Delivery, Link
from fedge.schemas.messages import (
    Assignment,
    Grant,
    Have,
    Message,
    Offer,
    Receipt,
    ReceiptStatus,
    RoundAnnouncement,
    RoundPhase,
    VersionAnnouncement,
)
from fedge.schemas.tensors import encode_tensors
from fedge.schemas.topics import Channel, Topics
from tests.edge_agent.plans import HandMadePlan, examples, initial_weights, linear_plan

M = TypeVar("M", bound=Message)

DEVICE = "d"
CHUNK_BYTES = 1024
LIMIT_S = 60.0


class ScriptedCoordinator:
    """One session at the broker, and what came over it. `plan`: of all its versions."""

    def __init__(self, port: int, folder: Path) -> None:
        self.population = f"t{uuid.uuid4().hex[:12]}"
        self.port = port
        self.folder = folder
        self.topics = Topics(self.population)
        self.link = self.make_link("coordinator")
        self.plan: HandMadePlan = linear_plan()
        self.chunks: dict[str, dict[int, bytes]] = {}
        self._inbox: list[Message] = []

    def make_link(self, name: str) -> Link:
        """Another session at the broker, not started."""
        settings = BrokerSettings(port=self.port, keepalive_s=5)
        return settings.link(f"{self.population}.{name}", random.Random(name))

    # ------------------------------------------------------------ hearing

    async def receive(self, wanted: type[M], /, **fields: object) -> M:
        """The next message of that kind whose fields have these values."""
        async with asyncio.timeout(LIMIT_S):
            while not self.heard(wanted, **fields):
                await self._hear()
        found = self.heard(wanted, **fields)[0]
        self._inbox.remove(found)
        return found

    def heard(self, wanted: type[M], /, **fields: object) -> list[M]:
        """Every such message that came and was not received yet."""
        return [
            message
            for message in self._inbox
            if isinstance(message, wanted)
            and all(getattr(message, name) == value for name, value in fields.items())
        ]

    async def listen(self, seconds: float) -> None:
        """Hears whatever comes for so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    await self._hear()

    async def _hear(self) -> None:
        event = await self.link.next_event()
        if not isinstance(event, Delivery):
            return
        self.link.ack(event)
        address = topics.parse(event.topic)
        if address.channel is Channel.UP_BULK:
            assert address.sha256 is not None
            assert address.chunk is not None
            self.chunks.setdefault(address.sha256, {})[address.chunk] = event.payload
        elif address.message is not None:
            self._inbox.append(messages.decode(address.message, event.payload))

    # ------------------------------------------------------------ saying

    async def tell(self, message: Message) -> None:
        """A message to the device."""
        topic = self.topics.down(DEVICE, type(message))
        await self.link.publish(topic, messages.encode(message))

    async def announce(self, message: Message) -> None:
        """A retained announcement to all."""
        topic = self.topics.announcement(type(message))
        await self.link.publish(topic, messages.encode(message), retain=True)

    def weights(self, number: int) -> dict[str, np.ndarray]:
        """Of version `number`: the plan's first weights, moved a little."""
        weights = dict(initial_weights())
        weights["w"] = (weights["w"] + np.float32(number)).astype(np.float32)
        return weights

    def version(self, number: int) -> tuple[VersionAnnouncement, list[tuple[BlobRef, bytes]]]:
        """A version: what is announced, and its blobs."""
        weights = self.weights(number)
        inputs = load(self.plan.golden)["input"]
        outputs = (inputs * weights["scale"]) @ weights["w"] + weights["b"]
        manifest = self.plan.manifest
        own = [
            (describe(data, CHUNK_BYTES), data)
            for data in (
                manifest.encode(),
                encode_tensors(weights),
                encode_tensors({"output": outputs.astype(np.float32)}),
            )
        ]
        model = self.plan.model(weights)
        announcement = VersionAnnouncement(
            number=number,
            plan=own[0][0],
            weights=own[1][0],
            golden=own[2][0],
            model_sha256=sha256(model),
            model_bytes=len(model),
        )
        # The manifest cuts the plan's blobs as it wants.
        plan = [
            (manifest.graphs.train, self.plan.train),
            (manifest.graphs.eval, self.plan.eval),
            (manifest.graphs.infer, self.plan.infer),
            (manifest.golden, self.plan.golden),
        ]
        return announcement, [*plan, *own]

    async def publish_blobs(self, blobs: list[tuple[BlobRef, bytes]]) -> None:
        """Keeps the chunks of blobs at the broker."""
        for ref, data in blobs:
            for index, chunk in enumerate(chunks_of(data, ref.chunk_bytes)):
                topic = self.topics.chunk(ref.sha256, index)
                await self.link.publish(topic, bytes(chunk), retain=True)

    async def publish_version(self, number: int) -> VersionAnnouncement:
        """Publishes a version's blobs and announces it."""
        announcement, blobs = self.version(number)
        await self.publish_blobs(blobs)
        await self.announce(announcement)
        return announcement

    async def announce_round(
        self,
        number: int,
        base: int,
        phase: RoundPhase = RoundPhase.GATHERING,
        **fields: Any,
    ) -> None:
        """Announces a round."""
        await self.announce(RoundAnnouncement(round=number, base=base, phase=phase, **fields))

    def assignment(self, number: int, base: int, **changes: Any) -> Assignment:
        """Two epochs of small batches, unless changed."""
        fields: dict[str, Any] = {
            "round": number,
            "base": base,
            "plan_sha256": self.plan.manifest.digest,
            "deadline_s": 60,
            "seed": 1,
            "batch_size": 8,
            "learning_rate": 0.01,
            "local_epochs": 2,
        }
        return Assignment.model_validate(fields | changes)

    async def take_upload(self, offer: Offer) -> bytes:
        """Grants an offer and returns the update once it is here; no receipt is sent."""
        ref = offer.update
        none = ChunkSet(ref.chunk_count).encode()
        grant = Grant(round=offer.round, sha256=ref.sha256, window=ref.chunk_count, held=none)
        await self.tell(grant)
        async with asyncio.timeout(LIMIT_S):
            while len(self.chunks.get(ref.sha256, {})) < ref.chunk_count:
                await self._hear()
        held = ChunkSet(ref.chunk_count, range(ref.chunk_count)).encode()
        await self.tell(Have(round=offer.round, sha256=ref.sha256, held=held))
        found = self.chunks[ref.sha256]
        return b"".join(found[index] for index in sorted(found))

    async def send_receipt(
        self, offer: Offer, status: ReceiptStatus = ReceiptStatus.ACCEPTED
    ) -> None:
        """The answer to an offer."""
        await self.tell(Receipt(round=offer.round, sha256=offer.update.sha256, status=status))

    # ------------------------------------------------------------ the agent

    def settings(self, **changes: Any) -> Settings:
        """Of the agent, with 400 examples."""
        path = self.folder / "data.npz"
        if not path.exists():
            x, y = examples(400)
            np.savez(path, x=x, y=y)
        return Settings.model_validate(
            {
                "population": self.population,
                "device": DEVICE,
                "state_dir": self.folder / "state",
                "engine": "onnx",
                "broker": {"port": self.port, "keepalive_s": 5, "reconnect_cap_s": 1},
                "data": {"path": path},
                **changes,
            }
        )


@contextlib.asynccontextmanager
async def scripted_coordinator(port: int, folder: Path) -> AsyncIterator[ScriptedCoordinator]:
    """A coordinator that hears everything from its devices."""
    made = ScriptedCoordinator(port, folder)
    await made.link.subscribe(*made.topics.coordinator_control, *made.topics.coordinator_bulk)
    await made.link.start()
    try:
        yield made
    finally:
        await made.link.close()


@contextlib.asynccontextmanager
async def running_agent(settings: Settings, **extra: Any) -> AsyncIterator[asyncio.Task[None]]:
    """An agent on this loop with its own training process; an error of it fails the test."""
    trainer = TrainerProcess(TrainerLimits(nice=0))
    agent = EdgeAgent(settings, trainer, random.Random(1), **extra)
    task = asyncio.create_task(agent.run(), name="agent")
    try:
        yield task
        assert not task.done(), "the agent ended by itself"
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await trainer.close()
