"""Personal trainings at the training processes of a fleet: whatever else there is goes first."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fedge.edge_agent.trainer.jobs import PersonaliseJob
from fedge.edge_agent.trainer.process import TrainingInterrupted
from tests.edge_agent.test_personal_training import Owner
from tests.edge_agent.test_shared_trainer import Processes, activation, shared, training


class Slow(Processes):
    """Personal trainings last until they are stopped, or `let` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.let = asyncio.Event()
        self.stopped: list[str] = []

    async def run(self, job: Any, on_progress: Any = None) -> str:
        if not isinstance(job, PersonaliseJob):
            return await super().run(job, on_progress)
        name = job.weights_output.name
        self.begun.append(name)
        try:
            await self.let.wait()
        except asyncio.CancelledError:
            self.stopped.append(name)
            raise
        return name


@pytest.fixture
def owner(tmp_path) -> Owner:
    return Owner(tmp_path)


def personal(owner: Owner, name: str) -> PersonaliseJob:
    return owner.personalise_job(weights_output=owner.folder / name)


async def begun(processes: Processes, number: int) -> None:
    while len(processes.begun) < number:  # noqa: ASYNC110 -- it tells nobody
        await asyncio.sleep(0)


@pytest.mark.parametrize("other", [training, activation])
def test_any_other_job_stops_a_personal_training_and_has_its_turn(owner, other):
    async def scenario() -> None:
        processes = Slow()
        trainer = shared(processes)
        own = asyncio.create_task(trainer.run(personal(owner, "own")))
        await begun(processes, 1)
        assert await trainer.run(other("other")) == "other"
        with pytest.raises(TrainingInterrupted):
            await own
        assert processes.stopped == ["own"]

    asyncio.run(scenario())


def test_only_as_many_are_stopped_as_there_are_other_jobs(owner):
    async def scenario() -> None:
        processes = Slow()
        trainer = shared(processes, at_once=3)
        own = [asyncio.create_task(trainer.run(personal(owner, f"own-{n}"))) for n in range(3)]
        await begun(processes, 3)
        await trainer.run(training("a"))
        assert len(processes.stopped) == 1
        # One place is free now.
        await trainer.run(training("b"))
        assert len(processes.stopped) == 1
        processes.let.set()
        outcomes = await asyncio.gather(*own, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes].count(TrainingInterrupted) == 1

    asyncio.run(scenario())


def test_personal_trainings_wait_until_nothing_else_does(owner):
    async def scenario() -> None:
        processes = Slow()
        processes.let.set()
        trainer = shared(processes)
        jobs = [personal(owner, "own"), training("a"), activation("b"), training("c")]
        await asyncio.gather(trainer.run(training("first")), *(trainer.run(job) for job in jobs))
        assert processes.begun[0] == "first"
        assert processes.begun[-1] == "own"
        assert set(processes.begun) == {"first", "a", "b", "c", "own"}

    asyncio.run(scenario())


def test_one_that_is_cancelled_or_fails_passes_its_turn_on(owner):
    async def scenario() -> None:
        processes = Slow()
        trainer = shared(processes)
        own = asyncio.create_task(trainer.run(personal(owner, "own")))
        waiting = asyncio.create_task(trainer.run(personal(owner, "waits")))
        await begun(processes, 1)
        for task in (waiting, own):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await trainer.run(training("next")) == "next"

    asyncio.run(scenario())
