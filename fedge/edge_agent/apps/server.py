"""The service of one agent: its sockets, the connections on them, and what they may cost.

Runs in the agent's event loop. A connection that fails ends by itself; only a socket that cannot be
had ends the agent, at its start, where somebody sees it.
"""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from fedge.edge_agent.apps import contract
from fedge.edge_agent.apps.admission import Door, Operation
from fedge.edge_agent.apps.connection import (
    BUFFER_BYTES,
    AppConnection,
    Bounds,
    Reply,
    reply_to_refused,
)
from fedge.edge_agent.apps.listening import Listener, tcp_listener, unix_listener
from fedge.edge_agent.apps.operations import Operations
from fedge.edge_agent.apps.refusals import Refused, not_now
from fedge.edge_agent.apps.settings import AppsSettings
from fedge.edge_agent.apps.status import status_of
from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.eligibility import Standing
from fedge.edge_agent.example_store import FILE_NAME
from fedge.edge_agent.library import Library
from fedge.edge_agent.machine import Agent
from fedge.edge_agent.serving import Served
from fedge.edge_agent.settings import Settings
from fedge.edge_agent.storage_watch import StorageWatch
from fedge.schemas.errors import StoreError
from fedge.schemas.logs import EventLog

log = EventLog(__name__)

TELL_AGAIN_S = 60.0
"""Between two log lines about refusals of one kind: a program that floods must not fill the log."""
_QUEUE = 64
"""Connections that the operating system takes before the agent does: one after this is refused, or
told that it would have to wait, without a word on why."""
_TOLD = frozenset({401, 403, 408, 500, 503})
"""What whoever runs the agent should know of; the rest is between the app and its author."""


_Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter, Door], Coroutine[Any, Any, None]]


class AppServer:
    """The service that `settings.apps` asks for.

    `state`, `standing`: the agent's, as they are now. `changed`: told on the event loop that texts
    were added or forgotten. `storage`: a full disk delays the start, and no more.

    `listening`: on how many of its sockets apps can connect by now.
    """

    def __init__(
        self,
        settings: Settings,
        library: Library,
        storage: StorageWatch,
        *,
        state: Callable[[], Agent],
        standing: Callable[[], Standing | None],
        changed: Callable[[], None],
        bounds: Bounds | None = None,
    ) -> None:
        self._device = settings.device
        self._data: DataConfig | None = settings.data
        self._apps: AppsSettings = settings.apps
        self._state_dir = settings.state_dir
        self._storage = storage
        self._bounds = bounds or Bounds(settings.apps.body_limit_bytes)

        def in_use() -> int | None:
            try:
                active = library.active()
            except StoreError:
                return None
            return None if active is None else active.version

        def tell(kept: contract.KeptTexts | None, version: int | None) -> contract.Status:
            return status_of(
                settings.device, settings.population,
                state=state(), standing=standing(), kept=kept, in_use=version,
            )  # fmt: skip

        self._operations = Operations(
            settings.state_dir / FILE_NAME,
            settings.examples.limits,
            Served(library),
            in_use=in_use,
            tell=tell,
            changed=changed,
        )
        self._refusals = _Refusals(settings.device)
        self._look = asyncio.Event()
        self.listening = 0

    def look_again(self) -> None:
        """Another model may be in use now: the next question should be its own."""
        self._look.set()

    async def run(self) -> None:
        """Serves until cancelled.

        Raises `ConfigError` if a socket or the token cannot be had, saying why.
        """
        self._say_what_texts_are_for()
        listeners = await self._storage.until_done("apps", self._opened)
        servers: list[asyncio.Server] = []
        try:
            async with asyncio.TaskGroup() as group:
                for listener in listeners:
                    accepting = _Accepting(self._apps.connections, self._serve, listener, group)
                    servers.append(await accepting.start())
                    self.listening += 1
                    log.info(
                        "apps_listening", device=self._device,
                        door=listener.door.name, place=listener.place,
                    )  # fmt: skip
                while True:
                    await self._look.wait()
                    self._look.clear()
                    await asyncio.to_thread(self._operations.look)
        finally:
            for server in servers:
                server.close()
            for listener in listeners:
                listener.close()
            await asyncio.to_thread(self._operations.close)

    def _say_what_texts_are_for(self) -> None:
        kept, data = self._state_dir / FILE_NAME, self._data
        if data is not None and data.is_store and data.path.resolve() == kept.resolve():
            return
        log.warning(
            "texts_not_trained_on", device=self._device, kept=str(kept),
            trained_on=None if data is None else str(data.path),
        )  # fmt: skip

    async def _opened(self) -> list[Listener]:
        apps, found = self._apps, list[Listener]()
        with contextlib.ExitStack() as stack:
            if apps.socket is not None:
                found.append(unix_listener(self._state_dir / apps.socket))
                stack.callback(found[-1].close)
            if apps.port is not None:
                found.append(tcp_listener(apps.port, self._state_dir / apps.token_file))
            stack.pop_all()
        return found

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, door: Door
    ) -> None:
        connection = AppConnection(
            reader,
            writer,
            door=door,
            bounds=self._bounds,
            perform=self._perform,
            refused=lambda refused: self._refusals.count(door, refused),
        )
        try:
            await connection.serve()
        except Exception as error:  # noqa: BLE001 -- a fault of ours must not end the agent
            self._log_fault(error)

    async def _perform(self, operation: Operation, body: bytes) -> Reply:
        try:
            return await self._operations.perform(operation, body)
        except Refused:
            raise
        except Exception as error:
            self._log_fault(error)
            message = "the agent failed; its log says where"
            raise Refused(500, "failed", message) from error

    def _log_fault(self, error: Exception) -> None:
        # Where, and not what: the words of an exception may be somebody's.
        last = traceback.extract_tb(error.__traceback__)[-1]
        log.error(
            "apps_fault", device=self._device, error=type(error).__name__,
            file=Path(last.filename).name, line=last.lineno,
        )  # fmt: skip


class _Accepting:
    """The connections of one listener, at most `limit` at once; one more is told to come again."""

    def __init__(
        self,
        limit: int,
        serve: _Serve,
        listener: Listener,
        group: asyncio.TaskGroup,
    ) -> None:
        self._limit = limit
        self._serve = serve
        self._listener = listener
        self._group = group
        self._open = 0

    async def start(self) -> asyncio.Server:
        """Begins to listen."""
        begin = asyncio.start_server if self._listener.file is None else asyncio.start_unix_server
        return await begin(
            self._connected, sock=self._listener.socket, limit=BUFFER_BYTES, backlog=_QUEUE
        )

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._open >= self._limit:
            writer.write(_full())
            writer.close()
            return
        self._open += 1
        door = self._listener.door
        task = self._group.create_task(self._serve(reader, writer, door), name=f"app-{door.name}")
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._open -= 1


def _full() -> bytes:
    """Said without a look at the request: nothing is read for one connection too many."""
    reply = reply_to_refused(not_now("too_many_connections", "close others, or try again"))
    head = f"HTTP/1.1 {reply.status} \r\nContent-Length: {len(reply.body)}\r\n"
    head += "Content-Type: application/json\r\nConnection: close\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in reply.headers)
    return f"{head}\r\n".encode() + reply.body


class _Refusals:
    """Logs refusals that matter, each kind at most once in `TELL_AGAIN_S`, with how many."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._counts: Counter[tuple[str, str]] = Counter()
        self._next_s: dict[tuple[str, str], float] = {}

    def count(self, door: Door, refused: Refused) -> None:
        """One more."""
        if refused.status not in _TOLD:
            return
        kind = (door.name, refused.code)
        self._counts[kind] += 1
        now_s = asyncio.get_running_loop().time()
        if now_s < self._next_s.get(kind, now_s):
            return
        self._next_s[kind] = now_s + TELL_AGAIN_S
        log.warning(
            "app_refused", device=self._device, door=door.name, status=refused.status,
            reason=refused.code, times=self._counts.pop(kind),
            detail=refused.message if refused.status == 500 else None,
        )  # fmt: skip
