"""A training that is left and taken up again ends as if nobody had stopped it, bit for bit."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.edge_agent.checkpoints import Checkpoints
from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.data.examples import Examples
from fedge.edge_agent.engines import EngineName
from fedge.edge_agent.example_limits import ExampleLimits
from fedge.edge_agent.example_store import FILE_NAME, ExampleStore
from fedge.edge_agent.trainer import child
from fedge.edge_agent.trainer import process as trainer_process
from fedge.edge_agent.trainer.checkpoint_file import (
    TrainingKey,
    digest_of_examples,
    take_checkpoint,
    write_checkpoint,
)
from fedge.edge_agent.trainer.jobs import Interrupted, TrainJob
from fedge.edge_agent.trainer.process import (
    TrainerLimits,
    TrainerPool,
    TrainerProcess,
    TrainingInterrupted,
)
from fedge.edge_agent.trainer.resumable import open_resumable
from fedge.edge_agent.training import Paused, train
from fedge.edge_agent.training_settings import TrainingSettings
from fedge.schemas.blobs import describe
from fedge.schemas.errors import PeerError, StoreUnavailable
from fedge.schemas.plan import Padding
from fedge.schemas.tensors import encode_tensors
from tests.edge_agent.plans import examples, initial_weights, linear_plan
from tests.edge_agent.small_disks import small_disk

SETTINGS = TrainingSettings(
    seed=11, batch_size=8, learning_rate=0.05, local_epochs=3, proximal_mu=0.1
)
DATA = Examples(*examples(30))
KEY = TrainingKey(
    plan_sha256="1" * 64,
    weights_sha256="2" * 64,
    settings=SETTINGS,
    engine=EngineName.ONNX,
    examples=digest_of_examples(DATA),
)


def in_stretches(plan, stops, path: Path | None = None, settings=SETTINGS):
    """Stopped after each of these numbers of steps, each stretch with an engine of its own."""
    earlier, position = None, None
    for stop_after in [*stops, None]:
        engine = open_resumable(plan.manifest, plan.train, threads=1)
        steps = itertools.count(1)
        done = train(
            engine,
            plan.manifest,
            initial_weights(),
            DATA,
            settings,
            stop=lambda steps=steps, end=stop_after: next(steps) == end,
            earlier=earlier,
            put_back=lambda engine=engine, at=position: None if at is None else engine.put_back(at),
            clock=lambda: 0.0,
        )
        if not isinstance(done, Paused):
            return done
        earlier, position = done, engine.position()
        if path is not None:
            write_checkpoint(path, KEY, earlier, position)
            earlier, position = take_checkpoint(path, KEY)
            assert earlier == done
            assert not path.exists()
    raise AssertionError("it never ended")


@pytest.mark.parametrize("padding", Padding)
def test_a_training_stopped_after_any_step_ends_bit_for_bit_as_one_that_was_not(padding, tmp_path):
    plan = linear_plan(padding=padding)
    whole = in_stretches(plan, [])
    assert whole.steps == 12
    for step in range(1, 13):
        again = in_stretches(plan, [step], tmp_path / "checkpoint")
        assert encode_tensors(again.delta) == encode_tensors(whole.delta), step
        assert (again.loss, again.metrics, again.steps, again.examples) == (
            whole.loss, whole.metrics, whole.steps, whole.examples,
        )  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(
    stops=st.lists(st.integers(1, 400), max_size=4),
    local_steps=st.none() | st.integers(1, 2400),
)
def test_stops_in_any_number_change_nothing_of_a_long_training(stops, local_steps):
    # 2,400 steps: the curve of the loss joins its neighbours on the way.
    long = SETTINGS.model_copy(
        update={
            "local_epochs": 80,
            "batch_size": 1,
            "local_steps": local_steps,
            "learning_rate": 1e-4,
        }
    )
    plan = linear_plan()
    whole, again = in_stretches(plan, [], None, long), in_stretches(plan, stops, None, long)
    assert encode_tensors(again.delta) == encode_tensors(whole.delta)
    assert (again.loss, again.metrics) == (whole.loss, whole.metrics)


def left(path: Path) -> tuple[Paused, dict[str, np.ndarray]]:
    plan = linear_plan()
    engine = open_resumable(plan.manifest, plan.train, threads=1)
    paused = train(engine, plan.manifest, initial_weights(), DATA, SETTINGS, stop=lambda: True)
    assert isinstance(paused, Paused)
    write_checkpoint(path, KEY, paused, engine.position())
    return paused, engine.position()


def test_a_checkpoint_comes_back_as_it_was_once(tmp_path):
    path = tmp_path / "folder" / "1.checkpoint"
    paused, position = left(path)
    found, tensors = take_checkpoint(path, KEY)
    assert found == paused
    assert set(tensors) == set(position)
    assert all(np.array_equal(tensors[name], position[name]) for name in position)
    assert take_checkpoint(path, KEY) is None
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"plan_sha256": "3" * 64},
        {"weights_sha256": "3" * 64},
        {"settings": SETTINGS.model_copy(update={"seed": 12})},
        {"engine": EngineName.TORCH},
        {"examples": digest_of_examples(Examples(*examples(29)))},
        # As many, and others: somebody had one forgotten and another came.
        {"examples": digest_of_examples(Examples(*examples(30, seed=2)))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_checkpoint_of_another_training_is_not_used_and_does_not_stay(change, tmp_path):
    path = tmp_path / "1.checkpoint"
    left(path)
    assert take_checkpoint(path, KEY.model_copy(update=change)) is None
    assert not path.exists()


def test_a_checkpoint_that_was_cut_or_changed_is_never_used(tmp_path):
    path = tmp_path / "1.checkpoint"
    left(path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        changed = bytes([whole[place] ^ (1 << place % 8)])
        for damaged in (whole[:place], whole[:place] + changed + whole[place + 1 :]):
            path.write_bytes(damaged)
            assert take_checkpoint(path, KEY) is None, place
    path.write_bytes(whole)
    assert take_checkpoint(path, KEY) is not None


def test_a_disk_that_is_full_keeps_no_half_of_one(tmp_path):
    with small_disk(tmp_path / "disk", 64 * 1024) as disk:
        disk.fill()
        with pytest.raises(StoreUnavailable):
            left(disk.folder / "1.checkpoint")
        assert [path.name for path in disk.folder.iterdir() if "checkpoint" in path.name] == []


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_training_on_a_text_that_is_forgotten_meanwhile_leaves_no_checkpoint(
    tmp_path, monkeypatch, forgotten
):
    device, limits = Device(tmp_path), ExampleLimits()
    store = tmp_path / FILE_NAME
    with ExampleStore(store, limits) as texts:
        texts.add("my secret")
        generation = texts.generation()
    # The plan is of numbers; which texts they were made of says the generation alone.
    numbers = Examples(*examples(40), generation=generation)
    monkeypatch.setattr(child, "open_examples", lambda *job: numbers)

    def stop() -> bool:
        if forgotten:
            with ExampleStore(store, limits) as texts:
                texts.forget_containing("secret")
        return True

    job = device.job(data=DataConfig(path=store), limits=limits)
    answer = child.Worker().do(job, lambda said: None, stop)
    assert isinstance(answer, Interrupted)
    assert answer.kept == device.checkpoint.exists() == (not forgotten)


def test_a_position_of_another_plan_is_refused():
    plan = linear_plan()
    engine = open_resumable(plan.manifest, plan.train, threads=1)
    engine.load(initial_weights())
    position = engine.position()
    with pytest.raises(PeerError):
        engine.put_back({name: array for name, array in position.items() if "state" not in name})
    with pytest.raises(PeerError):
        engine.put_back({name: np.zeros(7, np.float32) for name in position})


def test_a_folder_holds_one_checkpoint_and_strangers_are_left_alone(tmp_path):
    found = Checkpoints(tmp_path)
    Checkpoints(tmp_path / "none").keep_only(1)
    for name in ("3.checkpoint", "5.checkpoint", ".4.checkpoint.part", "notes"):
        (tmp_path / name).write_text("x")

    def names() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir())

    found.forget_before(4)
    assert names() == [".4.checkpoint.part", "5.checkpoint", "notes"]
    found.keep_only(5)
    assert names() == ["5.checkpoint", "notes"]
    found.forget(5)
    assert names() == ["notes"]


# ---------------------------------------------------------------- the training process


class Device:
    """A folder with a plan, weights and examples: 12 epochs of 4,000, in batches of 8."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        plan = linear_plan()
        plan.write(folder)
        (folder / "weights.safetensors").write_bytes(encode_tensors(initial_weights()))
        self.write_examples(1)
        self.checkpoint = folder / "checkpoint" / "1.checkpoint"

    def write_examples(self, seed: int) -> None:
        x, y = examples(4000, seed)
        np.savez(self.folder / "data.npz", x=x, y=y)

    def job(self, output: str = "update", **changes) -> TrainJob:
        fields = {
            "manifest": self.folder / "manifest.json",
            "train_graph": self.folder / "train.onnx",
            "weights": self.folder / "weights.safetensors",
            "data": DataConfig(path=self.folder / "data.npz"),
            "settings": SETTINGS.model_copy(update={"local_epochs": 12, "learning_rate": 1e-4}),
            "output": self.folder / output,
            "checkpoint": self.checkpoint,
            "engine": EngineName.ONNX,
        }
        return TrainJob.model_validate(fields | changes)


@pytest.fixture
def device(tmp_path) -> Device:
    return Device(tmp_path)


async def interrupted(trainer, job: TrainJob, *, after: int = 1) -> TrainingInterrupted:
    """The job, interrupted after it made progress so many times."""
    moving, seen = asyncio.Event(), itertools.count(1)
    task = asyncio.create_task(
        trainer.run(job, lambda progress: moving.set() if next(seen) == after else None)
    )
    waiter = asyncio.create_task(moving.wait())
    await asyncio.wait([task, waiter], return_when=asyncio.FIRST_COMPLETED)
    waiter.cancel()
    assert not task.done()
    assert trainer.interrupt(job)
    with pytest.raises(TrainingInterrupted) as caught:
        await task
    return caught.value


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_an_interrupted_process_leaves_its_checkpoint_ends_and_the_next_goes_on(device):
    async def scenario():
        trainer = TrainerProcess(TrainerLimits(nice=0))
        whole = await trainer.run(device.job("whole", checkpoint=None))
        (pid,) = trainer.pids
        left = await interrupted(trainer, device.job())
        assert left.kept
        assert 0 < left.step < left.steps == whole.steps
        assert trainer.pids == ()
        assert not is_alive(pid)
        assert device.checkpoint.exists()
        assert not (device.folder / "update").exists()
        again = await interrupted(trainer, device.job())
        assert again.step > left.step
        done = await trainer.run(device.job())
        assert done.first_step == again.step
        assert done.update == whole.update
        assert (done.loss, done.metrics, done.steps) == (whole.loss, whole.metrics, whole.steps)
        assert describe((device.folder / "update").read_bytes()) == whole.update
        assert not device.checkpoint.exists()
        await trainer.close()

    asyncio.run(scenario())


def test_examples_that_changed_meanwhile_begin_the_training_again(device):
    async def scenario():
        trainer = TrainerProcess(TrainerLimits(nice=0))
        assert (await interrupted(trainer, device.job())).kept
        device.write_examples(2)
        done = await trainer.run(device.job())
        assert done.first_step == 0
        assert done.update == (await trainer.run(device.job("fresh", checkpoint=None))).update
        assert not device.checkpoint.exists()
        await trainer.close()

    asyncio.run(scenario())


def test_a_process_that_does_not_stop_in_time_is_killed_and_keeps_nothing(device, monkeypatch):
    monkeypatch.setattr(trainer_process, "STOP_GRACE_S", 0.3)

    async def scenario():
        trainer = TrainerProcess(TrainerLimits(nice=0))
        job, moving = device.job(), asyncio.Event()
        task = asyncio.create_task(trainer.run(job, lambda progress: moving.set()))
        await moving.wait()
        (pid,) = trainer.pids
        # A step that takes for ever.
        os.kill(pid, signal.SIGSTOP)
        assert trainer.interrupt(job)
        with pytest.raises(TrainingInterrupted) as caught:
            await task
        assert not caught.value.kept
        assert not is_alive(pid)
        assert not device.checkpoint.exists()
        await trainer.close()

    asyncio.run(scenario())


def test_a_job_that_waits_or_is_done_cannot_be_interrupted(device):
    async def scenario():
        trainer = TrainerPool(1, TrainerLimits(nice=0))
        job, moving = device.job(), asyncio.Event()
        waiting = device.job("other", checkpoint=None)
        first = asyncio.create_task(trainer.run(job, lambda progress: moving.set()))
        second = asyncio.create_task(trainer.run(waiting))
        await moving.wait()
        assert not trainer.interrupt(waiting)
        assert trainer.interrupt(job)
        with pytest.raises(TrainingInterrupted):
            await first
        assert not trainer.interrupt(job)
        assert (await second).first_step == 0
        assert not trainer.interrupt(waiting)
        await trainer.close()

    asyncio.run(scenario())


def test_a_job_interrupted_before_its_process_was_there_never_begins(device):
    async def scenario():
        trainer = TrainerProcess(TrainerLimits(nice=0))
        job = device.job()
        task = asyncio.create_task(trainer.run(job))
        await asyncio.sleep(0)
        assert trainer.interrupt(job)
        with pytest.raises(TrainingInterrupted) as caught:
            await task
        assert not caught.value.kept
        assert trainer.pids == ()
        await trainer.close()

    asyncio.run(scenario())
