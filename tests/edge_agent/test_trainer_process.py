"""The training process as the agent uses it: real processes, killed, starved and cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.data.examples import Examples
from fedge.edge_agent.data.hold_out import held_out
from fedge.edge_agent.engines import EngineName
from fedge.edge_agent.engines.onnx_engine import OnnxEngine
from fedge.edge_agent.trainer import process as trainer_process
from fedge.edge_agent.trainer.jobs import (
    ActivateJob,
    CountJob,
    EvaluateJob,
    Progressed,
    TrainJob,
)
from fedge.edge_agent.trainer.process import (
    TrainerKilled,
    TrainerLimits,
    TrainerPool,
    TrainerProcess,
)
from fedge.edge_agent.training import train
from fedge.edge_agent.training_settings import TrainingSettings
from fedge.schemas.blobs import describe
from fedge.schemas.errors import (
    ConfigError,
    ParityFailed,
    PeerError,
    PlanRefused,
    RejectReason,
    StoreUnavailable,
    TrainingFailed,
)
from fedge.schemas.ids import sha256
from fedge.schemas.tensors import encode_tensors, read_tensors
from tests.edge_agent.plans import (
    NumpyReference,
    examples,
    initial_weights,
    linear_plan,
    train_graph,
)
from tests.edge_agent.small_disks import small_disk

SETTINGS = TrainingSettings(seed=1, batch_size=8, learning_rate=0.05, local_epochs=2)
ENDLESS = SETTINGS.model_copy(update={"learning_rate": 1e-6, "local_epochs": 1000})


class Device:
    """A folder with a plan, weights and examples."""

    def __init__(self, folder: Path, n: int = 30) -> None:
        self.folder = folder
        self.plan = linear_plan()
        self.plan.write(folder)
        (folder / "weights.safetensors").write_bytes(encode_tensors(initial_weights()))
        x, y = examples(n)
        np.savez(folder / "data.npz", x=x, y=y)
        self.data = DataConfig(path=folder / "data.npz")
        self.update = folder / "update.safetensors"

    def train_job(self, settings: TrainingSettings = SETTINGS, **changes) -> TrainJob:
        return TrainJob(
            manifest=self.folder / "manifest.json",
            train_graph=self.folder / "train.onnx",
            weights=self.folder / "weights.safetensors",
            data=self.data,
            settings=settings,
            output=self.update,
            engine=EngineName.ONNX,
        ).model_copy(update=changes)

    def evaluate_job(self, **changes) -> EvaluateJob:
        return EvaluateJob(
            manifest=self.folder / "manifest.json",
            eval_graph=self.folder / "eval.onnx",
            weights=self.folder / "weights.safetensors",
            data=self.data,
        ).model_copy(update=changes)

    def activate_job(self, **changes) -> ActivateJob:
        weights = initial_weights()
        reference = NumpyReference(weights)
        inputs = read_tensors(self.folder / "golden.safetensors")["input"]
        output = (inputs * reference.scale) @ reference.w + reference.b
        (self.folder / "outputs.safetensors").write_bytes(
            encode_tensors({"output": output.astype(np.float32)})
        )
        return ActivateJob(
            manifest=self.folder / "manifest.json",
            infer_graph=self.folder / "infer.onnx",
            weights=self.folder / "weights.safetensors",
            golden_inputs=self.folder / "golden.safetensors",
            golden_outputs=self.folder / "outputs.safetensors",
            model_sha256=sha256(self.plan.model(weights)),
            output=self.folder / "model.onnx",
        ).model_copy(update=changes)

    def leftovers(self) -> list[str]:
        return [
            p.name for p in self.folder.iterdir() if p.name.startswith((".", "update", "model"))
        ]


@pytest.fixture
def device(tmp_path) -> Device:
    return Device(tmp_path)


@pytest.fixture
def endless(tmp_path) -> Device:
    """A thousand epochs of 4,000 examples in batches of 8: half a million steps."""
    return Device(tmp_path, n=4000)


@contextlib.asynccontextmanager
async def trainer(**limits):
    process = TrainerProcess(TrainerLimits(nice=0, **limits))
    try:
        yield process
    finally:
        await process.close()


async def started(process: TrainerProcess, job: TrainJob) -> asyncio.Task:
    """A task of `job` that has made progress."""
    moving = asyncio.Event()
    task = asyncio.create_task(process.run(job, lambda progress: moving.set()))
    waiter = asyncio.create_task(moving.wait())
    await asyncio.wait([task, waiter], return_when=asyncio.FIRST_COMPLETED)
    waiter.cancel()
    assert not task.done()
    return task


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_process_gives_the_update_that_the_loop_gives_here(device):
    async def scenario():
        seen = []
        async with trainer() as process:
            trained = await process.run(device.train_job(), seen.append)
        return trained, seen

    trained, seen = asyncio.run(scenario())
    manifest = device.plan.manifest
    engine = OnnxEngine(manifest, device.plan.train, None)
    here = train(engine, manifest, initial_weights(), Examples(*examples(30)), SETTINGS)
    found = read_tensors(device.update, manifest.update_specs)
    for name, delta in here.delta.items():
        np.testing.assert_array_equal(found[name], delta)
    assert trained.update == describe(device.update.read_bytes())
    assert (trained.examples, trained.steps, trained.engine) == (30, 8, EngineName.ONNX)
    assert trained.loss == here.loss
    assert trained.metrics == here.metrics
    assert isinstance(seen[0], Progressed)
    assert (seen[0].step, seen[0].steps) == (1, 8)


def test_a_warm_process_does_the_next_job_and_knows_nothing_of_the_last(device):
    async def scenario():
        async with trainer() as process:
            await process.run(device.train_job())
            first, pid = device.update.read_bytes(), process.pid
            await process.run(device.train_job())
            assert process.pid == pid
            assert device.update.read_bytes() == first

    asyncio.run(scenario())


def test_zero_steps_give_a_zero_update_and_need_no_graph(device):
    (device.folder / "train.onnx").unlink()

    async def scenario(settings):
        async with trainer() as process:
            return await process.run(device.train_job(settings))

    for nothing in ({"local_steps": 0}, {"local_epochs": 0}):
        trained = asyncio.run(scenario(SETTINGS.model_copy(update=nothing)))
        assert (trained.examples, trained.steps, trained.engine) == (30, 0, None)
        found = read_tensors(device.update, device.plan.manifest.update_specs)
        assert not any(delta.any() for delta in found.values())


def test_a_version_is_measured_on_the_examples_that_are_held_out(device):
    data = device.data.model_copy(update={"hold_out": 0.4})

    async def scenario():
        async with trainer() as process:
            measured = await process.run(device.evaluate_job(data=data))
            trained = await process.run(device.train_job(data=data))
        return measured, trained

    measured, trained = asyncio.run(scenario())
    assert (measured.examples, trained.examples) == (11, 19)
    x, y = (each[held_out(30, 0.4)] for each in examples(30))
    expected = NumpyReference(initial_weights()).loss(x, y) * len(x)
    assert measured.loss_sum == pytest.approx(expected)


def test_a_count_needs_no_plan(device):
    async def scenario():
        async with trainer() as process:
            return await process.run(CountJob(data=device.data))

    assert asyncio.run(scenario()).examples == 30


def test_a_process_killed_in_training_fails_the_job_and_the_next_job_works(endless):
    async def scenario():
        async with trainer() as process:
            task = await started(process, endless.train_job(ENDLESS))
            os.kill(process.pid, signal.SIGKILL)
            with pytest.raises(TrainerKilled, match="SIGKILL"):
                await task
            assert endless.leftovers() == []
            assert (await process.run(endless.train_job())).steps == 1000

    asyncio.run(scenario())


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux'")
def test_a_process_that_stays_stopped_fails_the_job_and_the_next_job_works(endless, monkeypatch):
    monkeypatch.setattr(trainer_process, "_SILENCE_S", 0.2)

    async def scenario():
        async with trainer() as process:
            task = await started(process, endless.train_job(ENDLESS))
            pid = process.pid
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(TrainerKilled, match="SIGSTOP"):
                await task
            assert not is_alive(pid)
            assert endless.leftovers() == []
            assert (await process.run(endless.train_job())).steps == 1000

    asyncio.run(scenario())


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux'")
def test_a_process_that_was_stopped_for_a_moment_goes_on(endless, monkeypatch):
    monkeypatch.setattr(trainer_process, "_SILENCE_S", 1.0)

    async def scenario():
        async with trainer() as process:
            task = await started(process, endless.train_job())
            pid = process.pid
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(1.2)  # it is seen stopped once
            os.kill(pid, signal.SIGCONT)
            assert (await task).steps == 1000
            assert process.pid == pid

    asyncio.run(scenario())


def test_a_process_that_says_nothing_for_long_is_left_alone_while_it_runs(device, monkeypatch):
    # Starting up takes a hundred times as long as this.
    monkeypatch.setattr(trainer_process, "_SILENCE_S", 0.005)

    async def scenario():
        async with trainer() as process:
            assert (await process.run(device.train_job())).steps == 8

    asyncio.run(scenario())


def test_a_process_that_cannot_be_started_fails_the_job(device, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(device.folder / "no-python"))

    async def scenario():
        async with trainer() as process:
            with pytest.raises(TrainingFailed, match="cannot be started"):
                await process.run(device.train_job())

    asyncio.run(scenario())


def test_a_disk_that_is_full_comes_back_as_what_may_pass(device):
    with small_disk(device.folder / "disk", 64 * 1024) as disk:
        disk.fill()
        job = device.train_job(output=disk.folder / "update")

        async def scenario():
            async with trainer() as process:
                for _ in range(2):
                    with pytest.raises(StoreUnavailable, match="No space left"):
                        await process.run(job)
                disk.empty()
                assert (await process.run(job)).steps == 8

        asyncio.run(scenario())
        assert [path.name for path in disk.folder.iterdir()] == ["update"]


def test_a_training_that_is_cancelled_stops_and_its_process_does_the_next_job(endless):
    async def scenario():
        async with trainer() as process:
            task = await started(process, endless.train_job(ENDLESS))
            pid = process.pid
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await process.run(CountJob(data=endless.data))
            assert process.pid == pid
            assert endless.leftovers() == []

    asyncio.run(scenario())


def test_jobs_that_are_cancelled_before_a_process_has_started_do_not_cost_it(endless):
    # Else a device whose rounds are shorter than a start would start for ever.
    async def scenario():
        async with trainer() as process:
            pids = set()
            for _ in range(5):
                task = asyncio.ensure_future(process.run(endless.train_job(ENDLESS)))
                await asyncio.sleep(0.05)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                pids |= set(process.pids)
            await process.run(CountJob(data=endless.data))
            assert len(pids | set(process.pids)) == 1
            assert endless.leftovers() == []

    asyncio.run(scenario())


def test_a_cancelled_training_that_does_not_stop_is_killed(endless, monkeypatch):
    monkeypatch.setattr("fedge.edge_agent.trainer.process.CANCEL_GRACE_S", 0.3)

    async def scenario():
        async with trainer() as process:
            task = await started(process, endless.train_job(ENDLESS))
            pid = process.pid
            os.kill(pid, signal.SIGSTOP)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await process.run(CountJob(data=endless.data))
            assert process.pid != pid
            assert not is_alive(pid)
            assert endless.leftovers() == []

    asyncio.run(scenario())


def test_a_job_over_its_time_fails_and_ends_its_process(endless):
    async def scenario():
        async with trainer(time_limit_s=0.5) as process:
            with pytest.raises(TrainingFailed, match=r"time_limit_s = 0\.5"):
                await process.run(endless.train_job(ENDLESS))
            assert process.pid is None
            assert endless.leftovers() == []

    asyncio.run(scenario())


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is enforced on Linux")
def test_a_job_over_its_memory_fails_and_says_so(device):
    linear_plan(train=train_graph(wasted_floats=2**29)).write(device.folder)  # 2 GiB

    async def scenario():
        async with trainer(memory_limit_bytes=2**30) as process:
            with pytest.raises(TrainingFailed, match=r"memory|alloc"):
                await process.run(device.train_job())
            device.plan.write(device.folder)
            assert (await process.run(device.train_job())).steps == 8

    asyncio.run(scenario())


def test_the_end_of_stdin_ends_the_process_in_the_midst_of_a_job(endless):
    child = subprocess.Popen(
        [sys.executable, "-m", "fedge.edge_agent.trainer"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with child:
        child.stdin.write(endless.train_job(ENDLESS).encode())
        child.stdin.flush()
        assert b'"progress"' in child.stdout.readline()
        child.stdin.close()
        assert child.wait(timeout=30) == 0
    assert not endless.update.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="pidfd_open is Linux'")
def test_a_killed_agent_leaves_no_process_behind(endless):
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, str(endless.folder / "job.json")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    (endless.folder / "job.json").write_bytes(endless.train_job(ENDLESS).encode())
    with agent:
        agent.stdin.write("go\n")
        agent.stdin.flush()
        trainer_pid = int(agent.stdout.readline())
        watched = os.pidfd_open(trainer_pid)
        agent.kill()
    assert wait_for_end(watched)


AGENT = """
import asyncio, sys
from fedge.edge_agent.trainer.jobs import TrainJob
from fedge.edge_agent.trainer.process import TrainerProcess

async def main():
    sys.stdin.readline()
    job = TrainJob.model_validate_json(open(sys.argv[1]).read())
    process = TrainerProcess()
    await process.run(job, lambda progress: print(process.pid, flush=True))

asyncio.run(main())
"""


def wait_for_end(pidfd: int) -> bool:
    """Whether the process behind `pidfd` ended within 30 s."""
    try:
        return bool(select.select([pidfd], [], [], 30)[0])
    finally:
        os.close(pidfd)


@pytest.mark.skipif(sys.platform != "linux", reason="pidfd_open is Linux'")
def test_an_idle_process_ends_and_the_next_job_starts_another(device):
    async def scenario():
        async with trainer(keep_warm_s=0.0) as process:
            await process.run(device.train_job())
            idle = process.pid
            assert await asyncio.to_thread(wait_for_end, os.pidfd_open(idle))
            assert (await process.run(device.train_job())).steps == 8
            assert process.pid not in (None, idle)

    asyncio.run(scenario())


def test_closing_fails_the_job_under_way_and_those_that_wait(endless):
    async def scenario():
        async with trainer() as process:
            running = await started(process, endless.train_job(ENDLESS))
            waiting = asyncio.create_task(process.run(CountJob(data=endless.data)))
            await asyncio.sleep(0)
            await process.close()
            for task in (running, waiting):
                with pytest.raises(TrainingFailed):
                    await task
            assert process.pid is None

    asyncio.run(scenario())


def test_a_foreign_operator_is_refused_and_nothing_is_written(device):
    plan = linear_plan(train=train_graph(helper.make_node("RandomNormal", [], ["r"], shape=[1])))
    plan.write(device.folder)

    async def scenario():
        async with trainer() as process:
            with pytest.raises(PlanRefused, match="RandomNormal"):
                await process.run(device.train_job())

    asyncio.run(scenario())
    assert device.leftovers() == []


EXPLODING = SETTINGS.model_copy(update={"learning_rate": 1e3, "local_epochs": 99})


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"settings": EXPLODING}, TrainingFailed, "loss became"),
        ({"weights": "golden.safetensors"}, PeerError, "wrong_tensors"),
        ({"data": "absent.npz"}, ConfigError, r"absent\.npz"),
        ({"manifest": "train.onnx"}, PlanRefused, "manifest"),
        ({"train_graph": "infer.onnx"}, PlanRefused, "digest"),
    ],
    ids=["loss", "weights", "data", "manifest", "graph"],
)
def test_a_failure_comes_back_as_its_own_exception_and_leaves_no_file(
    device, changes, error, words
):
    found = {k: device.folder / v if isinstance(v, str) else v for k, v in changes.items()}
    if "data" in found:
        found["data"] = DataConfig(path=found["data"])

    async def scenario():
        async with trainer() as process:
            with pytest.raises(error, match=words):
                await process.run(device.train_job(**found))
            assert device.leftovers() == []
            assert (await process.run(device.train_job())).steps == 8

    asyncio.run(scenario())


def test_activation_makes_the_announced_file_after_the_golden_check(device):
    async def scenario():
        async with trainer() as process:
            return await process.run(device.activate_job())

    activated = asyncio.run(scenario())
    model = (device.folder / "model.onnx").read_bytes()
    assert model == device.plan.model(initial_weights())
    assert 0 <= activated.largest_difference < 1e-5
    assert activated.latency_ms > 0


def test_golden_outputs_that_differ_stop_the_activation(device):
    job = device.activate_job()
    outputs = read_tensors(job.golden_outputs)["output"].copy()
    outputs[2] += 0.01
    job.golden_outputs.write_bytes(encode_tensors({"output": outputs}))

    async def scenario():
        async with trainer() as process:
            with pytest.raises(ParityFailed) as failure:
                await process.run(job)
            return failure.value

    failure = asyncio.run(scenario())
    assert 0.001 < failure.largest_difference <= 0.0101
    assert failure.tolerance == device.plan.manifest.parity_tolerance
    assert device.leftovers() == []


def test_a_model_of_another_digest_is_not_activated(device):
    async def scenario():
        async with trainer() as process:
            with pytest.raises(PeerError) as failure:
                await process.run(device.activate_job(model_sha256="0" * 64))
            return failure.value.reason

    assert asyncio.run(scenario()) is RejectReason.DIGEST_MISMATCH
    assert device.leftovers() == []


def test_a_pool_runs_as_many_jobs_at_once_as_it_has_processes(endless):
    async def scenario():
        pool = TrainerPool(2, TrainerLimits(nice=0))
        moving = [asyncio.Event() for _ in range(3)]
        jobs = [endless.train_job(ENDLESS, output=endless.folder / f"update-{n}") for n in range(3)]
        tasks = [
            asyncio.create_task(pool.run(job, lambda _, event=event: event.set()))
            for job, event in zip(jobs, moving, strict=True)
        ]
        await asyncio.gather(moving[0].wait(), moving[1].wait())
        assert not moving[2].is_set()
        tasks[0].cancel()
        await moving[2].wait()  # the third job takes the place of the first
        await pool.close()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [
            asyncio.CancelledError, TrainingFailed, TrainingFailed,
        ]  # fmt: skip

    asyncio.run(scenario())


@pytest.mark.e2e
def test_training_without_torch_takes_less_than_half_the_memory(device):
    pytest.importorskip("torch")

    async def peak(engine: EngineName) -> int:
        async with trainer() as process:
            trained = await process.run(device.train_job(engine=engine))
            assert trained.engine is engine
            return trained.peak_rss_bytes

    onnx, torch = (asyncio.run(peak(engine)) for engine in (EngineName.ONNX, EngineName.TORCH))
    assert onnx < torch / 2
