"""The sockets that apps connect to, and who may.

A Unix socket has the mode 0600: the operating system lets this user's programs in, and root's. On
TCP nobody knows who connects, so it is 127.0.0.1 only, and a token says who is meant.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from fedge.edge_agent.apps.admission import Door
from fedge.edge_agent.apps.bearer import token_in
from fedge.edge_agent.durable import disk
from fedge.schemas.errors import ConfigError

HOST = "127.0.0.1"
MAX_PATH_BYTES = 107
"""Of a Unix socket: `sun_path` has 108 with the zero at its end."""


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket that is bound and does not listen yet.

    `place`: where, for people. `file`: of a Unix socket, its path and what tells it from another.
    """

    socket: socket.socket
    door: Door
    place: str
    file: tuple[Path, tuple[int, int]] | None = None

    def close(self) -> None:
        """Closes it; its file goes, unless another one is there by now."""
        with contextlib.suppress(OSError):
            if self.file is not None and _identity(self.file[0]) == self.file[1]:
                self.file[0].unlink()
        self.socket.close()


def unix_listener(path: Path) -> Listener:
    """A Unix socket at `path`. What a killed agent left there is removed.

    Raises `ConfigError` for a path that is too long, or where something else is, or where another
    program listens; `StoreUnavailable` if the disk cannot be used now.
    """
    length = len(os.fsencode(path))
    if length > MAX_PATH_BYTES:
        raise ConfigError(
            f"socket in [apps]: {path} has {length} bytes, and Unix sockets have at most "
            f"{MAX_PATH_BYTES}: name a shorter path, such as /run/fedge/apps.sock"
        )
    with disk(f"make the socket {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear(path)
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            try:
                made.bind(str(path))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                raise _in_use(path) from error
            # Until it listens, nobody can connect, whatever the mode that it was born with.
            path.chmod(0o600)
            return Listener(made, Door("socket"), str(path), (path, _identity(path)))
        except BaseException:
            made.close()
            raise


def tcp_listener(port: int, token_file: Path) -> Listener:
    """A socket on 127.0.0.1, whose clients must show the token.

    Raises `ConfigError` if the port is taken or the token's file is not fit, `StoreUnavailable` if
    the disk cannot be used now.
    """
    token = token_in(token_file)
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        # What a former life of this agent left behind in TIME_WAIT is in nobody's way.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((HOST, port))
    except OSError as error:
        made.close()
        raise ConfigError(
            f"port in [apps]: {HOST}:{port} cannot be had ({error.strerror}); another program, or "
            "another device of this host, has it: choose another port"
        ) from error
    hosts = frozenset(f"{name}:{port}".encode() for name in (HOST, "localhost"))
    return Listener(made, Door("port", token, hosts), f"{HOST}:{port}")


def _clear(path: Path) -> None:
    """Removes a socket that nobody listens on."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"socket in [apps]: there is something else at {path}; name another path")
    if _somebody_listens(path):
        raise _in_use(path)
    path.unlink(missing_ok=True)


def _somebody_listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        # A queue that is full is one that is there.
        return probe.connect_ex(str(path)) not in (errno.ECONNREFUSED, errno.ENOENT)


def _in_use(path: Path) -> ConfigError:
    return ConfigError(
        f"socket in [apps]: another program listens at {path}; stop it, or name another path"
    )


def _identity(path: Path) -> tuple[int, int]:
    facts = path.lstat()
    return facts.st_dev, facts.st_ino
