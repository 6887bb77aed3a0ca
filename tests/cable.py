"""A TCP relay on 127.0.0.1 that a test can cut and mend: a network between a client and a broker.

async with Cable(broker.port) as cable:
    ... connect to 127.0.0.1:cable.port ...
    await cable.cut()      # every connection dies without a goodbye, new ones are refused
    await cable.mend()
"""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Self

from tests.brokers import HOST, find_free_port


class Cable:
    """Relays bytes both ways until it is cut. `connections` counts the accepted ones."""

    def __init__(self, target_port: int) -> None:
        self.port = find_free_port()
        self.connections = 0
        self._target_port = target_port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._relays: set[asyncio.Task[None]] = set()

    async def mend(self) -> None:
        """Accepts connections (again)."""
        if self._server is None:
            self._server = await asyncio.start_server(
                self._relay, HOST, self.port, reuse_address=True
            )

    async def cut(self) -> None:
        """Resets all connections and refuses new ones."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None
        self.reset()
        if self._relays:
            await asyncio.wait(tuple(self._relays))

    def reset(self) -> None:
        """Resets all connections, but takes new ones."""
        for writer in self._writers:
            writer.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._relays.add(task)
        self._writers.add(writer)
        try:
            with contextlib.suppress(OSError):
                far_reader, far_writer = await asyncio.open_connection(HOST, self._target_port)
                self._writers.add(far_writer)
                async with asyncio.TaskGroup() as group:
                    group.create_task(_copy(reader, far_writer))
                    group.create_task(_copy(far_reader, writer))
                self._writers.discard(far_writer)
        finally:
            self._writers.discard(writer)
            self._relays.discard(task)
            writer.transport.abort()

    async def __aenter__(self) -> Self:
        await self.mend()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.cut()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(256 * 1024):
            writer.write(data)
            await writer.drain()
    # Either end's end is the end of both: MQTT has no half-closed connections.
    writer.transport.abort()
