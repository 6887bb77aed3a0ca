"""Why an app is refused: HTTP's status, a word for programs, a sentence for people."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pydantic import ValidationError

from fedge.edge_agent.example_text import TextRefused
from fedge.edge_agent.serving import NothingToServe
from fedge.schemas.errors import ConfigError, FedgeError, PlanError, StoreUnavailable

STATUS_MEANINGS: Mapping[int, str] = MappingProxyType(
    {
        400: "Not HTTP/1.1, or not JSON",
        401: "No token, or not the token of this agent",
        403: "Asked under a name that is not this host's own",
        404: "No such path",
        405: "The path is there, and this method is not",
        408: "The request did not come in time",
        411: "A body, and no word on how long it is",
        413: "The body is larger than body_limit_bytes in [apps]",
        415: "The body is not application/json, or is compressed",
        422: "JSON, but not what is asked for here; or an example that does not fit the task",
        431: "The head is too large",
        500: "The agent failed; its log says why",
        503: "Not now: no version yet, the disk is full, or too many connections",
    }
)
_SHOWN_PROBLEMS = 3
_TRY_AGAIN_S = 5


class Refused(Exception):  # noqa: N818 -- the service's decision
    """An answer that is an error. `headers`: what HTTP wants beside it."""

    def __init__(
        self, status: int, code: str, message: str, headers: tuple[tuple[str, str], ...] = ()
    ) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers


def not_now(code: str, message: str) -> Refused:
    """503: worth another try."""
    return Refused(503, code, message, (("Retry-After", str(_TRY_AGAIN_S)),))


def refusal_of_json(error: ValidationError) -> Refused:
    """What a body breaks. Names its fields and not their values: they are what somebody typed."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    if problems[0]["type"] == "json_invalid":
        return Refused(400, "not_json", problems[0]["msg"])
    said = []
    for problem in problems:
        if problem["type"] == "none_required":
            # A field that may be left out, which is no matter: it is there.
            continue
        # The field, and places in its list; between them pydantic names the kinds that it tried.
        name, *within = problem["loc"] or ("",)
        where = ".".join(str(part)[:40] for part in (name, *filter(_is_place, within)))
        text = problem["msg"].removeprefix("Value error, ")
        said.append(f"{where}: {text}" if where else text)
    return Refused(422, "invalid_request", "; ".join(said[:_SHOWN_PROBLEMS]))


def _is_place(part: int | str) -> bool:
    return isinstance(part, int)


def refusal_of(error: FedgeError) -> Refused:
    """What an error of the agent is to the app that asked."""
    match error:
        case TextRefused():
            return Refused(422, "text_refused", f"{error}; nothing was added")
        case NothingToServe():
            return not_now("no_version", str(error))
        case StoreUnavailable():
            return not_now("store_unavailable", str(error))
        case ConfigError():
            return Refused(500, "misconfigured", str(error))
        case PlanError():
            return Refused(500, "model_failed", str(error))
        case _:
            return Refused(500, "failed", str(error))
