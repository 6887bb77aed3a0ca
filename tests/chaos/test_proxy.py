"""The proxy's faults do what their names say, against a server that says everything again."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine

import pytest

from tests.brokers import HOST
from tests.chaos.mqtt_wire import (
    PacketType,
    Publish,
    Splitter,
    acknowledged_id,
    connect,
    packet,
    packet_type,
    parse_publish,
    puback,
    publish,
)
from tests.chaos.ports import free_port
from tests.chaos.proxy import Bandwidth, BlackHole, Latency, Proxy, Refuse, Stall
from tests.chaos.tampering import Mischief, Rule, Side

LIMIT_S = 10.0


class Peer:
    """One end of a connection, which sends and receives whole packets."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self._reader = reader
        self._splitter = Splitter()
        self._packets: list[bytes] = []

    def send(self, *packets: bytes) -> None:
        self.writer.write(b"".join(packets))

    async def receive(self) -> bytes:
        """The next packet; empty at the end of the connection."""
        while not self._packets:
            data = await self._reader.read(1 << 16)
            if not data:
                return b""
            self._packets += self._splitter.feed(data)
        return self._packets.pop(0)

    async def receives_within(self, limit_s: float) -> bytes | None:
        try:
            async with asyncio.timeout(limit_s):
                return await self.receive()
        except TimeoutError:
            return None


class Bench:
    """A proxy before a listener that hands out the far ends."""

    def __init__(self, proxy: Proxy, far: asyncio.Queue[Peer], tapped: list[Publish]) -> None:
        self.proxy = proxy
        self.tapped = tapped
        self._far = far

    async def pair(self) -> tuple[Peer, Peer]:
        """A new connection: the program's end and the broker's."""
        near = Peer(*await asyncio.open_connection(HOST, self.proxy.port))
        return near, await self._far.get()


@contextlib.asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    far: asyncio.Queue[Peer] = asyncio.Queue()
    port = free_port()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far.put_nowait(Peer(reader, writer))

    server = await asyncio.start_server(accept, HOST, port)
    tapped: list[Publish] = []
    proxy = Proxy("test", port, tap=lambda _side, message: tapped.append(message))
    async with proxy:
        yield Bench(proxy, far, tapped)
    server.close()
    assert proxy.failures == []


def on_a_bench(test: Callable[[Bench], Coroutine[object, object, None]]) -> Callable[[], None]:
    def run() -> None:
        async def work() -> None:
            async with asyncio.timeout(LIMIT_S), bench() as made:
                await test(made)

        asyncio.run(work())

    run.__name__ = test.__name__
    return run


HELLO = publish("up/d0/offer", b"hello", 7)


@on_a_bench
async def test_without_a_fault_bytes_go_both_ways(made: Bench):
    near, far = await made.pair()
    near.send(connect("d0"), HELLO)
    assert await far.receive() == connect("d0")
    assert await far.receive() == HELLO
    far.send(puback(7))
    assert await near.receive() == puback(7)
    assert [message.payload for message in made.tapped] == [b"hello"]


@on_a_bench
async def test_latency_delays_and_keeps_the_order(made: Bench):
    near, far = await made.pair()
    with made.proxy.during(Latency(0.2, jitter_s=0.1)):
        began = time.monotonic()
        near.send(*(publish("t", bytes([i]), i + 1) for i in range(20)))
        received = [parse_publish(await far.receive(), v5=False) for _ in range(20)]
    assert time.monotonic() - began >= 0.2
    assert [message.payload for message in received] == [bytes([i]) for i in range(20)]


@on_a_bench
async def test_a_narrow_link_takes_its_time(made: Bench):
    near, far = await made.pair()
    with made.proxy.during(Bandwidth(10_000)):
        began = time.monotonic()
        near.send(publish("t", bytes(4000), 1))
        assert len(await far.receive()) > 4000
    assert time.monotonic() - began >= 0.35


@on_a_bench
async def test_a_stall_holds_everything_and_loses_nothing(made: Bench):
    near, far = await made.pair()
    with made.proxy.during(Stall()):
        near.send(HELLO)
        assert await far.receives_within(0.2) is None
    assert await far.receive() == HELLO


@on_a_bench
async def test_a_black_hole_swallows_keeps_the_connection_and_resets_it_in_the_end(made: Bench):
    near, far = await made.pair()
    with made.proxy.during(BlackHole()):
        near.send(HELLO)
        assert await far.receives_within(0.2) is None
        assert await near.receives_within(0.05) is None
    with pytest.raises(ConnectionResetError):
        await near.receive()
    near, far = await made.pair()
    near.send(HELLO)
    assert await far.receive() == HELLO


@on_a_bench
async def test_a_black_hole_without_traffic_leaves_the_connection_alone(made: Bench):
    near, far = await made.pair()
    with made.proxy.during(BlackHole()):
        await asyncio.sleep(0.05)
    near.send(HELLO)
    assert await far.receive() == HELLO


@on_a_bench
async def test_a_reset_ends_both_ends(made: Bench):
    near, far = await made.pair()
    assert made.proxy.reset() == 1
    for peer in (near, far):
        with pytest.raises(ConnectionResetError):
            await peer.receive()


@pytest.mark.parametrize("count", [0, 1, 5, 40])
def test_a_cut_lets_so_many_bytes_through_and_no_more(count: int):
    async def work() -> None:
        async with asyncio.timeout(LIMIT_S), bench() as made:
            near = await asyncio.open_connection(HOST, made.proxy.port)
            far = await made._far.get()
            assert len(made.proxy.cut_after(Side.UP, count)) == 1
            near[1].write(publish("t", bytes(100), 1))
            got = b""
            with contextlib.suppress(ConnectionResetError):
                while data := await far._reader.read(1000):
                    got += data
            # A reset may overtake bytes that were on their way; more than so many never come.
            assert len(got) <= count
            with pytest.raises(ConnectionResetError):
                await near[0].readexactly(1)

    asyncio.run(work())


@on_a_bench
async def test_a_refusing_port_refuses_and_comes_back_on_the_same_port(made: Bench):
    near, _ = await made.pair()
    with made.proxy.during(Refuse()):
        with pytest.raises(ConnectionResetError):
            await near.receive()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(HOST, made.proxy.port)
    await asyncio.sleep(0)
    near, far = await made.pair()
    near.send(HELLO)
    assert await far.receive() == HELLO


@pytest.mark.parametrize("lost", list(Side))
def test_half_open_ends_one_end_and_tells_the_other_nothing(lost: Side):
    async def work() -> None:
        async with asyncio.timeout(LIMIT_S), bench() as made:
            near, far = await made.pair()
            gone, deceived = (far, near) if lost is Side.UP else (near, far)
            (connection,) = made.proxy.half_open(lost)
            with pytest.raises(ConnectionResetError):
                await gone.receive()
            deceived.send(HELLO)
            assert await deceived.receives_within(0.2) is None
            # The deceived end gives up by itself, and nothing of the connection is left.
            assert not connection.ended.is_set()
            deceived.writer.transport.abort()
            await connection.ended.wait()

    asyncio.run(work())


def rule(mischief: Mischief, side: Side, **changes: object) -> Rule:
    fields: dict[str, object] = {"share": 1.0, "rng": random.Random(1)}
    return Rule(mischief, side, **{**fields, **changes})  # type: ignore[arg-type] # by name


@on_a_bench
async def test_a_swallowed_publish_is_acknowledged_and_does_not_arrive(made: Bench):
    near, far = await made.pair()
    near.send(connect("d0"))
    await far.receive()
    with made.proxy.during(rule(Mischief.SWALLOW, Side.UP)):
        near.send(publish("t", b"lost", 9))
        answer = await near.receive()
    assert (packet_type(answer), acknowledged_id(answer)) == (PacketType.PUBACK, 9)
    near.send(publish("t", b"kept", 10))
    assert parse_publish(await far.receive(), v5=False).payload == b"kept"


@on_a_bench
async def test_a_swallowed_delivery_is_acknowledged_to_the_broker(made: Bench):
    near, far = await made.pair()
    with made.proxy.during(rule(Mischief.SWALLOW, Side.DOWN)):
        far.send(publish("t", b"lost", 3))
        assert acknowledged_id(await far.receive()) == 3
        assert await near.receives_within(0.1) is None


@on_a_bench
async def test_a_doubled_publish_comes_twice_and_is_answered_once(made: Bench):
    near, far = await made.pair()
    with made.proxy.during(rule(Mischief.DOUBLE, Side.UP)):
        near.send(publish("t", b"x", 4))
        first, second = await far.receive(), await far.receive()
    assert first == publish("t", b"x", 4)
    assert second[0] & 0x08
    assert second[1:] == first[1:]
    far.send(puback(4), puback(4), packet(PacketType.PINGRESP))
    assert await near.receive() == puback(4)
    assert await near.receive() == packet(PacketType.PINGRESP)


@on_a_bench
async def test_a_delayed_publish_is_overtaken(made: Bench):
    near, far = await made.pair()
    with made.proxy.during(rule(Mischief.DELAY, Side.UP, delay_s=0.2, kinds=("slow",))):
        near.send(publish("slow", b"1", 1), publish("fast", b"2", 2))
        order = [parse_publish(await far.receive(), v5=False).topic for _ in range(2)]
    assert order == ["fast", "slow"]


@on_a_bench
async def test_a_rule_touches_only_its_kinds_and_its_share(made: Bench):
    near, far = await made.pair()
    with made.proxy.during(rule(Mischief.SWALLOW, Side.UP, share=0.5, kinds=("half",))):
        near.send(*(publish("half", b"", i) for i in range(1, 101)), publish("whole", b"", 101))
        topics = []
        while (topic := parse_publish(await far.receive(), v5=False).topic) != "whole":
            topics.append(topic)
    assert 20 < len(topics) < 80


@on_a_bench
async def test_faults_add_up_and_end_one_by_one(made: Bench):
    near, far = await made.pair()
    with made.proxy.during(Stall()):
        with made.proxy.during(Stall()):
            near.send(HELLO)
        assert await far.receives_within(0.1) is None
    assert await far.receive() == HELLO


def test_packets_are_cut_out_of_any_stream():
    packets = [connect("a"), publish("t", bytes(300), 5), puback(5), publish("u", b"")]
    stream = b"".join(packets)
    for size in (1, 2, 3, 7, len(stream)):
        splitter = Splitter()
        found = [
            each
            for start in range(0, len(stream), size)
            for each in splitter.feed(stream[start : start + size])
        ]
        assert found == packets


def test_a_publish_of_version_5_is_parsed_behind_its_properties():
    body = b"\x00\x01t" + b"\x00\x09" + b"\x05\x02\x00\x00\x00\x3c" + b"payload"
    message = parse_publish(packet(PacketType.PUBLISH, body, flags=0x03), v5=True)
    assert message == Publish("t", b"payload", 9, retained=True)
