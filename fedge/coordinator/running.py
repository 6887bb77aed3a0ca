"""The coordinator that serves a state folder now, as commands beside it know it."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from fedge.schemas.errors import ConfigError
from fedge.schemas.state_lock import StateLock


def coordinator_of(state_dir: Path) -> int | None:
    """The process that serves this state folder, None if there is none."""
    return StateLock.holder(state_dir)


def tell_to_look(state_dir: Path) -> int | None:
    """Has the coordinator look for what a command has put into the store.

    Its process, None if there is none. Raises `ConfigError` if it is another user's.
    """
    pid = coordinator_of(state_dir)
    if pid is None:
        return None
    with contextlib.suppress(ProcessLookupError):
        try:
            os.kill(pid, signal.SIGHUP)
        except PermissionError as error:
            raise ConfigError(
                f"the coordinator (process {pid}) runs as another user: send it SIGHUP"
            ) from error
        return pid
    return None
