"""Asking another program: bounded in time and in output, and nothing of it is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Sequence

READ_LIMIT_S = 0.5
"""For an answer. The promise to stop within 2 s has two of these in it."""
MAX_OUTPUT_BYTES = 64 * 1024

_STDOUT, _STDERR = 1, 2
_EXIT_S = 1.0
"""What a killed process takes at the most before nobody waits for it any more."""


class NotRead(Exception):  # noqa: N818 -- a finding, which becomes a reading without a value
    """A reading could not be had; the text says why."""


async def answer_of(command: Sequence[str], *, limit_s: float = READ_LIMIT_S) -> bytes:
    """What `command` writes to its stdout.

    Raises `NotRead` if it cannot be started, fails, writes more than `MAX_OUTPUT_BYTES` or takes
    longer than `limit_s`; it and what it started are killed then.
    """
    name = command[0]
    loop = asyncio.get_running_loop()
    try:
        transport, answer = await loop.subprocess_exec(
            _Answer, *command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, start_new_session=True
        )
    except (OSError, ValueError) as error:
        raise NotRead(f"{name} cannot be started: {error}") from error
    has_ended = False
    try:
        async with asyncio.timeout(limit_s):
            await answer.complete
        has_ended = not answer.is_too_long
    except TimeoutError as error:
        raise NotRead(f"{name} took longer than {limit_s:g} s") from error
    finally:
        if not has_ended:
            # Its own session: what it started goes with it.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(transport.get_pid(), signal.SIGKILL)
        # Not `Process.wait`, which waits for pipes that a grandchild may hold.
        transport.close()
        await asyncio.wait([answer.exited], timeout=_EXIT_S)
    if answer.is_too_long:
        raise NotRead(f"{name} wrote more than {MAX_OUTPUT_BYTES} bytes")
    if (status := transport.get_returncode()) != 0:
        why = answer.told[_STDERR].decode(errors="replace").strip().partition("\n")[0][:200]
        raise NotRead(f"{name} ended with exit status {status}{': ' if why else ''}{why}")
    return bytes(answer.told[_STDOUT])


class _Answer(asyncio.SubprocessProtocol):
    """What a program told. `complete`: it has ended and its pipes are closed, or it is too long."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.told = {_STDOUT: bytearray(), _STDERR: bytearray()}
        self.complete: asyncio.Future[None] = loop.create_future()
        self.exited: asyncio.Future[None] = loop.create_future()

    @property
    def is_too_long(self) -> bool:
        return any(len(told) > MAX_OUTPUT_BYTES for told in self.told.values())

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if not self.is_too_long:
            self.told[fd] += data
        if self.is_too_long:
            self._complete()

    def process_exited(self) -> None:
        if not self.exited.done():
            self.exited.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._complete()

    def _complete(self) -> None:
        if not self.complete.done():
            self.complete.set_result(None)
