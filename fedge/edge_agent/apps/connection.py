"""One connection of an app: bytes ↔ requests, one after the other.

h11 knows HTTP's syntax and its states; here are the bounds that it leaves open: how long a request
may take to come, how large it may be, how long a client may take to read its answer, and what is
left on the line when one is refused. Requests that are sent ahead ("pipelining") wait on the line
until it is their turn, where they cost nobody more than the socket's buffers. What is asked and
what is answered is not known here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any, TypeAlias

import h11

from fedge.edge_agent.apps.admission import Admitted, Door, Head, Operation, admit, too_large
from fedge.edge_agent.apps.contract import Failure, Problem
from fedge.edge_agent.apps.refusals import Refused

_READ_BYTES = 16_384
BUFFER_BYTES = 16_384
"""Of a connection's reader: it takes twice as much from the socket before it waits."""
_LINGER_BYTES = 16 * 1024 * 1024
_VERSIONS = (b"1.0", b"1.1")


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a connection may take, in seconds and bytes.

    `request_s`: from the first byte of a request to its last; for the first one, from the beginning
    of the connection. `idle_s`: between two requests. `write_s`: until the client has taken its
    answer. `linger_s`: in which the rest of a refused request is thrown away, so that the refusal
    is read. `body_bytes`: of one request; with all that chunks bring along, a little more than
    twice of that.
    """

    body_bytes: int
    head_bytes: int = 16_384
    request_s: float = 10.0
    idle_s: float = 60.0
    write_s: float = 10.0
    linger_s: float = 2.0


@dataclass(frozen=True, slots=True)
class Reply:
    """What goes back. `body`: JSON."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


Perform: TypeAlias = Callable[[Operation, bytes], Awaitable[Reply]]
"""What is asked, with the body's bytes → the reply. Raises `Refused`."""


def reply_to_refused(refused: Refused) -> Reply:
    """The body that says why."""
    problem = Failure(error=Problem(code=refused.code, message=refused.message))
    return Reply(refused.status, problem.model_dump_json().encode(), refused.headers)


class _Gone(Exception):  # noqa: N818 -- an end
    """The client is not there any more, or has nothing to say: no answer is owed."""


class AppConnection:
    """Serves the requests of one connection until it ends.

    `perform`: see `Perform`. `refused`: told of each refusal, for the log.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        door: Door,
        bounds: Bounds,
        perform: Perform,
        refused: Callable[[Refused], None],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._door = door
        self._bounds = bounds
        self._perform = perform
        self._refused = refused
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=bounds.head_bytes)
        self._method = b""
        self._unread = False

    async def serve(self) -> None:
        """Returns when the connection is closed; a client's errors end nothing but itself."""
        try:
            idle_s = self._bounds.request_s
            while await self._serve_one(idle_s):
                self._http.start_next_cycle()
                idle_s = self._bounds.idle_s
            await self._close()
        except (_Gone, ConnectionError, TimeoutError):
            pass
        finally:
            # Nothing if it is closed; what the client did not take goes with it.
            self._writer.transport.abort()

    async def _serve_one(self, idle_s: float) -> bool:
        """Whether another request may follow."""
        try:
            reply = await self._reply(idle_s)
        except Refused as refused:
            reply = self._refusal(refused)
        except h11.RemoteProtocolError as error:
            reply = self._refusal(_refusal_of_syntax(error))
        await self._send(reply)
        return self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

    def _refusal(self, refused: Refused) -> Reply:
        self._refused(refused)
        return reply_to_refused(refused)

    # ------------------------------------------------------------ reading

    async def _reply(self, idle_s: float) -> Reply:
        await self._wait_for_bytes(idle_s)
        try:
            async with asyncio.timeout(self._bounds.request_s):
                admitted = admit(await self._head(), self._door, self._bounds.body_bytes)
                body = await self._body(admitted)
        except TimeoutError as error:
            raise Refused(
                408, "too_slow", f"a request must come within {self._bounds.request_s:g} s"
            ) from error
        return await self._perform(admitted.operation, body)

    async def _wait_for_bytes(self, idle_s: float) -> None:
        """Until a request begins; one that was sent ahead has begun."""
        sent_ahead, _ = self._http.trailing_data
        if sent_ahead:
            return
        async with asyncio.timeout(idle_s):
            await self._take_bytes()

    async def _head(self) -> Head:
        event = await self._event()
        if not isinstance(event, h11.Request):
            raise _Gone
        self._method = event.method
        if event.http_version not in _VERSIONS:
            raise Refused(400, "not_http", "this is not a request of HTTP/1.1")
        return Head(event.method, event.target, tuple(event.headers))

    async def _body(self, admitted: Admitted) -> bytes:
        if self._http.they_are_waiting_for_100_continue:
            going_on = h11.InformationalResponse(status_code=100, headers=[])
            await self._write(self._http.send(going_on))
        body = bytearray()
        limit_bytes = self._bounds.body_bytes
        allowance = 2 * limit_bytes + _READ_BYTES
        while True:
            event = self._http.next_event()
            match event:
                case h11.NEED_DATA:
                    # Of chunks, most can be their lengths.
                    allowance -= await self._take_bytes()
                    if allowance < 0:
                        raise too_large(limit_bytes)
                case h11.Data():
                    body += event.data
                    if len(body) > limit_bytes:
                        raise too_large(limit_bytes)
                case h11.EndOfMessage():
                    return bytes(body)
                case _:
                    raise _Gone

    async def _event(self) -> Any:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            await self._take_bytes()
        return event

    async def _take_bytes(self) -> int:
        data = await self._reader.read(_READ_BYTES)
        # A reader that has something returns at once: others must have their turn, too.
        await asyncio.sleep(0)
        if not data and self._http.their_state is h11.IDLE and not self._http.trailing_data[0]:
            raise _Gone
        self._http.receive_data(data)
        return len(data)

    # ------------------------------------------------------------ writing

    async def _send(self, reply: Reply) -> None:
        headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(reply.body))),
            ("Date", formatdate(usegmt=True)),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            *reply.headers,
        ]
        self._unread = self._http.their_state in (h11.IDLE, h11.SEND_BODY, h11.ERROR)
        if self._unread:
            headers.append(("Connection", "close"))
        data = self._http.send(h11.Response(status_code=reply.status, headers=headers))
        if self._method != b"HEAD":
            data += self._http.send(h11.Data(data=reply.body))
        data += self._http.send(h11.EndOfMessage())
        await self._write(data)

    async def _write(self, data: bytes | None) -> None:
        self._writer.write(data or b"")
        async with asyncio.timeout(self._bounds.write_s):
            await self._writer.drain()

    async def _close(self) -> None:
        if self._unread:
            await self._throw_away_the_rest()
        self._writer.close()
        async with asyncio.timeout(self._bounds.write_s):
            await self._writer.wait_closed()

    async def _throw_away_the_rest(self) -> None:
        """A socket that is closed with bytes unread may take the answer away from its reader."""
        self._writer.write_eof()
        left_bytes = _LINGER_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._bounds.linger_s):
                while left_bytes > 0 and (data := await self._reader.read(_READ_BYTES)):
                    left_bytes -= len(data)
                    await asyncio.sleep(0)


def _refusal_of_syntax(error: h11.RemoteProtocolError) -> Refused:
    if error.error_status_hint == 431:
        return Refused(431, "head_too_large", "the request's head is too large")
    return Refused(400, "not_http", f"this is not a request of HTTP/1.1: {str(error)[:200]}")
