"""A version is put into use soon, once, and never in the way of training."""

from __future__ import annotations

import asyncio

from fedge.edge_agent.activator import Activator
from fedge.schemas.messages import VersionAnnouncement
from tests.edge_agent.announcements import version


class Recorder:
    """Remembers which versions were activated; `seen` is set at each."""

    def __init__(self) -> None:
        self.activated: list[int] = []
        self.seen = asyncio.Event()

    async def activate(self, one: VersionAnnouncement) -> None:
        self.activated.append(one.number)
        self.seen.set()


def run(scenario: object) -> None:
    asyncio.run(scenario())  # type: ignore[operator]


def test_of_versions_in_quick_succession_only_the_newest_is_activated() -> None:
    async def scenario() -> None:
        recorder = Recorder()
        activator = Activator(recorder.activate, grace_s=0.2, latest_s=30)
        task = asyncio.create_task(activator.run())
        for number in range(1, 6):
            activator.wanted(version(number))
            await asyncio.sleep(0)
        await asyncio.wait_for(recorder.seen.wait(), 10)
        assert recorder.activated == [5]
        task.cancel()

    run(scenario)


def test_a_steady_series_of_versions_does_not_put_activation_off_for_ever() -> None:
    async def scenario() -> None:
        recorder = Recorder()
        activator = Activator(recorder.activate, grace_s=30, latest_s=0.1)
        task = asyncio.create_task(activator.run())
        number = 0
        while not recorder.seen.is_set():
            number += 1
            activator.wanted(version(number))
            await asyncio.sleep(0.01)
        assert len(recorder.activated) == 1
        assert number < 1000
        task.cancel()

    run(scenario)


def test_activation_waits_for_the_end_of_training_and_takes_what_is_newest_then() -> None:
    async def scenario() -> None:
        recorder = Recorder()
        activator = Activator(recorder.activate, grace_s=0, latest_s=0)
        task = asyncio.create_task(activator.run())
        activator.training(under_way=True)
        activator.wanted(version(1))
        for _ in range(20):
            await asyncio.sleep(0)
        assert recorder.activated == []
        activator.wanted(version(2))
        activator.training(under_way=False)
        await asyncio.wait_for(recorder.seen.wait(), 10)
        assert recorder.activated == [2]
        task.cancel()

    run(scenario)
