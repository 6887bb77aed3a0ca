"""Small disks that can be filled and made read-only: a tmpfs for each state folder.

They are mounted in a mount namespace of the kit's own, so they vanish with its last process,
however it ends, and nobody else sees them. Without the right to mount (no root, a container) there
are no disks, and the faults that need one are counted as skipped.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

_CLONE_NEWNS = 0x0002_0000
"""linux/sched.h"""
_MS_REC, _MS_PRIVATE = 0x4000, 0x4_0000
"""linux/mount.h"""
_FILLER = ".filler"


class NoMounting(Exception):
    """This process may not mount."""


def enter_private_namespace() -> None:
    """Gives this process mounts of its own. Call it before the first thread.

    Raises `NoMounting` where that is not allowed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        raise NoMounting(f"unshare: {os.strerror(ctypes.get_errno())}")
    if libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) != 0:
        raise NoMounting(f"private mounts: {os.strerror(ctypes.get_errno())}")


class Disk:
    """A tmpfs of `size_bytes` at `path`. Raises `NoMounting` if it cannot be mounted."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        _mount("-t", "tmpfs", "-o", f"size={size_bytes},mode=0700", "none", str(path))

    def fill(self, leave_bytes: int = 0) -> None:
        """Leaves `leave_bytes` free, in whole pages; called again, it takes what was freed."""
        state = os.statvfs(self.path)
        spare_bytes = state.f_bavail * state.f_frsize - leave_bytes
        if spare_bytes <= 0:
            return
        with _as_far_as_it_goes(), (self.path / _FILLER).open("ab") as filler:
            start = filler.seek(0, os.SEEK_END)
            os.posix_fallocate(filler.fileno(), start, spare_bytes)

    def free(self) -> None:
        """Takes the filling away, if the disk can be written now."""
        with _as_far_as_it_goes():
            (self.path / _FILLER).unlink(missing_ok=True)

    def set_read_only(self, read_only: bool) -> None:
        """Remounts it. Raises `NoMounting` while a process has a file open for writing."""
        _mount("-o", "remount,ro" if read_only else "remount,rw", str(self.path))

    def unmount(self) -> None:
        """Takes the disk away; its folder is then empty. Raises `NoMounting` if that fails.

        At once, also while a process that is just dying has a file on it open.
        """
        _call("umount", "--lazy", str(self.path))

    def leave_its_files(self) -> None:
        """Takes the disk away and leaves what was on it in its folder, without the filling.

        Raises `NoMounting` or `OSError` if that fails.
        """
        aside = self.path.with_name(f"{self.path.name}.copy")
        shutil.copytree(self.path, aside, ignore=shutil.ignore_patterns(_FILLER))
        self.unmount()
        self.path.rmdir()
        aside.rename(self.path)


@contextlib.contextmanager
def _as_far_as_it_goes() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # Another fault may have filled it meanwhile, or made it read-only.
        if error.errno not in (errno.ENOSPC, errno.EROFS):
            raise


def _mount(*arguments: str) -> None:
    _call("mount", *arguments)


def _call(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NoMounting(str(error)) from error
    if done.returncode != 0:
        raise NoMounting(done.stderr.strip())
