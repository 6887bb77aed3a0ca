"""What a link and a broker tell each other about sizes and times, and what they do about them."""

from __future__ import annotations

import asyncio

import pytest

from fedge.schemas.blobs import DEFAULT_CHUNK_BYTES, MAX_CHUNKS, MIN_CHUNK_BYTES, chunk_bytes_within
from fedge.schemas.errors import LinkRefused, PayloadTooLarge
from fedge.schemas.link.paho import MqttProtocol
from fedge.schemas.link.paho.limits import MEMORY_S, PacketLimit
from fedge.schemas.link.protocol import Delivery, LinkDown, LinkUp
from fedge.schemas.topics import Topics
from tests.brokers import MosquittoBroker
from tests.schemas.paho_links import keep_quiet, linked, needs_mosquitto, next_of
from tests.schemas.scripted_broker import ScriptedBroker, Type, Wire, message_expiry_s

LONGEST_TOPIC = Topics("p" * 63).upload_chunk("d" * 63, "0" * 64, MAX_CHUNKS - 1)


@pytest.mark.parametrize("protocol", [MqttProtocol.V5, MqttProtocol.V311])
def test_a_default_chunk_under_the_longest_topic_fits_a_limit_of_60_000_bytes(protocol):
    """Measured on the wire: 60 KB is 60,000 bytes to some and 61,440 to others."""
    sizes: list[int] = []

    async def script(wire: Wire) -> None:
        await wire.accept()
        publish = await wire.expect(Type.PUBLISH)
        sizes.append(1 + 3 + len(publish.body))
        wire.puback(publish.publish_id)
        await wire.serve()

    async def scenario() -> None:
        async with ScriptedBroker(script) as broker, linked(broker.port, protocol=protocol) as link:
            await link.publish(LONGEST_TOPIC, bytes(DEFAULT_CHUNK_BYTES))

    asyncio.run(scenario())
    assert len(LONGEST_TOPIC) == 209
    assert sizes == [59_610 if protocol is MqttProtocol.V5 else 59_609]


@needs_mosquitto
@pytest.mark.parametrize("limit_bytes", [60_000, 61_440, 20_000])
def test_chunks_within_what_the_broker_tells_are_taken(tmp_path, limit_bytes):
    async def scenario(port: int) -> None:
        async with linked(port) as link:
            await next_of(link, LinkUp)
            size = chunk_bytes_within(link.max_payload_bytes, DEFAULT_CHUNK_BYTES, LONGEST_TOPIC)
            assert size == DEFAULT_CHUNK_BYTES or size > limit_bytes - 300
            await link.publish(LONGEST_TOPIC, bytes(size))
            assert link.connected

    with MosquittoBroker(tmp_path, settings=(f"max_packet_size {limit_bytes}",)) as broker:
        asyncio.run(scenario(broker.port))


@needs_mosquitto
def test_a_limit_that_cannot_be_told_is_found_and_chunks_are_cut_to_it(tmp_path):
    """MQTT 3.1.1: mosquitto resets the connection."""

    async def scenario(port: int) -> None:
        async with linked(port, protocol=MqttProtocol.V311) as link:
            await next_of(link, LinkUp)
            size, tries = DEFAULT_CHUNK_BYTES, 0
            while True:
                try:
                    await link.publish(LONGEST_TOPIC, bytes(size))
                    break
                except LinkRefused:
                    tries += 1
                    size = chunk_bytes_within(link.max_payload_bytes, size, LONGEST_TOPIC)
            assert tries == 2
            assert DEFAULT_CHUNK_BYTES / 4 - 500 < size < DEFAULT_CHUNK_BYTES / 4

    with MosquittoBroker(tmp_path, settings=("max_packet_size 20000",)) as broker:
        asyncio.run(scenario(broker.port))


def test_a_limit_below_the_smallest_chunk_is_told_as_such():
    with pytest.raises(PayloadTooLarge, match="max_packet_size") as refusal:
        chunk_bytes_within(MIN_CHUNK_BYTES - 1, DEFAULT_CHUNK_BYTES, "t")
    assert refusal.value.limit_bytes == MIN_CHUNK_BYTES - 1
    assert chunk_bytes_within(MIN_CHUNK_BYTES, DEFAULT_CHUNK_BYTES, "t") == MIN_CHUNK_BYTES
    assert chunk_bytes_within(10**9, 5000, "t") == 5000


def test_what_was_found_is_forgotten_after_a_minute_or_when_the_broker_may_be_another():
    now_s = 0.0
    limit = PacketLimit(100_000, lambda: now_s)
    limit.connected(50_000, session_present=True)
    assert limit.packet_bytes == 50_000
    assert limit.refused("t", bytes(30_000)) == 30_016
    found_bytes = limit.packet_bytes
    assert found_bytes == 15_008
    limit.check("t", bytes(found_bytes - 16))
    with pytest.raises(PayloadTooLarge):
        limit.check("t", bytes(found_bytes - 15))
    limit.connected(50_000, session_present=True)
    assert limit.packet_bytes == found_bytes
    limit.connected(50_000, session_present=False)
    assert limit.packet_bytes == 50_000
    limit.refused("t", bytes(30_000))
    limit.ended_idle()
    assert limit.packet_bytes == 50_000
    limit.refused("t", bytes(30_000))
    now_s = MEMORY_S - 1
    assert limit.packet_bytes == found_bytes
    now_s = MEMORY_S
    assert limit.packet_bytes == 50_000


@needs_mosquitto
def test_a_device_that_publishes_something_huge_costs_its_receiver_nothing(tmp_path):
    """The broker is told at the connection, and drops it."""

    async def scenario(port: int) -> None:
        async with (
            linked(port, "t", client_id="receiver", largest_delivery_bytes=100_000) as receiver,
            linked(port, client_id="sender") as sender,
        ):
            await next_of(receiver, LinkUp)
            await sender.publish("t", bytes(5_000_000))
            await sender.publish("t", b"small")
            assert (await next_of(receiver, Delivery)).payload == b"small"
            assert receiver.connected

    with MosquittoBroker(tmp_path) as broker:
        asyncio.run(scenario(broker.port))


# ------------------------------------------------------------------ times


@pytest.mark.parametrize("protocol", [MqttProtocol.V5, MqttProtocol.V311])
def test_the_expiry_travels_with_mqtt_5_and_is_left_out_before(protocol):
    seen: list[int | None] = []

    async def script(wire: Wire) -> None:
        await wire.accept()
        while True:
            publish = await wire.expect(Type.PUBLISH)
            seen.append(message_expiry_s(publish) if wire.v5 else None)
            wire.puback(publish.publish_id)

    async def scenario() -> None:
        async with ScriptedBroker(script) as broker, linked(broker.port, protocol=protocol) as link:
            await next_of(link, LinkUp)
            for expiry_s in (None, 60.0, 0.3, 1e12):
                await link.publish("t", b"", expiry_s=expiry_s)

    asyncio.run(scenario())
    is_v5 = protocol is MqttProtocol.V5
    assert seen == ([None, 60, 1, 2**32 - 1] if is_v5 else [None] * 4)


def test_what_waited_for_the_link_travels_with_what_is_left_of_its_time():
    seen: list[int | None] = []

    async def script(wire: Wire) -> None:
        await wire.accept()
        if wire.number == 0:
            await wire.expect(Type.PUBLISH)
            await asyncio.sleep(1.1)
            return
        while True:
            publish = await wire.expect(Type.PUBLISH)
            seen.append(message_expiry_s(publish))
            wire.puback(publish.publish_id)

    async def scenario() -> None:
        async with ScriptedBroker(script) as broker, linked(broker.port) as link:
            # Neither was acknowledged before the connection was lost; one has no time left.
            await asyncio.gather(
                link.publish("t", b"", expiry_s=60.0), link.publish("t", b"", expiry_s=1.0)
            )

    asyncio.run(scenario())
    (left_s,) = seen
    assert left_s is not None
    assert 30 < left_s < 60


def test_what_expired_while_the_link_was_down_is_never_sent_and_its_call_returns():
    seen: list[bytes] = []

    async def script(wire: Wire) -> None:
        if wire.number == 0:
            await wire.accept()
            return
        await wire.accept()
        while True:
            publish = await wire.expect(Type.PUBLISH)
            seen.append(publish.body[-1:])
            wire.puback(publish.publish_id)

    async def scenario() -> None:
        slow = {"backoff_base_s": 1.0, "backoff_cap_s": 1.0}
        async with ScriptedBroker(script) as broker, linked(broker.port, **slow) as link:
            await next_of(link, LinkDown)
            calls = [
                link.publish("t", b"1", expiry_s=0.0),
                link.publish("t", b"2"),
                link.publish("t", b"3", expiry_s=0.0),
                link.publish("t", b"4", expiry_s=60.0),
            ]
            await asyncio.gather(*calls)

    asyncio.run(scenario())
    assert seen == [b"2", b"4"]


@needs_mosquitto
def test_mosquitto_hands_no_expired_message_to_whoever_comes_back(mosquitto):
    async def scenario() -> None:
        async with linked(mosquitto.port, client_id="expiry-sender") as sender:
            async with linked(mosquitto.port, "expiry/t", client_id="expiry-receiver") as receiver:
                await next_of(receiver, LinkUp)
            await sender.publish("expiry/t", b"short", expiry_s=1.0)
            await sender.publish("expiry/t", b"long", expiry_s=600.0)
            # Mosquitto counts in whole seconds.
            await asyncio.sleep(2.1)
            async with linked(mosquitto.port, "expiry/t", client_id="expiry-receiver") as receiver:
                assert (await next_of(receiver, Delivery)).payload == b"long"
                await keep_quiet()

    asyncio.run(scenario())
