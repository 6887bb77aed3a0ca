"""The network between one program and the broker: a TCP proxy whose faults can be switched.

    async with Proxy("d0", broker.port) as proxy:
        ... the program connects to proxy.port ...
        with proxy.during(Latency(0.2)):       # any number of conditions, also at the same time
            await asyncio.sleep(3)
        proxy.cut_after(Side.UP, 700)          # in the middle of whatever comes

It cuts the stream into MQTT packets for `tampering`, and passes on bytes. Everything of one kit run
is on one event loop: what a tap sees, it sees before the other end does.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tests.brokers import HOST
from tests.chaos.mqtt_wire import Publish, Splitter, WireError
from tests.chaos.ports import reserved_socket
from tests.chaos.tampering import Rule, Sent, Side, Tamper

READ_BYTES = 1 << 16
LANE_LIMIT_BYTES = 1 << 18
"""So much may be under way in one direction; then the sender has to wait, as with TCP."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Everything arrives `delay_s` later, give or take a random part of `jitter_s`, in order."""

    delay_s: float
    jitter_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """At most so many bytes a second in each direction of each connection."""

    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Stall:
    """Nothing moves, as behind a lost radio link; it goes on where it stopped."""


@dataclass(frozen=True, slots=True)
class BlackHole:
    """What is sent vanishes and the connection stays; what has a gap then is reset at the end."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """The connections that are there are reset, and new ones are refused."""


Condition = Latency | Bandwidth | Stall | BlackHole | Refuse | Rule
Tap = Callable[[Side, Publish], None]


class Proxy:
    """A listening port that leads to `target_port`. `name`: whose network it is.

    `tap`: called with each PUBLISH of either direction. `before_up`: called before bytes of the
    program are passed on. `rng`: jitter.
    """

    def __init__(
        self,
        name: str,
        target_port: int,
        *,
        tap: Tap = lambda _side, _message: None,
        before_up: Callable[[], None] = lambda: None,
        rng: random.Random | None = None,
    ) -> None:
        self.name = name
        self.target_port = target_port
        self.tap = tap
        self.before_up = before_up
        self.rng = rng or random.Random(name)
        self.conditions: list[Condition] = []
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.accepted_s: list[float] = []
        self._reserve = reserved_socket()
        self.port: int = self._reserve.getsockname()[1]
        self._server: asyncio.Server | None = None
        self.connections: set[Connection] = set()
        self.failures: list[BaseException] = []
        self._tasks: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------ faults

    @contextlib.contextmanager
    def during(self, condition: Condition) -> Iterator[None]:
        """`condition` holds inside the block."""
        self.conditions.append(condition)
        self._apply()
        try:
            yield
        finally:
            self.conditions.remove(condition)
            self._apply()
            if isinstance(condition, BlackHole):
                self.reset(lambda connection: connection.has_a_gap)

    def reset(self, which: Callable[[Connection], bool] = lambda _: True) -> int:
        """Resets connections; returns how many."""
        chosen = [each for each in self.connections if which(each)]
        for each in chosen:
            each.abort()
        return len(chosen)

    def cut_after(self, side: Side, count: int) -> tuple[Connection, ...]:
        """Resets each connection once `count` more bytes went to `side`; returns them."""
        for each in self.connections:
            each.lanes[side].cut_after = count
        return tuple(self.connections)

    def half_open(self, lost: Side) -> tuple[Connection, ...]:
        """Ends the leg that leads to `lost`, and does not tell the other end; returns whose."""
        for each in self.connections:
            each.lose(lost)
        return tuple(self.connections)

    # ------------------------------------------------------------ what holds now

    @property
    def swallows_bytes(self) -> bool:
        """Whether a black hole is there."""
        return any(isinstance(each, BlackHole) for each in self.conditions)

    def delay_s(self) -> float:
        """How much later the bytes that came now arrive."""
        delays = [each for each in self.conditions if isinstance(each, Latency)]
        return sum(each.delay_s + self.rng.uniform(0, each.jitter_s) for each in delays)

    def bytes_per_s(self) -> float | None:
        """The narrowest limit, None without one."""
        limits = [each.bytes_per_s for each in self.conditions if isinstance(each, Bandwidth)]
        return min(limits, default=None)

    def rules(self) -> tuple[Rule, ...]:
        """What is done to PUBLISH packets."""
        return tuple(each for each in self.conditions if isinstance(each, Rule))

    def _apply(self) -> None:
        stalled = any(isinstance(each, Stall) for each in self.conditions)
        (self.flowing.clear if stalled else self.flowing.set)()
        refused = any(isinstance(each, Refuse) for each in self.conditions)
        if refused and self._server is not None:
            self._server.close()
            self._server = None
            self.reset()
        elif not refused and self._server is None:
            self._keep(self._listen(), f"listen-{self.name}")

    # ------------------------------------------------------------ connections

    async def _listen(self) -> None:
        if self._server is None:
            listener = reserved_socket(self.port)
            self._server = await asyncio.start_server(self._accept, sock=listener)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted_s.append(time.monotonic())
        connection = Connection(self, reader, writer)
        self.connections.add(connection)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            # The end of the proxy cancels it; asyncio 3.11 takes that for a failure and logs it.
            with contextlib.suppress(asyncio.CancelledError):
                await connection.run()
        finally:
            self.connections.discard(connection)
            self._tasks.discard(task)

    def _keep(self, work: object, name: str) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)  # type: ignore[arg-type]
        task.set_name(name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def __aenter__(self) -> Self:
        await self._listen()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._server is not None:
            self._server.close()
        self.flowing.set()
        self.reset()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._reserve.close()


class Connection:
    """One connection of the program and its counterpart at the broker."""

    def __init__(
        self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.proxy = proxy
        self.has_a_gap = False
        self.tamper = Tamper(proxy.rules, proxy.tap)
        self._reader = reader
        self._writer = writer
        self._lost: set[Side] = set()
        self._legs: dict[Side, asyncio.StreamWriter] = {Side.DOWN: writer}
        self.ended = asyncio.Event()
        self.lanes = {side: Lane(self, side) for side in Side}

    async def run(self) -> None:
        """Carries bytes both ways until an end closes or a fault ends it."""
        try:
            reader, writer = await asyncio.open_connection(HOST, self.proxy.target_port)
        except OSError:
            self.abort()
            return
        self._legs[Side.UP] = writer
        works = [
            asyncio.create_task(work)
            for work in (
                self._pump(Side.UP, self._reader),
                self._pump(Side.DOWN, reader),
                self.lanes[Side.UP].drain(writer),
                self.lanes[Side.DOWN].drain(self._writer),
            )
        ]
        try:
            await self.ended.wait()
        finally:
            self.abort()
            for work in works:
                work.cancel()
            ends = await asyncio.gather(*works, return_exceptions=True)
            # A defect of the kit must not look like a fault of the network.
            self.proxy.failures += [end for end in ends if isinstance(end, Exception)]

    def abort(self) -> None:
        """Resets both legs."""
        for writer in self._legs.values():
            _reset(writer)
        self.ended.set()

    def lose(self, lost: Side) -> None:
        """Resets one leg; the other stays until its own end gives up."""
        if lost in self._legs:
            self._lost.add(lost)
            self.has_a_gap = True
            _reset(self._legs[lost])

    def broke(self, side: Side) -> None:
        """The leg to `side` ended by itself."""
        if side not in self._lost:
            self.abort()

    async def _pump(self, side: Side, reader: asyncio.StreamReader) -> None:
        """What comes for `side`, packet by packet, into its lane."""
        splitter = Splitter()
        with contextlib.suppress(OSError, WireError):
            while data := await reader.read(READ_BYTES):
                await self.proxy.flowing.wait()
                if side is Side.UP:
                    self.proxy.before_up()
                if self.proxy.swallows_bytes:
                    self.has_a_gap = True
                if self.has_a_gap:
                    # After a gap nothing that follows would be a packet.
                    continue
                for packet in splitter.feed(data):
                    for sent in self.tamper.pass_on(side, packet):
                        self._send(sent)
                await self.lanes[side].room()
        self.broke(side.reverse)

    def _send(self, sent: Sent) -> None:
        lane = self.lanes[sent.side]
        if sent.delay_s:
            asyncio.get_running_loop().call_later(sent.delay_s, lane.put, sent.data)
        else:
            lane.put(sent.data)


class Lane:
    """Bytes on their way in one direction of one connection."""

    def __init__(self, connection: Connection, side: Side) -> None:
        self.cut_after: int | None = None
        self._connection = connection
        self._side = side
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._bytes = 0
        self._changed = asyncio.Event()
        self._latest_s = 0.0

    def put(self, data: bytes) -> None:
        """Adds bytes; they leave in the order in which they were added."""
        now = asyncio.get_running_loop().time()
        self._latest_s = max(self._latest_s, now + self._connection.proxy.delay_s())
        self._waiting.append((self._latest_s, data))
        self._bytes += len(data)
        self._changed.set()

    async def room(self) -> None:
        """Returns when the lane is not full."""
        while self._bytes > LANE_LIMIT_BYTES:
            self._changed.clear()
            await self._changed.wait()

    async def drain(self, writer: asyncio.StreamWriter) -> None:
        """Writes what was put, as the conditions allow."""
        loop = asyncio.get_running_loop()
        proxy = self._connection.proxy
        with contextlib.suppress(OSError):
            while True:
                while not self._waiting:
                    self._changed.clear()
                    await self._changed.wait()
                ready_s, data = self._waiting[0]
                await asyncio.sleep(max(0.0, ready_s - loop.time()))
                await proxy.flowing.wait()
                await self._write(writer, data)
                self._waiting.popleft()
                self._bytes -= len(data)
                self._changed.set()
        self._connection.broke(self._side)

    async def _write(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        while data:
            limit = self._connection.proxy.bytes_per_s()
            slice_bytes = len(data) if limit is None else max(1, int(limit / 20))
            part, data = data[:slice_bytes], data[slice_bytes:]
            if self.cut_after is not None:
                part = part[: self.cut_after]
                self.cut_after -= len(part)
            writer.write(part)
            await writer.drain()
            if self.cut_after == 0:
                self._connection.abort()
                return
            if limit is not None:
                await asyncio.sleep(len(part) / limit)


def _reset(writer: asyncio.StreamWriter) -> None:
    found = writer.get_extra_info("socket")
    if found is not None:
        with contextlib.suppress(OSError):
            # Without lingering, closing sends RST and not FIN.
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
