"""Who may connect: the Unix socket's mode and place, the port's token and its names."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedge.edge_agent.apps.bearer import BearerToken, token_in
from fedge.edge_agent.apps.listening import MAX_PATH_BYTES, unix_listener
from fedge.schemas.errors import ConfigError
from tests.brokers import find_free_port
from tests.edge_agent.app_clients import LIMIT_S, Reply, Service, ask_on, running_service
from tests.edge_agent.quick_disk import quick_folder

STATUS = "/v1/status"


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as made:
        yield made


# ---------------------------------------------------------------- the Unix socket


def test_only_this_user_may_connect_and_the_socket_goes_with_the_service(folder: Path) -> None:
    before = os.umask(0)
    try:
        with running_service(folder) as service:
            mode = service.path.lstat().st_mode
            assert stat.S_ISSOCK(mode)
            assert stat.S_IMODE(mode) == 0o600
            assert service.ask("GET", STATUS).status == 200
    finally:
        os.umask(before)
    assert not service.path.exists()


def test_the_socket_of_a_killed_agent_is_replaced(folder: Path) -> None:
    path = folder / "state" / "apps.sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    assert path.exists()
    with running_service(folder) as service:
        assert service.ask("GET", STATUS).status == 200


def test_a_socket_that_somebody_listens_on_is_left_to_them(folder: Path) -> None:
    with running_service(folder) as service:
        with pytest.raises(ConfigError, match="another program listens"):
            unix_listener(service.path)
        assert service.ask("GET", STATUS).status == 200


def test_what_is_no_socket_is_not_removed(folder: Path) -> None:
    path = folder / "precious"
    path.write_text("data")
    for name in (path, folder):
        with pytest.raises(ConfigError, match="something else"):
            unix_listener(name)
    assert path.read_text() == "data"


def test_a_socket_that_another_program_put_there_meanwhile_stays(folder: Path) -> None:
    ours = unix_listener(folder / "apps.sock")
    (folder / "apps.sock").unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(folder / "apps.sock"))
        ours.close()
        assert (folder / "apps.sock").exists()


def test_the_longest_path_is_taken_and_a_longer_one_is_refused_with_a_way_out(
    folder: Path,
) -> None:
    room = MAX_PATH_BYTES - len(os.fsencode(folder)) - 1
    unix_listener(folder / ("s" * room)).close()
    # Bytes, not letters.
    for name in ("s" * (room + 1), "ü" * (room // 2 + 1)):
        with pytest.raises(ConfigError, match="at most 107: name a shorter path"):
            unix_listener(folder / name)


# ---------------------------------------------------------------- the port


@dataclass(frozen=True)
class Tcp:
    service: Service
    port: int

    @property
    def token_file(self) -> Path:
        return self.service.settings.state_dir / "apps.token"

    @property
    def token(self) -> str:
        return self.token_file.read_text().strip()

    def ask(self, authorization: str | None, *, host: str | None = None) -> Reply:
        made = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_S)
        headers = {} if host is None else {"Host": host}
        if authorization is not None:
            headers["Authorization"] = authorization
        with contextlib.closing(made) as connection:
            return ask_on(connection, "GET", STATUS, headers=headers)


@pytest.fixture
def tcp(folder: Path) -> Iterator[Tcp]:
    port = find_free_port()
    with running_service(folder, apps={"port": port}) as service:
        yield Tcp(service, port)


def test_who_shows_the_token_is_let_in(tcp: Tcp) -> None:
    assert len(tcp.token) >= 32
    assert stat.S_IMODE(tcp.token_file.stat().st_mode) == 0o600
    for scheme in ("Bearer", "bearer"):
        assert tcp.ask(f"{scheme} {tcp.token}").status == 200
    assert tcp.ask(f"Bearer {tcp.token}", host=f"LOCALHOST:{tcp.port}").status == 200


def test_who_does_not_is_not_and_the_log_says_so_once_without_a_token(
    tcp: Tcp, caplog: pytest.LogCaptureFixture
) -> None:
    token = tcp.token
    wrong = (None, "", "Bearer", f"Basic {token}", token, f"Bearer {token}x", "Bearer \xff")
    with caplog.at_level(logging.DEBUG):
        for given in (*wrong, f"Bearer {token[:-1]}"):
            reply = tcp.ask(given)
            assert (reply.status, reply.code) == (401, "unauthorized"), given
            assert reply.headers["WWW-Authenticate"] == "Bearer"
        assert tcp.ask(f"Bearer {token}").status == 200
    said = [vars(one) for one in caplog.records if one.getMessage() == "app_refused"]
    assert len(said) == 1
    assert token not in str([vars(one) for one in caplog.records])


def test_a_page_that_made_its_own_name_mean_this_host_is_refused(tcp: Tcp) -> None:
    for host in ("evil.example", f"evil.example:{tcp.port}", "127.0.0.1", f"127.0.0.2:{tcp.port}"):
        reply = tcp.ask(f"Bearer {tcp.token}", host=host)
        assert (reply.status, reply.code) == (403, "wrong_host")


def test_nobody_without_a_token_learns_what_is_there(tcp: Tcp) -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", tcp.port)) as connection:
        for path in ("/v1/openapi.json", "/nothing", "*"):
            assert ask_on(connection, "GET", path).status == 401


def test_only_this_host_can_connect(tcp: Tcp) -> None:
    addresses = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)}
    for address in addresses - {"127.0.0.1", "::1"}:
        with pytest.raises(OSError, match=r"refused|unreachable|timed out"):
            socket.create_connection((address, tcp.port), timeout=2).close()


def test_the_token_stays_the_same_from_one_start_to_the_next(folder: Path) -> None:
    found = set()
    for _ in range(2):
        port = find_free_port()
        with running_service(folder, apps={"port": port}) as service:
            found.add(Tcp(service, port).token)
    assert len(found) == 1


def test_a_port_that_is_taken_is_said(folder: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot be had"),
            running_service(folder, apps={"socket": "apps.sock", "port": port}),
        ):
            pass
    assert not (folder / "state" / "apps.sock").exists()


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (b"a" * 40, 0o644, "chmod 600"),
        (b"a" * 40, 0o620, "chmod 600"),
        (b"", 0o600, "holds no token"),
        (b"too short", 0o600, "holds no token"),
        (b"a" * 20 + b" " + b"a" * 20, 0o600, "holds no token"),
        (b"a" * 5000, 0o600, "holds no token"),
    ],
)
def test_a_token_file_that_is_not_fit_is_refused_and_kept(
    folder: Path, content: bytes, mode: int, words: str
) -> None:
    path = folder / "token"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=words):
        token_in(path)
    assert path.read_bytes() == content


def test_a_pipe_in_place_of_the_token_does_not_hold_the_agent_up(folder: Path) -> None:
    os.mkfifo(folder / "token", 0o600)
    with pytest.raises(ConfigError, match="not a file"):
        token_in(folder / "token")


def test_a_token_is_not_shown() -> None:
    assert "secret" not in repr(BearerToken(b"secret" * 8))
