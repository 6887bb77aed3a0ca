"""A whole fleet for tests: a real coordinator and real agents over a real broker, on one loop.

Everything is what the programs run; only the processes are missing (tests that kill processes
start them). Waiting is on announcements that the coordinator publishes.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedge.coordinator.serving import serve
from fedge.coordinator.settings import Settings as CoordinatorSettings
from fedge.coordinator.store import RoundReport, Store
from fedge.edge_agent.agent import EdgeAgent
from fedge.edge_agent.settings import Settings as AgentSettings
from fedge.edge_agent.trainer.process import TrainerPool
from fedge.schemas import messages, topics
from fedge.schemas.link.broker import BrokerSettings
from fedge.schemas.link.protocol import Delivery, Link
from fedge.schemas.messages import VersionAnnouncement
from fedge.schemas.topics import Topics

TINY_TASK = f"{Path(__file__).parent / 'tiny_task.py'}:task"
LIMIT_S = 150.0

Examples = tuple[np.ndarray, np.ndarray]


def tiny_examples(count: int, seed: int) -> Examples:
    """Points in four dimensions, their class decided by a hidden plane and a bump."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 4)).astype(np.float32)
    y = ((x[:, 0] + x[:, 1] > 0).astype(np.int64) + (x[:, 2] > 0.5)).astype(np.int64)
    return x, y


@dataclass
class Fleet:
    """Where everything is. `observer`: a session that sees the coordinator's announcements."""

    population: str
    port: int
    folder: Path
    settings: CoordinatorSettings
    observer: Link
    topics: Topics
    newest: VersionAnnouncement | None = None
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    pool: TrainerPool = field(default_factory=lambda: TrainerPool(1))

    def start_coordinator(self) -> asyncio.Task[None]:
        return self._start(serve(self.settings), "coordinator")

    def start_agent(self, name: str, examples: Examples, **changes: Any) -> asyncio.Task[None]:
        path = self.folder / f"{name}.npz"
        np.savez(path, x=examples[0], y=examples[1])
        settings = AgentSettings.model_validate(
            {
                "population": self.population,
                "device": name,
                "state_dir": self.folder / name,
                "engine": "onnx",
                "broker": {"port": self.port},
                "data": {"path": path},
                **changes,
            }
        )
        agent = EdgeAgent(settings, self.pool, random.Random(name))
        return self._start(agent.run(), name)

    def link(self, client_id: str) -> Link:
        """Another session at the broker, not started."""
        broker = BrokerSettings(port=self.port)
        return broker.link(f"{self.population}.{client_id}", random.Random(client_id))

    async def version(self, number: int) -> VersionAnnouncement:
        """Returns when that version (or a later one) is announced; raises if a program died."""

        async def watch() -> VersionAnnouncement:
            while self.newest is None or self.newest.number < number:
                event = await self.observer.next_event()
                if isinstance(event, Delivery):
                    self.observer.ack(event)
                    if topics.parse(event.topic).message is VersionAnnouncement:
                        self.newest = messages.decode(VersionAnnouncement, event.payload)
            return self.newest

        return await self.during(watch())

    async def during(self, work: Any) -> Any:
        """The result of `work`, unless a program of the fleet ends before it."""
        wanted = asyncio.ensure_future(work)
        async with asyncio.timeout(LIMIT_S):
            done, _ = await asyncio.wait([wanted, *self.tasks], return_when=asyncio.FIRST_COMPLETED)
        if wanted not in done:
            wanted.cancel()
            for task in done:
                await task
            raise AssertionError(f"{[task.get_name() for task in done]} ended")
        return wanted.result()

    def store(self) -> Store:
        return Store.open(self.settings.state_dir)

    def report(self, number: int) -> RoundReport:
        with self.store() as store:
            found = store.round_report(number)
        assert found is not None
        return found

    def _start(self, work: Any, name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self.tasks.append(task)
        return task

    async def stop(self, tasks: Sequence[asyncio.Task[None]] | None = None) -> None:
        ending = list(self.tasks if tasks is None else tasks)
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        self.tasks = [task for task in self.tasks if task not in ending]


@contextlib.asynccontextmanager
async def fleet(
    port: int, folder: Path, *, task: str = TINY_TASK, **tables: Any
) -> AsyncIterator[Fleet]:
    """A fleet without coordinator and agents yet. `tables`: of the coordinator's settings."""
    population = f"t{uuid.uuid4().hex[:12]}"
    settings = CoordinatorSettings.model_validate(
        {
            "population": population,
            "task": task,
            "state_dir": folder / "coordinator",
            "broker": {"port": port},
            **tables,
        }
    )
    names = Topics(population)
    observer = BrokerSettings(port=port).link(f"{population}.observer", random.Random(0))
    await observer.subscribe(f"{names.prefix}/all/+")
    await observer.start()
    made = Fleet(population, port, folder, settings, observer, names)
    try:
        yield made
    finally:
        await made.stop()
        await made.pool.close()
        await observer.close()
