"""The head of a request → the operation that it names, or a refusal. Pure.

The order matters: who has no token learns nothing of the paths, and no body is read before its
length and its kind are known to be right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from pydantic import BaseModel

from fedge.edge_agent.apps import contract
from fedge.edge_agent.apps.bearer import BearerToken
from fedge.edge_agent.apps.refusals import Refused

Headers = Iterable[tuple[bytes, bytes]]
"""Names in lower case, as h11 gives them."""

_JSON = "application/json"


class Name(StrEnum):
    """The operations, by the names that the description gives them."""

    ADD = "add_examples"
    FORGET = "forget_examples"
    COUNT = "count_examples"
    PREDICT = "predict"
    STATUS = "status"
    DESCRIBE = "describe"


@dataclass(frozen=True, slots=True)
class Operation:
    """One method on one path.

    `asked`: what the body holds, None for none. `answered`: what may come back, with `status`;
    empty for the description itself. `failures`: statuses of its own, beside those of all.
    """

    name: Name
    method: str
    path: str
    summary: str
    asked: type[BaseModel] | None
    answered: tuple[type[BaseModel], ...]
    status: int = 200
    failures: tuple[int, ...] = ()


OPERATIONS = (
    Operation(
        Name.ADD,
        "POST",
        "/v1/examples",
        "Keep texts to learn from. They are on the disk when this answers; all of them, or none.",
        asked=contract.NewExamples,
        answered=(contract.Added,),
        status=201,
        failures=(503,),
    ),
    Operation(
        Name.FORGET,
        "DELETE",
        "/v1/examples",
        "Forget texts for good. A training that is under way is thrown away.",
        asked=contract.WhatToForget,
        answered=(contract.Forgotten,),
        failures=(503,),
    ),
    Operation(
        Name.COUNT,
        "GET",
        "/v1/examples/count",
        "How many texts there are, how large and how old.",
        asked=None,
        answered=(contract.ExampleCounts,),
        failures=(503,),
    ),
    Operation(
        Name.PREDICT,
        "POST",
        "/v1/predict",
        "Ask the version in use. The answer names it.",
        asked=contract.Question,
        answered=(contract.Words, contract.Classes, contract.Values),
        failures=(503,),
    ),
    Operation(
        Name.STATUS,
        "GET",
        "/v1/status",
        "How this device stands. Never a text.",
        asked=None,
        answered=(contract.Status,),
    ),
    Operation(
        Name.DESCRIBE,
        "GET",
        "/v1/openapi.json",
        "This description.",
        asked=None,
        answered=(),
    ),
)

_BY_PATH: Mapping[str, Mapping[str, Operation]] = {
    path: {one.method: one for one in OPERATIONS if one.path == path}
    for path in {one.path for one in OPERATIONS}
}


@dataclass(frozen=True, slots=True)
class Door:
    """Where a connection came in, and what it must show there.

    `name`: for the log. `token`: None where the operating system has said who may connect.
    `hosts`: the names that a request may be for, in lower case; None: any.
    """

    name: str
    token: BearerToken | None = None
    hosts: frozenset[bytes] | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """A request without its body."""

    method: bytes
    target: bytes
    headers: tuple[tuple[bytes, bytes], ...]

    def values(self, name: bytes) -> list[bytes]:
        """The header's values, one for each time that it is there."""
        return [value.strip() for key, value in self.headers if key == name]


@dataclass(frozen=True, slots=True)
class Admitted:
    """What may go on. `body_bytes`: as announced; None: it ends with its last chunk."""

    operation: Operation
    body_bytes: int | None


def admit(head: Head, door: Door, body_limit_bytes: int) -> Admitted:
    """The operation that is asked for. Raises `Refused`."""
    _check_host(head, door)
    _check_token(head, door)
    operation = _operation(head)
    return Admitted(operation, _body_bytes(head, operation, body_limit_bytes))


def _check_host(head: Head, door: Door) -> None:
    # A page in a browser can be made to resolve its own name to 127.0.0.1, and would then be let
    # ask; but it asks under its own name ("DNS rebinding").
    if door.hosts is None:
        return
    given = head.values(b"host")
    if len(given) != 1 or given[0].lower() not in door.hosts:
        known = ", ".join(sorted(host.decode() for host in door.hosts))
        raise Refused(403, "wrong_host", f"this service answers as {known} only")


def _check_token(head: Head, door: Door) -> None:
    if door.token is None:
        return
    given = head.values(b"authorization")
    if len(given) != 1 or not door.token.admits(given[0]):
        raise Refused(
            401,
            "unauthorized",
            "send Authorization: Bearer with the token in the agent's token_file",
            (("WWW-Authenticate", "Bearer"),),
        )


def _operation(head: Head) -> Operation:
    if not head.target.startswith(b"/"):
        raise Refused(400, "wrong_target", "ask for a path, such as /v1/status")
    path, query, _ = head.target.partition(b"?")
    methods = _BY_PATH.get(path.decode("latin-1"))
    if methods is None:
        raise Refused(404, "not_found", f"there is {', '.join(sorted(_BY_PATH))}")
    operation = methods.get(head.method.decode("latin-1"))
    if operation is None:
        allowed = ", ".join(sorted(methods))
        raise Refused(405, "wrong_method", f"here is {allowed}", (("Allow", allowed),))
    if query:
        raise Refused(400, "wrong_target", "no parameters: what is asked is in the body, as JSON")
    return operation


def _body_bytes(head: Head, operation: Operation, limit_bytes: int) -> int | None:
    lengths, codings = head.values(b"content-length"), head.values(b"transfer-encoding")
    if lengths and codings:
        # Two readers of the same bytes could disagree on where this request ends.
        raise Refused(400, "two_lengths", "Content-Length and Transfer-Encoding: send one of them")
    # h11 lets only digits through, at most 20 of them, and only one value.
    length = int(lengths[0]) if lengths else None
    if operation.asked is None:
        if length or codings:
            raise Refused(400, "takes_no_body", f"{operation.method} {operation.path} has no body")
        return 0
    if length is None and not codings:
        raise Refused(411, "length_required", "send what is asked in the body, with Content-Length")
    if length is not None and length > limit_bytes:
        raise too_large(limit_bytes)
    _check_kind(head)
    return length


def too_large(limit_bytes: int) -> Refused:
    """413."""
    return Refused(
        413,
        "body_too_large",
        f"at most {limit_bytes} bytes, body_limit_bytes in [apps]: ask in parts",
    )


def _check_kind(head: Head) -> None:
    kinds = [value.decode("latin-1").lower() for value in head.values(b"content-type")]
    kind, *parameters = kinds[0].split(";") if len(kinds) == 1 else [""]
    if kind.strip() != _JSON or not set(_stripped(parameters)) <= {
        "",
        "charset=utf-8",
        'charset="utf-8"',
    }:
        raise Refused(415, "wrong_content_type", f"send Content-Type: {_JSON}, in UTF-8")
    if any(value.lower() != b"identity" for value in head.values(b"content-encoding")):
        raise Refused(415, "wrong_content_encoding", "send the body as it is, not compressed")


def _stripped(parameters: Iterable[str]) -> Iterator[str]:
    return (one.strip() for one in parameters)
