"""Bytes that no honest client sends, and clients that are slow, greedy or gone.

Whatever comes, the service answers with JSON or closes, and the next app is served.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fedge.edge_agent.apps.connection import Bounds
from tests.edge_agent.app_clients import (
    JSON,
    Service,
    UnixConnection,
    ask_on,
    connected,
    raw,
    read_reply,
    running_service,
    until_the_end,
)
from tests.edge_agent.quick_disk import quick_folder

BODY_BYTES = 20_000
QUICK = Bounds(BODY_BYTES, request_s=0.3, idle_s=0.3, write_s=0.3, linger_s=0.3)
STATUS = b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with quick_folder() as folder, running_service(folder, Bounds(BODY_BYTES)) as made:
        yield made


@pytest.fixture
def hasty() -> Iterator[Service]:
    """One that waits for nobody longer than 0.3 s, with room for three connections."""
    apps = {"socket": "apps.sock", "connections": 3}
    with quick_folder() as folder, running_service(folder, QUICK, apps=apps) as made:
        yield made


def post(
    body: bytes,
    *headers: str,
    path: str = "/v1/examples",
    method: str = "POST",
    kind: str = JSON,
    length: int | None = None,
) -> bytes:
    """A request as bytes; `length`: as it says, where that is not the truth."""
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Type: {kind}", *headers]
    if not any(one.startswith(("Transfer-Encoding", "Content-Length")) for one in headers):
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunked(*chunks: bytes) -> bytes:
    sized = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return post(sized + b"0\r\n\r\n", "Transfer-Encoding: chunked")


class Received(io.BytesIO):
    """What came, read by one response after the other."""

    def makefile(self, *_: object) -> Received:
        return self

    def close(self) -> None:
        """Not at the end of a response: another may follow."""


def answers(data: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """Every response in what came; fails if something else is there."""
    found = []
    received = Received(data)
    while received.tell() < len(data):
        response = http.client.HTTPResponse(received)  # type: ignore[arg-type]  # reads, no more
        response.begin()
        found.append((response.status, dict(response.getheaders()), response.read()))
    return found


TEXT = b'{"text": "hello"}'


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50), 400, "not_http"),
        (b"hello\r\n\r\n", 400, "not_http"),
        (b"\r\n\r\n", 400, "not_http"),
        (b"GET /v1/status\r\n\r\n", 400, "not_http"),
        (b"GET /v1/status HTTP/2.0\r\nHost: x\r\n\r\n", 400, "not_http"),
        (b"GET /v1/status HTTP/1.1\r\n\r\n", 400, "not_http"),
        (b"GET /v1/status HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400, "not_http"),
        (b"GET /v1/status HTTP/1.1\r\nHost: x\r\nA B: c\r\n\r\n", 400, "not_http"),
        (b"GET /v1/status HTTP/1.1\r\nHost: x\r\nA: \x00\r\n\r\n", 400, "not_http"),
        (b"GET /v1/status HTTP/1.1\r\nHost: x", 400, "not_http"),
        (b"GET /" + b"a" * 20_000, 431, "head_too_large"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 20_000, 431, "head_too_large"),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 4_000, 431, "head_too_large"),
        (b"GET /v2/status HTTP/1.1\r\nHost: x\r\n\r\n", 404, "not_found"),
        (b"GET /v1/status/ HTTP/1.1\r\nHost: x\r\n\r\n", 404, "not_found"),
        (b"GET /v1/../v1/status HTTP/1.1\r\nHost: x\r\n\r\n", 404, "not_found"),
        (b"GET /v1/%73tatus HTTP/1.1\r\nHost: x\r\n\r\n", 404, "not_found"),
        (b"GET /v1/status?a=b HTTP/1.1\r\nHost: x\r\n\r\n", 400, "wrong_target"),
        (b"GET http://x/v1/status HTTP/1.1\r\nHost: x\r\n\r\n", 400, "wrong_target"),
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 400, "wrong_target"),
        (b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", 400, "wrong_target"),
        (b"PUT /v1/status HTTP/1.1\r\nHost: x\r\n\r\n", 405, "wrong_method"),
        (b"get /v1/status HTTP/1.1\r\nHost: x\r\n\r\n", 405, "wrong_method"),
        (post(TEXT, method="GET", path="/v1/status"), 400, "takes_no_body"),
        (b"POST /v1/examples HTTP/1.1\r\nHost: x\r\n\r\n", 411, "length_required"),
        (post(b"a" * (BODY_BYTES + 1)), 413, "body_too_large"),
        (post(b"", length=10**15), 413, "body_too_large"),
        (post(TEXT, "Content-Length: -5"), 400, "not_http"),
        (post(TEXT, "Content-Length: 0x11"), 400, "not_http"),
        (post(TEXT, "Content-Length: 17, 18"), 400, "not_http"),
        (post(TEXT, "Content-Length: " + "9" * 5000), 400, "not_http"),
        (post(TEXT, "Content-Length: 17", "Transfer-Encoding: chunked"), 400, "two_lengths"),
        (post(TEXT, "Transfer-Encoding: gzip"), 400, "not_http"),
        (post(TEXT, length=18), 400, "not_http"),
        (chunked(b"a" * BODY_BYTES, b"b"), 413, "body_too_large"),
        (chunked(*[b"a"] * 15_000), 413, "body_too_large"),
        (post(b"fffffffffffffffff\r\n", "Transfer-Encoding: chunked"), 400, "not_http"),
        (post(b"5\r\nhello", "Transfer-Encoding: chunked"), 400, "not_http"),
        (post(TEXT, kind="text/plain"), 415, "wrong_content_type"),
        (post(TEXT, kind="application/json; charset=utf-16"), 415, "wrong_content_type"),
        (post(TEXT, "Content-Type: text/plain"), 415, "wrong_content_type"),
        (post(TEXT, "Content-Encoding: gzip"), 415, "wrong_content_encoding"),
        (post(b""), 400, "not_json"),
        (post(b"{"), 400, "not_json"),
        (post(b'{"text": "\xff"}'), 400, "not_json"),
        (post(b'{"text": "\\ud800"}'), 400, "not_json"),
        (post(b"[" * 10_000), 400, "not_json"),
        (post(b'{"text": "a", "at": NaN}'), 422, "invalid_request"),
        (post(b'{"text": "a", "at": 1e999}'), 422, "invalid_request"),
        (post(b'{"text": "a", "at": ' + b"9" * 4000 + b"}"), 422, "invalid_request"),
        (post(b"17"), 422, "invalid_request"),
    ],
)
def test_what_is_wrong_is_answered_in_json_with_its_status(
    service: Service, sent: bytes, status: int, code: str
) -> None:
    [(found, headers, body)] = answers(raw(service.path, sent))
    assert (found, json.loads(body)["error"]["code"]) == (status, code)
    assert headers["Content-Type"] == JSON
    assert headers["Cache-Control"] == "no-store"
    assert json.loads(body)["error"]["message"]


def test_a_method_that_is_not_there_is_told_those_that_are(service: Service) -> None:
    reply = service.ask("GET", "/v1/examples")
    assert (reply.status, reply.headers["Allow"]) == (405, "DELETE, POST")


def test_head_gets_a_head(service: Service) -> None:
    data = raw(service.path, STATUS.replace(b"GET", b"HEAD"))
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 405 ")
    assert body == b""


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_an_old_client_and_one_that_says_close_are_answered_and_closed(
    service: Service, version: bytes
) -> None:
    sent = b"GET /v1/status HTTP/" + version + b"\r\nHost: x\r\nConnection: close\r\n\r\n"
    with connected(service.path) as link:
        link.sendall(sent)
        [(status, headers, _)] = answers(until_the_end(link))
    assert (status, headers["Connection"].lower()) == (200, "close")


def test_an_offer_to_upgrade_is_not_taken_up(service: Service) -> None:
    upgrade = b"Host: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
    [(status, _, _)] = answers(raw(service.path, STATUS.replace(b"Host: x\r\n", upgrade)))
    assert status == 200


def test_a_connection_serves_many_requests_and_survives_a_refusal(service: Service) -> None:
    with contextlib.closing(UnixConnection(service.path)) as connection:
        connection.connect()
        line = connection.sock
        for _ in range(3):
            assert ask_on(connection, "GET", "/v1/status").status == 200
            assert ask_on(connection, "POST", "/v1/examples", b"no JSON").status == 400
            assert ask_on(connection, "POST", "/v1/examples", {"texts": 5}).status == 422
        assert connection.sock is line


def test_requests_that_are_sent_ahead_are_answered_in_order(service: Service) -> None:
    sent = STATUS + post(b"{") + STATUS + post(b'{"text": 5}') + STATUS
    statuses = [status for status, _, _ in answers(raw(service.path, sent))]
    assert statuses == [200, 400, 200, 422, 200]


def test_a_body_in_chunks_is_as_good_as_one_in_one_piece(service: Service) -> None:
    [(status, _, body)] = answers(raw(service.path, chunked(TEXT[:5], TEXT[5:])))
    assert status == 201
    assert len(json.loads(body)["ids"]) == 1


def test_who_waits_to_be_told_to_go_on_is_told_and_not_before_the_head_was_admitted(
    service: Service,
) -> None:
    with connected(service.path) as link:
        link.sendall(post(b"", "Expect: 100-continue", length=len(TEXT)))
        assert link.recv(100).startswith(b"HTTP/1.1 100 ")
        link.sendall(TEXT)
        assert read_reply(link).status == 201
    with connected(service.path) as link:
        link.sendall(post(b"", "Expect: 100-continue", length=10**9))
        assert read_reply(link).code == "body_too_large"


def test_a_large_body_is_refused_and_its_sender_reads_why(service: Service) -> None:
    reply = service.ask("POST", "/v1/examples", b"a" * 3_000_000)
    assert (reply.status, reply.code) == (413, "body_too_large")
    assert reply.headers["Connection"] == "close"


# ---------------------------------------------------------------- slow, greedy, gone


@pytest.mark.parametrize("sent", [b"GET /v1/sta", post(b'{"te', length=50)], ids=["head", "body"])
def test_a_request_that_does_not_come_is_given_up(hasty: Service, sent: bytes) -> None:
    with connected(hasty.path) as link:
        link.sendall(sent)
        reply = read_reply(link)
        assert (reply.status, reply.code) == (408, "too_slow")
        assert reply.headers["Connection"] == "close"
        assert until_the_end(link) == b""


def test_a_byte_now_and_then_does_not_keep_a_request_alive(hasty: Service) -> None:
    with connected(hasty.path) as link:
        link.setblocking(False)
        data = b""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for byte in post(TEXT) * 50:
                link.send(bytes([byte]))
                time.sleep(0.02)
                with contextlib.suppress(BlockingIOError):
                    data += link.recv(65536)
        assert data.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("before", [b"", STATUS], ids=["at once", "later"])
def test_a_client_that_says_nothing_is_let_go_without_a_word(hasty: Service, before: bytes) -> None:
    with connected(hasty.path) as link:
        if before:
            link.sendall(before)
            assert read_reply(link).status == 200
        assert until_the_end(link) == b""


def test_a_client_that_reads_no_answers_costs_its_connection_and_no_more(hasty: Service) -> None:
    asked = b"GET /v1/openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    with connected(hasty.path) as link:
        link.setblocking(False)
        sent, stuck_since = 0, None
        with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012 -- one long talk
            while True:
                try:
                    sent += link.send(asked * 50)
                    stuck_since = None
                except BlockingIOError:
                    # Its buffers are full in both directions; it is given up after a while.
                    stuck_since = stuck_since or time.monotonic()
                    assert time.monotonic() < stuck_since + 20
                    time.sleep(0.02)
                assert sent < 20_000_000, "it is read from for ever"
    assert hasty.ask("GET", "/v1/status").status == 200


def test_one_connection_too_many_is_told_so_and_room_comes_back(hasty: Service) -> None:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(connected(hasty.path)) for _ in range(3)]
        for link in held:
            link.sendall(STATUS)
            assert read_reply(link).status == 200
        with connected(hasty.path) as link:
            reply = read_reply(link)
        assert (reply.status, reply.code) == (503, "too_many_connections")
        held[0].close()
        asked_until_s = time.monotonic() + 20
        while hasty.ask("GET", "/v1/status").status != 200:
            assert time.monotonic() < asked_until_s


def test_clients_that_vanish_leave_room_for_others(hasty: Service) -> None:
    for sent in (b"", b"GET /", post(b"{", length=100), post(TEXT), STATUS * 20):
        for _ in range(6):
            with connected(hasty.path) as link, contextlib.suppress(BrokenPipeError):
                link.sendall(sent)
    asked_until_s = time.monotonic() + 20
    while hasty.ask("GET", "/v1/status").status != 200:
        assert time.monotonic() < asked_until_s


# ---------------------------------------------------------------- anything at all

VALID = (
    STATUS,
    post(TEXT, path="/v1/predict"),
    post(b'{"ids": [1]}', method="DELETE"),
    post(b'{"row": [1.5]}', path="/v1/predict"),
    chunked(TEXT),
)


@st.composite
def nearly_valid(draw: st.DrawFn) -> bytes:
    """Requests with bytes changed, cut out, or put in."""
    data = bytearray(b"".join(draw(st.lists(st.sampled_from(VALID), min_size=1, max_size=3))))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 4)))
        data[at:end] = draw(st.binary(max_size=8))
    return bytes(data)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(sent=st.one_of(nearly_valid(), st.binary(max_size=300)))
@example(sent=b"")
@example(sent=STATUS * 3)
def test_whatever_is_sent_what_comes_back_is_http_and_the_next_app_is_served(
    service: Service, sent: bytes
) -> None:
    for status, _, body in answers(raw(service.path, sent)):
        assert status != 500
        if status >= 400 and body:
            assert set(json.loads(body)) == {"error"}
    assert service.ask("GET", "/v1/status").status == 200


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["text", "texts", "at", "ids", "all", "containing", "row", "image", "top"]
            )
            | st.text(max_size=5),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    asked=json_values,
    operation=st.sampled_from(
        [("POST", "/v1/examples"), ("DELETE", "/v1/examples"), ("POST", "/v1/predict")]
    ),
)
def test_no_json_whatsoever_makes_the_agent_fail(
    service: Service, asked: object, operation: tuple[str, str]
) -> None:
    reply = service.ask(*operation, json.dumps(asked).encode())
    # There is no version here.
    assert reply.status in (200, 201, 400, 422, 503)
    assert reply.status != 503 or reply.code == "no_version"
