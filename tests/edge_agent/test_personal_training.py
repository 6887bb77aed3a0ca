"""A personal training in the training process: real processes, killed, interrupted, compared."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.data.examples import Examples, open_examples
from fedge.edge_agent.engines.onnx_engine import OnnxEngine
from fedge.edge_agent.example_text import Split
from fedge.edge_agent.trainer.jobs import CountJob, PersonaliseJob
from fedge.edge_agent.trainer.process import STOP_GRACE_S, TrainerKilled, TrainingInterrupted
from fedge.edge_agent.training import train
from fedge.schemas.errors import ConfigError, PlanRefused, TrainingFailed
from fedge.schemas.ids import sha256
from fedge.schemas.tensors import encode_tensors, read_tensors
from tests.edge_agent.plans import NumpyReference, initial_weights
from tests.edge_agent.test_trainer_process import ENDLESS, SETTINGS, Device, started, trainer

HOLD_OUT = 0.3


class Owner(Device):
    """A device that holds out some of its examples."""

    def __init__(self, folder: Path, n: int = 40) -> None:
        super().__init__(folder, n)
        self.data = DataConfig(path=folder / "data.npz", hold_out=HOLD_OUT)
        self.weights, self.model = folder / ".own.safetensors.part", folder / ".own.onnx.part"

    def personalise_job(self, **changes) -> PersonaliseJob:
        return PersonaliseJob(
            manifest=self.folder / "manifest.json",
            train_graph=self.folder / "train.onnx",
            eval_graph=self.folder / "eval.onnx",
            infer_graph=self.folder / "infer.onnx",
            weights=self.folder / "weights.safetensors",
            golden_inputs=self.folder / "golden.safetensors",
            data=self.data,
            settings=SETTINGS,
            layers="all",
            weights_output=self.weights,
            model_output=self.model,
        ).model_copy(update=changes)

    def sides(self) -> tuple[Examples, Examples]:
        return open_examples(self.data), open_examples(self.data, side=Split.HOLD_OUT)


@pytest.fixture
def device(tmp_path) -> Owner:
    return Owner(tmp_path)


@pytest.fixture
def endless(tmp_path) -> Owner:
    return Owner(tmp_path, n=4000)


def done_by(*jobs):
    """The answers of one process to these jobs, one after the other."""

    async def scenario():
        async with trainer() as process:
            return [await process.run(job) for job in jobs]

    return asyncio.run(scenario())


def test_the_version_is_trained_on_one_side_and_both_are_measured_on_the_other(device):
    (answer,) = done_by(device.personalise_job())
    training, held_out = device.sides()
    manifest = device.plan.manifest
    engine = OnnxEngine(manifest, device.plan.train, None)
    train(engine, manifest, initial_weights(), training, SETTINGS)
    expected = engine.weights()
    found = read_tensors(device.weights, manifest.weight_specs)
    assert {name: array.tobytes() for name, array in found.items()} == {
        name: array.tobytes() for name, array in expected.items()
    }
    for sums, weights in ((answer.common, initial_weights()), (answer.personal, expected)):
        loss = NumpyReference(weights).loss(held_out.raw_inputs, held_out.raw_targets)
        assert sums.loss_sum / sums.rows == pytest.approx(loss, rel=1e-5)
        assert sums.examples == sums.rows == len(held_out)
    assert answer.personal.loss_sum < answer.common.loss_sum / 2
    assert (answer.examples, answer.steps) == (len(training), 8)
    assert answer.weights_sha256 == sha256(device.weights.read_bytes())


def test_the_personal_file_is_an_ordinary_onnx_file_of_the_personal_weights(device):
    done_by(device.personalise_job())
    weights = read_tensors(device.weights)
    assert device.model.read_bytes() == device.plan.model(weights)
    inputs = np.ones((2, 3), np.float32)
    (output,) = onnxruntime.InferenceSession(device.model).run(None, {"input": inputs})
    reference = NumpyReference(weights)
    np.testing.assert_allclose(
        output, (inputs * reference.scale) @ reference.w + reference.b, rtol=1e-5
    )


def test_what_is_not_better_is_not_written(device):
    away = SETTINGS.model_copy(update={"learning_rate": 0.9, "local_epochs": 1})
    (answer,) = done_by(device.personalise_job(settings=away))
    assert answer.personal.loss_sum > answer.common.loss_sum
    assert answer.weights_sha256 is None
    assert device.leftovers() == []


def test_at_a_tie_the_version_stays(device):
    # A step so small that it rounds to nothing.
    still = SETTINGS.model_copy(update={"learning_rate": 1e-30})
    (answer,) = done_by(device.personalise_job(settings=still))
    assert answer.personal.loss_sum == answer.common.loss_sum
    assert answer.weights_sha256 is None
    assert device.leftovers() == []


def test_with_some_layers_the_others_are_the_version_s_bit_for_bit(device):
    (answer,) = done_by(device.personalise_job(layers=("b",)))
    assert answer.weights_sha256 is not None
    found, start = read_tensors(device.weights), initial_weights()
    assert found["w"].tobytes() == start["w"].tobytes()
    assert found["input_sum"].tobytes() == start["input_sum"].tobytes()
    assert found["b"].tobytes() != start["b"].tobytes()


def test_a_round_s_update_is_the_same_before_and_after_a_personal_training(device):
    async def scenario():
        updates = []
        async with trainer() as process:
            await process.run(device.train_job())
            updates.append(device.update.read_bytes())
            pid = process.pid
            for layers in ("all", 1):
                await process.run(device.personalise_job(layers=layers))
                await process.run(device.train_job())
                updates.append(device.update.read_bytes())
            assert process.pid == pid
        return updates

    first, *later = asyncio.run(scenario())
    assert later == [first, first]


def test_a_rule_that_breaks_stops_it_in_time_and_leaves_nothing(endless):
    async def scenario():
        async with trainer() as process:
            job = endless.personalise_job(settings=ENDLESS)
            task = await started(process, job)
            loop = asyncio.get_running_loop()
            begun_s = loop.time()
            assert process.interrupt(job)
            with pytest.raises(TrainingInterrupted) as left:
                await task
            # It is killed after the grace, whatever it does; its memory is the host's again.
            assert loop.time() - begun_s < STOP_GRACE_S + 2.0
            assert process.pid is None
            assert not left.value.kept
            assert endless.leftovers() == []
            await process.run(endless.personalise_job())

    asyncio.run(scenario())


def test_one_that_is_cancelled_leaves_its_process_to_the_next_job(endless):
    async def scenario():
        async with trainer() as process:
            task = await started(process, endless.personalise_job(settings=ENDLESS))
            pid = process.pid
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await process.run(CountJob(data=endless.data))
            assert process.pid == pid
            assert endless.leftovers() == []

    asyncio.run(scenario())


def test_a_process_killed_in_it_leaves_nothing(endless):
    async def scenario():
        async with trainer() as process:
            task = await started(process, endless.personalise_job(settings=ENDLESS))
            os.kill(process.pid, signal.SIGKILL)
            with pytest.raises(TrainerKilled):
                await task
            assert endless.leftovers() == []

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"settings": SETTINGS.model_copy(update={"learning_rate": 1e3, "local_epochs": 99})},
         TrainingFailed, "loss became"),
        ({"layers": ("head.*",)}, ConfigError, r"matches no parameter.*w, b"),
        ({"data": {"hold_out": 0.0}}, TrainingFailed, "held out"),
        ({"eval_graph": "infer.onnx"}, PlanRefused, "digest"),
        ({"infer_graph": "eval.onnx"}, PlanRefused, "digest"),
    ],
    ids=["loss", "layers", "hold-out", "eval", "infer"],
)  # fmt: skip
def test_a_failure_comes_back_as_its_own_exception_and_leaves_no_file(
    device, changes, error, words
):
    found = {k: device.folder / v if isinstance(v, str) else v for k, v in changes.items()}
    if "data" in found:
        found["data"] = device.data.model_copy(update=found["data"])

    async def scenario():
        async with trainer() as process:
            with pytest.raises(error, match=words):
                await process.run(device.personalise_job(**found))

    asyncio.run(scenario())
    assert device.leftovers() == []


def test_a_model_that_gives_infinity_is_not_kept(device):
    # The loss of what is held out is finite; the golden inputs go further.
    golden = read_tensors(device.folder / "golden.safetensors")["input"].copy()
    golden[0] = 3e38
    (device.folder / "golden.safetensors").write_bytes(encode_tensors({"input": golden}))

    async def scenario():
        async with trainer() as process:
            with pytest.raises(TrainingFailed, match="NaN or infinity for the golden inputs"):
                await process.run(device.personalise_job())

    asyncio.run(scenario())
    assert device.leftovers() == []


@pytest.mark.e2e
def test_a_personal_training_takes_no_more_memory_than_a_round_s(tmp_path):
    """A model of 2.6 MB of weights: an evaluator beside an engine would show."""
    compiled_plans = pytest.importorskip("tests.edge_agent.compiled_plans")
    plan = compiled_plans.compiled("next-word")
    graphs = plan.manifest.graphs
    blobs = {
        "manifest.json": plan.manifest.encode(),
        "train.onnx": plan.blobs[graphs.train.sha256],
        "eval.onnx": plan.blobs[graphs.eval.sha256],
        "infer.onnx": plan.blobs[graphs.infer.sha256],
        "golden.safetensors": plan.blobs[plan.manifest.golden.sha256],
        "words": plan.blobs[plan.manifest.vocabulary.sha256],
        "weights.safetensors": encode_tensors(plan.initial_weights),
    }
    owner = Owner(tmp_path)
    for name, data in blobs.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "data.txt").write_text("the module is a function of the class\n" * 200)
    data = DataConfig(path=tmp_path / "data.txt", hold_out=HOLD_OUT)
    settings = SETTINGS.model_copy(update={"learning_rate": 1.0, "batch_size": 16})
    shared = {"data": data, "settings": settings, "vocabulary": tmp_path / "words"}
    (rounds,) = done_by(owner.train_job(**shared))
    (personal,) = done_by(owner.personalise_job(**shared))
    assert personal.weights_sha256 is not None
    print(f"{rounds.peak_rss_bytes / 1e6:.1f} MB and {personal.peak_rss_bytes / 1e6:.1f} MB")
    assert personal.peak_rss_bytes < 1.05 * rounds.peak_rss_bytes
