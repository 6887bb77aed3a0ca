"""Which room may import what: read from the sources, and from what a start really loads."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

import fedge

PACKAGE = Path(fedge.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

TORCH_MAY_BE_IMPORTED_IN = (
    "coordinator/centralized.py",
    "coordinator/compiler/*",
    "coordinator/evaluation.py",
    "coordinator/release.py",
    "coordinator/task.py",
    "coordinator/tasks/*",
    "edge_agent/engines/torch*",
)
TORCH_MAY_BE_ASKED_FOR_IN = (
    # In a function, where it is certain to be needed; a start must not load it (see below).
    "coordinator/datasets.py",
    "coordinator/testset.py",
    "edge_agent/engines/__init__.py",
)
ONNXRUNTIME_MAY_BE_IMPORTED_IN = (
    "coordinator/compiler/*",
    "coordinator/onnx_session.py",
    "edge_agent/engines/onnx*",
)
HEAVY = {"onnx", "onnxruntime", "scipy", "sklearn", "sqlalchemy", "torch", "torchvision"}


def imports_of(path: Path) -> Iterator[str]:
    """Every module that the file imports anywhere, also inside functions, by its full name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def importers(package: str, under: str = "") -> list[str]:
    """The files below `fedge/{under}` that import `package`, relative to `fedge`."""
    return [
        str(path.relative_to(PACKAGE))
        for path in MODULES
        if str(path.relative_to(PACKAGE)).startswith(under)
        and any(is_in(each, package) for each in imports_of(path))
    ]


def outside(found: list[str], allowed: tuple[str, ...]) -> list[str]:
    return [path for path in found if not any(fnmatch(path, pattern) for pattern in allowed)]


def test_the_guard_sees_imports():
    assert "schemas/messages.py" in importers("pydantic")
    assert "schemas/messages.py" in importers("fedge.schemas.blobs")
    assert importers("fedge.schemas", under="schemas/")


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("schemas", "fedge.coordinator"),
        ("schemas", "fedge.edge_agent"),
        ("coordinator", "fedge.edge_agent"),
        ("edge_agent", "fedge.coordinator"),
    ],
)
def test_the_rooms_depend_on_the_contract_and_not_on_each_other(room, forbidden):
    assert importers(forbidden, under=f"{room}/") == []


def test_only_the_paho_adapter_imports_paho():
    found = importers("paho")
    assert found
    assert outside(found, ("schemas/link/paho/*", "schemas/link/paho.py")) == []


@pytest.mark.parametrize("package", ["torch", "torchvision"])
def test_only_compiling_evaluating_and_the_torch_engine_import_torch(package):
    allowed = TORCH_MAY_BE_IMPORTED_IN + TORCH_MAY_BE_ASKED_FOR_IN
    assert outside(importers(package), allowed) == []


def test_only_the_engines_and_the_coordinators_checks_import_onnxruntime():
    assert outside(importers("onnxruntime"), ONNXRUNTIME_MAY_BE_IMPORTED_IN) == []


def test_nothing_unpickles_or_evaluates():
    for package in ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"):
        assert importers(package) == []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), path


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("fedge", HEAVY | {"numpy", "paho", "pydantic"}),
        ("fedge.schemas.messages", HEAVY | {"numpy", "paho"}),
        ("fedge.schemas.link.paho", HEAVY),
        ("fedge.edge_agent.agent", HEAVY),
        ("fedge.edge_agent.cli", HEAVY),
        ("fedge.edge_agent.engines", HEAVY),
        ("fedge.edge_agent.machine", HEAVY | {"paho"}),
        ("fedge.coordinator.cli", {"onnxruntime", "torch", "torchvision"}),
        ("fedge.coordinator.datasets", {"torch", "torchvision"}),
        ("fedge.coordinator.testset", {"torch", "torchvision"}),
        ("fedge.coordinator.rounds", HEAVY | {"paho"}),
    ],
)
def test_a_start_loads_no_more_than_its_room_needs(module, forbidden):
    """In a process of its own, because this one has loaded everything already."""
    assert importlib.util.find_spec(module) is not None, "the guard must follow what it guards"
    script = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert loaded & forbidden == set()
