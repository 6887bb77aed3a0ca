"""What is known to bite in paho and in brokers, each with the bite."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.schemas.errors import ConfigError, LinkClosed, LinkRefused, PayloadTooLarge
from fedge.schemas.link.paho import LinkSettings, MqttProtocol, PahoLink
from fedge.schemas.link.paho.connection import Answer, Connection
from fedge.schemas.link.paho.settings import Backoff
from fedge.schemas.link.protocol import MAX_IN_FLIGHT, Delivery, LinkDown, LinkUp, Will
from tests.brokers import HOST, MOSQUITTO, AmqttBroker, MosquittoBroker
from tests.cable import Cable
from tests.schemas.scripted_broker import ScriptedBroker, Type, Wire, receive_maximum

needs_mosquitto = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
LIMIT_S = 20.0
QUIET_S = 0.2


def settings(port: int, client_id: str = "client", **changes) -> LinkSettings:
    values = {"protocol": MqttProtocol.V5, "backoff_base_s": 0.02, "backoff_cap_s": 0.05}
    return LinkSettings(HOST, port, client_id, **(values | changes))


@contextlib.asynccontextmanager
async def linked(port: int, *filters: str, **changes) -> AsyncIterator[PahoLink]:
    link = PahoLink(settings(port, **changes), random.Random(1))
    await link.subscribe(*filters)
    await link.start()
    try:
        async with asyncio.timeout(LIMIT_S):
            yield link
    finally:
        await link.close()


async def next_of(link: PahoLink, kind: type):
    while True:
        event = await link.next_event()
        if isinstance(event, kind):
            return event


async def keep_quiet() -> None:
    """Long enough for something wrong to happen on this machine."""
    await asyncio.sleep(QUIET_S)


# ---------------------------------------------------------------- callbacks


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


# ---------------------------------------------------------------- flow control


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


# ---------------------------------------------------------------- refusals


@needs_mosquitto
def test_a_negative_puback_raises_with_the_brokers_reason(tmp_path):
    acl = tmp_path / "acl"
    acl.write_text("topic read #\ntopic write allowed\n")

    async def scenario(port: int) -> None:
        async with linked(port) as link:
            await link.publish("allowed", b"")
            with pytest.raises(LinkRefused, match="Not authorized") as refusal:
                await link.publish("forbidden", b"")
            assert refusal.value.code == 0x87
            await link.publish("allowed", b"")

    with MosquittoBroker(tmp_path / "broker", settings=(f"acl_file {acl}",)) as broker:
        asyncio.run(scenario(broker.port))


@pytest.mark.parametrize("protocol", [MqttProtocol.V5, MqttProtocol.V311])
def test_a_refused_subscription_raises_and_is_forgotten(protocol):
    subscribes: list[int] = []

    async def script(wire: Wire) -> None:
        await wire.accept()
        while True:
            subscribe = await wire.expect(Type.SUBSCRIBE)
            subscribes.append(wire.number)
            wire.suback(subscribe, code=0x80)
            if wire.number == 0:
                await wire.writer.drain()
                await asyncio.sleep(QUIET_S)
                return

    async def scenario() -> None:
        async with (
            ScriptedBroker(script) as broker,
            linked(broker.port, protocol=protocol) as link,
        ):
            await next_of(link, LinkUp)
            with pytest.raises(LinkRefused, match="the subscription to secret") as refusal:
                await link.subscribe("secret")
            assert refusal.value.code == 0x80
            await next_of(link, LinkDown)
            await next_of(link, LinkUp)
            assert subscribes == [0]

    asyncio.run(scenario())


@needs_mosquitto
def test_a_packet_that_the_broker_closes_upon_is_given_up_and_the_others_arrive(tmp_path):
    """MQTT 3.1.1 has no way to say the limit; resent for ever, it would end every connection."""

    async def scenario(port: int) -> None:
        async with (
            linked(port, protocol=MqttProtocol.V311) as link,
            linked(port, "t", client_id="receiver") as receiver,
        ):
            await next_of(link, LinkUp)
            await next_of(receiver, LinkUp)
            bad = asyncio.create_task(link.publish("t", bytes(30_000)))
            good = [asyncio.create_task(link.publish("t", bytes([n]))) for n in range(20)]
            with pytest.raises(LinkRefused, match="closes the connection") as refusal:
                await bad
            assert refusal.value.code is None
            await asyncio.gather(*good)
            received = set()
            while len(received) < 20:
                found = await next_of(receiver, Delivery)
                receiver.ack(found)
                received.add(found.payload)
            assert received == {bytes([n]) for n in range(20)}

    with MosquittoBroker(tmp_path, settings=("max_packet_size 20000",)) as broker:
        asyncio.run(scenario(broker.port))


@needs_mosquitto
def test_a_payload_that_waits_is_measured_against_the_limit_that_the_broker_then_tells(tmp_path):
    async def scenario(port: int) -> None:
        link = PahoLink(settings(port), random.Random(1))
        early = asyncio.create_task(link.publish("t", bytes(30_000)))
        await asyncio.sleep(0)
        await link.start()
        with pytest.raises(PayloadTooLarge) as refusal:
            await asyncio.wait_for(early, LIMIT_S)
        assert refusal.value.limit_bytes < 20_000
        await link.publish("t", bytes(refusal.value.limit_bytes))
        assert link.connected
        await link.close()

    with MosquittoBroker(tmp_path, settings=("max_packet_size 20000",)) as broker:
        asyncio.run(scenario(broker.port))


@needs_mosquitto
def test_a_refused_password_is_reported_and_never_logged(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    never_shown = "hunter2"

    async def scenario(port: int) -> None:
        async with linked(port, username="device", password=never_shown) as link:
            down = await next_of(link, LinkDown)
            assert "Not authorized" in down.reason
            assert never_shown not in repr(link) + repr(link.settings) + down.reason
            assert not link.connected

    with MosquittoBroker(tmp_path, settings=("allow_anonymous false",)) as broker:
        asyncio.run(scenario(broker.port))
    assert never_shown not in caplog.text


# ---------------------------------------------------------------- reconnecting


@given(st.integers(0, 2**32), st.floats(0.01, 10.0), st.integers(0, 100))
def test_the_back_off_is_uniform_below_a_limit_that_doubles_up_to_the_cap(seed, base_s, attempts):
    cap_s = 60.0
    backoff = Backoff(base_s, cap_s, random.Random(seed))
    reference = random.Random(seed)
    limit_s = base_s
    for _ in range(attempts):
        assert backoff.next_delay_s(0.0) == reference.uniform(0.0, min(limit_s, cap_s))
        limit_s = min(limit_s * 2, cap_s * 2)


def test_only_a_connection_that_outlasted_the_cap_starts_the_back_off_anew():
    class Highest(random.Random):
        def uniform(self, a: float, b: float) -> float:
            return b

    backoff = Backoff(1.0, 60.0, Highest())
    assert [backoff.next_delay_s(0.0) for _ in range(4)] == [1.0, 2.0, 4.0, 8.0]
    assert backoff.next_delay_s(59.0) == 16.0
    assert backoff.next_delay_s(61.0) == 1.0
    backoff.slow_down()
    assert backoff.next_delay_s(59.0) == 60.0


def test_a_session_taken_over_is_told_as_such_and_not_fought_for():
    accepted: list[int] = []

    async def script(wire: Wire) -> None:
        await wire.accept()
        accepted.append(wire.number)
        # A server that disconnects with "session taken over" (MQTT 5, section 3.14.2.1).
        wire.send(Type.DISCONNECT, b"\x8e")

    async def scenario() -> None:
        patient = {"backoff_base_s": 0.001, "backoff_cap_s": 600}
        async with ScriptedBroker(script) as broker, linked(broker.port, **patient) as link:
            assert "Session taken over" in (await next_of(link, LinkDown)).reason
            await keep_quiet()
            assert accepted == [0]

    asyncio.run(scenario())


@needs_mosquitto
def test_rivals_for_one_session_slow_down_and_say_what_it_looks_like(mosquitto):
    """Mosquitto closes the older connection without a reason."""

    async def scenario() -> None:
        async with Cable(mosquitto.port) as cable:
            rival = {"client_id": "rivals", "backoff_base_s": 0.01, "backoff_cap_s": 600}
            async with linked(cable.port, **rival) as first, linked(cable.port, **rival) as second:

                async def suspects(link: PahoLink) -> None:
                    while (
                        "another client use the id 'rivals'"
                        not in (await next_of(link, LinkDown)).reason
                    ):
                        pass

                watchers = [asyncio.create_task(suspects(link)) for link in (first, second)]
                await asyncio.wait(watchers, return_when=asyncio.FIRST_COMPLETED)
                await asyncio.sleep(5 * QUIET_S)
                # Without a growing back-off it would be hundreds.
                assert cable.connections < 40
                for watcher in watchers:
                    watcher.cancel()
                await asyncio.wait(watchers)

    asyncio.run(scenario())


@needs_mosquitto
def test_a_session_is_taken_back_once_its_rival_is_gone(mosquitto):
    async def scenario() -> None:
        async with linked(mosquitto.port, client_id="twin") as first:
            await next_of(first, LinkUp)
            async with linked(
                mosquitto.port, client_id="twin", backoff_base_s=60, backoff_cap_s=60
            ) as second:
                await next_of(second, LinkUp)
                await next_of(first, LinkDown)
            assert (await next_of(first, LinkUp)).session_present

    asyncio.run(scenario())


def test_a_refused_connection_is_told_once_however_long_it_lasts(free_port):
    async def scenario() -> None:
        async with linked(free_port, backoff_base_s=0.001, backoff_cap_s=0.002) as link:
            await keep_quiet()
            first = await link.next_event()
            assert isinstance(first, LinkDown)
            assert f"{HOST}:{free_port}" in first.reason
            # Dozens of attempts were made meanwhile.
            assert len(link._events) <= 1

    asyncio.run(scenario())


def test_a_broker_that_takes_the_connection_and_says_nothing_is_left_in_time():
    async def script(wire: Wire) -> None:
        if wire.number == 0:
            await asyncio.Event().wait()
        await wire.accept()
        await wire.serve()

    async def scenario() -> None:
        async with (
            ScriptedBroker(script) as broker,
            linked(broker.port, connect_timeout_s=0.2) as link,
        ):
            assert "no CONNACK" in (await next_of(link, LinkDown)).reason
            await next_of(link, LinkUp)

    asyncio.run(scenario())


def test_a_broker_that_falls_silent_is_left_after_the_keep_alive_and_an_idle_one_is_pinged():
    pings: list[int] = []
    twice = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.accept()
        while True:
            if (packet := await wire.packet()).type is Type.DISCONNECT:
                return
            assert packet.type is Type.PINGREQ
            pings.append(wire.number)
            if wire.number:
                wire.send(Type.PINGRESP)
            if pings.count(1) == 2:
                twice.set()

    async def scenario() -> None:
        async with ScriptedBroker(script) as broker, linked(broker.port, keepalive_s=1) as link:
            assert "keep-alive" in (await next_of(link, LinkDown)).reason
            await next_of(link, LinkUp)
            await twice.wait()
            assert link.connected
            assert pings.count(0) == 1

    asyncio.run(scenario())


# ---------------------------------------------------------------- protocol versions


@pytest.mark.parametrize("answer", ["code 1", "close", "silence"])
def test_a_broker_that_knows_only_311_is_spoken_to_in_311_from_then_on(answer):
    levels: list[int] = []

    async def script(wire: Wire) -> None:
        connect = await wire.expect(Type.CONNECT)
        levels.append(connect.protocol_level)
        if connect.protocol_level == 5:
            if answer == "code 1":
                wire.send(Type.CONNACK, b"\0\1")
            elif answer == "silence":
                await asyncio.Event().wait()
            return
        wire.connack()
        await wire.expect(Type.PUBLISH)

    async def scenario() -> None:
        async with (
            ScriptedBroker(script) as broker,
            linked(broker.port, protocol=MqttProtocol.AUTO, auto_answer_s=0.1) as link,
        ):
            await next_of(link, LinkUp)
            publish = asyncio.create_task(link.publish("t", b""))
            await next_of(link, LinkDown)
            await next_of(link, LinkUp)
            assert levels == [5, 4, 4]
            publish.cancel()

    asyncio.run(scenario())


def test_amqtt_is_found_to_speak_311(tmp_path):
    async def scenario(port: int) -> None:
        will = Will("t", b"dead")
        async with linked(
            port, "t", protocol=MqttProtocol.AUTO, auto_answer_s=0.3, will=will
        ) as link:
            await next_of(link, LinkUp)
            await link.publish("t", b"hello")
            assert (await next_of(link, Delivery)).payload == b"hello"

    with AmqttBroker(tmp_path) as broker:
        asyncio.run(scenario(broker.port))


@needs_mosquitto
def test_where_both_are_spoken_mqtt_5_is_used(mosquitto):
    async def scenario() -> None:
        async with linked(mosquitto.port, protocol=MqttProtocol.AUTO, client_id="auto") as link:
            await next_of(link, LinkUp)

    asyncio.run(scenario())
    lines = mosquitto.log_path.read_text().splitlines()
    assert any("as auto (p5," in line for line in lines)


# ---------------------------------------------------------------- subscriptions


def test_a_subscribe_packet_carries_at_most_the_set_number_of_filters():
    counts: list[int] = []

    async def script(wire: Wire) -> None:
        await wire.accept()
        while True:
            subscribe = await wire.expect(Type.SUBSCRIBE)
            counts.append(subscribe.filter_count(v5=True))
            wire.suback(subscribe)

    async def scenario() -> None:
        filters = [f"t/{n}" for n in range(19)]
        async with ScriptedBroker(script) as broker, linked(broker.port, *filters) as link:
            await next_of(link, LinkUp)
            await link.subscribe(*(f"u/{n}" for n in range(9)))
        assert counts == [8, 8, 3, 8, 1]

    asyncio.run(scenario())


def test_what_arrives_before_the_subscriptions_are_restored_comes_after_link_up():
    async def script(wire: Wire) -> None:
        await wire.accept()
        subscribe = await wire.expect(Type.SUBSCRIBE)
        wire.publish(b"t", b"early", 1)
        wire.suback(subscribe)
        await wire.serve()

    async def scenario() -> None:
        async with ScriptedBroker(script) as broker, linked(broker.port, "t") as link:
            assert await link.next_event() == LinkUp(session_present=False)
            early = await link.next_event()
            assert isinstance(early, Delivery)
            assert early.payload == b"early"

    asyncio.run(scenario())


def test_a_subscription_whose_answer_was_lost_is_asked_for_again_though_the_session_is_there():
    seen: list[int] = []

    async def script(wire: Wire) -> None:
        await wire.accept(session_present=True)
        subscribe = await wire.expect(Type.SUBSCRIBE)
        seen.append(wire.number)
        if wire.number:
            wire.suback(subscribe)
            await wire.serve()

    async def scenario() -> None:
        async with ScriptedBroker(script) as broker, linked(broker.port) as link:
            await next_of(link, LinkUp)
            await link.subscribe("t")
            await next_of(link, LinkUp)
            assert seen == [0, 1]

    asyncio.run(scenario())


def test_what_is_not_a_filter_is_refused_before_it_is_sent():
    link = PahoLink(settings(1), random.Random(1))
    for wrong in ("", "a/#/b", "a+/b", "nul\0"):
        with pytest.raises(ValueError, match="not a topic filter"):
            asyncio.run(link.subscribe(wrong))


# ---------------------------------------------------------------- the end


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@needs_mosquitto
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors in /proc")
def test_a_closed_link_leaves_no_task_and_no_descriptor(mosquitto, free_port):
    async def scenario() -> None:
        # The loop's own pipe and the resolver's thread are there before the count.
        await asyncio.get_running_loop().run_in_executor(None, os.getpid)
        before = open_descriptors()
        for port in (mosquitto.port, free_port):
            for waits in (True, False):
                link = PahoLink(settings(port, "fleeting"), random.Random(1))
                await link.start()
                if waits:
                    await link.next_event()
                else:
                    await asyncio.sleep(0)
                await link.close()
        # An attempt that was under way in a thread ends by itself, and then closes its socket.
        await asyncio.get_running_loop().shutdown_default_executor()
        await asyncio.sleep(0)
        assert open_descriptors() == before
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())


def test_a_link_that_was_never_started_can_be_closed():
    async def scenario() -> None:
        link = PahoLink(settings(1), random.Random(1))
        publish = asyncio.create_task(link.publish("t", b""))
        await asyncio.sleep(0)
        await link.close()
        with pytest.raises(LinkClosed):
            await publish

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", 0),
        ("client_id", ""),
        ("keepalive_s", 0),
        ("receive_maximum", 70000),
        ("backoff_cap_s", 0.001),
        ("password", "without a user"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match="username" if field == "password" else field):
        LinkSettings(**{"host": HOST, "port": 1883, "client_id": "c", field: value})
