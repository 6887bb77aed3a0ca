"""The device's part of an evaluation, with real jobs and no process: what it says, and when."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedge.edge_agent import evaluations
from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.data.hold_out import held_out
from fedge.edge_agent.evaluations import Evaluations
from fedge.edge_agent.example_limits import ExampleLimits
from fedge.edge_agent.example_store import ExampleStore
from fedge.edge_agent.library import Library
from fedge.edge_agent.trainer.child import Worker
from fedge.edge_agent.trainer.jobs import CountJob, Evaluated, EvaluateJob
from fedge.edge_agent.trainer.process import TrainerKilled
from fedge.edge_agent.typed_texts import TypedTexts
from fedge.schemas.blobs import BlobRef, describe
from fedge.schemas.errors import StoreUnavailable
from fedge.schemas.logs import JsonFormatter
from fedge.schemas.messages import (
    EvaluationRequest,
    EvaluationResult,
    EvaluationStatus,
    VersionAnnouncement,
    encode,
)
from fedge.schemas.tensors import encode_tensors
from tests.edge_agent.plans import examples, initial_weights, linear_plan

PLAN = linear_plan()
CHUNK_BYTES = 1024
ROWS = 100
SHARE = 0.3
LIMIT_S = 20.0

Weights = dict[str, np.ndarray]


def weights_of(number: int) -> Weights:
    weights = dict(initial_weights())
    weights["w"] = (weights["w"] + np.float32(number)).astype(np.float32)
    return weights


def version(number: int) -> VersionAnnouncement:
    return VersionAnnouncement(
        number=number,
        plan=describe(PLAN.manifest.encode(), CHUNK_BYTES),
        weights=describe(encode_tensors(weights_of(number)), CHUNK_BYTES),
        golden=describe(f"golden {number}".encode(), CHUNK_BYTES),
        model_sha256="0" * 64,
        model_bytes=1,
    )


def blobs_of(number: int) -> dict[str, bytes]:
    data = (
        *(PLAN.manifest.encode(), PLAN.train, PLAN.eval, PLAN.infer, PLAN.golden),
        encode_tensors(weights_of(number)),
        f"golden {number}".encode(),
    )
    return {describe(one).sha256: one for one in data}


def expected(weights: Weights, rows: int = ROWS) -> tuple[int, float, float]:
    """Examples, squared and absolute errors over the hold-out, in float64 and by hand."""
    x, y = (one.astype(float)[held_out(rows, SHARE)] for one in examples(rows))
    errors = (x * weights["scale"]) @ weights["w"].astype(float) + weights["b"] - y
    return len(x), float((errors**2).sum()), float(np.abs(errors).sum())


class Processes:
    """A training process without the process. `gate`: jobs wait while it is not set."""

    def __init__(self) -> None:
        self.worker = Worker()
        self.jobs: list[Any] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.kills = 0
        self.before: Callable[[Any], None] = lambda job: None

    async def run(self, job: Any, on_progress: object = None) -> Any:
        self.jobs.append(job)
        await self.gate.wait()
        if self.kills and isinstance(job, EvaluateJob):
            self.kills -= 1
            raise TrainerKilled("killed")
        answer = self.worker.do(job, lambda said: None)
        self.before(job)
        return answer

    def interrupt(self, job: object) -> bool:
        raise AssertionError("an evaluation is cancelled")

    @property
    def pids(self) -> tuple[int, ...]:
        return ()

    async def close(self) -> None:
        return

    def ran(self) -> list[str]:
        return [job.job for job in self.jobs]


class Bench:
    """A device that holds version 5, and a broker that has the blobs of versions 1 to 5."""

    def __init__(self, folder: Path, *, hold_out: float = SHARE, **changes: Any) -> None:
        self.library = Library(folder / "state", changes.pop("cache_limit_bytes", None))
        self.at_broker: dict[str, bytes] = {}
        for number in range(1, 6):
            self.at_broker |= blobs_of(number)
        self.held = version(5)
        for ref in (self.held.plan, self.held.weights, self.held.golden):
            self.library.blobs.put(self.at_broker[ref.sha256])
        for ref in self.library.needed(self.held, PLAN.manifest):
            self.library.blobs.put(self.at_broker[ref.sha256])
        path = folder / "data.npz"
        x, y = examples(ROWS)
        np.savez(path, x=x, y=y)
        self.processes = Processes()
        self.fetched: list[str] = []
        self.arrivals = asyncio.Event()
        self.said: list[EvaluationResult] = []
        self.heard = asyncio.Event()
        self.runs: list[bool] = []
        self.evaluations = Evaluations(
            "d",
            **{
                "data": DataConfig(path=path, hold_out=hold_out),
                "typed": None,
                "minimum_hold_out": 5,
                "threads": 1,
                "trainer": self.processes,
                "library": self.library,
                "in_hand": lambda: self.held,
                "fetch": self.fetch,
                "send": self.send,
                "changed": lambda: self.runs.append(self.evaluations.is_running),
                **changes,
            },
        )

    async def fetch(self, refs: Iterable[BlobRef]) -> None:
        for ref in refs:
            while not self.library.blobs.has(ref.sha256):
                self.arrivals.clear()
                if ref.sha256 in self.at_broker:
                    self.library.blobs.put(self.at_broker[ref.sha256])
                    self.fetched.append(ref.sha256)
                else:
                    await self.arrivals.wait()

    async def send(self, result: EvaluationResult) -> None:
        self.said.append(result)
        self.heard.set()

    def ask(self, number: int = 5, evaluation: int = 1, **changes: Any) -> EvaluationRequest:
        of = version(number)
        fields = {"evaluation": evaluation, "number": number, "deadline_s": 60.0}
        request = EvaluationRequest.model_validate(
            {**fields, "plan": of.plan, "weights": of.weights, **changes}
        )
        self.evaluations.asked(request)
        return request

    async def answer(self) -> EvaluationResult:
        async with asyncio.timeout(LIMIT_S):
            await self.heard.wait()
        self.heard.clear()
        return self.said[-1]

    async def pass_turns(self) -> None:
        await asyncio.sleep(0.05)


def logged(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(map(JsonFormatter().format, caplog.records))


def play(
    bench: Callable[[], Bench], scenario: Callable[[Bench], Coroutine[Any, Any, None]]
) -> None:
    async def run() -> None:
        here = bench()
        task = asyncio.create_task(here.evaluations.run())
        try:
            await scenario(here)
            assert not task.done()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())


def test_the_sums_are_those_of_the_hold_out_and_of_nothing_else(tmp_path):
    async def scenario(here: Bench) -> None:
        here.evaluations.see(free=True)
        here.ask(2)
        result = await here.answer()
        count, squares, absolute = expected(weights_of(2))
        assert (result.evaluation, result.number) == (1, 2)
        assert result.status is EvaluationStatus.OK
        assert (result.sums.examples, result.sums.rows) == (count, count)
        assert result.sums.loss_sum == pytest.approx(squares, rel=1e-5)
        assert result.sums.metrics == {"absolute_error": pytest.approx(absolute, rel=1e-5)}
        assert result.personal is None
        # Saying it is no work.
        assert here.runs == [True, False]
        # Of the older version only what measuring takes was fetched, and its weights are gone.
        eval_sha = PLAN.manifest.graphs.eval.sha256
        assert here.fetched == [eval_sha, version(2).weights.sha256]
        assert not here.library.blobs.has(version(2).weights.sha256)
        assert here.library.blobs.has(eval_sha)
        assert here.library.holds(here.held)

    play(lambda: Bench(tmp_path), scenario)


def test_an_answer_holds_nothing_but_sums_and_so_do_the_logs(tmp_path, caplog):
    caplog.set_level(logging.INFO)

    async def scenario(here: Bench) -> None:
        here.evaluations.see(free=True)
        here.ask()
        result = await here.answer()
        x, y = examples(ROWS)
        told = json.loads(encode(result))
        assert set(told["sums"]) == {"examples", "rows", "loss_sum", "metrics"}
        text = json.dumps(told) + logged(caplog)
        assert "evaluation_done" in text
        for value in [*x.ravel().tolist(), *y.ravel().tolist()]:
            assert f"{value:.6g}" not in text

    play(lambda: Bench(tmp_path), scenario)


def test_asked_again_it_measures_once_and_says_the_same(tmp_path):
    async def scenario(here: Bench) -> None:
        here.evaluations.see(free=True)
        here.processes.gate.clear()
        here.ask(2)
        await here.pass_turns()
        here.ask(2)
        await here.pass_turns()
        here.processes.gate.set()
        first = await here.answer()
        here.ask(2)
        assert await here.answer() == first
        assert len(here.said) == 2
        assert here.processes.ran() == ["count", "evaluate"]
        # Busy with a round, it can say all the same what it has measured.
        here.evaluations.see(free=False)
        here.ask(2)
        assert await here.answer() == first

    play(lambda: Bench(tmp_path), scenario)


def test_another_evaluation_is_measured_anew(tmp_path):
    async def scenario(here: Bench) -> None:
        here.evaluations.see(free=True)
        here.ask(2)
        first = await here.answer()
        here.ask(3, evaluation=2)
        second = await here.answer()
        assert (second.evaluation, second.number) == (2, 3)
        assert second.sums != first.sums

    play(lambda: Bench(tmp_path), scenario)


def test_a_round_goes_first_and_it_begins_anew_afterwards(tmp_path):
    async def scenario(here: Bench) -> None:
        here.ask(2)
        await here.pass_turns()
        assert here.processes.jobs == []
        here.processes.gate.clear()
        here.evaluations.see(free=True)
        await here.pass_turns()
        assert here.evaluations.is_running
        here.evaluations.see(free=False)
        await here.pass_turns()
        assert not here.evaluations.is_running
        here.processes.gate.set()
        await here.pass_turns()
        assert here.said == []
        here.evaluations.see(free=True)
        assert (await here.answer()).status is EvaluationStatus.OK

    play(lambda: Bench(tmp_path), scenario)


def test_what_is_not_at_the_broker_yet_is_waited_for_and_given_up_for_a_round(tmp_path):
    async def scenario(here: Bench) -> None:
        missing = version(2).weights.sha256
        chunks = here.at_broker.pop(missing)
        here.evaluations.see(free=True)
        here.ask(2)
        await here.pass_turns()
        # The fetch of a version must not wait behind this one.
        here.evaluations.see(free=False)
        await here.pass_turns()
        assert not here.evaluations.is_running
        here.evaluations.see(free=True)
        here.at_broker[missing] = chunks
        here.arrivals.set()
        assert (await here.answer()).status is EvaluationStatus.OK

    play(lambda: Bench(tmp_path), scenario)


def test_after_its_deadline_nothing_is_said(tmp_path):
    async def scenario(here: Bench) -> None:
        here.evaluations.see(free=True)
        here.processes.gate.clear()
        here.ask(2, deadline_s=0.05)
        await asyncio.sleep(0.2)
        here.processes.gate.set()
        await here.pass_turns()
        assert here.said == []
        assert not here.evaluations.is_running
        here.ask(2, evaluation=2)
        assert (await here.answer()).evaluation == 2

    play(lambda: Bench(tmp_path), scenario)


def test_a_request_that_is_said_again_gives_the_measuring_its_time_again(tmp_path):
    async def scenario(here: Bench) -> None:
        here.evaluations.see(free=True)
        here.processes.gate.clear()
        here.ask(2, deadline_s=0.2)
        await here.pass_turns()
        here.ask(2, deadline_s=60.0)
        await asyncio.sleep(0.3)
        here.processes.gate.set()
        assert (await here.answer()).status is EvaluationStatus.OK
        assert here.processes.ran() == ["count", "evaluate"]

    play(lambda: Bench(tmp_path), scenario)


def test_a_device_that_holds_nothing_out_says_so_at_once_and_fetches_nothing(tmp_path):
    async def scenario(here: Bench) -> None:
        here.ask(2)
        result = await here.answer()
        assert (result.status, result.sums) == (EvaluationStatus.NO_HOLD_OUT, None)
        assert (here.fetched, here.processes.jobs) == ([], [])

    play(lambda: Bench(tmp_path, hold_out=0.0), scenario)
    play(lambda: Bench(tmp_path, data=None), scenario)


@pytest.mark.parametrize(
    ("minimum", "status"), [(30, EvaluationStatus.OK), (31, EvaluationStatus.NO_HOLD_OUT)]
)
def test_below_the_floor_it_says_that_it_has_none(tmp_path, minimum, status):
    async def scenario(here: Bench) -> None:
        assert expected(weights_of(2))[0] == 30
        here.evaluations.see(free=True)
        here.ask(2)
        assert (await here.answer()).status is status
        assert bool(here.fetched) == (status is EvaluationStatus.OK)

    play(lambda: Bench(tmp_path, minimum_hold_out=minimum), scenario)


def test_a_version_that_does_not_fit_beside_the_one_in_hand_is_refused_with_the_limit(tmp_path):
    size = sum(len(data) for data in blobs_of(5).values())

    async def scenario(here: Bench) -> None:
        here.evaluations.see(free=True)
        here.ask(2)
        result = await here.answer()
        assert result.status is EvaluationStatus.FAILED
        assert "storage.cache_limit_bytes" in result.detail
        assert here.library.holds(here.held)

    async def fits(here: Bench) -> None:
        here.evaluations.see(free=True)
        here.ask(2)
        assert (await here.answer()).status is EvaluationStatus.OK
        assert here.library.holds(here.held)

    play(lambda: Bench(tmp_path / "small", cache_limit_bytes=size - len(PLAN.eval)), scenario)
    play(lambda: Bench(tmp_path / "large", cache_limit_bytes=size + 1000), fits)


def test_why_it_failed_is_told_without_a_word_of_the_examples(tmp_path, caplog):
    async def scenario(here: Bench) -> None:
        x, _ = examples(ROWS)
        np.savez(tmp_path / "data.npz", x=x[:, :2], y=x[:, :1])
        here.evaluations.see(free=True)
        here.ask(2)
        result = await here.answer()
        assert result.status is EvaluationStatus.FAILED
        assert result.detail == evaluations.NOT_HERE
        # Its own log says more.
        assert "evaluation_failed" in logged(caplog)
        assert "3" in logged(caplog)

    play(lambda: Bench(tmp_path), scenario)


def test_a_process_that_is_killed_is_tried_again_and_then_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluations, "AGAIN_S", 0.01)

    async def scenario(here: Bench) -> None:
        here.evaluations.see(free=True)
        here.processes.kills = 2
        here.ask(2)
        assert (await here.answer()).status is EvaluationStatus.OK
        here.processes.kills = 9
        here.ask(3, evaluation=2)
        assert (await here.answer()).detail == evaluations.CUT_OFF

    play(lambda: Bench(tmp_path), scenario)


def test_a_disk_that_is_full_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluations, "AGAIN_S", 0.01)

    async def scenario(here: Bench) -> None:
        full = [1, 2, 3]

        async def fetch(refs: Iterable[BlobRef]) -> None:
            if full:
                full.pop()
                raise StoreUnavailable("no space left")
            await here.fetch(refs)

        here.evaluations._fetch = fetch
        here.evaluations.see(free=True)
        here.ask(2)
        assert (await here.answer()).status is EvaluationStatus.OK
        assert full == []

    play(lambda: Bench(tmp_path), scenario)


def test_a_personal_copy_is_measured_on_the_same_examples(tmp_path):
    path = tmp_path / "personal.safetensors"
    path.write_bytes(encode_tensors(weights_of(3)))

    async def scenario(here: Bench) -> None:
        here.evaluations.see(free=True)
        here.ask(2)
        result = await here.answer()
        assert result.personal is not None
        count, squares, _ = expected(weights_of(3))
        assert (result.personal.rows, result.sums.rows) == (count, count)
        assert result.personal.loss_sum == pytest.approx(squares, rel=1e-5)
        # Of another version it has none.
        here.ask(4, evaluation=2)
        assert (await here.answer()).personal is None

    play(
        lambda: Bench(tmp_path, personal_weights=lambda n: path if n == 2 else None),
        scenario,
    )


def test_a_personal_copy_that_is_broken_spoils_nothing(tmp_path):
    path = tmp_path / "personal.safetensors"
    path.write_bytes(b"rubbish")

    async def scenario(here: Bench) -> None:
        here.evaluations.see(free=True)
        here.ask(2)
        result = await here.answer()
        assert (result.status, result.personal) == (EvaluationStatus.OK, None)

    play(lambda: Bench(tmp_path, personal_weights=lambda n: path), scenario)


def test_typed_texts_are_counted_by_their_hold_out(tmp_path):
    limits = ExampleLimits(keep_days=30, limit_bytes=65536, hold_out=0.5)
    data = DataConfig(path=tmp_path / "examples.sqlite")
    with ExampleStore(data.path, limits) as store:
        for number in range(40):
            store.add(f"sentence number {number}")
        assert 5 < store.count().hold_out.examples < 35

    async def scenario(here: Bench) -> None:
        here.evaluations.see(free=True)
        here.ask(2)
        result = await here.answer()
        assert result.status is EvaluationStatus.NO_HOLD_OUT
        assert here.processes.jobs == []

    typed = TypedTexts("d", data, limits)
    play(lambda: Bench(tmp_path, data=data, typed=typed, minimum_hold_out=36), scenario)


def test_what_was_measured_on_a_text_that_was_taken_back_is_not_said_again(tmp_path):
    async def scenario(here: Bench) -> None:
        here.evaluations.see(free=True)
        here.ask(2)
        await here.answer()
        here.ask(2)
        await here.answer()
        assert here.processes.ran().count("evaluate") == 1
        await here.evaluations.forgotten()
        here.ask(2)
        await here.answer()
        assert here.processes.ran().count("evaluate") == 2

    play(lambda: Bench(tmp_path), scenario)


def test_a_text_that_is_taken_back_while_it_measures_is_measured_without(tmp_path):
    async def scenario(here: Bench) -> None:
        here.evaluations.see(free=True)
        here.processes.gate.clear()
        here.ask(2)
        await here.pass_turns()
        await here.evaluations.forgotten()
        here.processes.gate.set()
        assert (await here.answer()).status is EvaluationStatus.OK
        assert len(here.said) == 1

    play(lambda: Bench(tmp_path), scenario)


def test_sums_over_a_text_that_was_forgotten_meanwhile_are_thrown_away(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluations, "AGAIN_S", 0.01)
    limits = ExampleLimits(keep_days=30, limit_bytes=65536, hold_out=0.5)
    data = DataConfig(path=tmp_path / "examples.sqlite")
    with ExampleStore(data.path, limits) as store:
        for number in range(40):
            store.add(f"sentence number {number}")
        # Also a forget that finds nothing is one.
        generations = [store.generation()]

    class Measured:
        """Answers as a job that has read the store before the forget, and one after it."""

        async def run(self, job: EvaluateJob) -> Evaluated:
            with ExampleStore(data.path, limits) as store:
                read = store.generation()
                if len(generations) == 1:
                    store.forget_containing("number 7")
                    generations.append(store.generation())
            facts = {"examples": 20, "rows": 50, "metrics": {}, "evaluation_s": 0.1}
            return Evaluated(**facts, loss_sum=float(read), generation=read)

    async def scenario(here: Bench) -> None:
        here.evaluations.see(free=True)
        here.ask(2)
        result = await here.answer()
        first, second = generations
        assert first != second
        assert result.sums.loss_sum == second

    typed = TypedTexts("d", data, limits)
    play(lambda: Bench(tmp_path, data=data, typed=typed, trainer=Measured()), scenario)


def test_only_files_are_counted_by_a_job(tmp_path):
    async def scenario(here: Bench) -> None:
        here.evaluations.see(free=True)
        for evaluation in (1, 2):
            here.ask(2, evaluation=evaluation)
            await here.answer()
        assert [type(job) for job in here.processes.jobs] == [CountJob, EvaluateJob, EvaluateJob]

    play(lambda: Bench(tmp_path), scenario)
