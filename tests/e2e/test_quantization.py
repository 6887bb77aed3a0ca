"""`[export] quantization`: a fleet that runs gets int8 files, trains on, and gets its own back."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedge.coordinator.export import export_model, rolled_back
from fedge.coordinator.serving import serve
from fedge.coordinator.store import VersionRecord
from fedge.edge_agent.library import Library
from fedge.schemas.errors import ConfigError
from fedge.schemas.ids import sha256
from fedge.schemas.plan import PlanManifest
from fedge.schemas.quantization import Scheme
from tests.brokers import MosquittoBroker
from tests.fleet import Fleet, fleet, tiny_examples

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

TASK = """
from torch import nn

from fedge.coordinator.task import Task, accuracy, cross_entropy
from fedge.schemas.features import ClassTarget, TabularFeatures
from fedge.schemas.plan import TrainingDefaults

task = Task(
    name="wide",
    model=lambda: nn.Sequential(
        nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 3)
    ),
    loss=cross_entropy,
    features=TabularFeatures(columns=4),
    target=ClassTarget(classes=3),
    metrics={"accuracy": accuracy},
    defaults=TrainingDefaults(batch_size=8, learning_rate=RATE, local_epochs=1),
)
"""


def write_task(folder: Path, rate: float = 0.1) -> Path:
    path = folder / "wide_task.py"
    path.write_text(TASK.replace("RATE", str(rate)))
    return path


def export(here: Fleet, scheme: Scheme | None, versions: int) -> None:
    """The configuration file is changed, while nothing serves."""
    changed = here.settings.export.model_copy(update={"quantization": scheme})
    rounds = here.settings.round.model_copy(update={"versions": versions})
    here.settings = here.settings.model_copy(update={"export": changed, "round": rounds})


async def stop(here: Fleet, name: str) -> None:
    await here.stop([task for task in here.tasks if task.get_name() == name])


def known(here: Fleet) -> list[VersionRecord]:
    with here.store() as store:
        return list(store.versions())


def manifest_of(here: Fleet, version: VersionRecord) -> PlanManifest:
    with here.store() as store:
        return PlanManifest.decode(store.blobs.read(version.plan_sha256))


async def in_use(here: Fleet, number: int) -> bytes:
    library = Library(here.folder / "d0")
    while True:
        active = library.active()
        if active is not None and active.version == number:
            return active.model.read_bytes()
        await asyncio.sleep(0.05)


async def measured(here: Fleet, number: int) -> VersionRecord:
    while True:
        with here.store() as store:
            found = store.version(number)
        if found is not None and "loss" in found.metrics:
            return found
        await asyncio.sleep(0.05)


def test_a_running_population_is_given_int8_files_and_its_own_back(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    x, y = tiny_examples(200, seed=9)
    np.savez(tmp_path / "test.npz", x=x, y=y)

    async def scenario() -> None:
        async with fleet(
            mosquitto.port,
            tmp_path,
            task=f"{write_task(tmp_path)}:task",
            round={"goal": 1, "over_selection": 1.0, "versions": 1},
            evaluation={"path": tmp_path / "test.npz"},
        ) as here:
            here.start_coordinator()
            here.start_agent("d0", tiny_examples(80, seed=1))
            await here.version(1)
            plain = await here.during(in_use(here, 1))
            await here.during(measured(here, 1))
            await stop(here, "coordinator")
            _, first = known(here)
            assert set(first.metrics) == {"loss", "accuracy"}

            # int8 from now on: a version with the same weights, then one that is trained from it.
            export(here, Scheme.INT8, versions=3)
            here.start_coordinator()
            await here.version(3)
            small = await here.during(in_use(here, 3))
            third = await here.during(measured(here, 3))
            await stop(here, "coordinator")
            second = known(here)[2]
            assert second.weights == first.weights
            assert (second.base, second.round) == (1, None)
            assert "int8 weights" in second.note
            assert second.plan_sha256 != first.plan_sha256
            assert (third.base, third.plan_sha256) == (2, second.plan_sha256)
            assert third.weights.size_bytes == first.weights.size_bytes, "float32 travels"
            assert sha256(small) == third.model_sha256
            assert len(small) == third.model_bytes < 0.5 * len(plain)
            assert set(third.metrics) == {"loss", "accuracy", "int8_loss", "int8_accuracy"}
            assert abs(third.metrics["int8_accuracy"] - third.metrics["accuracy"]) <= 0.02
            assert third.metrics["int8_loss"] != third.metrics["loss"]
            with here.store() as store:
                assert export_model(store, third) == small
            before, after = manifest_of(here, first), manifest_of(here, second)
            assert before.graphs.train == after.graphs.train
            assert after.quantization is not None
            assert after.quantization.int8 == ("2.weight",)

            # The same wish again changes nothing; neither does none at all.
            for scheme in (Scheme.INT8, None):
                export(here, scheme, versions=3)
                here.start_coordinator()
                await here.during(asyncio.sleep(1.0))
                await stop(here, "coordinator")
                assert len(known(here)) == 4

            # And back: the plan is the first one, so even the first version can be gone back to.
            export(here, Scheme.NONE, versions=3)
            here.start_coordinator()
            await here.version(4)
            again = await here.during(in_use(here, 4))
            await stop(here, "coordinator")
            fourth = known(here)[-1]
            assert fourth.weights == third.weights
            assert fourth.plan_sha256 == first.plan_sha256
            assert len(again) == len(plain)
            assert rolled_back(fourth, first, now=0.0).model_sha256 == sha256(plain)
            with pytest.raises(Exception, match="change it back first"):
                rolled_back(fourth, third, now=0.0)

    asyncio.run(scenario())


def test_a_changed_task_is_not_smuggled_in_with_the_option(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with fleet(
            mosquitto.port, tmp_path, task=f"{write_task(tmp_path)}:task", round={"versions": 1}
        ) as here:
            here.start_coordinator()
            await here.version(0)
            await stop(here, "coordinator")
            write_task(tmp_path, rate=0.2)
            export(here, Scheme.INT8, versions=1)
            with pytest.raises(ConfigError, match="compiled from other settings"):
                await serve(here.settings)
            assert len(known(here)) == 1

    asyncio.run(scenario())


def test_a_new_population_begins_with_int8_and_says_which_weights(
    mosquitto: MosquittoBroker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> tuple[int, Any]:
        async with fleet(
            mosquitto.port,
            tmp_path,
            task=f"{write_task(tmp_path)}:task",
            round={"versions": 1},
            export={"quantization": "int8"},
        ) as here:
            here.start_coordinator()
            announced = await here.version(0)
            await stop(here, "coordinator")
            (zero,) = known(here)
            assert zero.model_sha256 == announced.model_sha256
            return zero.model_bytes, manifest_of(here, zero).quantization

    with caplog.at_level("INFO"):
        model_bytes, quantization = asyncio.run(scenario())
    assert quantization.int8 == ("2.weight",)
    assert model_bytes < 15_000
    told = " ".join(json.dumps(vars(record), default=str) for record in caplog.records)
    assert "2.weight" in told
    assert "0.weight 0.bias 2.bias 4.weight 4.bias" in told
