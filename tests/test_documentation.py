"""The documents against the code: every key of the configuration, and every example that is shown.

What a reader copies must work, and what the programs read must be documented, with its default.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import types
import typing
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from fedge.coordinator.server_optimizer import AdagradConfig, AdamConfig, SgdConfig
from fedge.coordinator.settings import Settings as CoordinatorSettings
from fedge.coordinator.settings import load as load_coordinator
from fedge.edge_agent.predictor import encode_example, interpret
from fedge.edge_agent.settings import Settings as AgentSettings
from fedge.edge_agent.settings import load as load_agent
from fedge.schemas.features import ClassTarget, ImageFeatures
from fedge.schemas.plan import PlanManifest

REPOSITORY = Path(__file__).parent.parent
CONFIGURATION = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")

OPTIMIZERS = {
    'With `name = "sgd"`': SgdConfig,
    'With `name = "adam"` or `name = "yogi"`': AdamConfig,
    'With `name = "adagrad"`': AdagradConfig,
}


def models_in(annotation: object) -> list[type[BaseModel]]:
    """The tables that a key may hold: none for a plain value, several for a union of tables."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [found for inner in typing.get_args(annotation) for found in models_in(inner)]
    return []


def tables(kind: type[BaseModel], file: str, name: str = "") -> dict[str, type[BaseModel]]:
    """The settings by the heading that must document them; a union has a lead-in for each kind."""
    heading = f"### `[{name}]` in {file}" if name else f"### Top level of {file}"
    if name == "broker":
        heading = "## `[broker]`, in both files"
    found = {heading: kind}
    for key, field in kind.model_fields.items():
        inner = models_in(field.annotation)
        if len(inner) > 1:
            assert set(inner) == set(OPTIMIZERS.values()), f"say how {key} is documented"
            found |= OPTIMIZERS
        for one in inner if len(inner) == 1 else []:
            found |= tables(one, file, f"{name}.{key}" if name else key)
    return found


TABLES = tables(CoordinatorSettings, "fedge.toml") | tables(AgentSettings, "agent.toml")


def documented(start: str) -> dict[str, str]:
    """Key → default, from the first table after `start`."""
    [after] = re.findall(rf"^{re.escape(start)}(.*)\Z", CONFIGURATION, re.DOTALL | re.MULTILINE)
    table = re.search(r"^\| key \| default \| meaning \|\n\| --- .*\n((?:\|.*\n)+)", after, re.M)
    assert table is not None, f"there is no table after {start!r}"
    between = after[: table.start()]
    assert "\n#" not in between, f"the table after {start!r} belongs to another heading"
    rows = [
        re.fullmatch(r"\| `(\w+)` \| (\S+) \| \S.* \|", row) for row in table[1].strip().split("\n")
    ]
    assert None not in rows, f"a row after {start!r} is not | `key` | default | meaning |"
    return {row[1]: row[2] for row in rows if row is not None}


def true_defaults(kind: type[BaseModel]) -> dict[str, object]:
    """Key → default as TOML has it; "required" and "none" as the page says them."""
    found: dict[str, object] = {}
    for key, field in kind.model_fields.items():
        if models_in(field.annotation):
            continue
        if field.is_required():
            found[key] = "required"
        elif field.default is None:
            found[key] = "none"
        else:
            found[key] = (to_jsonable_python(field.default),)
    return found


def test_the_walk_finds_every_table() -> None:
    assert {"RoundSettings", "PartitionConfig", "BrokerSettings", "AdagradConfig"} <= {
        kind.__name__ for kind in TABLES.values()
    }
    assert len(TABLES) == 24


@pytest.mark.parametrize("start", TABLES)
def test_each_table_is_documented_key_by_key_with_its_defaults(start: str) -> None:
    said: dict[str, object] = {
        key: default
        if default in ("required", "none")
        else (tomllib.loads(f"it = {default.strip('`')}")["it"],)
        for key, default in documented(start).items()
    }
    assert said == true_defaults(TABLES[start])


@pytest.mark.parametrize("name", ["fedge.toml", "agent.toml"])
def test_the_complete_examples_are_read_as_they_stand(name: str, tmp_path: Path) -> None:
    [text] = re.findall(rf"```toml\n(# {name}\n.*?)```", CONFIGURATION, re.DOTALL)
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    if name == "fedge.toml":
        coordinator = load_coordinator(path)
        assert coordinator.evaluation is not None
        assert coordinator.evaluation.path == tmp_path / "test.npz"
        assert coordinator.round.quorum == 7
    else:
        agent = load_agent(path)
        assert agent.data is not None
        assert agent.data.path == tmp_path / "examples.npz"
        assert agent.trainer.memory_limit_bytes == 512 * 1024**2


def test_the_example_of_a_coordinator_names_every_key() -> None:
    [text] = re.findall(r"```toml\n(# fedge\.toml\n.*?)```", CONFIGURATION, re.DOTALL)
    named = tomllib.loads(text)
    for key, field in CoordinatorSettings.model_fields.items():
        inner = models_in(field.annotation)
        assert key in named
        if inner:
            assert set(inner[0].model_fields) == set(named[key]), key


def test_the_readme_prediction_is_the_agents(tmp_path: Path) -> None:
    [source] = re.findall(r"```python\n# look\.py\n(.*?)```", README, re.DOTALL)
    rng = np.random.default_rng(3)
    features = ImageFeatures(height=8, width=8, raw_max=16, mean=(0.3,), std=(0.4,))
    target = ClassTarget(classes=10)
    weights = rng.normal(size=(64, 10)).astype(np.float32)
    write_linear_model(tmp_path / "model.onnx", features, target, weights)
    # Larger than the input: the page must resize as the agent does.
    pixels = rng.integers(0, 256, (20, 12), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "test-0.png")

    said = subprocess.run(
        [sys.executable, "-c", source], cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout

    manifest = PlanManifest.model_construct(features=features, target=target)
    inputs = encode_example(tmp_path / "test-0.png", manifest)
    prediction = interpret((inputs.reshape(1, 64) @ weights)[0], manifest, top=1)
    likeliest = prediction.as_dict()["probabilities"][0]
    label, probability = said.split()
    assert label == likeliest["label"]
    assert float(probability) == pytest.approx(likeliest["probability"], abs=1e-3)


def write_linear_model(
    path: Path, features: ImageFeatures, target: ClassTarget, weights: np.ndarray
) -> None:
    """One matrix, with the input, the output and the metadata of an exported version."""
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["input"], ["row"]),
            helper.make_node("MatMul", ["row", "weights"], ["output"]),
        ],
        "linear",
        [helper.make_tensor_value_info("input", float32, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("output", float32, ["batch", 10])],
        [onnx.numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(
        model,
        {
            "fedge.task": "linear",
            "fedge.features": features.model_dump_json(),
            "fedge.target": json.dumps(target.model_dump(mode="json")),
        },
    )
    onnx.save(model, path)


def test_every_test_that_the_guarantees_name_is_there() -> None:
    """A promise without its test would look as good as one with it."""
    text = (REPOSITORY / "docs" / "guarantees.md").read_text(encoding="utf-8")
    named = re.findall(r"`([a-z0-9_]+/[a-z0-9_]+\.py)(?:::([a-z0-9_]+))?`", text)
    assert len(named) > 30
    for path, name in named:
        source = (REPOSITORY / "tests" / path).read_text(encoding="utf-8")
        assert name == "" or f"def {name}(" in source, f"{path}::{name}"


def test_the_files_of_a_keyboard_are_read_as_they_stand(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "your-own-keyboard.md").read_text(encoding="utf-8")
    for name, load in (("fedge.toml", load_coordinator), ("agent.toml", load_agent)):
        [text] = re.findall(rf"```toml\n(# {name}\n.*?)```", page, re.DOTALL)
        (tmp_path / name).write_text(text)
        load(tmp_path / name)
    agent = load_agent(tmp_path / "agent.toml")
    assert agent.data is not None
    assert agent.data.is_store
    assert agent.apps.is_on
