"""What every `Link` promises, over the broker in memory and over real ones."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable

import pytest

from fedge.schemas.errors import LinkClosed, PayloadTooLarge
from fedge.schemas.link.paho import MqttProtocol
from fedge.schemas.link.protocol import Delivery, Link, LinkDown, LinkEvent, LinkUp, Will
from tests.brokers import MOSQUITTO, BrokerProcess
from tests.schemas.link_benches import (
    PAYLOAD_LIMIT_BYTES,
    Bench,
    MemoryBench,
    PahoBench,
    make_broker,
)

LIMIT_S = 20.0
"""No step of a test may take longer; nothing is concluded from how long it took."""
QUIET_S = 0.3
"""How long silence must last to be taken for silence."""

KINDS = ["memory", "mosquitto-5", "mosquitto-3.1.1", "amqtt-3.1.1"]
_numbers = itertools.count()

Scenario = Callable[[Bench], Awaitable[None]]


@pytest.fixture(scope="module")
def brokers(tmp_path_factory: pytest.TempPathFactory):
    """Running brokers by kind; amqtt takes a second to start, so it serves the whole module."""
    running: dict[str, BrokerProcess] = {}

    def get(kind: str, *, limited: bool) -> BrokerProcess:
        name = f"{kind}-limited" if limited else kind
        if name not in running:
            running[name] = make_broker(kind, tmp_path_factory.mktemp(name), limited=limited)
            running[name].start()
        return running[name]

    yield get
    for broker in running.values():
        broker.kill()


@pytest.fixture(params=KINDS)
def play(request: pytest.FixtureRequest, brokers):
    """Runs a scenario on the bench of this kind and closes what it opened."""

    def run(scenario: Scenario, *, limited: bool = False, needs: str = "", why: str = "") -> None:
        kind, _, protocol = request.param.partition("-")
        if kind == "mosquitto" and MOSQUITTO is None:
            pytest.skip("mosquitto is not installed")

        async def on_bench() -> None:
            bench: Bench
            if kind == "memory":
                bench = MemoryBench(limited=limited)
            else:
                broker = brokers(kind, limited=limited)
                bench = PahoBench(broker, MqttProtocol(protocol), limited=limited)
            if needs and not getattr(bench, needs):
                pytest.skip(f"{kind}: {why}")
            try:
                async with asyncio.timeout(3 * LIMIT_S):
                    await scenario(bench)
            finally:
                await bench.close()

        asyncio.run(on_bench())

    return run


def unique(word: str) -> str:
    """A client id or topic that no other test uses: a broker may serve many."""
    return f"{word}-{next(_numbers)}"


async def event(link: Link) -> LinkEvent:
    async with asyncio.timeout(LIMIT_S):
        return await link.next_event()


async def delivery(link: Link) -> Delivery:
    """The next delivery, past news of the connection."""
    while True:
        found = await event(link)
        if isinstance(found, Delivery):
            return found


async def up(link: Link) -> LinkUp:
    """The next LinkUp, past everything else."""
    while True:
        found = await event(link)
        if isinstance(found, LinkUp):
            return found


async def down(link: Link) -> LinkDown:
    while True:
        found = await event(link)
        if isinstance(found, LinkDown):
            return found


async def next_within(link: Link, limit_s: float) -> LinkEvent | None:
    try:
        async with asyncio.timeout(limit_s):
            return await link.next_event()
    except TimeoutError:
        return None


async def silence(link: Link) -> None:
    assert await next_within(link, QUIET_S) is None


async def started(bench: Bench, *filters: str, **extra) -> Link:
    link = await bench.link(unique("client"), **extra)
    await link.subscribe(*filters)
    await link.start()
    assert await up(link) == LinkUp(session_present=False)
    assert link.connected
    return link


def test_what_is_published_arrives_at_subscribers_and_at_nobody_else(play):
    async def scenario(bench: Bench) -> None:
        topic = unique("t")
        receiver, other = await started(bench, topic), await started(bench, unique("t"))
        sender = await started(bench)
        await sender.publish(topic, b"\x00\xff payload")
        found = await delivery(receiver)
        assert (found.topic, found.payload, found.retained) == (topic, b"\x00\xff payload", False)
        receiver.ack(found)
        receiver.ack(found)  # harmless
        await silence(other)
        await silence(sender)

    play(scenario)


def test_deliveries_keep_the_order_of_publishes(play):
    async def scenario(bench: Bench) -> None:
        topic = unique("t")
        receiver, sender = await started(bench, topic), await started(bench)
        sent = [bytes([n]) for n in range(60)]
        # All are asked for at once: more than may be in flight, so most of them wait.
        publishes = asyncio.gather(*(sender.publish(topic, each) for each in sent))
        received = []
        while len(received) < len(sent):
            found = await delivery(receiver)
            receiver.ack(found)
            received.append(found.payload)
        await publishes
        assert received == sent

    play(scenario)


def test_a_retained_message_comes_on_subscribing_and_an_empty_one_clears_it(play):
    async def scenario(bench: Bench) -> None:
        topic = unique("t")
        sender = await started(bench)
        await sender.publish(topic, b"old", retain=True)
        await sender.publish(topic, b"new", retain=True)
        receiver = await started(bench)
        await receiver.subscribe(topic)
        found = await delivery(receiver)
        assert (found.payload, found.retained) == (b"new", True)
        receiver.ack(found)
        await sender.publish(topic, b"", retain=True)
        await silence(await started(bench, topic))

    play(scenario)


def test_wildcards_cover_one_level_or_all_below(play):
    async def scenario(bench: Bench) -> None:
        base = unique("t")
        one, below = await started(bench, f"{base}/+/x"), await started(bench, f"{base}/#")
        sender = await started(bench)
        for topic in (f"{base}/a/x", f"{base}/a/y", f"{base}/a/x/deeper", base):
            await sender.publish(topic, topic.encode())
        assert (await delivery(one)).topic == f"{base}/a/x"
        await silence(one)
        topics = [(await delivery(below)).topic for _ in range(4)]
        assert topics == [f"{base}/a/x", f"{base}/a/y", f"{base}/a/x/deeper", base]

    play(scenario)


def test_after_unsubscribing_nothing_comes(play):
    async def scenario(bench: Bench) -> None:
        topic, kept = unique("t"), unique("t")
        receiver, sender = await started(bench, topic, kept), await started(bench)
        await receiver.unsubscribe(topic)
        await sender.publish(topic, b"unwanted")
        await sender.publish(kept, b"wanted")
        assert (await delivery(receiver)).payload == b"wanted"

    play(scenario)


def test_what_only_an_earlier_process_asked_for_is_dropped(play):
    async def scenario(bench: Bench) -> None:
        old, new, client_id = unique("t"), unique("t"), unique("client")
        before = await bench.link(client_id)
        await before.subscribe(old)
        await before.start()
        await up(before)
        await before.close()
        sender = await started(bench)
        # More than may be unacknowledged: the link has to acknowledge what it drops.
        for _ in range(40):
            await sender.publish(old, b"stale", retain=True)
        after = await bench.link(client_id)
        await after.subscribe(new)
        await after.start()
        await up(after)
        await sender.publish(new, b"asked for")
        assert (await delivery(after)).payload == b"asked for"

    play(scenario)


def test_a_session_gets_what_was_published_while_its_client_was_cut_off(play):
    async def scenario(bench: Bench) -> None:
        topic, client_id = unique("t"), unique("client")
        receiver = await bench.link(client_id)
        await receiver.subscribe(topic)
        await receiver.start()
        await up(receiver)
        sender = await started(bench)
        await bench.cut(client_id)
        await down(receiver)
        for n in range(3):
            await sender.publish(topic, bytes([n]))
        await bench.mend(client_id)
        assert (await up(receiver)).session_present
        assert [(await delivery(receiver)).payload for _ in range(3)] == [b"\0", b"\1", b"\2"]

    play(
        scenario, needs="queues_for_absent", why="keeps nothing for anonymous clients that are away"
    )


def test_what_was_not_acknowledged_comes_again_after_a_reconnect(play):
    async def scenario(bench: Bench) -> None:
        topic, client_id = unique("t"), unique("client")
        receiver = await bench.link(client_id)
        await receiver.subscribe(topic)
        await receiver.start()
        sender = await started(bench)
        await up(receiver)
        for payload in (b"acknowledged", b"not acknowledged"):
            await sender.publish(topic, payload)
        first, second = await delivery(receiver), await delivery(receiver)
        receiver.ack(first)
        # A message after the acknowledgement shows that the broker has seen it.
        await receiver.publish(unique("t"), b"")
        await bench.cut(client_id)
        await down(receiver)
        await bench.mend(client_id)
        await up(receiver)
        again = await delivery(receiver)
        assert again.payload == b"not acknowledged"
        receiver.ack(second)  # of the old connection: too late, harmless
        receiver.ack(again)
        await silence(receiver)

    play(scenario, needs="delivers_again", why="forgets what was not acknowledged")


def test_a_session_survives_its_process(play):
    async def scenario(bench: Bench) -> None:
        topic, client_id = unique("t"), unique("client")
        before = await bench.link(client_id)
        await before.subscribe(topic)
        await before.start()
        await up(before)
        await before.close()
        sender = await started(bench)
        await sender.publish(topic, b"meanwhile")
        after = await bench.link(client_id)
        await after.subscribe(topic)
        await after.start()
        assert (await event(after)) == LinkUp(session_present=True)
        assert (await delivery(after)).payload == b"meanwhile"

    play(
        scenario, needs="queues_for_absent", why="keeps nothing for anonymous clients that are away"
    )


def test_the_will_is_published_at_an_abrupt_death_and_retained(play):
    async def scenario(bench: Bench) -> None:
        topic, client_id = unique("t"), unique("client")
        watcher = await started(bench, topic)
        mortal = await bench.link(client_id, will=Will(topic, b"dead"))
        await mortal.start()
        await up(mortal)
        await bench.cut(client_id)
        assert (await delivery(watcher)).payload == b"dead"
        late = await delivery(await started(bench, topic))
        assert (late.payload, late.retained) == (b"dead", True)

    play(scenario)


def test_no_will_is_published_at_a_goodbye(play):
    async def scenario(bench: Bench) -> None:
        topic = unique("t")
        watcher = await started(bench, topic)
        mortal = await started(bench, will=Will(topic, b"dead"))
        await mortal.close()
        await silence(watcher)

    why = "may see the end of a connection before the DISCONNECT that came first"
    play(scenario, needs="hears_goodbyes", why=why)


def test_a_large_payload_arrives_whole(play):
    async def scenario(bench: Bench) -> None:
        topic = unique("t")
        receiver, sender = await started(bench, topic), await started(bench)
        payload = bytes(range(256)) * 4096
        publish = asyncio.create_task(sender.publish(topic, payload))
        assert (await delivery(receiver)).payload == payload
        await publish

    play(scenario)


def test_a_payload_above_the_brokers_limit_is_refused_before_it_is_sent(play):
    async def scenario(bench: Bench) -> None:
        topic = unique("t")
        sender, receiver = await started(bench), await started(bench, topic)
        assert sender.max_payload_bytes <= PAYLOAD_LIMIT_BYTES
        with pytest.raises(PayloadTooLarge) as refusal:
            await sender.publish(topic, bytes(PAYLOAD_LIMIT_BYTES + 1))
        assert refusal.value.payload_bytes == PAYLOAD_LIMIT_BYTES + 1
        assert refusal.value.limit_bytes <= PAYLOAD_LIMIT_BYTES
        await sender.publish(topic, bytes(sender.max_payload_bytes))
        assert len((await delivery(receiver)).payload) == sender.max_payload_bytes
        assert sender.connected

    play(scenario, limited=True, needs="refuses_oversize", why="has no limit")


def test_an_owner_that_acknowledges_nothing_is_sent_no_more_than_it_allowed(play):
    async def scenario(bench: Bench) -> None:
        topic = unique("t")
        receiver = await started(bench, topic, receive_maximum=16)
        sender = await started(bench)
        await asyncio.gather(*(sender.publish(topic, bytes([n])) for n in range(100)))
        taken: list[Delivery] = []
        while found := await next_within(receiver, QUIET_S):
            assert isinstance(found, Delivery)
            taken.append(found)
        # Under 3.1.1 the client cannot say its limit; mosquitto stops at its own 20.
        assert 16 <= len(taken) <= 20
        while len(taken) < 100:
            receiver.ack(taken[-1])
            for found in taken:
                receiver.ack(found)
            taken.append(await delivery(receiver))
        assert [found.payload for found in taken] == [bytes([n]) for n in range(100)]

    play(scenario, needs="bounds_deliveries", why="sends on without waiting for acknowledgements")


def test_a_killed_broker_comes_back_without_sessions_and_subscriptions_are_restored(play):
    async def scenario(bench: Bench) -> None:
        topic, base = unique("t"), unique("t")
        # More filters than one SUBSCRIBE may carry.
        filters = [f"{base}/{n}" for n in range(20)]
        receiver, sender = await started(bench, topic, *filters), await started(bench)
        await bench.kill_broker()
        await down(receiver)
        assert not receiver.connected
        await bench.start_broker()
        assert await up(receiver) == LinkUp(session_present=False)
        await up(sender)
        for each in (topic, *filters):
            await sender.publish(each, each.encode())
            found = await delivery(receiver)
            receiver.ack(found)
            assert found.topic == each

    play(scenario)


def test_a_publish_that_was_asked_for_while_the_link_is_down_completes_after_it_is_up(play):
    async def scenario(bench: Bench) -> None:
        topic = unique("t")
        receiver, sender = await started(bench, topic), await started(bench)
        await bench.kill_broker()
        await down(sender)
        publishes = [asyncio.create_task(sender.publish(topic, bytes([n]))) for n in range(12)]
        await asyncio.sleep(0)
        assert not any(each.done() for each in publishes)
        await bench.start_broker()
        await up(receiver)
        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(*publishes)

    play(scenario)


def test_a_publish_before_the_first_connection_is_sent_once_when_it_is_there(play):
    async def scenario(bench: Bench) -> None:
        topic = unique("t")
        receiver, sender = await started(bench, topic), await bench.link(unique("client"))
        early = asyncio.create_task(sender.publish(topic, b"early"))
        await asyncio.sleep(0)
        await sender.start()
        async with asyncio.timeout(LIMIT_S):
            await early
        assert (await delivery(receiver)).payload == b"early"
        await silence(receiver)

    play(scenario)


def test_a_cancelled_publish_leaves_its_place_to_others(play):
    async def scenario(bench: Bench) -> None:
        topic, client_id = unique("t"), unique("client")
        receiver = await started(bench, topic)
        sender = await bench.link(client_id)
        await sender.start()
        await up(sender)
        await bench.cut(client_id)
        await down(sender)
        abandoned = [asyncio.create_task(sender.publish(topic, b"abandoned")) for _ in range(50)]
        await asyncio.sleep(0)
        for each in abandoned:
            each.cancel()
        await asyncio.wait(abandoned)
        await bench.mend(client_id)
        async with asyncio.timeout(LIMIT_S):
            await sender.publish(topic, b"sent")
        assert (await delivery(receiver)).payload == b"sent"

    play(scenario)


def test_closing_ends_every_waiting_call_and_may_be_repeated(play):
    async def scenario(bench: Bench) -> None:
        client_id = unique("client")
        link = await bench.link(client_id)
        await link.start()
        await up(link)
        await bench.cut(client_id)
        await down(link)
        waiting = [
            asyncio.create_task(link.publish(unique("t"), b"")),
            asyncio.create_task(up(link)),
        ]
        await asyncio.sleep(0)
        await link.close()
        await link.close()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(each) for each in results] == [LinkClosed, LinkClosed]
        assert not link.connected
        for call in (link.next_event(), link.publish("t", b""), link.subscribe("t")):
            with pytest.raises(LinkClosed):
                await call

    play(scenario)


def test_what_is_subscribed_while_down_is_granted_before_link_up(play):
    async def scenario(bench: Bench) -> None:
        topic, gone, client_id = unique("t"), unique("t"), unique("client")
        sender = await started(bench)
        link = await bench.link(client_id)
        await link.subscribe(gone)
        await link.start()
        await up(link)
        await bench.cut(client_id)
        await down(link)
        await link.subscribe(topic)
        await link.unsubscribe(gone)
        await bench.mend(client_id)
        await up(link)
        await sender.publish(gone, b"unwanted")
        await sender.publish(topic, b"wanted")
        assert (await delivery(link)).payload == b"wanted"

    play(scenario)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_through_repeated_cuts_everything_arrives_at_least_once_and_first_in_order(play, seed):
    async def scenario(bench: Bench) -> None:
        rng = random.Random(seed)
        topic, names = unique("t"), [unique("sender"), unique("receiver")]
        sender, receiver = await bench.link(names[0]), await bench.link(names[1])
        await receiver.subscribe(topic)
        for link in (sender, receiver):
            await link.start()
            await up(link)
        wanted = [n.to_bytes(2, "big") * 512 for n in range(400)]
        received: dict[bytes, None] = {}

        async def receive() -> None:
            while len(received) < len(wanted):
                found = await delivery(receiver)
                received[found.payload] = None
                if rng.random() < 0.9 or len(received) == len(wanted):
                    receiver.ack(found)
                else:
                    asyncio.get_running_loop().call_later(0.01, receiver.ack, found)

        async def send() -> None:
            # In groups, so that cuts fall into the middle.
            for start in range(0, len(wanted), 20):
                group = wanted[start : start + 20]
                await asyncio.gather(*(sender.publish(topic, each) for each in group))
                await asyncio.sleep(0.005)

        async def cut_and_mend() -> None:
            for _ in range(8):
                victim = rng.choice(names)
                await bench.cut(victim)
                await bench.mend(victim)
                await asyncio.sleep(rng.uniform(0.0, 0.05))

        await asyncio.gather(receive(), send(), cut_and_mend())
        assert list(received) == wanted

    play(scenario, needs="delivers_again", why="forgets what was not acknowledged")
