"""Turns at the training processes of a fleet."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.shared_trainer import SharedTrainer
from fedge.edge_agent.trainer.jobs import ActivateJob, CountJob, TrainJob
from fedge.edge_agent.trainer.process import Trainer
from fedge.edge_agent.training_settings import TrainingSettings

NOWHERE = Path("nowhere")


def training(name: str) -> TrainJob:
    return TrainJob(
        manifest=NOWHERE, train_graph=NOWHERE, weights=NOWHERE, data=DataConfig(path=NOWHERE),
        settings=TrainingSettings(seed=0, batch_size=1, learning_rate=0.1, local_epochs=1),
        output=Path(name),
    )  # fmt: skip


def activation(name: str) -> ActivateJob:
    return ActivateJob(
        manifest=NOWHERE, infer_graph=NOWHERE, weights=NOWHERE, golden_inputs=NOWHERE,
        golden_outputs=NOWHERE, model_sha256="0" * 64, output=Path(name),
    )  # fmt: skip


class Processes:
    """Notes what it is given, and takes some turns of the loop for it."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.under_way = 0
        self.most = 0

    async def run(self, job: Any, on_progress: Any = None) -> str:
        name = "count" if isinstance(job, CountJob) else job.output.name
        self.begun.append(name)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            for _ in range(5):
                await asyncio.sleep(0)
            if name.startswith("bad"):
                raise RuntimeError(name)
            return name
        finally:
            self.under_way -= 1


def shared(processes: Processes, at_once: int = 1) -> SharedTrainer:
    return SharedTrainer(cast("Trainer", processes), at_once)


def test_trainings_go_first_and_one_other_job_between_two_of_them() -> None:
    async def scenario() -> list[str]:
        processes = Processes()
        trainer = shared(processes)
        jobs = [activation(f"a{n}") for n in range(5)] + [training(f"t{n}") for n in range(3)]
        await asyncio.gather(*(trainer.run(job) for job in jobs))
        return processes.begun

    # The process was free when the first came.
    assert asyncio.run(scenario()) == ["a0", "t0", "a1", "t1", "a2", "t2", "a3", "a4"]


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_as_many_run_at_a_time_as_there_are_processes(at_once: int) -> None:
    async def scenario() -> Processes:
        processes = Processes()
        trainer = shared(processes, at_once)
        jobs = [
            activation("a"),
            training("t"),
            training("bad"),
            CountJob(data=DataConfig(path=NOWHERE)),
        ]
        found = await asyncio.gather(*(trainer.run(j) for j in jobs * 4), return_exceptions=True)
        assert sum(isinstance(one, RuntimeError) for one in found) == 4
        # And after all that the places are free again.
        await asyncio.gather(*(trainer.run(training("last")) for _ in range(at_once)))
        return processes

    processes = asyncio.run(scenario())
    assert processes.most == at_once
    assert len(processes.begun) == 16 + at_once


def test_who_is_cancelled_while_waiting_keeps_nobody_else_waiting() -> None:
    async def scenario() -> list[str]:
        processes = Processes()
        trainer = shared(processes)
        tasks = [asyncio.create_task(trainer.run(training(f"t{n}"))) for n in range(4)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await tasks[0]
        # t2 has just been given its turn and has not begun.
        tasks[2].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert [task.cancelled() for task in tasks] == [False, True, True, False]
        return processes.begun

    assert asyncio.run(scenario()) in (["t0", "t3"], ["t0", "t2", "t3"])


@given(
    at_once=st.integers(1, 3),
    ticks=st.lists(
        st.lists(
            st.one_of(
                st.tuples(st.just("run"), st.booleans()),
                st.tuples(st.just("cancel"), st.integers(0, 11)),
            ),
            max_size=5,
        ),
        max_size=12,
    ),
)
def test_whoever_is_cancelled_in_whatever_moment_the_next_job_has_its_turn(
    at_once: int, ticks: list[list[tuple[str, Any]]]
) -> None:
    async def scenario() -> None:
        processes = Processes()
        trainer = shared(processes, at_once)
        tasks: list[asyncio.Task[str]] = []
        for tick in ticks:
            for what, which in tick:
                if what == "run":
                    job = training("t") if which else activation("a")
                    tasks.append(asyncio.create_task(trainer.run(job)))
                elif which < len(tasks):
                    tasks[which].cancel()
            await asyncio.sleep(0)
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(ended, str | asyncio.CancelledError)
        assert processes.most <= at_once
        last = [trainer.run(training(f"last{n}")) for n in range(at_once)]
        async with asyncio.timeout(5):
            assert len(await asyncio.gather(*last)) == at_once

    asyncio.run(scenario())
