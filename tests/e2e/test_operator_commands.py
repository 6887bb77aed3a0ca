"""What the operator types while a coordinator serves: the real commands as processes."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fedge.edge_agent.library import Library
from fedge.schemas.ids import sha256
from tests.brokers import MosquittoBroker
from tests.fleet import Fleet, fleet, tiny_examples

pytestmark = pytest.mark.e2e


async def fedge(here: Fleet, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a `fedge` command."""
    config = here.folder / "fedge.toml"
    config.write_text(
        f'population = "{here.population}"\ntask = "unused"\nstate_dir = "coordinator"\n'
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fedge.coordinator", *arguments, "--config", str(config)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    return process.returncode or 0, output.decode(), errors.decode()


async def as_json(here: Fleet, *arguments: str) -> Any:
    status, output, errors = await fedge(here, *arguments, "--json")
    assert status == 0, errors
    return json.loads(output)


def test_versions_are_listed_exported_and_rolled_back_while_the_coordinator_serves(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with fleet(
            mosquitto.port, tmp_path, round={"goal": 1, "over_selection": 1.0, "versions": 2}
        ) as here:
            here.start_coordinator()
            here.start_agent("d0", tiny_examples(40, seed=1))
            await here.version(2)
            await here.during(look_and_export(here))
            await here.during(roll_back(here))
            announced = await here.version(3)
            with here.store() as store:
                first, third = store.version(1), store.version(3)
            assert first is not None
            assert third is not None
            assert announced.number == 3
            assert third.weights.sha256 == first.weights.sha256
            assert announced.model_sha256 == first.model_sha256
            await here.during(device_uses(here, "d0", 3, first.model_sha256))

    asyncio.run(scenario())


async def look_and_export(here: Fleet) -> None:
    versions = await as_json(here, "version", "list")
    assert [v["number"] for v in versions] == [0, 1, 2]
    shown = await as_json(here, "version", "show", "1")
    assert shown["round"] == 1
    path = here.folder / "exported.onnx"
    status, output, _ = await fedge(here, "version", "export", "1", str(path))
    assert status == 0
    assert str(path) in output
    assert sha256(path.read_bytes()) == shown["model_sha256"]
    rounds = await as_json(here, "round", "list")
    assert [r["outcome"] for r in rounds] == ["aggregated", "aggregated"]
    (device,) = await as_json(here, "device", "list")
    assert (device["name"], device["online"], device["examples"]) == ("d0", True, 40)
    for command in (
        ["version", "list"],
        ["round", "list"],
        ["round", "show", "1"],
        ["device", "list"],
    ):
        status, output, _ = await fedge(here, *command)
        assert status == 0
        assert len(output.splitlines()) >= 2


async def roll_back(here: Fleet) -> None:
    status, output, _ = await fedge(here, "version", "rollback", "1")
    assert status == 0
    assert "version 3 has the weights of version 1" in output
    status, _, errors = await fedge(here, "version", "rollback", "77")
    assert status == 2
    assert "there is no version 77" in errors


async def device_uses(here: Fleet, name: str, number: int, model_sha256: str) -> None:
    library = Library(here.folder / name)
    while True:
        active = library.active()
        if active is not None and active.version == number:
            assert sha256(active.model.read_bytes()) == model_sha256
            return
        # The file is what an app looks at, too; there is no event outside the agent for it.
        await asyncio.sleep(0.05)
