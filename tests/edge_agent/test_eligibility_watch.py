"""When the readings are taken, what is said of them, and what the agent hears."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from fedge.edge_agent.eligibility import (
    EligibilitySettings,
    Reading,
    Readings,
    Sensor,
    Standing,
)
from fedge.edge_agent.eligibility_watch import EligibilityWatch, Pace
from fedge.edge_agent.participation import ParticipationSettings, Usage
from fedge.schemas.errors import StoreUnavailable

HOUR = 3600.0


class Host:
    """What the host says, and who was told. Looks are an hour apart unless somebody asks."""

    def __init__(self, policies: ParticipationSettings | None = None, **rules: Any) -> None:
        self.value: bool | None = True
        self.looks = 0
        self.heard: asyncio.Queue[Standing] = asyncio.Queue()
        self.used: list[Usage] | StoreUnavailable = []
        self.examples: int | None = None
        fields = {"charging": True, "steady_for_s": 0, "look_every_s": HOUR} | rules
        self.watch = EligibilityWatch(
            "d",
            rules=EligibilitySettings.model_validate(fields),
            policies=policies or ParticipationSettings(),
            reader=self,
            used=self.usage,
            examples=lambda: self.examples,
            changed=self.heard.put_nowait,
            wall_clock=lambda: 1e9,
        )

    async def read(self) -> Readings:
        self.looks += 1
        return {Sensor.CHARGING: Reading(self.value, "no sensor")}

    def usage(self) -> list[Usage]:
        if isinstance(self.used, StoreUnavailable):
            raise self.used
        return self.used

    async def hears(self) -> Standing:
        async with asyncio.timeout(10):
            return await self.heard.get()


def watched(host: Host, scenario: Any) -> None:
    async def run() -> None:
        task = asyncio.create_task(host.watch.run())
        try:
            await scenario()
        finally:
            task.cancel()

    asyncio.run(run())


def test_the_first_look_is_at_once_and_another_pace_looks_again_at_once() -> None:
    host = Host()

    async def scenario() -> None:
        assert (await host.hears()).eligible
        host.value = False
        host.watch.set_pace(Pace.IDLE)  # the same: nobody needs to know sooner
        await asyncio.sleep(0.1)
        assert host.looks == 1
        host.watch.set_pace(Pace.TRAINING)
        assert (await host.hears()).reasons == ("charging: on battery, wanted external power",)

    watched(host, scenario)


def test_while_it_trains_a_broken_rule_is_seen_without_being_asked() -> None:
    host = Host()

    async def scenario() -> None:
        host.watch.set_pace(Pace.TRAINING)
        assert (await host.hears()).eligible
        looks = host.looks
        host.value = False
        assert not (await host.hears()).eligible
        assert host.looks <= looks + 2, "the next look or, if one was under way, the one after it"

    watched(host, scenario)


def test_the_same_standing_is_told_once() -> None:
    host = Host()

    async def scenario() -> None:
        await host.hears()
        for _ in range(5):
            host.watch.look_again()
            await asyncio.sleep(0.01)
        assert host.looks > 1
        assert host.heard.empty()

    watched(host, scenario)


def test_a_reading_that_cannot_be_had_is_logged_once_and_again_after_it_could(
    caplog: pytest.LogCaptureFixture,
) -> None:
    host = Host()

    def told() -> int:
        return sum(record.getMessage() == "reading_unknown" for record in caplog.records)

    async def look(value: bool | None) -> None:
        host.value = value
        looks = host.looks
        host.watch.look_again()
        await asyncio.sleep(0.1)
        assert host.looks > looks

    async def scenario() -> None:
        await host.hears()
        for value, expected in ((None, 1), (None, 1), (True, 1), (None, 2)):
            await look(value)
            assert told() == expected

    with caplog.at_level(logging.INFO, logger="fedge"):
        watched(host, scenario)


def test_a_limit_of_the_day_and_a_ledger_that_cannot_be_read_are_in_the_way() -> None:
    host = Host(ParticipationSettings(daily_training_s=10, minimum_examples=5))

    async def scenario() -> None:
        assert (await host.hears()).eligible
        host.used = [Usage(1e9, 10.0, 0)]
        host.watch.look_again()
        (reason,) = (await host.hears()).reasons
        assert reason.startswith("daily_training_s: 10 of 10")
        host.used = []
        host.watch.look_again()
        assert (await host.hears()).eligible
        host.used = StoreUnavailable("the disk is gone")
        host.watch.look_again()
        assert "the disk is gone" in (await host.hears()).reasons[0]
        host.used, host.examples = [], 5
        host.watch.look_again()
        assert (await host.hears()).eligible
        host.examples = 4
        host.watch.look_again()
        assert (await host.hears()).reasons == ("minimum_examples: 4 here, 5 wanted",)

    watched(host, scenario)


def test_after_a_break_the_device_waits_for_the_steady_time_and_looks_when_it_is_over() -> None:
    host = Host(steady_for_s=0.3)

    async def scenario() -> None:
        await host.hears()
        host.value = False
        host.watch.look_again()
        assert not (await host.hears()).eligible
        host.value = True
        host.watch.look_again()
        # The looks are an hour apart: it comes back for the end of the time.
        back = await host.hears()
        assert back.eligible
        assert asyncio.get_running_loop().time() - back.good_since_s >= 0.3

    watched(host, scenario)
