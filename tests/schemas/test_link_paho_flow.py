"""What is known to bite in paho: callbacks that fail, windows that are ignored, floods."""

from __future__ import annotations

import asyncio

from fedge.schemas.link.paho import MqttProtocol
from fedge.schemas.link.paho.connection import Answer, Connection
from fedge.schemas.link.protocol import MAX_IN_FLIGHT, Delivery, LinkDown, LinkUp
from tests.brokers import MosquittoBroker
from tests.schemas.paho_links import (
    LIMIT_S,
    keep_quiet,
    linked,
    needs_mosquitto,
    next_of,
    settings,
)
from tests.schemas.scripted_broker import ScriptedBroker, Type, Wire, receive_maximum


class FailingSink:
    """A sink with a defect: it cannot take messages."""

    def on_message(self, topic: str, payload: bytes, retained: bool, packet_id: int) -> None:
        raise LookupError("a defect")

    def on_published(self, packet_id: int, answer: Answer) -> None:
        pass


@needs_mosquitto
def test_an_exception_in_a_callback_ends_the_connection_and_says_why(mosquitto, caplog):
    async def scenario() -> None:
        connection = await Connection.open(
            settings(mosquitto.port, "failing"), MqttProtocol.V5, FailingSink()
        )
        await connection.accepted(LIMIT_S)
        await connection.subscribe(["failing/topic"])
        async with linked(mosquitto.port, client_id="sender") as sender:
            await sender.publish("failing/topic", b"")
            lost = await asyncio.wait_for(connection.lost, LIMIT_S)
        assert "LookupError('a defect')" in lost.reason

    asyncio.run(scenario())
    assert "link_callback_failed" in caplog.text


def test_a_packet_that_cannot_be_parsed_ends_the_connection_and_the_link_goes_on():
    async def script(wire: Wire) -> None:
        await wire.accept()
        if wire.number == 0:
            wire.send(Type.PUBLISH, b"\xff", flags=0x02)
        await wire.serve()

    async def scenario() -> None:
        async with ScriptedBroker(script) as broker, linked(broker.port) as link:
            await next_of(link, LinkDown)
            await next_of(link, LinkUp)
            await link.publish("t", b"")

    asyncio.run(scenario())


def test_a_topic_that_is_not_utf8_is_acknowledged_and_dropped():
    acknowledged: list[int] = []

    async def script(wire: Wire) -> None:
        await wire.accept()
        wire.suback(await wire.expect(Type.SUBSCRIBE))
        wire.publish(b"\xff\xfe", b"bad", 7)
        wire.publish(b"t", b"good", 8)
        acknowledged.append((await wire.expect(Type.PUBACK)).packet_id)
        await wire.serve()

    async def scenario() -> None:
        async with ScriptedBroker(script) as broker, linked(broker.port, "#") as link:
            assert (await next_of(link, Delivery)).payload == b"good"
            await link.publish("t", b"")
            assert acknowledged == [7]

    asyncio.run(scenario())


class Counting:
    """A script that acknowledges only what it is told to, and counts what is outstanding."""

    def __init__(self, *maxima: int) -> None:
        self.maxima = maxima
        self.outstanding: list[int] = []
        self.most = 0
        self.arrived = asyncio.Event()
        self.wire: Wire | None = None

    async def __call__(self, wire: Wire) -> None:
        maximum = self.maxima[min(wire.number, len(self.maxima) - 1)]
        self.outstanding, self.most, self.wire = [], 0, wire
        await wire.accept(session_present=True, properties=receive_maximum(maximum))
        while True:
            packet = await wire.expect(Type.PUBLISH)
            self.outstanding.append(packet.publish_id)
            self.most = max(self.most, len(self.outstanding))
            self.arrived.set()

    async def count(self, wanted: int) -> None:
        while len(self.outstanding) < wanted:
            self.arrived.clear()
            await self.arrived.wait()

    def acknowledge_one(self) -> None:
        assert self.wire is not None
        self.wire.puback(self.outstanding.pop(0))


def test_the_brokers_receive_maximum_is_kept_also_after_a_reconnect_and_all_are_sent():
    async def scenario() -> None:
        script = Counting(65535, 3)
        async with ScriptedBroker(script) as broker, linked(broker.port) as link:
            publishes = [asyncio.create_task(link.publish("t", bytes([n]))) for n in range(20)]
            await script.count(MAX_IN_FLIGHT)
            await keep_quiet()
            assert script.most == MAX_IN_FLIGHT
            assert script.wire is not None
            script.wire.writer.transport.abort()
            await next_of(link, LinkDown)
            await next_of(link, LinkUp)
            await script.count(3)
            await keep_quiet()
            for done in range(len(publishes)):
                await script.count(min(3, len(publishes) - done))
                assert script.most == 3
                script.acknowledge_one()
            await asyncio.gather(*publishes)

    asyncio.run(scenario())


@needs_mosquitto
def test_mosquitto_with_a_small_receive_maximum_keeps_the_connection(tmp_path):
    async def scenario(port: int) -> None:
        async with linked(port) as link:
            await next_of(link, LinkUp)
            await asyncio.gather(*(link.publish("t", bytes(1000)) for _ in range(200)))
            assert link.connected

    with MosquittoBroker(tmp_path, settings=("max_inflight_messages 2",)) as broker:
        asyncio.run(scenario(broker.port))
        assert "Receive Maximum exceeded" not in broker.log_path.read_text()


def test_a_cancelled_publish_keeps_its_place_until_the_puback_and_then_frees_it():
    async def scenario() -> None:
        script = Counting(2)
        async with ScriptedBroker(script) as broker, linked(broker.port) as link:
            cancelled = [asyncio.create_task(link.publish("t", b"cancelled")) for _ in range(2)]
            await script.count(2)
            for each in cancelled:
                each.cancel()
            await asyncio.wait(cancelled)
            kept = asyncio.create_task(link.publish("t", b"kept"))
            await keep_quiet()
            assert script.most == 2
            script.acknowledge_one()
            await script.count(2)
            script.acknowledge_one()
            script.acknowledge_one()
            await kept

    asyncio.run(scenario())


def test_what_was_cancelled_is_not_sent_again_after_a_reconnect():
    async def scenario() -> None:
        script = Counting(8)
        async with ScriptedBroker(script) as broker, linked(broker.port) as link:
            cancelled = asyncio.create_task(link.publish("t", b"cancelled"))
            await script.count(1)
            cancelled.cancel()
            await asyncio.wait((cancelled,))
            assert script.wire is not None
            script.wire.writer.transport.abort()
            await next_of(link, LinkDown)
            await next_of(link, LinkUp)
            await keep_quiet()
            assert script.outstanding == []

    asyncio.run(scenario())


def flooding(count: int, sent: list[int]):
    """A script that sends `count` messages of 16 KiB without waiting for acknowledgements."""

    async def script(wire: Wire) -> None:
        await wire.accept()
        wire.suback(await wire.expect(Type.SUBSCRIBE))
        server = asyncio.create_task(wire.serve())
        try:
            for number in range(count):
                wire.publish(b"t", number.to_bytes(2, "big") * 8192, 1 + number)
                await wire.writer.drain()
                sent.append(number)
        finally:
            await asyncio.gather(server, return_exceptions=True)

    return script


def test_a_broker_without_flow_control_is_stopped_by_tcp_and_nothing_is_lost():
    async def scenario() -> None:
        count, sent = 3000, []
        async with (
            ScriptedBroker(flooding(count, sent)) as broker,
            linked(broker.port, "t", protocol=MqttProtocol.V311, receive_maximum=4) as link,
        ):
            await next_of(link, LinkUp)
            await keep_quiet()
            # The kernel's buffers on both sides hold a few MB; the rest waits at the broker.
            assert len(sent) < count
            for number in range(count):
                found = await next_of(link, Delivery)
                assert found.payload[:2] == number.to_bytes(2, "big")
                link.ack(found)

    asyncio.run(scenario())


def test_an_owner_that_publishes_before_it_takes_events_is_not_locked_out_by_a_flood():
    async def scenario() -> None:
        async with (
            ScriptedBroker(flooding(1000, [])) as broker,
            linked(broker.port, "t", protocol=MqttProtocol.V311, receive_maximum=4) as link,
        ):
            await next_of(link, LinkUp)
            await keep_quiet()
            await link.publish("answer", b"")
            await link.subscribe("another")

    asyncio.run(scenario())
