"""One program a state folder: the lock that says who."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from fedge.schemas.closing import Closing
from fedge.schemas.errors import ConfigError, StoreUnavailable

LOCK_FILE = "lock"


class StateLock(Closing):
    """Holds `<state>/lock` so that one program at a time writes a state folder.

    The kernel drops the lock when the process ends, however it ends: there is no stale lock to
    clear. Readers need none. `program`: what to call it in the error.
    Raises `ConfigError` if another process holds it, `StoreUnavailable` if the disk refuses.
    """

    def __init__(self, state_dir: Path, program: str) -> None:
        self.path = state_dir / LOCK_FILE
        try:
            self._file = self.path.open("a+", encoding="ascii")
        except OSError as error:
            passing = error.errno in (errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO)
            kind = StoreUnavailable if passing else ConfigError
            raise kind(f"cannot open the lock {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise ConfigError(
                f"another {program} (process {holder}) uses {state_dir}; stop it, or name "
                "another state folder"
            ) from error
        # The number is for people: on a full disk the lock holds without it.
        with contextlib.suppress(OSError):
            self._file.truncate(0)
            self._file.write(f"{os.getpid()}\n")
            self._file.flush()

    @staticmethod
    def holder(state_dir: Path) -> int | None:
        """The process that serves a state folder now, None if there is none."""
        try:
            with (state_dir / LOCK_FILE).open("r", encoding="ascii") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    # Empty for the moment between locking and writing.
                    return int(file.read() or 0) or None
        except FileNotFoundError:
            return None
        return None

    def close(self) -> None:
        """Lets the next one in. The file stays: removing it would let two processes lock two."""
        # On a full disk the number is still to be written; the file is closed all the same.
        with contextlib.suppress(OSError):
            self._file.close()
