"""The simulation itself: time moves by hand, threads keep their order, the killed stay dead."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from fedge.schemas.link.protocol import Delivery, Will
from tests.model.world import World


@pytest.fixture
def world() -> Iterator[World]:
    world = World(random.Random(1))
    yield world
    world.end()


def test_an_hour_of_sleep_takes_no_time_and_happens_in_order(world: World) -> None:
    process = world.process(offset_s=123.0)
    woken: list[float] = []

    async def sleep(seconds: float) -> None:
        await asyncio.sleep(seconds)
        woken.append(round(world.now_s))

    for seconds in (3600.0, 60.0, 1800.0):
        process.loop.begin(sleep(seconds))
    world.pass_time(3000.0)
    assert woken == [60, 1800]
    world.pass_time(601.0)
    assert woken == [60, 1800, 3600]


def test_a_timeout_goes_off_when_its_time_has_come(world: World) -> None:
    process = world.process()

    async def wait() -> str:
        try:
            async with asyncio.timeout(5.0):
                await asyncio.Event().wait()
        except TimeoutError:
            return "late"
        return "never"

    task = process.loop.begin(wait())
    world.pass_time(4.9)
    assert not task.done()
    world.pass_time(0.2)
    assert task.result() == "late"


def test_what_is_given_to_one_thread_is_done_in_order_and_known_later(world: World) -> None:
    process = world.process(work_s=2.0)
    done: list[int] = []
    with ThreadPoolExecutor(1) as thread:

        async def give() -> list[int]:
            loop = asyncio.get_running_loop()
            work = [loop.run_in_executor(thread, done.append, number) for number in range(5)]
            await work[2]
            return list(done)

        task = process.loop.begin(give())
        world.pass_time(30.0)
    assert task.result()[:3] == [0, 1, 2]
    assert done == [0, 1, 2, 3, 4]


def test_a_process_that_is_killed_runs_nothing_more_and_its_will_is_published(world: World) -> None:
    process, other = world.process(), world.process()
    link, watching = process.link("one", will=Will("will", b"gone")), other.link("other")
    ended: list[str] = []
    heard: list[str] = []

    async def work() -> None:
        await link.start()
        try:
            await asyncio.sleep(10.0)
        finally:
            ended.append("finally")

    async def watch() -> None:
        await watching.subscribe("will")
        await watching.start()
        while True:
            event = await watching.next_event()
            if isinstance(event, Delivery):
                heard.append(event.topic)

    process.loop.begin(work())
    other.loop.begin(watch())
    world.pass_time(1.0)
    world.kill(process)
    world.pass_time(60.0)
    assert (ended, heard) == ([], ["will"])


def test_a_loop_that_feeds_itself_is_found(world: World) -> None:
    async def spin() -> None:
        while True:  # noqa: ASYNC110 -- that is the mistake that is looked for
            await asyncio.sleep(0)

    world.process().loop.begin(spin())
    with pytest.raises(AssertionError, match="the clock still stands"):
        world.settle()


def test_one_seed_is_one_run() -> None:
    def run() -> list[tuple[str, float]]:
        world = World(random.Random(7))
        log: list[tuple[str, float]] = []

        async def work(name: str) -> None:
            for _ in range(5):
                await asyncio.sleep(world.rng.random())
                log.append((name, world.now_s))

        for name in "abc":
            world.process().loop.begin(work(name))
        world.pass_time(10.0)
        world.end()
        return log

    assert run() == run()
    assert len({name for name, _ in run()}) == 3
