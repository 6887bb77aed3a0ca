"""Ports that stay ours while nobody listens on them.

A port of the ephemeral range may be taken by anybody's outgoing connection while a broker or a
proxy is down. So ports come from below that range, and a proxy keeps a bound socket beside its
listening one (both with SO_REUSEPORT): connections are refused then, and the port is not lost.
"""

from __future__ import annotations

import random
import socket

from tests.brokers import HOST

LOWEST, HIGHEST = 20_000, 32_000


def reserved_socket(port: int | None = None) -> socket.socket:
    """A TCP socket bound to `port`, or to one that nobody uses; it does not listen.

    Raises `OSError` if there is none.
    """
    candidates = (
        [port] if port is not None else random.SystemRandom().sample(range(LOWEST, HIGHEST), 200)
    )
    for candidate in candidates:
        if port is None and not _is_free(candidate):
            continue
        bound = socket.socket()
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((HOST, candidate))
        except OSError:
            bound.close()
            continue
        return bound
    raise OSError(f"no free port of {candidates[0]} and others")


def _is_free(port: int) -> bool:
    # Without SO_REUSEPORT: with it, another run's port could be had, too.
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port below the ephemeral range that nobody uses now."""
    with reserved_socket() as bound:
        port: int = bound.getsockname()[1]
        return port
