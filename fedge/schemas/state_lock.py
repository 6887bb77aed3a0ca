"""One program a state folder: the lock that says who."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path
from typing import IO

from fedge.schemas.closing import Closing
from fedge.schemas.errors import ConfigError, StoreUnavailable

LOCK_FILE = "lock"
LOOKED_AT_S = 0.3
"""A lock that cannot be had for so long is held, and not only looked at."""


class StateLock(Closing):
    """Holds `<state>/lock` so that one program at a time writes a state folder.

    The kernel drops the lock when the process ends, however it ends: there is no stale lock to
    clear. Readers need none. `program`: what to call it in the error. `serves`: whether it is what
    `holder` looks for, which other programs may send signals to.
    Raises `ConfigError` if another process holds it, `StoreUnavailable` if the disk refuses.
    """

    def __init__(self, state_dir: Path, program: str, *, serves: bool = True) -> None:
        self.path = state_dir / LOCK_FILE
        try:
            self._file = self.path.open("a+", encoding="ascii")
        except OSError as error:
            passing = error.errno in (errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO)
            kind = StoreUnavailable if passing else ConfigError
            raise kind(f"cannot open the lock {self.path}: {error.strerror}") from error
        if not self._taken():
            number, what = _read(self._file)
            self._file.close()
            other = f"another {program}" if what in ("", program) else f"a {what}"
            raise ConfigError(
                f"{other} (process {number or 'unknown'}) uses {state_dir}; stop it, or name "
                "another state folder"
            )
        # The number is for people: on a full disk the lock holds without it.
        with contextlib.suppress(OSError):
            self._file.truncate(0)
            # What serves has a line alone, as in releases that knew nothing else.
            self._file.write(f"{os.getpid()}\n" if serves else f"{os.getpid()}\n{program}\n")
            self._file.flush()

    def _taken(self) -> bool:
        give_up = time.monotonic() + LOOKED_AT_S
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= give_up:
                    return False
                time.sleep(LOOKED_AT_S / 20)
            else:
                return True

    @staticmethod
    def holder(state_dir: Path) -> int | None:
        """The process that serves a state folder now, None if there is none.

        To look it takes the lock for an instant, shared; whoever wants it then tries again.
        """
        try:
            with (state_dir / LOCK_FILE).open("r", encoding="ascii") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    number, what = _read(file)
                    return None if what else number
        except FileNotFoundError:
            return None
        return None

    def close(self) -> None:
        """Lets the next one in. The file stays: removing it would let two processes lock two."""
        # On a full disk the number is still to be written; the file is closed all the same.
        with contextlib.suppress(OSError):
            self._file.close()


def _read(file: IO[str]) -> tuple[int | None, str]:
    """Who holds a lock, and what it is where that does not serve."""
    file.seek(0)
    # Empty for the moment between locking and writing.
    number, _, what = file.read().partition("\n")
    return int(number or 0) or None, what.strip()
