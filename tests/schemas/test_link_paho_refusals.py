"""What brokers refuse, what a subscription goes through, and what a closed link leaves behind."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from pathlib import Path

import pytest

from fedge.schemas.errors import ConfigError, LinkClosed, LinkRefused, PayloadTooLarge
from fedge.schemas.link.paho import LinkSettings, MqttProtocol, PahoLink
from fedge.schemas.link.protocol import Delivery, LinkDown, LinkUp
from tests.brokers import HOST, MosquittoBroker
from tests.schemas.paho_links import (
    LIMIT_S,
    QUIET_S,
    linked,
    needs_mosquitto,
    next_of,
    settings,
)
from tests.schemas.scripted_broker import ScriptedBroker, Type, Wire


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
