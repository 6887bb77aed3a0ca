"""The moments at which something becomes durable: where a process can be killed, or a disk refuse.

Between two callbacks of a loop nothing is half-written; inside of one, a file may have its name and
its row in the database not yet. So every sync, rename and commit of the code under test comes by
here, before and after. What a simulated process has running is known from `World.running`; what the
test itself reads and writes is left alone.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from sqlalchemy import Connection

from fedge.coordinator.store.database import Database
from fedge.edge_agent.state import AgentState
from fedge.schemas import state_lock
from fedge.schemas.errors import StoreUnavailable
from tests.model.world import Killed, World

_WRITES = ("INSERT", "UPDATE", "DELETE", "COMMIT")


class DurableSteps:
    """Watches the durable steps of a world's processes until `close`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._patches = ExitStack()
        patch = self._patches.enter_context
        # In memory, a sync would cost time and change nothing.
        patch(mock.patch.object(os, "fsync", self._between(lambda descriptor: None)))
        patch(mock.patch.object(os, "replace", self._between(os.replace)))
        patch(mock.patch.object(Database, "write", self._transaction(Database.write)))
        patch(mock.patch.object(AgentState, "_run", self._statement(AgentState._run)))
        # The kernel drops the lock of a process that is killed; all of these are one process.
        patch(mock.patch.object(state_lock.fcntl, "flock", return_value=None))

    def close(self) -> None:
        """Lets everything be as it was."""
        self._patches.close()

    def _between(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def acts(*args: Any, **named: Any) -> Any:
            self._may_be_killed()
            if self._refused:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            result = act(*args, **named)
            self._may_be_killed()
            return result

        return acts

    def _transaction(self, plain: Callable[[Database], Any]) -> Callable[[Database], Any]:
        @contextmanager
        def write(database: Database) -> Iterator[Connection]:
            self._may_be_killed()
            if self._refused:
                raise StoreUnavailable("the database or disk is full")
            with plain(database) as connection:
                yield connection
            self._may_be_killed()

        return write

    def _statement(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def run(state: AgentState, statement: str, *values: object) -> Any:
            if not statement.startswith(_WRITES):
                return plain(state, statement, *values)
            self._may_be_killed()
            if self._refused:
                raise StoreUnavailable("the database or disk is full")
            result = plain(state, statement, *values)
            self._may_be_killed()
            return result

        return run

    @property
    def _refused(self) -> bool:
        return self._world.running is not None and self._world.running.disk_refuses

    def _may_be_killed(self) -> None:
        process = self._world.running
        if process is None or process.steps_to_live is None:
            return
        process.steps_to_live -= 1
        if process.steps_to_live < 0:
            process.steps_to_live = None
            raise Killed(0)
