"""Coming back: jitter, rivals, silence, the keep-alive, and brokers that speak only MQTT 3.1.1."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.schemas.link.broker import BrokerSettings
from fedge.schemas.link.paho import MqttProtocol, PahoLink
from fedge.schemas.link.paho.settings import Backoff
from fedge.schemas.link.protocol import Delivery, Link, LinkDown, LinkUp, Will
from tests.brokers import HOST, AmqttBroker, MosquittoBroker
from tests.cable import Cable
from tests.schemas.paho_links import (
    QUIET_S,
    keep_quiet,
    linked,
    needs_mosquitto,
    next_of,
    settings,
)
from tests.schemas.scripted_broker import ScriptedBroker, Type, Wire


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


def test_a_link_that_waits_tries_at_once_when_it_is_told_that_the_broker_is_back(free_port):
    class Longest(random.Random):
        def uniform(self, a: float, b: float) -> float:
            return b

    async def script(wire: Wire) -> None:
        await wire.accept()
        await asyncio.Event().wait()

    async def scenario() -> None:
        patient = settings(free_port, backoff_base_s=600, backoff_cap_s=600)
        link = PahoLink(patient, Longest())
        await link.start()
        await next_of(link, LinkDown)
        async with ScriptedBroker(script, port=free_port):
            link.hurry()
            await next_of(link, LinkUp)
            await link.close()

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


@needs_mosquitto
def test_a_broker_that_comes_back_with_an_older_session_is_subscribed_to_again(
    tmp_path: Path,
) -> None:
    persistent = ("persistence true", f"persistence_location {tmp_path}/")
    broker = MosquittoBroker(tmp_path, settings=(*persistent, "autosave_interval 1800"))

    async def is_up(link: Link) -> LinkUp:
        while not isinstance(event := await link.next_event(), LinkUp):
            pass
        return event

    async def scenario() -> None:
        settings = BrokerSettings(port=broker.port, reconnect_cap_s=1)
        link, other = (settings.link(name, random.Random(name)) for name in ("a", "b"))
        await link.subscribe("old/+")
        await asyncio.gather(link.start(), other.start())
        await asyncio.gather(is_up(link), is_up(other))
        os.kill(broker.pid, signal.SIGUSR1)  # mosquitto saves what it has now
        await asyncio.sleep(0.5)
        await link.subscribe("new/+")
        broker.kill()
        broker.start()
        assert (await is_up(link)).session_present
        await is_up(other)
        await other.publish("new/x", b"heard")
        async with asyncio.timeout(10):
            while not isinstance(event := await link.next_event(), Delivery):
                pass
        assert (event.topic, event.payload) == ("new/x", b"heard")
        await asyncio.gather(link.close(), other.close())

    with broker:
        asyncio.run(scenario())
