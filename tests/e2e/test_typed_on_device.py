"""An app and the agent at the same time: texts come while it trains, and some are taken back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fedge.edge_agent.example_store import FILE_NAME, ExampleStore
from fedge.edge_agent.trainer.jobs import TrainJob
from fedge.edge_agent.trainer.process import TrainerPool
from tests.brokers import MosquittoBroker
from tests.fleet import Fleet, fleet, tiny_examples

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

TASK = """
from fedge.coordinator.tasks.next_word import next_word
from fedge.schemas.words import Vocabulary


def task():
    return next_word(Vocabulary("see you soon at home my secret is".split()), cells=8, dimensions=6,
                     window=4)
"""


class Watched(TrainerPool):
    """Calls `between` when the first training is done and its answer not yet given."""

    def __init__(self) -> None:
        super().__init__(1)
        self.trainings = 0
        self.between = lambda: None

    async def run(self, job, on_progress=None):
        answer = await super().run(job, on_progress)
        if isinstance(job, TrainJob):
            self.trainings += 1
            if self.trainings == 1:
                self.between()
        return answer


def start_keyboard(here: Fleet, name: str) -> Path:
    path = here.folder / name / FILE_NAME
    here.start_agent(name, tiny_examples(1, 0), data={"path": path, "format": "store"})
    return path


def test_a_device_without_texts_takes_part_when_an_app_has_added_some(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("fedge.edge_agent.typed_texts.COUNT_AGAIN_S", 0.2)
    (tmp_path / "words_task.py").write_text(TASK)

    async def scenario(port: int) -> None:
        rounds = {"goal": 1, "versions": 1, "gather_s": 0.5}
        async with fleet(
            port, tmp_path, task=f"{tmp_path}/words_task.py:task", round=rounds
        ) as here:
            here.start_coordinator()
            path = start_keyboard(here, "phone")
            await here.version(0)
            await asyncio.sleep(1.0)
            assert here.newest is not None
            assert here.newest.number == 0
            with ExampleStore(path) as store:
                for _ in range(20):
                    store.add("See you soon at home.")
                    store.add("See you at home!")
            await here.version(1)
            (one,) = here.report(1).participants
            assert one.contribution is not None
            # Texts of the training side; the others are only measured on.
            with ExampleStore(path) as store:
                assert one.contribution.examples == store.count().training.examples > 0

    with MosquittoBroker(tmp_path / "broker") as broker:
        asyncio.run(scenario(broker.port))


def test_what_was_made_from_a_forgotten_text_is_thrown_away(tmp_path, monkeypatch) -> None:
    (tmp_path / "words_task.py").write_text(TASK)

    async def scenario(port: int) -> None:
        rounds = {"goal": 1, "versions": 1, "gather_s": 0.5, "deadline_s": 60}
        async with fleet(
            port, tmp_path, task=f"{tmp_path}/words_task.py:task", round=rounds
        ) as here:
            pool = here.pool = Watched()
            path = here.folder / "phone" / FILE_NAME
            path.parent.mkdir()
            with ExampleStore(path) as store:
                for number in range(30):
                    store.add("See you soon at home.")
                    store.add(f"My secret is {number} soon.")

            def forget() -> None:
                with ExampleStore(path) as store:
                    assert store.forget_containing("secret").erased

            pool.between = forget
            here.start_coordinator()
            start_keyboard(here, "phone")
            await here.version(1)
            assert pool.trainings == 2
            (one,) = here.report(1).participants
            assert one.contribution is not None
            with ExampleStore(path) as store:
                left = store.count()
            assert one.contribution.examples == left.training.examples

    with MosquittoBroker(tmp_path / "broker") as broker:
        asyncio.run(scenario(broker.port))
