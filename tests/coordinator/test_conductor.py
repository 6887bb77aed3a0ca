"""The conductor at the edges that no machine sees: what is being decided while time passes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedge.coordinator.conductor import Conductor
from fedge.coordinator.intake import accepted_receipt
from fedge.coordinator.rounds import Mode, RoundPolicy
from fedge.coordinator.store import Contribution, Outcome, Store
from fedge.coordinator.surroundings import Surroundings
from fedge.coordinator.workers import Workers
from fedge.schemas.blobs import describe
from fedge.schemas.messages import Assignment, LossCurve, Offer, Receipt


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "state", create=True, serve=True) as opened:
        yield opened


class Bench:
    """A conductor over a real store. `gate`: updates are decided while it is set."""

    def __init__(self, store: Store, policy: RoundPolicy) -> None:
        self.store = store
        self.now = 0.0
        self.told: list[tuple[str, Any]] = []
        self.aggregated: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.workers = Workers()
        self._tasks: list[asyncio.Task[Any]] = []
        succession = SimpleNamespace(
            newest=SimpleNamespace(number=0), overtaken=self._none, make_next=self._make_next
        )
        nothing: Callable[..., Any] = lambda *_: ()  # noqa: E731 -- one for three
        self.conductor = Conductor(
            store=store,
            succession=succession,
            intake=self,
            desk=SimpleNamespace(
                taken=nothing, drop=lambda _: None, drop_all=nothing, keep_only=nothing
            ),
            journal=SimpleNamespace(refused=nothing),
            workers=self.workers,
            round_settings=SimpleNamespace(
                policy=policy, versions=None, checkins_per_s=500.0, checkin_spread_s=0.0
            ),
            training=SimpleNamespace(
                batch_size=1, learning_rate=0.1, local_epochs=1, local_steps=None, proximal_mu=0.0
            ),
            plan_sha256="0" * 64,
            seed=0,
            around=Surroundings(
                tell=lambda device, message: self.told.append((device, message)),
                start=lambda work, _: self._tasks.append(asyncio.ensure_future(work)),
                publish=lambda: None,
                publish_again=lambda: None,
                wake=lambda: None,
                online=lambda: frozenset("abc"),
                all_known=lambda: True,
                clock=lambda: self.now,
                wall_clock=lambda: 1000.0 + self.now,
            ),
        )

    def finish(self, upload: Any, counted_in: int) -> tuple[int, Receipt]:
        self.gate.wait(10)
        offer = upload.offer
        contribution = Contribution(offer.update, 1, 1, 1.0, LossCurve(), {})
        self.store.record_accepted(
            offer.round, upload.device, contribution, at=0.0, counted_in=counted_in
        )
        return counted_in, accepted_receipt(offer)

    def accepted_updates(self, number: int, base: int) -> list[Any]:
        self.aggregated.append([p.device for p in self.store.accepted_in(number)])
        return []

    async def _make_next(self, *_: Any) -> Any:
        return SimpleNamespace(number=1)

    async def _none(self) -> None:
        return None

    async def settle(self) -> None:
        while waiting := [task for task in self._tasks if not task.done()]:
            await asyncio.wait(waiting)
        for task in self._tasks:
            task.result()

    async def begin(self, devices: str) -> None:
        await self.conductor.open_next_round()
        for device in devices:
            self.conductor.checked_in(device, 1, 5)
        await self.settle()

    async def upload(self, device: str) -> None:
        update = describe(device.encode() * 9)
        offer = SimpleNamespace(
            round=1, base=0, update=update, examples=1, training_s=1.0, loss=LossCurve()
        )
        upload: Any = SimpleNamespace(device=device, offer=offer)
        await self.conductor.answers.finish(upload)


SYNC = RoundPolicy(goal=3, quorum=2, deadline_s=100.0, gather_s=1.0)
ASYNC = RoundPolicy(goal=3, quorum=2, deadline_s=100.0, mode=Mode.ASYNC, concurrency=3)


@pytest.mark.parametrize("policy", [SYNC, ASYNC], ids=["sync", "async"])
def test_what_was_accepted_in_the_moment_of_the_deadline_counts(store, policy) -> None:
    async def scenario() -> None:
        bench = Bench(store, policy)
        await bench.begin("abc")
        await bench.upload("a")
        bench.gate.clear()
        deciding = asyncio.ensure_future(bench.upload("b"))
        await asyncio.sleep(0.05)
        bench.now = 100.5
        bench.conductor.time_passed()
        await asyncio.sleep(0.05)
        bench.gate.set()
        await deciding
        await bench.settle()
        assert bench.aggregated == [["a", "b"]]
        bench.workers.close()

    asyncio.run(scenario())


def test_a_round_that_falls_short_says_how_many_it_had(store) -> None:
    async def scenario() -> None:
        bench = Bench(store, SYNC)
        await bench.begin("abc")
        await bench.upload("a")
        bench.now = 100.5
        bench.conductor.time_passed()
        await bench.settle()
        (record,) = store.rounds()
        assert record.outcome is Outcome.ABANDONED
        assert record.reason == "the deadline came with 1 updates; the quorum is 2"
        bench.workers.close()

    asyncio.run(scenario())


def test_a_member_that_asks_again_and_again_costs_one_look_at_a_time(store, monkeypatch) -> None:
    looks = 0
    real = store.participant

    def counted(number: int, device: str) -> Any:
        nonlocal looks
        looks += 1
        return real(number, device)

    monkeypatch.setattr(store, "participant", counted)

    async def scenario() -> None:
        bench = Bench(store, SYNC)
        await bench.begin("abc")
        bench.told.clear()
        for _ in range(200):
            bench.conductor.checked_in("a", 1, 5)
        await bench.settle()
        # One that was under way, and the newest of what came meanwhile.
        assert looks <= 2
        told = [message for device, message in bench.told if device == "a"]
        assert 1 <= len(told) <= 2
        assert all(isinstance(message, Assignment) for message in told)
        bench.workers.close()

    asyncio.run(scenario())


def test_an_offer_is_not_recorded_over_a_verdict(store) -> None:
    async def scenario() -> None:
        bench = Bench(store, SYNC)
        await bench.begin("abc")
        held = threading.Event()
        blocked = asyncio.ensure_future(bench.workers.durable(lambda: held.wait(10)))
        for text in (b"first", b"second"):
            offer = Offer(
                round=1,
                base=0,
                update=describe(text),
                examples=1,
                steps=1,
                training_s=1.0,
                loss=LossCurve(),
                metrics={},
            )
            bench.conductor.answers.offered("a", offer)
            await asyncio.sleep(0)
        bench.conductor.answers.training_failed("a", 1, "no memory")
        held.set()
        await blocked
        await bench.settle()
        known = store.participant(1, "a")
        assert known is not None
        assert known.status.value == "failed"
        bench.workers.close()

    asyncio.run(scenario())
