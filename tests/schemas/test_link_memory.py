"""The broker in memory: its faults, and that a seed makes a run."""

from __future__ import annotations

import asyncio
import random

from hypothesis import given
from hypothesis import strategies as st

from fedge.schemas.link.memory import Faults, MemoryBroker, MemoryLink
from fedge.schemas.link.protocol import Delivery, LinkDown, LinkEvent, LinkUp, Will

PAYLOADS = [bytes([n]) for n in range(30)]


def taken(link: MemoryLink) -> list[LinkEvent]:
    """What the link holds now."""
    events = list(link._events)
    link._events.clear()
    return events


def payloads(link: MemoryLink) -> list[bytes]:
    """The payloads that the link holds now and, acknowledged, what they made room for."""
    found: list[bytes] = []
    while deliveries := [event for event in taken(link) if isinstance(event, Delivery)]:
        for each in deliveries:
            found.append(each.payload)
            link.ack(each)
    return found


async def pair(broker: MemoryBroker) -> tuple[MemoryLink, MemoryLink]:
    sender, receiver = broker.link("sender"), broker.link("receiver", receive_maximum=8)
    await receiver.subscribe("t")
    await sender.start()
    await receiver.start()
    return sender, receiver


async def run(seed: int, faults: Faults) -> tuple[list[bytes], MemoryBroker]:
    """Thirty publishes through these faults, and all that arrives after enough time."""
    broker = MemoryBroker(random.Random(seed), faults=faults)
    sender, receiver = await pair(broker)
    received = payloads(receiver)
    for payload in PAYLOADS:
        await sender.publish("t", payload)
        broker.advance(0.1)
        received += payloads(receiver)
    broker.advance_until_idle()
    return received + payloads(receiver), broker


probabilities = st.floats(0.0, 1.0)
faults = st.builds(
    Faults,
    drop=probabilities,
    duplicate=probabilities,
    reorder=probabilities,
    delay_s=st.floats(0.0, 5.0),
)


@given(st.integers(0, 2**32), faults)
def test_one_seed_makes_one_run(seed, some):
    first, _ = asyncio.run(run(seed, some))
    second, _ = asyncio.run(run(seed, some))
    assert first == second


@given(st.integers(0, 2**32), faults)
def test_only_what_the_broker_counts_as_dropped_is_missing(seed, some):
    received, broker = asyncio.run(run(seed, some))
    assert set(received) <= set(PAYLOADS)
    assert len(PAYLOADS) - len(set(received)) <= broker.dropped
    if not some.drop:
        assert set(received) == set(PAYLOADS)
    if not some.duplicate:
        assert len(received) == len(PAYLOADS) - broker.dropped
    if not some.reorder and not some.duplicate:
        assert received == sorted(received)


def test_each_fault_does_what_it_says():
    lost, broker = asyncio.run(run(1, Faults(drop=1.0)))
    assert lost == []
    assert broker.dropped == len(PAYLOADS)
    twice, _ = asyncio.run(run(1, Faults(duplicate=1.0)))
    assert twice == sorted(PAYLOADS * 2)
    mixed, _ = asyncio.run(run(1, Faults(reorder=1.0)))
    assert sorted(mixed) == PAYLOADS
    assert mixed != PAYLOADS


def test_what_is_delayed_comes_when_its_time_has_come():
    async def scenario() -> None:
        broker = MemoryBroker(random.Random(1), faults=Faults(delay_s=10.0))
        sender, receiver = await pair(broker)
        await sender.publish("t", b"late")
        assert payloads(receiver) == []
        assert broker.held == 1
        broker.advance(10.0)
        assert payloads(receiver) == [b"late"]

    asyncio.run(scenario())


def test_a_full_queue_loses_what_its_publisher_was_told_is_well():
    async def scenario() -> None:
        broker = MemoryBroker(random.Random(1), max_queued_messages=5)
        sender, receiver = await pair(broker)
        broker.partition("receiver")
        for payload in PAYLOADS:
            await sender.publish("t", payload)
        broker.heal("receiver")
        assert payloads(receiver) == PAYLOADS[:5]
        assert broker.dropped == len(PAYLOADS) - 5

    asyncio.run(scenario())


def test_a_session_taken_over_goes_down_and_tries_again_later():
    async def scenario() -> None:
        broker = MemoryBroker(random.Random(1))
        first = broker.link("twin", will=Will("w", b"dead"))
        await first.start()
        second = broker.link("twin")
        await second.start()
        assert taken(first) == [LinkUp(session_present=False), LinkDown("session taken over")]
        assert taken(second) == [LinkUp(session_present=True)]
        assert broker.retained == {"w": b"dead"}
        await second.close()
        broker.advance(1.0)
        assert taken(first) == [LinkUp(session_present=True)]

    asyncio.run(scenario())


def test_a_killed_broker_publishes_no_will_and_keeps_nothing():
    async def scenario() -> None:
        broker = MemoryBroker(random.Random(1), faults=Faults(delay_s=5.0))
        mortal = broker.link("mortal", will=Will("w", b"dead"))
        await mortal.subscribe("t")
        await mortal.start()
        await mortal.publish("t", b"kept", retain=True)
        broker.kill()
        broker.start()
        broker.advance_until_idle()
        assert broker.retained == {}
        assert [type(event) for event in taken(mortal)] == [LinkUp, LinkDown, LinkUp]

    asyncio.run(scenario())


def test_what_expired_is_not_delivered_to_whoever_comes_back_and_is_retained_no_more():
    async def scenario() -> None:
        broker = MemoryBroker(random.Random(1))
        sender, receiver = await pair(broker)
        broker.partition("receiver")
        await sender.publish("t", b"short", expiry_s=5.0)
        await sender.publish("t", b"long", expiry_s=50.0)
        await sender.publish("t", b"for ever")
        await sender.publish("r", b"retained", retain=True, expiry_s=5.0)
        assert broker.retained == {"r": b"retained"}
        broker.advance(5.0)
        broker.heal("receiver")
        assert payloads(receiver) == [b"long", b"for ever"]
        assert broker.retained == {}

    asyncio.run(scenario())


def test_what_expires_before_it_can_be_sent_is_over_for_its_sender():
    async def scenario() -> None:
        broker = MemoryBroker(random.Random(1))
        sender, receiver = await pair(broker)
        broker.partition("sender")
        late = asyncio.create_task(sender.publish("t", b"late", expiry_s=5.0))
        kept = asyncio.create_task(sender.publish("t", b"kept"))
        await asyncio.sleep(0)
        broker.advance(6.0)
        broker.heal("sender")
        await asyncio.gather(late, kept)
        assert payloads(receiver) == [b"kept"]

    asyncio.run(scenario())
