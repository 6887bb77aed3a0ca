"""The postbox: bounded, in order, the newest of each kind."""

from __future__ import annotations

import asyncio
import random

from fedge.coordinator.postbox import Postbox
from fedge.schemas import messages, topics
from fedge.schemas.link.memory import MemoryBroker
from fedge.schemas.link.protocol import Delivery
from fedge.schemas.messages import Retry
from fedge.schemas.topics import Topics


def retry(number, after_s=0.0):
    return Retry(round=number, after_s=after_s)


async def delivered(send, *, most=100_000):
    """What a device receives when `send(postbox)` was called before the link was up."""
    broker = MemoryBroker(random.Random(0))
    names = Topics("p")
    device, link = broker.link("device"), broker.link("coordinator")
    await device.subscribe(f"{names.prefix}/dn/+/+")
    await device.start()
    await device.next_event()
    postbox = Postbox(link, names, most=most)
    send(postbox)
    waiting = len(postbox)
    await link.start()
    task = asyncio.create_task(postbox.run())
    found = []
    async with asyncio.timeout(5):
        while len(found) < waiting:
            event = await device.next_event()
            if isinstance(event, Delivery):
                device.ack(event)
                found.append(messages.decode(Retry, event.payload))
                assert topics.parse(event.topic).device is not None
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return postbox, found


def test_of_one_kind_about_one_round_only_the_newest_is_sent():
    def send(postbox):
        for after_s in range(1000):
            postbox.send("a", retry(1, after_s))
        postbox.send("a", retry(2))

    postbox, found = asyncio.run(delivered(send))
    assert [(m.round, m.after_s) for m in found] == [(1, 999.0), (2, 0.0)]
    assert postbox.replaced == 999


def test_messages_go_out_in_order():
    _, found = asyncio.run(
        delivered(lambda postbox: [postbox.send(f"d{n}", retry(n + 1)) for n in range(50)])
    )
    assert [m.round for m in found] == list(range(1, 51))


def test_it_never_holds_more_than_it_may():
    def send(postbox):
        for number in range(1, 101):
            postbox.send("a", retry(number))

    postbox, found = asyncio.run(delivered(send, most=10))
    assert [m.round for m in found] == list(range(91, 101))
    assert postbox.replaced == 90
