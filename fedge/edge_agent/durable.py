"""Files that are either the old ones or the new ones, whatever the moment of a power cut."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from fedge.schemas.errors import StoreError, StoreUnavailable

_PASSING = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES),
        *(errno.EPERM, errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.ENOTCONN),
        *(errno.EBUSY, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    }
)
"""What may be otherwise when a write is tried again: a full disk, a quota, a lost mount (whose
folders are gone with it), too many open files."""


@contextlib.contextmanager
def disk(what: str) -> Iterator[None]:
    """Turns an `OSError` of a write into `StoreUnavailable`, or `StoreError` if it will not pass.

    `what`: what could not be done, for the message.
    """
    try:
        yield
    except OSError as error:
        kind = StoreUnavailable if error.errno in _PASSING else StoreError
        raise kind(f"cannot {what}: {error.strerror or error} ({error.errno})") from error


def partial_of(path: Path) -> Path:
    """Where `replace_file` writes before it renames: what a killed process may leave behind."""
    return path.with_name(f".{path.name}.part")


def is_partial(path: Path) -> bool:
    """Whether `replace_file` makes such names: at a start, what is left under them is rubbish."""
    return path.name.startswith(".") and path.name.endswith(".part")


def replace_file(path: Path, data: bytes, *, private: bool = False) -> None:
    """Makes `path` hold `data`: written beside it, synced, renamed, the folder synced.

    `private`: readable by this user alone, from its first moment on.

    One process at a time may write a path. Raises `StoreError`, or `StoreUnavailable` for a disk
    that cannot be written now; `path` is as it was then, and nothing is left beside it.
    """
    partial = partial_of(path)
    with disk(f"write {path}"):
        try:
            # What a killed process left may be readable by others.
            partial.unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with os.fdopen(os.open(partial, flags, 0o600 if private else 0o666), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            # What cannot even be removed now is overwritten next time.
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
