"""The evaluation desk over a real store: what is durable, who is asked, who is heard."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedge.coordinator.evaluation_desk import LOOK_SOON_S, EvaluationDesk
from fedge.coordinator.evaluations import (
    AGAIN_S,
    ASKED_A_SECOND,
    DEADLINE,
    ENOUGH,
    GRACE_S,
    NOBODY_LEFT,
    PATIENCE_SHARE,
    Looked,
    opened,
    step,
)
from fedge.coordinator.store import EvaluationReport, Store
from fedge.coordinator.surroundings import Surroundings
from fedge.coordinator.workers import Workers
from fedge.schemas.blobs import BlobRef
from fedge.schemas.errors import PeerError, RejectReason, StoreError, StoreUnavailable
from fedge.schemas.messages import (
    EvaluationRequest,
    EvaluationResult,
    EvaluationStatus,
    EvaluationSums,
)
from tests.coordinator.test_store import PLAN, version
from tests.coordinator.updates import LINEAR, manifest_of

NEWEST = 2
MANIFEST = manifest_of(LINEAR).model_copy(update={"metrics": ("accuracy",)})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "state", create=True, serve=True) as opened:
        opened.record_plan(PLAN)
        for number in range(NEWEST + 1):
            opened.record_version(version(number))
        yield opened


class Bench:
    """A desk whose broker is a list. `kill` forgets everything but the store."""

    def __init__(self, store: Store, devices: str = "abcdef") -> None:
        self.store = store
        self.now = 0.0
        self.online = frozenset(devices)
        self.told: list[tuple[str, EvaluationRequest]] = []
        self.refused: list[tuple[str, RejectReason]] = []
        self.held: list[str] = []
        self.taken_back = 0
        self.unreadable: StoreError | None = None
        self.workers = Workers()
        self._tasks: list[asyncio.Task[Any]] = []
        self.desk = self.start()

    def start(self) -> EvaluationDesk:
        return EvaluationDesk(
            store=self.store,
            plan=PLAN.ref,
            manifest=MANIFEST,
            distribution=self,
            succession=SimpleNamespace(newest=version(NEWEST)),
            journal=SimpleNamespace(
                refused=lambda device, error, _: self.refused.append((device, error.reason))
            ),
            workers=self.workers,
            around=Surroundings(
                tell=self._tell,
                start=self._start,
                publish=lambda: None,
                publish_again=lambda: None,
                wake=lambda: None,
                online=lambda: self.online,
                all_known=lambda: True,
                clock=lambda: self.now,
                wall_clock=lambda: 1000.0 + self.now,
            ),
        )

    # As the distribution does.

    async def hold(self, ref: BlobRef) -> None:
        if self.unreadable is not None:
            raise self.unreadable
        self.held.append(ref.sha256)

    def let_go(self, ref: BlobRef) -> None:
        if ref.sha256 in self.held:
            self.held.remove(ref.sha256)

    async def clear_before(self, newest: Any) -> None:
        assert newest.number == NEWEST
        self.taken_back += 1

    def _tell(self, device: str, message: Any) -> None:
        # Whoever is asked is on record before: after a restart its answer must count.
        report = self.store.evaluation_report(message.evaluation)
        assert report is not None
        assert device in {one.device for one in report.answers}
        self.told.append((device, message))

    def _start(self, work: Coroutine[Any, Any, Any], name: str) -> None:
        self._tasks.append(asyncio.create_task(work, name=name))

    async def settle(self) -> None:
        while waiting := [task for task in self._tasks if not task.done()]:
            await asyncio.wait(waiting)
        for task in self._tasks:
            task.result()

    async def begin(self) -> None:
        await self.desk.look()
        await self.settle()

    async def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.desk.time_passed()
        await self.settle()

    async def answer(self, device: str, **changes: Any) -> None:
        self.desk.answered(device, result(**changes))
        await self.settle()

    def kill(self) -> None:
        self.told.clear()
        self.held.clear()
        self.desk = self.start()

    def asked(self) -> list[str]:
        return [device for device, _ in self.told]

    def report(self, number: int = 1) -> EvaluationReport:
        found = self.store.evaluation_report(number)
        assert found is not None
        return found


def result(**changes: Any) -> EvaluationResult:
    fields: dict[str, Any] = {
        "evaluation": 1,
        "number": 1,
        "status": EvaluationStatus.OK,
        "sums": EvaluationSums(examples=7, rows=9, loss_sum=4.5, metrics={"accuracy": 6.0}),
    }
    if changes.get("status", EvaluationStatus.OK) is not EvaluationStatus.OK:
        fields["sums"] = None
    return EvaluationResult.model_validate(fields | changes)


def play(store: Store, scenario: Callable[[Bench], Coroutine[Any, Any, None]], **how: Any) -> None:
    async def run() -> None:
        bench = Bench(store, **how)
        try:
            await scenario(bench)
        finally:
            bench.workers.close()

    asyncio.run(run())


def request(store: Store, wanted: int = 3, of_version: int = 1) -> None:
    store.request_evaluation(of_version, wanted=wanted, deadline_s=600.0, seed=1, at=1.0)


def test_as_many_as_were_wanted_are_asked_and_their_answers_end_it(store) -> None:
    request(store)

    async def scenario(bench: Bench) -> None:
        await bench.begin()
        assert len(set(bench.asked())) == len(bench.asked()) == 3
        _, said = bench.told[0]
        assert (said.number, said.plan, said.deadline_s) == (1, PLAN.ref, 600.0)
        assert bench.held == [said.weights.sha256] == [version(1).weights.sha256]
        for device in bench.asked():
            await bench.answer(device)
        report = bench.report()
        assert report.evaluation.reason == ENOUGH
        assert all(one.sums is not None for one in report.answers)
        # What was brought to the broker for it goes again.
        assert (bench.held, bench.taken_back) == ([], 1)
        assert bench.desk.next_deadline is None

    play(store, scenario)


def test_who_has_no_hold_out_is_replaced_and_who_failed_is_not(store) -> None:
    request(store)

    async def scenario(bench: Bench) -> None:
        await bench.begin()
        first, second, third = bench.asked()
        await bench.answer(first, status=EvaluationStatus.NO_HOLD_OUT)
        await bench.pass_time(LOOK_SOON_S)
        assert len(bench.asked()) == 4
        await bench.answer(second, status=EvaluationStatus.FAILED, detail="why")
        await bench.pass_time(LOOK_SOON_S)
        assert len(bench.asked()) == 4
        await bench.answer(third)
        await bench.answer(bench.asked()[3])
        assert bench.report().evaluation.reason == ENOUGH
        said = Counter(one.status for one in bench.report().answers)
        assert said == {"ok": 2, "no_hold_out": 1, "failed": 1}

    play(store, scenario)


def test_who_goes_away_is_replaced_and_still_counts_if_it_comes_back(store) -> None:
    request(store, wanted=2)

    async def scenario(bench: Bench) -> None:
        await bench.begin()
        gone, stays = bench.asked()
        bench.online -= {gone}
        bench.desk.presence_changed()
        await bench.pass_time(1.0)
        assert len(bench.asked()) == 3
        bench.online |= {gone}
        await bench.answer(gone)
        await bench.answer(stays)
        assert bench.report().evaluation.reason == ENOUGH

    play(store, scenario)


def test_who_is_silent_for_long_is_not_counted_on_any_more_and_still_counts(store) -> None:
    request(store, wanted=2)

    async def scenario(bench: Bench) -> None:
        await bench.begin()
        first, silent = bench.asked()
        await bench.answer(first)
        bench.told.clear()
        await bench.pass_time(600.0 * PATIENCE_SHARE)
        # It may not work now, as most phones by day: another one is asked beside it.
        fresh = set(bench.asked()) - {silent}
        assert len(fresh) == 1
        assert not fresh & {first}
        await bench.answer(silent)
        assert bench.report().evaluation.reason == ENOUGH

    play(store, scenario)


def test_a_large_fleet_is_not_asked_again_all_the_time() -> None:
    state = opened(1, 1, wanted=5000, seed=1, deadline_s=600.0, left_s=600.0, now=0.0)
    everybody = frozenset(f"d{number}" for number in range(5000))
    state, _ = step(state, Looked(everybody), 0.0)
    assert state.again_at == AGAIN_S
    state, (again,) = step(state, Looked(everybody), AGAIN_S)
    assert len(again.devices) == 5000
    assert state.again_at == AGAIN_S + 5000 / ASKED_A_SECOND


def test_many_answers_cost_a_look_a_second_and_not_a_look_each(store, monkeypatch) -> None:
    """Each look takes as long as the fleet is large."""
    request(store, wanted=100)
    looks: list[int] = []

    def counted(state, event, now):
        looks.append(len(getattr(event, "answers", ())))
        return step(state, event, now)

    monkeypatch.setattr("fedge.coordinator.evaluation_desk.evaluations.step", counted)

    async def scenario(bench: Bench) -> None:
        fleet = [f"d{number}" for number in range(120)]
        bench.online = frozenset(fleet)
        await bench.begin()
        looks.clear()
        asked = bench.asked()
        for at, device in enumerate(asked):
            bench.desk.answered(device, result())
            bench.desk.answered(device, result())
            if at % 25 == 24:
                await bench.settle()
                await bench.pass_time(LOOK_SOON_S)
        assert bench.report().evaluation.reason == ENOUGH
        # The last look is the one that finds that it is enough.
        assert looks == [25, 25, 25, 25]

    play(store, scenario)


def test_who_is_silent_is_asked_again_and_an_answer_counts_once(store) -> None:
    request(store)

    async def scenario(bench: Bench) -> None:
        await bench.begin()
        first = bench.asked()[0]
        await bench.answer(first)
        await bench.answer(first)
        bench.told.clear()
        await bench.pass_time(AGAIN_S)
        assert len(bench.asked()) == 2
        assert first not in bench.asked()
        assert bench.told[0][1].deadline_s == 600.0 - AGAIN_S
        assert bench.refused == []

    play(store, scenario)


def test_late_answers_and_those_of_strangers_are_refused(store) -> None:
    request(store)

    async def scenario(bench: Bench) -> None:
        with pytest.raises(PeerError, match="late"):
            await bench.answer("a")
        await bench.begin()
        stranger = min(bench.online - set(bench.asked()))
        with pytest.raises(PeerError, match="not_in_cohort"):
            await bench.answer(stranger)
        with pytest.raises(PeerError, match="late"):
            await bench.answer(bench.asked()[0], evaluation=7)
        bench.now = 600.0
        await bench.pass_time(0.0)
        assert bench.report().evaluation.reason == DEADLINE
        with pytest.raises(PeerError, match="late"):
            await bench.answer(bench.asked()[0])
        assert {one.status for one in bench.report().answers} == {None}

    play(store, scenario)


@pytest.mark.parametrize(
    "changes",
    [
        {"number": 0},
        {"sums": EvaluationSums(examples=7, rows=9, loss_sum=1.0, metrics={})},
        {"personal": EvaluationSums(examples=8, rows=8, loss_sum=1.0, metrics={"accuracy": 1.0})},
        {"sums": EvaluationSums(examples=7, rows=9, loss_sum=1.0, metrics={"accuracy": 9.5})},
        {"sums": EvaluationSums(examples=7, rows=9, loss_sum=1.0, metrics={"accuracy": -1.0})},
    ],
    ids=["another version", "other metrics", "other examples", "above all", "below none"],
)
def test_an_answer_that_cannot_be_right_counts_as_failed_and_is_not_asked_for_again(
    store, changes
) -> None:
    request(store)

    async def scenario(bench: Bench) -> None:
        await bench.begin()
        device = bench.asked()[0]
        await bench.answer(device, **changes)
        assert [one for one, _ in bench.refused] == [device]
        bench.told.clear()
        await bench.pass_time(AGAIN_S)
        assert device not in bench.asked()
        (kept,) = (one for one in bench.report().answers if one.device == device)
        assert kept.status is EvaluationStatus.FAILED
        assert "refused" in kept.detail

    play(store, scenario)


def test_a_coordinator_that_was_killed_goes_on_with_the_same_evaluation(store) -> None:
    request(store)

    async def scenario(bench: Bench) -> None:
        await bench.begin()
        first, *others = bench.asked()
        await bench.answer(first)
        bench.now = 100.0
        bench.kill()
        await bench.begin()
        assert sorted(bench.asked()) == sorted(others)
        assert bench.told[0][1].deadline_s == 500.0
        for device in others:
            await bench.answer(device)
        assert bench.report().evaluation.reason == ENOUGH
        assert len(bench.report().answers) == 3

    play(store, scenario)


def test_an_answer_that_the_broker_kept_counts_before_anything_else_is_done(store) -> None:
    request(store, wanted=1)

    async def scenario(bench: Bench) -> None:
        await bench.begin()
        (device,) = bench.asked()
        bench.kill()
        await bench.desk.recover()
        await bench.answer(device)
        assert (bench.told, bench.refused) == ([], [])
        assert bench.report().evaluation.reason == ENOUGH
        await bench.begin()
        assert bench.desk.number is None

    play(store, scenario)


def test_a_deadline_that_passed_meanwhile_is_put_off_by_a_moment(store) -> None:
    request(store)

    async def scenario(bench: Bench) -> None:
        await bench.begin()
        bench.now = 5000.0
        bench.kill()
        await bench.begin()
        assert bench.told[0][1].deadline_s == GRACE_S
        await bench.pass_time(GRACE_S)
        assert bench.report().evaluation.reason == DEADLINE

    play(store, scenario)


def test_evaluations_take_turns(store) -> None:
    request(store, wanted=1)
    request(store, wanted=1, of_version=NEWEST)

    async def scenario(bench: Bench) -> None:
        await bench.begin()
        await bench.begin()
        assert {said.evaluation for _, said in bench.told} == {1}
        await bench.answer(bench.asked()[0])
        assert [said.evaluation for _, said in bench.told] == [1, 2]
        assert bench.held == [version(NEWEST).weights.sha256]
        assert bench.desk.number == 2

    play(store, scenario)


def test_without_anybody_it_waits_for_somebody_until_the_deadline(store) -> None:
    request(store)

    async def scenario(bench: Bench) -> None:
        await bench.begin()
        await bench.pass_time(300.0)
        assert bench.told == []
        bench.online = frozenset("x")
        bench.desk.presence_changed()
        await bench.pass_time(1.0)
        assert bench.asked() == ["x"]
        await bench.answer("x")
        await bench.pass_time(LOOK_SOON_S)
        assert bench.report().evaluation.reason == NOBODY_LEFT

    play(store, scenario, devices="")


def test_weights_that_cannot_be_read_end_it_with_the_reason_and_those_that_may_do_not(
    store, monkeypatch
) -> None:
    request(store)
    monkeypatch.setattr("fedge.coordinator.evaluation_desk.REFUSED_AGAIN_S", 0.01)

    async def scenario(bench: Bench) -> None:
        bench.unreadable = StoreUnavailable("the disk is away")
        await bench.desk.look()
        await asyncio.sleep(0.05)
        assert bench.report().evaluation.closed_at is None
        assert bench.told == []
        bench.unreadable = StoreError("blob is damaged")
        await bench.settle()
        assert "blob is damaged" in bench.report().evaluation.reason
        # The next one is taken up as if nothing had been.
        bench.unreadable = None
        request(bench.store)
        await bench.begin()
        assert bench.desk.number == 2

    play(store, scenario)
