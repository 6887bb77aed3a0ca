"""The coordinator that serves a state folder now, as commands beside it know it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

import click

from fedge.schemas.errors import ConfigError
from fedge.schemas.state_lock import StateLock


def coordinator_of(state_dir: Path) -> int | None:
    """The process that serves this state folder, None if there is none."""
    return StateLock.holder(state_dir)


def reachable_coordinator(state_dir: Path) -> int | None:
    """The same, for who is about to put something into its store that it should look for.

    Raises `ConfigError` if it is another user's, and could not be told.
    """
    pid = coordinator_of(state_dir)
    with contextlib.suppress(ProcessLookupError):
        try:
            if pid is not None:
                os.kill(pid, 0)
        except PermissionError as error:
            raise ConfigError(
                f"the coordinator (process {pid}) runs as another user, and nothing was asked of "
                "it: do this as that user"
            ) from error
        return pid
    return None


def tell_to_look(state_dir: Path) -> int | None:
    """Has the coordinator look for what a command has put into the store: the command's last act.

    Its process, None if there is none. If it is another user's, says so and ends the command
    without an error: what is in the store stays, and whoever tries again would put it there twice.
    """
    pid = coordinator_of(state_dir)
    if pid is None:
        return None
    with contextlib.suppress(ProcessLookupError):
        try:
            os.kill(pid, signal.SIGHUP)
        except PermissionError:
            click.echo(
                f"stored, but the coordinator (process {pid}) runs as another user and was not "
                "told: send it SIGHUP as that user, or it looks at its next start",
                err=True,
            )
            sys.exit(0)
        return pid
    return None
