"""Brokers that do everything wrong: the link says so, tries again patiently, and never hangs."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedge.schemas.errors import LinkRefused, PayloadTooLarge
from fedge.schemas.link.paho import MqttProtocol, PahoLink
from fedge.schemas.link.protocol import Delivery, LinkDown, LinkUp
from tests.schemas.paho_links import LIMIT_S, QUIET_S, keep_quiet, linked, next_of, settings
from tests.schemas.scripted_broker import (
    ScriptedBroker,
    Type,
    Wire,
    maximum_packet_size,
    receive_maximum,
    server_keep_alive,
)

Misdeed = Callable[[Wire], Awaitable[None]]


class Longest(random.Random):
    """The longest wait that the back-off allows, each time: what follows is certain."""

    def uniform(self, a: float, b: float) -> float:
        return b


def says(*parts: bytes) -> Misdeed:
    """Accepts the connection, says that, and waits."""

    async def misdeed(wire: Wire) -> None:
        await wire.accept()
        for part in parts:
            wire.raw(part)
        await asyncio.Event().wait()

    return misdeed


def answers_connect_with(data: bytes) -> Misdeed:
    async def misdeed(wire: Wire) -> None:
        await wire.expect(Type.CONNECT)
        wire.raw(data)
        await asyncio.Event().wait()

    return misdeed


async def says_nothing(wire: Wire) -> None:
    await asyncio.Event().wait()


async def closes_at_once(wire: Wire) -> None:
    return


async def closes_in_the_middle_of_a_packet(wire: Wire) -> None:
    await wire.accept()
    wire.raw(b"\x32\x80\x01\0\1t\0\1\0half of what was announced")
    await wire.writer.drain()


async def closes_in_the_middle_of_the_connack(wire: Wire) -> None:
    await wire.expect(Type.CONNECT)
    wire.raw(b"\x20\x03\0")
    await wire.writer.drain()


async def accepts_twice(wire: Wire) -> None:
    await wire.accept()
    wire.connack()
    await asyncio.Event().wait()


def accepts_with(properties: bytes) -> Misdeed:
    async def misdeed(wire: Wire) -> None:
        await wire.accept(properties=properties)
        await asyncio.Event().wait()

    return misdeed


def disconnects_with(code: int) -> Misdeed:
    async def misdeed(wire: Wire) -> None:
        await wire.accept()
        wire.disconnect(code)
        await asyncio.Event().wait()

    return misdeed


ENDING: dict[str, tuple[Misdeed, str]] = {
    "says nothing": (says_nothing, "no CONNACK within 0.3 s"),
    "closes at once": (closes_at_once, "closed by the broker or the network"),
    "closes in mid packet": (closes_in_the_middle_of_a_packet, "closed by the broker"),
    "closes in mid connack": (closes_in_the_middle_of_the_connack, "closed by the broker"),
    "is a web server": (answers_connect_with(b"HTTP/1.1 400 Bad Request\r\n\r\n"), ""),
    "is busy": (answers_connect_with(b"\x20\x03\0\x89\0"), "Server busy"),
    "is unavailable": (answers_connect_with(b"\x20\x03\0\x88\0"), "Server unavailable"),
    "says an unknown code": (answers_connect_with(b"\x20\x03\0\x42\0"), ""),
    "accepts twice": (accepts_twice, "CONNACK for a second time"),
    "takes no publish": (accepts_with(receive_maximum(0)), "what is not MQTT"),
    "takes no packet": (accepts_with(maximum_packet_size(0)), "what is not MQTT"),
    "session taken over": (disconnects_with(0x8E), "Session taken over"),
    "packet too large": (disconnects_with(0x95), "Packet too large"),
    "quota exceeded": (disconnects_with(0x97), "Quota exceeded"),
    "server busy": (disconnects_with(0x89), "Server busy"),
    "server shutting down": (disconnects_with(0x8B), "Server shutting down"),
    "use another server": (disconnects_with(0x9C), "Use another server"),
    "connection rate": (disconnects_with(0x9F), "Connection rate exceeded"),
    "no such reason": (disconnects_with(0x42), ""),
    "garbage": (says(b"\xff" * 64), "what is not MQTT"),
    "zeros": (says(bytes(63)), "what is not MQTT"),
    "a length without end": (says(b"\x30\xff\xff\xff\xff\xff"), "what is not MQTT"),
    "a publish of qos 3": (says(b"\x36\x07\0\1t\0\1\0x"), "what is not MQTT"),
    "a publish cut short": (says(b"\x32\x03\0\x09t"), ""),
    "a puback cut short": (says(b"\x40\x01\0"), ""),
    "a huge packet": (
        says(b"\x32\xff\xff\xff\x7f", bytes(1000)), "a packet of 268435455 bytes; it was told"
    ),
    "auth": (says(b"\xf0\x02\0\0"), "what is not MQTT"),
    "a subscribe": (says(b"\x82\x06\0\1\0\1t\1"), "what is not MQTT"),
}  # fmt: skip
"""What ends a connection, and what the link says about it."""


@pytest.mark.parametrize("name", ENDING)
def test_the_link_says_what_went_wrong_and_works_as_soon_as_the_broker_does(name):
    misdeed, reason = ENDING[name]

    async def script(wire: Wire) -> None:
        if wire.number == 0:
            return await misdeed(wire)
        await wire.accept()
        return await wire.serve()

    async def scenario() -> None:
        async with (
            ScriptedBroker(script) as broker,
            linked(broker.port, connect_timeout_s=0.3, keepalive_s=1) as link,
        ):
            down = await next_of(link, LinkDown)
            assert reason in down.reason
            assert down.reason
            await next_of(link, LinkUp)
            await link.publish("t", b"")

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ENDING)
def test_the_link_does_not_hammer_a_broker_that_never_learns(name):
    misdeed, _ = ENDING[name]
    attempts: list[int] = []

    async def script(wire: Wire) -> None:
        attempts.append(wire.number)
        await misdeed(wire)

    async def scenario() -> None:
        async with ScriptedBroker(script) as broker:
            patient = {"connect_timeout_s": 0.05, "keepalive_s": 1, "backoff_cap_s": 600}
            link = PahoLink(settings(broker.port, **patient), Longest())
            publish = asyncio.create_task(link.publish("t", b""))
            await link.start()
            await asyncio.sleep(4 * QUIET_S)
            # 0.02 s, then twice as long each time: the 7th attempt comes after 1.2 s.
            assert 1 <= len(attempts) <= 6
            publish.cancel()
            await asyncio.wait_for(link.close(), LIMIT_S)
            broker.failures.clear()  # it spoke to a client that had gone

    asyncio.run(scenario())


@pytest.mark.parametrize("protocol", [MqttProtocol.V5, MqttProtocol.V311])
def test_what_is_only_wrong_is_passed_over_and_the_connection_stays(protocol):
    acknowledged: list[tuple[Type, int]] = []

    async def script(wire: Wire) -> None:
        await wire.accept()
        wire.suback(await wire.expect(Type.SUBSCRIBE))
        wire.puback(4711)  # of a packet that was never sent
        wire.send(Type.SUBACK, struct.pack("!H", 4712) + (b"\0\1" if wire.v5 else b"\1"))
        wire.send(Type.UNSUBACK, struct.pack("!H", 4713) + (b"\0\0" if wire.v5 else b""))
        wire.send(Type.PINGRESP)
        wire.send(Type.PUBREL, struct.pack("!H", 4714), flags=2)
        wire.publish(b"never/asked/for", b"foreign", 1)
        wire.publish(b"never/asked/for", b"foreign")
        wire.publish(b"t", b"twice", 2)
        wire.publish(b"t", b"twice", 2, again=True)
        wire.publish(b"t", b"number 0", 0)
        wire.publish(b"t", b"retained", 3, retained=True)
        wire.publish(b"t", b"qos 2", 4, qos=2)
        wire.publish(b"t", b"later", 6)
        wire.publish(b"t", b"earlier", 5)
        wire.send(Type.PUBREL, struct.pack("!H", 4), flags=2)
        while True:
            packet = await wire.packet()
            if packet.type in (Type.PUBACK, Type.PUBREC, Type.PUBCOMP):
                acknowledged.append((packet.type, packet.packet_id))
            elif packet.type is Type.PUBLISH:
                wire.puback(packet.publish_id)

    async def scenario() -> None:
        async with (
            ScriptedBroker(script) as broker,
            linked(broker.port, "t", protocol=protocol) as link,
        ):
            await next_of(link, LinkUp)
            seen: list[bytes] = []
            while len(seen) < 7:
                found = await next_of(link, Delivery)
                link.ack(found)
                seen.append(found.payload)
                assert found.retained is (found.payload == b"retained")
            assert seen == [
                *(b"twice", b"twice", b"number 0", b"retained", b"later", b"earlier", b"qos 2")
            ]
            # The answer shows that the connection lived through all of it.
            await link.publish("t", b"")
            assert link.connected
            told = [number for kind, number in acknowledged if kind is Type.PUBACK]
            assert set(told) == {1, 2, 3, 5, 6}
            assert (Type.PUBREC, 4) in acknowledged
            assert (Type.PUBCOMP, 4) in acknowledged

    asyncio.run(scenario())


@pytest.mark.parametrize("code", [0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99])
def test_each_negative_puback_is_the_callers_to_know(code):
    async def script(wire: Wire) -> None:
        await wire.accept()
        wire.puback((await wire.expect(Type.PUBLISH)).publish_id, code)
        await wire.serve()

    async def scenario() -> None:
        async with ScriptedBroker(script) as broker, linked(broker.port) as link:
            with pytest.raises(LinkRefused) as refusal:
                await link.publish("t", b"")
            assert refusal.value.code == code
            await link.publish("t", b"")

    asyncio.run(scenario())


@pytest.mark.parametrize("what", ["publish", "subscribe", "unsubscribe", "wrong numbers"])
def test_a_broker_that_answers_only_pings_is_left_and_what_was_asked_is_asked_again(what):
    """Without this, a publish or a subscription would wait for ever on a link that is up."""

    async def script(wire: Wire) -> None:
        await wire.accept()
        if wire.number:
            await wire.serve()
        while True:
            packet = await wire.packet()
            if packet.type is Type.PINGREQ:
                wire.send(Type.PINGRESP)
            elif what == "wrong numbers" and packet.type is Type.PUBLISH:
                wire.puback(packet.publish_id + 1)

    async def scenario() -> None:
        async with (
            ScriptedBroker(script) as broker,
            linked(broker.port, answer_limit_s=0.3, keepalive_s=1) as link,
        ):
            await next_of(link, LinkUp)
            call = {"subscribe": link.subscribe, "unsubscribe": link.unsubscribe}.get(what)
            asked = asyncio.create_task(link.publish("t", b"") if call is None else call("t"))
            assert "answers no publish" in (await next_of(link, LinkDown)).reason
            await next_of(link, LinkUp)
            await asked

    asyncio.run(scenario())


def test_a_broker_that_never_answers_the_first_subscriptions_is_left_too():
    async def script(wire: Wire) -> None:
        await wire.accept()
        if wire.number == 0:
            await asyncio.Event().wait()
        await wire.serve()

    async def scenario() -> None:
        async with (
            ScriptedBroker(script) as broker,
            linked(broker.port, "t", answer_limit_s=0.2) as link,
        ):
            await next_of(link, LinkDown)
            await next_of(link, LinkUp)

    asyncio.run(scenario())


def test_a_slow_broker_that_answers_is_kept():
    async def script(wire: Wire) -> None:
        await wire.accept()
        for _ in range(6):
            publish = await wire.expect(Type.PUBLISH)
            await asyncio.sleep(0.15)
            wire.puback(publish.publish_id)
        await wire.serve()

    async def scenario() -> None:
        async with (
            ScriptedBroker(script) as broker,
            linked(broker.port, answer_limit_s=0.5) as link,
        ):
            # All six together take longer than the limit, each answer less.
            await asyncio.gather(*(link.publish("t", b"") for _ in range(6)))
            assert [await link.next_event()] == [LinkUp(session_present=False)]

    asyncio.run(scenario())


def test_a_broker_that_wants_no_keep_alive_makes_no_busy_timer():
    async def script(wire: Wire) -> None:
        await wire.accept(properties=server_keep_alive(0))
        await wire.serve()

    async def scenario() -> None:
        async with ScriptedBroker(script) as broker, linked(broker.port, keepalive_s=5) as link:
            await next_of(link, LinkUp)
            await link.publish("t", b"")
            await keep_quiet()
            assert link._connection is not None
            timer = link._connection._keepalive_timer
            assert timer is not None
            assert timer.when() - asyncio.get_running_loop().time() > 4

    asyncio.run(scenario())


def test_a_packet_that_is_never_taken_is_given_up_and_nothing_as_large_is_tried_again():
    """MQTT 3.1.1: the broker resets the connection, as mosquitto does."""
    large: list[int] = []

    async def script(wire: Wire) -> None:
        await wire.accept()
        while True:
            packet = await wire.packet()
            if packet.type is Type.PUBLISH and len(packet.body) > 20_000:
                large.append(wire.number)
                wire.writer.transport.abort()
                return
            if packet.type is Type.PUBLISH:
                wire.puback(packet.publish_id)

    async def scenario() -> None:
        async with (
            ScriptedBroker(script) as broker,
            linked(broker.port, protocol=MqttProtocol.V311) as link,
        ):
            await next_of(link, LinkUp)
            before = link.max_payload_bytes
            with pytest.raises(LinkRefused, match="closes the connection"):
                await link.publish("t", bytes(30_000))
            tried = len(large)
            await link.publish("t", bytes(10_000))
            for size in (30_000, 40_000):
                with pytest.raises(PayloadTooLarge) as refusal:
                    await link.publish("t", bytes(size))
                assert refusal.value.limit_bytes < 30_000
            assert link.max_payload_bytes < 30_000 < before
            await link.publish("t", bytes(10_000))
            assert len(large) == tried

    asyncio.run(scenario())


def test_a_broker_that_comes_back_with_a_larger_limit_is_found_to_have_one():
    generous = False

    async def script(wire: Wire) -> None:
        await wire.accept()
        while True:
            packet = await wire.packet()
            if packet.type is Type.PUBLISH and len(packet.body) > 20_000 and not generous:
                wire.writer.transport.abort()
                return
            if packet.type is Type.PUBLISH:
                wire.puback(packet.publish_id)

    async def scenario() -> None:
        nonlocal generous
        async with (
            ScriptedBroker(script) as broker,
            linked(broker.port, protocol=MqttProtocol.V311) as link,
        ):
            with pytest.raises(LinkRefused):
                await link.publish("t", bytes(30_000))
            while not link.connected:
                await next_of(link, LinkUp)
            generous = True
            # It restarts while we are idle.
            assert link._connection is not None
            link._connection._socket.shutdown(2)
            await next_of(link, LinkDown)
            while not link.connected:
                await next_of(link, LinkUp)
            await link.publish("t", bytes(30_000))

    asyncio.run(scenario())


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    data=st.one_of(
        st.binary(min_size=1, max_size=200),
        # Packets of every type with a right length and a wrong body.
        st.builds(
            lambda first, body: bytes([first, len(body)]) + body,
            st.integers(0, 255),
            st.binary(max_size=60),
        ),
    ),
    protocol=st.sampled_from([MqttProtocol.V5, MqttProtocol.V311]),
    before_connack=st.booleans(),
)
def test_whatever_bytes_come_the_link_lives_on(data, protocol, before_connack):
    async def script(wire: Wire) -> None:
        if wire.number == 0:
            await wire.expect(Type.CONNECT)
            if not before_connack:
                wire.connack()
            wire.raw(data)
            await wire.writer.drain()
            return
        await wire.accept()
        await wire.serve()

    async def scenario() -> None:
        async with (
            ScriptedBroker(script) as broker,
            linked(broker.port, "t", protocol=protocol, backoff_base_s=0.001) as link,
        ):
            while not isinstance(await link.next_event(), LinkDown):
                pass
            await next_of(link, LinkUp)
            await link.publish("t", b"")

    asyncio.run(scenario())
