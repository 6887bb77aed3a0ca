"""A device that a test plays by hand: it speaks the protocol, truthfully or not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TypeVar

from fedge.schemas import messages, topics
from fedge.schemas.blobs import BlobRef, chunks_of, describe
from fedge.schemas.link.protocol import Delivery, Link
from fedge.schemas.messages import (
    Assignment,
    Checkin,
    Grant,
    LossCurve,
    Message,
    Offer,
    Receipt,
    RoundAnnouncement,
    RoundPhase,
)
from tests.fleet import Fleet

M = TypeVar("M", bound=Message)


class ScriptedDevice:
    """Sessions at the broker under a device's name, and the messages that came."""

    def __init__(self, here: Fleet, name: str, control: Link, bulk: Link) -> None:
        self.name = name
        self.control = control
        self.bulk = bulk
        self._topics = here.topics
        self._inbox: list[Message] = []

    async def receive(self, kind: type[M], **fields: object) -> M:
        """The next message of that kind whose fields have these values."""
        while True:
            for message in self._inbox:
                if isinstance(message, kind) and all(
                    getattr(message, name) == value for name, value in fields.items()
                ):
                    self._inbox.remove(message)
                    return message
            event = await self.control.next_event()
            if isinstance(event, Delivery):
                self.control.ack(event)
                address = topics.parse(event.topic)
                assert address.message is not None
                self._inbox.append(messages.decode(address.message, event.payload))

    def has_received(self, kind: type[Message]) -> bool:
        """Whether such a message came and was not taken yet."""
        return any(isinstance(message, kind) for message in self._inbox)

    async def send(self, message: Message) -> None:
        await self.send_raw(self._topics.up(self.name, type(message)), messages.encode(message))

    async def send_raw(self, topic: str, payload: bytes) -> None:
        await self.control.publish(topic, payload)

    async def join_round(self) -> Assignment:
        """Checks in for the round that gathers and waits for the assignment."""
        announced = await self.receive(RoundAnnouncement, phase=RoundPhase.GATHERING)
        await self.check_in(announced.round)
        return await self.receive(Assignment)

    async def check_in(self, number: int) -> None:
        """Says that it is ready for that round."""
        await self.send(Checkin(round=number, examples=10, boot=1))

    @staticmethod
    def describe(data: bytes) -> BlobRef:
        """The reference of an update's bytes."""
        return describe(data)

    def offer_of(self, assignment: Assignment, update: BlobRef, **changes: object) -> Offer:
        """What an honest device would say of this update, but for the changes."""
        fields: dict[str, object] = {
            "round": assignment.round,
            "base": assignment.base,
            "update": update,
            "examples": 10,
            "steps": 2,
            "training_s": 0.1,
            "loss": LossCurve(by_epoch=(1.0,), by_batch=(1.0, 1.0)),
            "metrics": {},
        }
        return Offer.model_validate(fields | changes)

    async def upload(self, assignment: Assignment, data: bytes) -> Receipt:
        """Offers and sends an update as it should be sent; returns the receipt."""
        ref = describe(data)
        await self.send(self.offer_of(assignment, ref))
        await self.receive(Grant, sha256=ref.sha256)
        for index, chunk in enumerate(chunks_of(data, ref.chunk_bytes)):
            await self.send_chunk(ref, index, bytes(chunk))
        return await self.receive(Receipt, sha256=ref.sha256)

    async def send_chunk(self, ref: BlobRef, index: int, payload: bytes) -> None:
        await self.bulk.publish(self._topics.upload_chunk(self.name, ref.sha256, index), payload)


@contextlib.asynccontextmanager
async def scripted_device(here: Fleet, name: str) -> AsyncIterator[ScriptedDevice]:
    """A device under that name; its sessions end with the block."""
    control, bulk = here.link(name), here.link(f"{name}-bulk")
    await control.subscribe(*here.topics.device_control(name))
    await control.start()
    await bulk.start()
    try:
        yield ScriptedDevice(here, name, control, bulk)
    finally:
        await asyncio.gather(control.close(), bulk.close())
