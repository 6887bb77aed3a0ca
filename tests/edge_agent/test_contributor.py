"""From an assignment to an update in the outbox, with real training processes that are killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from fedge.edge_agent.checkpoints import Checkpoints
from fedge.edge_agent.contributor import Contributor
from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.engines import EngineName
from fedge.edge_agent.events import Trained, TrainingStopped
from fedge.edge_agent.library import Library
from fedge.edge_agent.outbox import Outbox
from fedge.edge_agent.state import AgentState
from fedge.edge_agent.trainer.jobs import CountJob
from fedge.edge_agent.trainer.process import TrainerLimits, TrainerProcess
from fedge.schemas.blobs import describe
from fedge.schemas.messages import Assignment, VersionAnnouncement
from fedge.schemas.tensors import encode_tensors
from tests.edge_agent.plans import examples, initial_weights, linear_plan
from tests.edge_agent.small_disks import small_disk

PLAN = linear_plan()


class Device:
    """A device that holds version 0; its state may lie on a disk of its own."""

    def __init__(self, folder: Path, state_dir: Path, n: int) -> None:
        x, y = examples(n)
        np.savez(folder / "data.npz", x=x, y=y)
        self.library = Library(state_dir)
        weights = encode_tensors(initial_weights())
        for data in (PLAN.manifest.encode(), PLAN.train, PLAN.infer, PLAN.golden, weights):
            self.library.blobs.put(data)
        self.version = VersionAnnouncement(
            number=0,
            plan=describe(PLAN.manifest.encode()),
            weights=describe(weights),
            golden=describe(PLAN.golden),
            model_sha256="0" * 64,
            model_bytes=1,
        )
        self.memory = AgentState(state_dir / "agent.sqlite")
        self.outbox = Outbox(self.memory, state_dir / "outbox", "d")
        self.trainer = TrainerProcess(TrainerLimits(nice=0))
        self.begun: list[int] = []
        self.moving = asyncio.Event()
        self.contributor = Contributor(
            "d",
            data=DataConfig(path=folder / "data.npz"),
            engine=EngineName.ONNX,
            threads=1,
            trainer=self,
            library=self.library,
            outbox=self.outbox,
            held=lambda: self.version,
            checkpoints=Checkpoints(state_dir / "checkpoint"),
        )

    def interrupt(self, job) -> bool:
        return self.trainer.interrupt(job)

    async def run(self, job, on_progress=None):
        """The trainer's, and notes that training moves."""

        def moved(progress) -> None:
            if self.trainer.pid not in self.begun:
                self.begun.append(self.trainer.pid)
                self.moving.set()

        return await self.trainer.run(job, moved)

    def kill_trainer(self) -> None:
        self.moving.clear()
        os.kill(self.trainer.pid, signal.SIGKILL)

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in self.outbox.path(1).parent.iterdir())


@contextlib.asynccontextmanager
async def device(folder: Path, *, n: int = 30, state_dir: Path | None = None):
    made = Device(folder, state_dir or folder / "state", n)
    try:
        yield made
    finally:
        await made.trainer.close()
        made.memory.close()


def assignment(**changes) -> Assignment:
    fields = {
        "round": 1,
        "base": 0,
        "plan_sha256": PLAN.manifest.digest,
        "deadline_s": 60,
        "seed": 1,
        "batch_size": 8,
        "learning_rate": 1e-6,
        "local_epochs": 2,
    }
    return Assignment.model_validate(fields | changes)


LONG = assignment(local_epochs=1000)


@contextlib.asynccontextmanager
async def training(here: Device, work: Assignment) -> AsyncIterator[asyncio.Task]:
    task = asyncio.create_task(here.contributor.contribute(work))
    moving = asyncio.create_task(here.moving.wait())
    await asyncio.wait([task, moving], return_when=asyncio.FIRST_COMPLETED)
    assert not task.done()
    yield task
    moving.cancel()


def test_an_update_is_in_the_outbox_durably_when_training_is_said_to_be_done(tmp_path) -> None:
    async def scenario() -> None:
        async with device(tmp_path) as here:
            assert await here.contributor.contribute(assignment()) == Trained(1)
            # What another process, the next life, finds.
            rows = AgentState(tmp_path / "state" / "agent.sqlite").outbox()
            assert list(rows) == [1]
            assert here.outbox.damage(1) is None
            assert here.files == ["1.safetensors"]

    asyncio.run(scenario())


def test_a_training_whose_process_was_killed_is_tried_once_more(tmp_path) -> None:
    async def scenario() -> None:
        async with device(tmp_path, n=4000) as here:
            work = assignment(local_epochs=30)
            async with training(here, work) as task:
                here.kill_trainer()
                assert await task == Trained(1)
            assert len(here.begun) == 2
            first = here.outbox.path(1).read_bytes()
            again = work.model_copy(update={"round": 2})
            assert await here.contributor.contribute(again) == Trained(2)
            assert here.outbox.path(2).read_bytes() == first

    asyncio.run(scenario())


def test_a_training_whose_process_is_killed_again_has_failed_and_says_so_at_once(tmp_path) -> None:
    async def scenario() -> None:
        async with device(tmp_path, n=4000) as here:
            async with training(here, LONG) as task:
                here.kill_trainer()
                await here.moving.wait()
                here.kill_trainer()
                stopped = await task
            assert isinstance(stopped, TrainingStopped)
            assert "SIGKILL" in stopped.reason
            assert here.files == []

    asyncio.run(scenario())


def test_a_killed_training_is_not_begun_anew_without_half_of_its_time(tmp_path) -> None:
    async def scenario() -> None:
        async with device(tmp_path, n=4000) as here:
            # Said for the second time when 25 of its 60 seconds were left.
            here.contributor.asked(LONG.model_copy(update={"deadline_s": 25}))
            async with training(here, LONG) as task:
                here.kill_trainer()
                stopped = await task
            assert isinstance(stopped, TrainingStopped)
            assert "SIGKILL" in stopped.reason
            assert len(here.begun) == 1

    asyncio.run(scenario())


def test_the_deadline_counts_from_the_assignment_not_from_the_training(tmp_path) -> None:
    async def scenario() -> None:
        async with device(tmp_path) as here:
            short = assignment(deadline_s=0.01)
            here.contributor.asked(short)
            await asyncio.sleep(0.05)  # its base was being fetched
            stopped = await here.contributor.contribute(short)
            assert isinstance(stopped, TrainingStopped)
            assert "deadline" in stopped.reason
            assert here.trainer.pid is None

    asyncio.run(scenario())


def test_a_training_that_is_stopped_leaves_nothing(tmp_path) -> None:
    async def scenario() -> None:
        async with device(tmp_path, n=4000) as here:
            async with training(here, LONG) as task:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            # The process stops after its step, and waits for the next job.
            await here.trainer.run(CountJob(data=DataConfig(path=tmp_path / "data.npz")))
            assert here.files == []
            assert here.memory.outbox() == {}

    asyncio.run(scenario())


def test_a_result_that_cannot_be_kept_is_a_failure_with_the_reason_and_leaves_nothing(
    tmp_path,
) -> None:
    async def scenario() -> None:
        with small_disk(tmp_path / "disk", 512 * 1024) as disk:
            async with device(tmp_path, state_dir=disk.folder) as here:
                disk.fill()
                stopped = await here.contributor.contribute(assignment())
                assert isinstance(stopped, TrainingStopped)
                assert "No space left" in stopped.reason
                assert here.files == []
                # Room for the file, and not for the row.
                disk.empty()
                disk.fill(leave_bytes=8192)
                curve = assignment(local_epochs=1000, batch_size=1)
                stopped = await here.contributor.contribute(curve)
                assert isinstance(stopped, TrainingStopped)
                assert "full" in stopped.reason
                assert here.files == []
                assert here.memory.outbox() == {}
                disk.empty()
                assert await here.contributor.contribute(assignment()) == Trained(1)

    asyncio.run(scenario())


def test_a_suspended_training_goes_on_where_it_was_to_the_same_update(tmp_path) -> None:
    async def scenario() -> None:
        async with device(tmp_path, n=4000) as here:
            work = assignment(local_epochs=10)
            checkpoint = tmp_path / "state" / "checkpoint" / "1.checkpoint"
            for _ in range(2):
                here.moving.clear()
                here.begun.clear()
                async with training(here, work) as task:
                    here.contributor.suspend()
                    here.contributor.suspend()  # once more is the same
                    assert await task is None
                assert checkpoint.exists()
                assert here.trainer.pid is None
                assert here.files == []
            assert await here.contributor.contribute(work) == Trained(1)
            assert not checkpoint.exists()
            again = work.model_copy(update={"round": 2})
            assert await here.contributor.contribute(again) == Trained(2)
            assert here.outbox.path(1).read_bytes() == here.outbox.path(2).read_bytes()
            here.contributor.suspend()  # nothing is under way

    asyncio.run(scenario())


def test_a_training_that_waits_for_its_turn_is_suspended_before_it_begins(tmp_path) -> None:
    async def scenario() -> None:
        async with device(tmp_path, n=4000) as here:
            # Another device of the fleet has the process.
            job = here.contributor._job(assignment(local_epochs=10))
            busy = asyncio.create_task(here.trainer.run(job))
            await asyncio.sleep(0)
            task = asyncio.create_task(here.contributor.contribute(assignment()))
            await asyncio.sleep(0.1)
            here.contributor.suspend()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await busy).steps == 5000
            assert here.trainer.pid is not None
            assert await here.contributor.contribute(assignment()) == Trained(1)

    asyncio.run(scenario())


def test_another_round_s_checkpoint_goes_when_a_training_begins(tmp_path) -> None:
    async def scenario() -> None:
        async with device(tmp_path) as here:
            folder = tmp_path / "state" / "checkpoint"
            folder.mkdir()
            (folder / "7.checkpoint").write_bytes(b"of another round")
            (folder / "1.checkpoint").write_bytes(b"damaged")
            assert await here.contributor.contribute(assignment()) == Trained(1)
            assert list(folder.iterdir()) == []

    asyncio.run(scenario())
