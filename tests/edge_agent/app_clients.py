"""A service for apps that runs in a thread, and clients of it: http.client, and raw bytes."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedge.edge_agent import machine
from fedge.edge_agent.apps.connection import Bounds
from fedge.edge_agent.apps.server import AppServer
from fedge.edge_agent.eligibility import Standing
from fedge.edge_agent.library import Library
from fedge.edge_agent.settings import Settings
from fedge.edge_agent.storage_watch import StorageWatch

LIMIT_S = 30.0
JSON = "application/json"


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=LIMIT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = connected(self._path)


@dataclass(frozen=True)
class Reply:
    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """Of the error that it must be."""
        found: str = self.json["error"]["code"]
        return found


def connected(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.settimeout(LIMIT_S)
    made.connect(str(path))
    return made


def ask_on(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    asked: Any = None,
    headers: dict[str, str] | None = None,
) -> Reply:
    """One request. `asked`: bytes as they are, None for no body, anything else as JSON."""
    body = asked if asked is None or isinstance(asked, bytes) else json.dumps(asked).encode()
    kind = {} if body is None else {"Content-Type": JSON}
    connection.request(method, path, body, {**kind, **(headers or {})})
    with connection.getresponse() as response:
        return Reply(response.status, response.read(), dict(response.getheaders()))


def read_reply(link: socket.socket, method: str = "GET") -> Reply:
    """The next response on a raw connection; raises as http.client does if it is none."""
    response = http.client.HTTPResponse(link, method=method)
    response.begin()
    return Reply(response.status, response.read(), dict(response.getheaders()))


def raw(path: Path, data: bytes) -> bytes:
    """Sends `data`, ends sending, and returns all that comes until the end."""
    with connected(path) as link:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            link.sendall(data)
            link.shutdown(socket.SHUT_WR)
        return until_the_end(link)


def until_the_end(link: socket.socket) -> bytes:
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while data := link.recv(65536):
            found += data
    return found


@dataclass
class Service:
    """`path`: of its socket. `state`, `standing`: what the agent would say. `changes`: so often it
    was told that texts changed."""

    settings: Settings
    path: Path
    state: machine.Agent = field(default_factory=machine.Agent)
    standing: Standing | None = None
    changes: int = 0

    def ask(
        self, method: str, path: str, asked: Any = None, headers: dict[str, str] | None = None
    ) -> Reply:
        """One request on a connection of its own."""
        with contextlib.closing(UnixConnection(self.path)) as connection:
            return ask_on(connection, method, path, asked, headers)

    def told(self) -> None:
        self.changes += 1


@contextlib.contextmanager
def running_service(
    folder: Path, bounds: Bounds | None = None, *, apps: dict[str, Any] | None = None, **more: Any
) -> Iterator[Service]:
    """A service on a socket in `folder`, on a loop in a thread; it must end without an error."""
    settings = Settings.model_validate(
        {
            "population": "p",
            "device": "d",
            "state_dir": folder / "state",
            "apps": {"socket": "apps.sock"} if apps is None else apps,
            **more,
        }
    )
    settings.state_dir.mkdir(exist_ok=True)
    made = Service(settings, settings.state_dir / "apps.sock")
    listening = threading.Event()
    loop = asyncio.new_event_loop()
    ended: list[BaseException] = []

    async def serve() -> None:
        server = AppServer(
            settings,
            Library(settings.state_dir),
            StorageWatch("d", first_retry_s=0.01),
            state=lambda: made.state,
            standing=lambda: made.standing,
            changed=made.told,
            bounds=bounds,
        )
        task = asyncio.create_task(server.run())
        stopping.append(task)
        wanted = (made.settings.apps.socket is not None) + (made.settings.apps.port is not None)
        while not task.done() and server.listening < wanted:  # noqa: ASYNC110 -- nobody tells
            await asyncio.sleep(0.005)
        listening.set()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    stopping: list[asyncio.Task[None]] = []

    def run() -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(serve())
        except BaseException as error:
            ended.append(error)
            listening.set()
        finally:
            loop.close()

    thread = threading.Thread(target=run, name="service")
    thread.start()
    try:
        assert listening.wait(LIMIT_S)
        if ended:
            raise ended[0]
        yield made
    finally:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(stopping[0].cancel)
        thread.join(LIMIT_S)
        assert not thread.is_alive(), "the service did not end"
    if ended:
        raise ended[0]
