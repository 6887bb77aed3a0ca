"""One piece of work a device at a time, and of what waits only the newest."""

from __future__ import annotations

import asyncio

import pytest

from fedge.coordinator.latest import LatestOnly
from fedge.schemas.errors import StoreError


def test_of_what_a_device_says_meanwhile_only_the_newest_is_done() -> None:
    async def scenario() -> None:
        gate, done = asyncio.Semaphore(0), []

        async def work(device: str, said: int) -> None:
            await gate.acquire()
            done.append((device, said))

        async with asyncio.TaskGroup() as group:
            latest = LatestOnly(work, lambda c, name: group.create_task(c, name=name), "work")
            for said in range(1000):
                latest.put("flood", said)
                await asyncio.sleep(0)
            latest.put("other", 7)
            gate.release()
            gate.release()
            gate.release()
        assert sorted(done) == [("flood", 0), ("flood", 999), ("other", 7)]

    asyncio.run(scenario())


def test_work_that_fails_does_not_keep_the_device_from_the_next() -> None:
    async def scenario() -> list[int]:
        done: list[int] = []

        async def work(_: str, said: int) -> None:
            if said == 0:
                raise ValueError("no")
            done.append(said)

        tasks: list[asyncio.Task[None]] = []
        latest = LatestOnly(work, lambda c, _: tasks.append(asyncio.ensure_future(c)), "work")
        latest.put("a", 0)
        with pytest.raises(ValueError, match="no"):
            await tasks[0]
        latest.put("a", 1)
        await tasks[1]
        return done

    assert asyncio.run(scenario()) == [1]


def test_what_the_store_refuses_of_one_device_ends_nothing() -> None:
    async def scenario() -> list[int]:
        done: list[int] = []

        async def work(_: str, said: int) -> None:
            if said == 0:
                raise StoreError("CHECK constraint failed")
            done.append(said)

        async with asyncio.TaskGroup() as group:
            latest = LatestOnly(work, lambda c, name: group.create_task(c, name=name), "work")
            latest.put("liar", 0)
            await asyncio.sleep(0)
            latest.put("liar", 1)
            latest.put("honest", 2)
        return done

    assert sorted(asyncio.run(scenario())) == [1, 2]
