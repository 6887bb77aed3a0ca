"""The token that lets an app in over TCP: made at the first start, kept in a file of this user.

Any program of this host may connect to 127.0.0.1, whoever runs it; who can read the file is let in.
The token is never logged and never an argument of a program.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import stat
from pathlib import Path

from fedge.edge_agent.durable import disk, replace_file
from fedge.schemas.errors import ConfigError

_TOKEN_BYTES = 32
_TOKEN = re.compile(rb"[A-Za-z0-9._~+/=-]{32,512}")
_MAX_FILE_BYTES = 1024


class BearerToken:
    """What must stand in `Authorization: Bearer …`."""

    def __init__(self, token: bytes) -> None:
        self._token = token

    def __repr__(self) -> str:
        return "BearerToken(…)"

    def admits(self, authorization: bytes) -> bool:
        """Whether the header's value holds the token; takes the same time wherever they differ."""
        scheme, _, given = authorization.partition(b" ")
        is_same = hmac.compare_digest(given.strip(b" "), self._token)
        return is_same and scheme.lower() == b"bearer"


def token_in(path: Path) -> BearerToken:
    """The token in the file at `path`, which is made if it is not there, for its user alone.

    Raises `ConfigError` for a file that others may read, or that holds no token;
    `StoreUnavailable` if the disk cannot be used now.
    """
    with disk(f"use the token {path}"):
        if not path.exists():
            token = secrets.token_urlsafe(_TOKEN_BYTES).encode()
            replace_file(path, token + b"\n", private=True)
        return BearerToken(_read(path))


def _read(path: Path) -> bytes:
    descriptor = _opened(path)
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise ConfigError(f"token_file {path} is not a file")
        if facts.st_mode & 0o077 or facts.st_uid not in (os.geteuid(), 0):
            raise ConfigError(
                f"token_file {path} may be read or replaced by others: run chmod 600 on it, or "
                "delete it, and the agent makes another"
            )
        token = file.read(_MAX_FILE_BYTES + 1).strip()
    if not _TOKEN.fullmatch(token):
        raise ConfigError(
            f"token_file {path} holds no token, which is 32 to 512 letters, digits and ._~+/=-: "
            "delete it, and the agent makes another"
        )
    return token


def _opened(path: Path) -> int:
    try:
        # A pipe under this name must not hold the agent up.
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError as error:
        raise ConfigError(f"token_file {path} belongs to another user: it is not read") from error
