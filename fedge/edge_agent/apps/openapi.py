"""The OpenAPI 3.1 description of the service, made from the contract and the table of operations.

Nothing is said here a second time: what a request may hold is what the models parse.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from fedge.edge_agent.apps.admission import OPERATIONS, Operation
from fedge.edge_agent.apps.contract import Failure
from fedge.edge_agent.apps.refusals import STATUS_MEANINGS

_REF = "#/components/schemas/{model}"
_OF_ALL = (400, 401, 403, 408, 431, 500)
_OF_BODIES = (411, 413, 415, 422)


def description() -> dict[str, Any]:
    """The document, as JSON has it."""
    models = dict.fromkeys(_models())
    _, schemas = models_json_schema([(one, "validation") for one in models], ref_template=_REF)
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Fedge on this device",
            "version": "1",
            "description": "What apps ask of the agent, over a Unix socket, or over 127.0.0.1 with "
            "the token.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        # Not on the Unix socket, or with the token.
        "security": [{}, {"token": []}],
    }


def _models() -> list[type[BaseModel]]:
    asked = [one.asked for one in OPERATIONS if one.asked is not None]
    return [*asked, *(model for one in OPERATIONS for model in one.answered), Failure]


def _described(operation: Operation) -> dict[str, Any]:
    responses = {str(operation.status): {"description": "Done", **_json(operation.answered)}}
    of_bodies = () if operation.asked is None else _OF_BODIES
    for status in sorted({*_OF_ALL, *of_bodies, *operation.failures}):
        responses[str(status)] = {"description": STATUS_MEANINGS[status], **_json((Failure,))}
    found: dict[str, Any] = {
        "operationId": operation.name.value,
        "summary": operation.summary,
        "responses": responses,
    }
    if operation.asked is not None:
        found["requestBody"] = {"required": True, **_json((operation.asked,))}
    return found


def _json(models: tuple[type[BaseModel], ...]) -> dict[str, Any]:
    schemas = [{"$ref": _REF.format(model=one.__name__)} for one in models]
    match schemas:
        case []:
            schema: dict[str, Any] = {"type": "object"}
        case [one]:
            schema = one
        case _:
            schema = {"anyOf": schemas}
    return {"content": {"application/json": {"schema": schema}}}
