"""The rollout desk: what it writes down, what it announces, and what another life makes of both."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from fedge.coordinator.publisher import Publisher
from fedge.coordinator.rollout_desk import RolloutDesk
from fedge.coordinator.rollout_reports import RolloutReport, show
from fedge.coordinator.rollouts import Phase, ServingMode, Wish
from fedge.coordinator.settings import RolloutSettings
from fedge.coordinator.store import DeviceSighting, Store
from fedge.coordinator.workers import Workers
from fedge.schemas import messages
from fedge.schemas.errors import PeerError, RejectReason
from fedge.schemas.link.memory import MemoryBroker
from fedge.schemas.link.protocol import Delivery
from fedge.schemas.messages import (
    CandidateAnnouncement,
    CandidatePhase,
    StableAnnouncement,
    TrialCounted,
    TrialOutcome,
    TrialReason,
    TrialReport,
)
from fedge.schemas.rollout_share import place_of
from fedge.schemas.topics import Topics
from tests.coordinator.states import put_plan, put_version

DEVICES = [f"d{number}" for number in range(8)]
SETTINGS = RolloutSettings(
    mode=ServingMode.MANUAL, stages=(0.25, 1.0), soak_s=60.0, min_devices=1, max_failure_share=0.3
)


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "state", create=True, serve=True) as opened:
        plan = put_plan(opened)
        for number in range(3):
            put_version(opened, plan, number)
        born(opened, DEVICES)
        yield opened


def born(store: Store, names: list[str], at: float = 1e12, *, online: bool = True) -> None:
    store.record_devices([DeviceSighting(name, at, boot=1, online=online) for name in names])


class Life:
    """One life of a desk, over a broker that keeps what is retained."""

    def __init__(
        self,
        store: Store,
        broker: MemoryBroker,
        mode: ServingMode,
        settings: RolloutSettings = SETTINGS,
    ) -> None:
        self.store = store
        self.now = 0.0
        self.wall = 1e12
        self.kept: list[str] = []
        self.all_known = True
        self.link = broker.link(f"coordinator-{random.random()}")
        self.workers = Workers()
        self.publisher = Publisher(self.link, self.link, Topics("p"), store.blobs)
        distribution: Any = SimpleNamespace(keep=self._keep)
        self.desk = RolloutDesk(
            "p",
            mode=mode,
            terms=settings.terms(),
            store=store,
            workers=self.workers,
            distribution=distribution,
            publisher=self.publisher,
            newest=self._newest,
            publish=lambda: None,
            all_known=lambda: self.all_known,
            clock=lambda: self.now,
            wall_clock=lambda: self.wall,
        )

    def _keep(self, refs: Any) -> None:
        self.kept = [ref.sha256 for ref in refs]

    def _newest(self) -> Any:
        return self.store.newest_version()

    async def look(self, seconds: float = 0.0) -> None:
        self.now += seconds
        await self.desk._look()
        await self.desk.announce()

    async def report(
        self, device: str, rollout: int, version: int, reason: TrialReason | None = None
    ) -> TrialCounted:
        outcome = TrialOutcome.ACTIVE if reason is None else TrialOutcome.ROLLED_BACK
        return await self.desk.count(
            device, TrialReport(rollout=rollout, version=version, outcome=outcome, reason=reason)
        )

    async def report_reached(self, rollout: int, version: int, **facts: Any) -> None:
        """Every device in the share says how it ended."""
        record = self.store.rollout(rollout)
        assert record is not None
        for name in DEVICES:
            if place_of("p", rollout, name) < record.share:
                await self.report(name, rollout, version, **facts)


class Observer:
    """A device that only listens."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.link = broker.link("observer")
        self.stable: StableAnnouncement | None = None
        self.candidate: CandidateAnnouncement | None = None
        self.emptied: list[str] = []

    async def hear(self) -> None:
        while True:
            event = await self.link.next_event()
            if not isinstance(event, Delivery):
                continue
            self.link.ack(event)
            kind = event.topic.rpartition("/")[2]
            if not event.payload:
                self.emptied.append(kind)
            elif kind == "stable":
                self.stable = messages.decode(StableAnnouncement, event.payload)
            else:
                self.candidate = messages.decode(CandidateAnnouncement, event.payload)

    @property
    def said(self) -> tuple[int, int, int, CandidatePhase]:
        """The stable version; rollout, version and phase of the candidate."""
        assert self.stable is not None
        assert self.candidate is not None
        candidate = self.candidate
        return (self.stable.number, candidate.rollout, candidate.number, candidate.phase)


@asynccontextmanager
async def world(store: Store) -> AsyncIterator[Any]:
    broker = MemoryBroker(random.Random(1))
    observer = Observer(broker)
    await observer.link.subscribe("fedge/1/p/all/+")
    await observer.link.start()
    listening = asyncio.create_task(observer.hear())
    lives: list[Life] = []

    async def begin(
        mode: ServingMode = ServingMode.MANUAL,
        *,
        all_known: bool = True,
        settings: RolloutSettings = SETTINGS,
    ) -> Life:
        life = Life(store, broker, mode, settings)
        life.all_known = all_known
        lives.append(life)
        await life.link.start()
        await life.desk.recover()
        await life.desk.announce()
        await settle()
        return life

    async def settle() -> None:
        for _ in range(50):
            await asyncio.sleep(0)

    try:
        yield SimpleNamespace(begin=begin, observer=observer, settle=settle)
    finally:
        listening.cancel()
        for life in lives:
            await life.link.close()
            life.workers.close()
        await observer.link.close()


def test_stage_by_stage_it_is_written_announced_and_stable(store) -> None:
    async def scenario() -> None:
        async with world(store) as here:
            life = await here.begin()
            assert here.observer.said == (2, 0, 2, CandidatePhase.DONE)
            store.start_rollout(1, SETTINGS.terms(), at=1.0)
            await life.look()
            await here.settle()
            assert here.observer.said == (2, 1, 1, CandidatePhase.RUNNING)
            reached = [n for n in DEVICES if place_of("p", 1, n) < here.observer.candidate.share]
            assert len(reached) == 2
            assert store.rollout(1).share == here.observer.candidate.share
            assert {store.version(n).weights.sha256 for n in (1, 2)} <= set(life.kept)
            await life.report_reached(1, 1)
            await life.look()
            await life.look(60.0)
            await here.settle()
            assert here.observer.candidate.share == 1.0
            await life.report_reached(1, 1)
            await life.look()
            await life.look(60.0)
            await here.settle()
            assert here.observer.said == (1, 1, 1, CandidatePhase.DONE)
            assert store.stable_version() == 1

    asyncio.run(scenario())


def test_what_fails_is_withdrawn_and_the_staged_mode_does_not_try_it_again(store) -> None:
    async def scenario() -> None:
        async with world(store) as here:
            life = await here.begin(ServingMode.STAGED)
            assert here.observer.said == (2, 0, 2, CandidatePhase.DONE)
            put_version(store, store.plan(store.version(0).plan_sha256), 3)
            await life.look()
            await here.settle()
            assert here.observer.said == (2, 1, 3, CandidatePhase.RUNNING)
            # Meanwhile training goes on.
            put_version(store, store.plan(store.version(0).plan_sha256), 4)
            await life.report_reached(1, 3, reason=TrialReason.HOLD_OUT)
            await life.look()
            await here.settle()
            assert here.observer.said == (2, 1, 3, CandidatePhase.WITHDRAWN)
            assert "rolled it back" in store.rollout(1).reason
            await life.look()
            await here.settle()
            # The next one is of what is newest then, and no other follows by itself.
            assert here.observer.said == (2, 2, 4, CandidatePhase.RUNNING)
            await life.report_reached(2, 4, reason=TrialReason.PARITY)
            for _ in range(3):
                await life.look(10.0)
            assert [one.version for one in store.rollouts()] == [3, 4]

    asyncio.run(scenario())


def test_another_life_goes_on_in_the_same_stage_and_carries_out_what_was_wished(store) -> None:
    async def scenario() -> None:
        async with world(store) as here:
            life = await here.begin()
            store.start_rollout(1, SETTINGS.terms(), at=1.0)
            await life.look()
            await life.report_reached(1, 1)
            await life.look()
            await life.look(59.0)
            said = here.observer.candidate
            # Killed: nothing is said any more.
            again = await here.begin()
            assert here.observer.candidate.share == said.share
            await again.look(0.9)
            assert store.rollout(1).stage == 0
            await again.look(0.2)
            assert store.rollout(1).stage == 1
            store.wish_of_rollout(Wish.PAUSE)
            await again.look()
            await here.settle()
            assert here.observer.said == (2, 1, 1, CandidatePhase.PAUSED)
            store.wish_of_rollout(Wish.ABORT, "second thoughts")
            third = await here.begin()
            assert here.observer.said == (2, 1, 1, CandidatePhase.WITHDRAWN)
            assert store.rollout(1).reason == "second thoughts"
            assert third.kept  # The stable version stays to be had.

    asyncio.run(scenario())


def test_what_was_done_before_each_newest_version_was_served_is_not_said_again(store) -> None:
    async def scenario() -> None:
        async with world(store) as here:
            life = await here.begin()
            store.start_rollout(1, SETTINGS.terms(straight=True), at=1.0)
            await life.look()
            await life.report_reached(1, 1)
            await life.look()
            await life.look(60.0)
            assert store.stable_version() == 1
            await here.begin(ServingMode.EVERY)
            put_version(store, store.plan(store.version(0).plan_sha256), 3)
            await here.begin()
            # Nobody goes back to 1.
            assert here.observer.said == (3, 0, 3, CandidatePhase.DONE)

    asyncio.run(scenario())


def test_a_report_is_counted_once_and_only_of_devices_that_are_reached(store) -> None:
    async def scenario() -> None:
        async with world(store) as here:
            life = await here.begin()
            store.start_rollout(1, SETTINGS.terms(), at=1.0)
            await life.look()
            share = store.rollout(1).share
            inside = next(n for n in DEVICES if place_of("p", 1, n) < share)
            outside = next(n for n in DEVICES if place_of("p", 1, n) >= share)
            for _ in range(2):
                assert (await life.report(inside, 1, 1)).rollout == 1
            for device, rollout, version in ((outside, 1, 1), (inside, 9, 1), (inside, 1, 2)):
                with pytest.raises(PeerError) as caught:
                    await life.report(device, rollout, version)
                assert caught.value.reason is RejectReason.NOT_IN_COHORT
            assert [one.device for one in store.trials(1)] == [inside]

    asyncio.run(scenario())


def test_the_mode_every_says_nothing_and_takes_back_what_was_said(store) -> None:
    async def scenario() -> None:
        async with world(store) as here:
            await here.begin(ServingMode.EVERY)
            assert (here.observer.stable, here.observer.emptied) == (None, [])
            life = await here.begin()
            store.start_rollout(1, SETTINGS.terms(), at=1.0)
            await life.look()
            for _ in range(2):
                await here.begin(ServingMode.EVERY)
                # Once: a note says that nothing is left there.
                assert sorted(here.observer.emptied) == ["candidate", "stable"]
            assert store.rollout(1).phase is Phase.ABORTED
            assert 'mode = "every"' in store.rollout(1).reason

    asyncio.run(scenario())


def test_a_restored_coordinator_reaches_a_share_of_its_fleet_and_not_of_the_first_who_come(
    store,
) -> None:
    """`fedge db restore` sets everybody offline; the newest version is rolled out in `recover`."""
    names = [f"n{number}" for number in range(1000)]
    with store.database.write() as connection:
        connection.exec_driver_sql("DELETE FROM devices")
    born(store, names, 1e12 - 2 * 86400, online=False)

    async def scenario() -> None:
        async with world(store) as here:
            store.serve_in_stages()
            put_version(store, store.plan(store.version(0).plan_sha256), 3)
            life = await here.begin(ServingMode.STAGED, all_known=False, settings=RolloutSettings())
            await life.look(1.0)
            # Begun, announced, and nobody is reached before the roll has ended.
            assert here.observer.said == (2, 1, 3, CandidatePhase.RUNNING)
            assert here.observer.candidate.share == 0.0
            assert life.desk._wait_s() == 1.0
            born(store, names[:40])
            life.all_known = True
            reached = []
            for _ in range(2):
                await life.look(10.0)
                await here.settle()
                share = here.observer.candidate.share
                reached.append(sum(place_of("p", 1, name) < share for name in names))
                born(store, names)
            assert reached == [10, 10]

    asyncio.run(scenario())


@pytest.mark.parametrize("wish", [Wish.ABORT, Wish.PAUSE])
def test_a_command_that_comes_between_the_look_and_the_record_is_carried_out(
    store, monkeypatch, wish
) -> None:
    async def scenario() -> None:
        async with world(store) as here:
            life = await here.begin()
            store.start_rollout(1, SETTINGS.terms(straight=True), at=1.0)
            await life.look()
            await life.report_reached(1, 1)
            await life.look()
            keep, kept = store.keep_rollout, []

            def late(record: Any) -> bool:
                if not kept:
                    # What `fedge rollout abort` says is accepted: "is taken back".
                    assert record.phase is Phase.DONE
                    store.wish_of_rollout(wish, "second thoughts")
                kept.append(keep(record))
                return kept[-1]

            monkeypatch.setattr(store, "keep_rollout", late)
            await life.look(60.0)
            await here.settle()
            assert kept == [False, True]
            assert store.stable_version() == 2
            if wish is Wish.ABORT:
                assert store.rollout(1).phase is Phase.ABORTED
                assert here.observer.said == (2, 1, 1, CandidatePhase.WITHDRAWN)
                return
            assert here.observer.said == (2, 1, 1, CandidatePhase.PAUSED)
            # The time before the pause counts.
            store.wish_of_rollout(Wish.RUN)
            await life.look()
            await life.look()
            assert (store.rollout(1).phase, store.rollout(1).reason) == (Phase.DONE, "")

    asyncio.run(scenario())


def test_a_name_that_nobody_was_born_with_counts_for_nothing(store) -> None:
    async def scenario() -> None:
        async with world(store) as here:
            life = await here.begin()
            store.start_rollout(1, SETTINGS.terms(straight=True), at=1.0)
            # Whoever may publish can make up names; what they sent is all that is known of them.
            store.record_devices(
                [DeviceSighting(f"invented-{n}", 1e12, online=True) for n in range(50)]
            )
            await life.look()
            assert store.rollout(1).reached == len(DEVICES)
            for number in range(50):
                with pytest.raises(PeerError, match="no birth of invented"):
                    await life.report(f"invented-{number}", 1, 1, TrialReason.PARITY)
            await life.look()
            assert store.rollout(1).phase is Phase.RUNNING
            assert store.trials(1) == ()
            born(store, ["late"])
            assert (await life.report("late", 1, 1)).rollout == 1

    asyncio.run(scenario())


def test_who_was_reached_and_fell_silent_is_shown_and_not_replaced(store, capsys) -> None:
    now = time.time()
    names = [f"n{number}" for number in range(40)]
    with store.database.write() as connection:
        connection.exec_driver_sql("DELETE FROM devices")
    born(store, names, now)

    async def scenario() -> None:
        async with world(store) as here:
            life = await here.begin()
            life.wall = now
            store.start_rollout(1, SETTINGS.terms(), at=now)
            await life.look()
            record = store.rollout(1)
            reached = [name for name in names if place_of("p", 1, name) < record.share]
            assert len(reached) == record.reached == 10
            born(store, reached, now + 1, online=False)
            others = [name for name in names if name not in reached]
            for day in range(1, 4):
                life.wall = now + day * 86400 + 2
                born(store, others, life.wall)
                await life.look(86400.0)
            assert store.rollout(1).share == record.share
            await life.report(reached[0], 1, 1)
            report = RolloutReport.of(
                store,
                store.rollout(1),
                population="p",
                mode=ServingMode.MANUAL,
                running=True,
                now=life.wall,
            )
            assert report.vanished == tuple(sorted(reached[1:]))
            assert report.wanted == 1  # `min_devices` of SETTINGS
            show(report, as_json=False)

    asyncio.run(scenario())
    said = capsys.readouterr().out
    assert "vanished: 9 gave no answer and were not seen for a day" in said
    assert "none is connected, and time does not count" in said
