"""What the service tells: its status, and its own description, which must be the truth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fedge.edge_agent import machine
from fedge.edge_agent.apps.admission import OPERATIONS
from fedge.edge_agent.apps.openapi import description
from fedge.edge_agent.eligibility import Standing
from fedge.schemas.messages import Assignment
from tests.edge_agent.app_clients import Reply, Service, running_service
from tests.edge_agent.quick_disk import quick_folder
from tests.edge_agent.word_versions import EVENING, WordPlan


@pytest.fixture
def service() -> Iterator[Service]:
    with quick_folder() as folder, running_service(folder) as made:
        yield made


# ---------------------------------------------------------------- the status


def test_a_device_that_has_nothing_yet_says_so_and_makes_no_store(service: Service) -> None:
    assert service.ask("GET", "/v1/status").json == {
        "device": "d",
        "population": "p",
        "version": None,
        "newest": None,
        "connected": False,
        "kept": {"training": 0, "hold_out": 0},
        "training": {
            "examples": None,
            "eligible": None,
            "in_the_way": [],
            "round": None,
            "stage": None,
            "unsent": 0,
        },
    }
    assert not list(service.settings.state_dir.glob("examples*"))


def test_the_status_is_the_agents_own_and_has_no_text(service: Service) -> None:
    WordPlan().put_into_use(service.settings.state_dir, 5, EVENING)
    service.ask("POST", "/v1/examples", {"texts": [f"my secret is {n}" for n in range(20)]})
    assignment = Assignment(
        round=12, base=5, plan_sha256="0" * 64, deadline_s=60, seed=1, batch_size=1,
        learning_rate=1, local_epochs=1,
    )  # fmt: skip
    work = machine.Work(assignment, machine.Stage.SUSPENDED)
    service.state = machine.Agent(
        connected=True, examples=18, work=work, outbox=frozenset({10, 11})
    )
    service.standing = Standing(
        eligible=False, reasons=("charging: on battery",), good_since_s=None
    )
    reply = service.ask("GET", "/v1/status")
    found = reply.json
    assert (found["version"], found["connected"]) == (5, True)
    assert sum(found["kept"].values()) == 20
    assert found["training"] == {
        "examples": 18,
        "eligible": False,
        "in_the_way": ["charging: on battery"],
        "round": 12,
        "stage": "suspended",
        "unsent": 2,
    }
    assert "secret" not in reply.body.decode()


# ---------------------------------------------------------------- the description


def test_the_service_describes_itself(service: Service) -> None:
    assert service.ask("GET", "/v1/openapi.json").json == description()


def test_every_operation_is_described_and_every_reference_leads_somewhere() -> None:
    found = description()
    assert found["openapi"].startswith("3.1")
    described = {(method.upper(), path) for path, item in found["paths"].items() for method in item}
    assert described == {(one.method, one.path) for one in OPERATIONS}
    references = list(values_of(found, "$ref"))
    assert len(references) > len(OPERATIONS)
    for reference in references:
        here: Any = found
        for part in reference.removeprefix("#/").split("/"):
            here = here[part]
    names = {reference.rpartition("/")[2] for reference in references}
    assert names == set(found["components"]["schemas"]), "a schema that nothing refers to"


def values_of(document: Any, key: str) -> Iterator[Any]:
    if isinstance(document, dict):
        for name, value in document.items():
            if name == key:
                yield value
            yield from values_of(value, key)
    elif isinstance(document, list):
        for value in document:
            yield from values_of(value, key)


def schema_of(operation: dict[str, Any], status: int) -> list[dict[str, Any]]:
    """The schemas that an answer with this status may have."""
    schema = operation["responses"][str(status)]["content"]["application/json"]["schema"]
    found = schema.get("anyOf", [schema])
    schemas = description()["components"]["schemas"]
    return [schemas[one["$ref"].rpartition("/")[2]] for one in found]


@pytest.mark.parametrize(
    ("method", "path", "asked", "status"),
    [
        ("POST", "/v1/examples", {"texts": ["a"]}, 201),
        ("POST", "/v1/examples", {"texts": [""]}, 422),
        ("POST", "/v1/examples", b"", 400),
        ("DELETE", "/v1/examples", {"all": True}, 200),
        ("GET", "/v1/examples/count", None, 200),
        ("POST", "/v1/predict", {"text": "see "}, 200),
        ("POST", "/v1/predict", {"row": [1.0]}, 422),
        ("POST", "/v1/predict", None, 415),
        ("GET", "/v1/status", None, 200),
    ],
)
def test_what_is_answered_is_what_is_described(
    service: Service, method: str, path: str, asked: Any, status: int
) -> None:
    WordPlan().put_into_use(service.settings.state_dir, 5, EVENING)
    reply: Reply = service.ask(method, path, asked)
    assert reply.status == status
    operation = description()["paths"][path][method.lower()]
    kinds = [set(schema["properties"]) for schema in schema_of(operation, status)]
    assert set(reply.json) in kinds
    if isinstance(asked, dict) and status < 300:
        name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        schema = description()["components"]["schemas"][name.rpartition("/")[2]]
        assert set(asked) <= set(schema["properties"])
        assert any(set(one["required"]) <= set(asked) for one in schema["oneOf"])
        assert schema["additionalProperties"] is False
