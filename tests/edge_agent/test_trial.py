"""A trial on a device: fair to the candidate, discreet about the examples, in no round's way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.evaluations import NOT_HERE
from fedge.edge_agent.example_limits import ExampleLimits
from fedge.edge_agent.example_store import ExampleStore
from fedge.edge_agent.trainer.child import Worker
from fedge.edge_agent.trainer.jobs import ActivateJob, EvaluateJob
from fedge.edge_agent.trial import MEASURINGS
from fedge.edge_agent.typed_texts import TypedTexts
from fedge.schemas.messages import TrialOutcome, TrialReason
from fedge.schemas.quantization import as_stored
from fedge.schemas.tensors import encode_tensors
from tests.coordinator.plans import quantized_plan_named
from tests.edge_agent.plans import examples
from tests.edge_agent.rollout_bench import Device, Site, device, settled, site, until

__all__ = ["site"]

ACTIVE, ROLLED_BACK = TrialOutcome.ACTIVE, TrialOutcome.ROLLED_BACK


def before_measuring(here: Device, number: int | None, act: Callable[[], None]) -> None:
    """`act` is called before the measuring with that number, from 1; None: before each."""
    count = 0

    def look(job: object) -> None:
        nonlocal count
        if isinstance(job, EvaluateJob):
            count += 1
            if number in (None, count):
                act()

    here.trainer.fail = look


def evaluations(here: Device) -> int:
    return sum(isinstance(job, EvaluateJob) for job in here.trainer.jobs)


# ---------------------------------------------------------------- the same examples


def test_examples_that_change_between_the_two_measurings_are_not_held_against_it(
    tmp_path: Path, site: Site
) -> None:
    def change() -> None:
        # As many rows as before, on which every version is bad.
        x, y = examples(200)
        np.savez(tmp_path / "d" / "data.npz", x=x, y=y + 50)

    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)
            before_measuring(here, 2, change)
            await here.rest(site.candidate(7))
            [report] = here.reports
            assert (report.outcome, here.in_use) == (ACTIVE, 7)
            assert report.loss_ratio is not None
            assert report.loss_ratio < 1.0
            assert evaluations(here) == 4

    asyncio.run(scenario())


def test_a_hold_out_that_is_emptied_meanwhile_is_not_held_against_it(
    tmp_path: Path, site: Site
) -> None:
    def empty() -> None:
        x, y = examples(200)
        np.savez(tmp_path / "d" / "data.npz", x=x[:0], y=y[:0])

    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)
            before_measuring(here, 2, empty)
            await here.rest(site.candidate(7))
            [report] = here.reports
            assert (report.outcome, report.loss_ratio, here.in_use) == (ACTIVE, None, 7)
            assert "not measured" in report.detail

    asyncio.run(scenario())


def test_examples_that_change_all_the_time_end_as_not_measured(tmp_path: Path, site: Site) -> None:
    changes = 0

    def change() -> None:
        nonlocal changes
        changes += 1
        x, y = examples(200)
        np.savez(tmp_path / "d" / "data.npz", x=x, y=y + changes)

    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)
            before_measuring(here, None, change)
            await here.rest(site.candidate(8))
            [report] = here.reports
            assert (report.outcome, report.loss_ratio, report.hold_out) == (ACTIVE, None, None)
            assert "changed again and again" in report.detail
            assert evaluations(here) == 2 * MEASURINGS

    asyncio.run(scenario())


@pytest.mark.parametrize("number", [2, 3])
def test_nothing_is_told_of_a_text_that_was_forgotten_meanwhile(
    tmp_path: Path, site: Site, number: int
) -> None:
    """Number 2: between the two measurings; 3: after both, before the trial has ended."""
    limits = ExampleLimits(keep_days=30, limit_bytes=65536, hold_out=0.5)
    data = DataConfig(path=tmp_path / "examples.sqlite")
    with ExampleStore(data.path, limits) as store:
        for text in range(40):
            store.add(f"sentence number {text}")
    count, losses = 0, []

    def forget() -> None:
        with ExampleStore(data.path, limits) as store:
            store.forget_containing("number 7")

    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)
            # The store is real; what a job finds in it is played: the model knows no words.
            typed = TypedTexts("d", data, limits)
            here.trials._typed = typed
            does = here.trainer.run

            async def run(job: Any, on_progress: object = None) -> Any:
                nonlocal count
                if not isinstance(job, EvaluateJob):
                    return await does(job, on_progress)
                assert job.limits == limits
                count += 1
                if count == number == 2:
                    forget()
                read = typed.generation()
                done = await does(job.model_copy(update={"limits": None}), on_progress)
                if count == 2 and number == 3:
                    forget()
                found = done.model_copy(
                    update={"generation": read, "loss_sum": done.loss_sum + 1000 * count}
                )
                losses.append(found.loss_sum / found.rows)
                return found

            here.trainer.run = run
            await here.rest(site.candidate(7))
            [report] = here.reports
            assert count == 4
            # The second pair is told, the first is not.
            assert report.loss_ratio == pytest.approx(losses[3] / losses[2])
            assert f"{losses[2]:.6g}" in report.detail

    asyncio.run(scenario())


def test_after_a_forget_what_was_measured_is_not_said_again(tmp_path: Path, site: Site) -> None:
    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)
            await here.rest(site.candidate(8))
            [report] = here.reports
            assert (report.reason, report.hold_out is None) == (TrialReason.HOLD_OUT, False)
            here.said.clear()
            here.follower.forgotten()
            await here.rest()
            [report] = here.reports
            assert (report.outcome, report.reason) == (ROLLED_BACK, TrialReason.HOLD_OUT)
            assert (report.detail, report.loss_ratio, report.hold_out) == ("", None, None)

    asyncio.run(scenario())


# ---------------------------------------------------------------- what is told


@pytest.mark.parametrize("number", [1, 2])
def test_a_report_and_its_reasons_hold_nothing_of_an_example(
    tmp_path: Path, site: Site, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    people = tmp_path / "people.csv"
    rows = "".join(f"{row},2,3,4\n" for row in range(60))
    people.write_text(f"a,b,c,y\n{rows}")

    def spoil() -> None:
        people.write_text(f"a,b,c,y\n{rows}1,Jane Doe HIV+,3,4\n")

    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)
            here.trials._data = DataConfig(path=people, hold_out=0.5)
            before_measuring(here, number, spoil)
            await here.rest(site.candidate(7))
            [report] = here.reports
            assert (report.outcome, report.detail) == (ACTIVE, f"hold-out not measured: {NOT_HERE}")
            assert "Jane" not in "".join(message.model_dump_json() for message in here.said)
            # Whoever has the device in hand finds the reason.
            assert any("Jane" in str(vars(record)) for record in caplog.records)

    asyncio.run(scenario())


def test_a_candidate_is_measured_as_its_file_has_it(tmp_path: Path) -> None:
    plan = quantized_plan_named("digits")
    manifest, weights = plan.manifest, plan.initial_weights
    rng = np.random.default_rng(3)
    inputs = rng.random((64, *manifest.features.tensor.shape[1:]), np.float32)
    np.savez(tmp_path / "data.npz", x=inputs, y=rng.integers(0, 10, 64))
    files = {
        "manifest": manifest.encode(),
        "eval": plan.blobs[manifest.graphs.eval.sha256],
        "float32": encode_tensors(weights),
        "int8": encode_tensors(as_stored(manifest, weights)),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)

    def loss_of(name: str, plan_file: str = "manifest") -> float:
        job = EvaluateJob(
            manifest=tmp_path / plan_file,
            eval_graph=tmp_path / "eval",
            weights=tmp_path / name,
            data=DataConfig(path=tmp_path / "data.npz", hold_out=0.5),
        )
        return Worker().do(job, lambda _: None).loss_sum

    plain = manifest.model_copy(update={"quantization": None})
    (tmp_path / "plain").write_bytes(plain.encode())
    assert loss_of("float32") == loss_of("int8") == loss_of("int8", "plain")
    assert loss_of("float32", "plain") != loss_of("float32")


# ---------------------------------------------------------------- rounds go first


async def begun(here: Device, kind: type) -> None:
    await until(lambda: any(isinstance(job, kind) for job in here.trainer.jobs))


def test_a_measuring_makes_way_at_once_and_begins_anew(tmp_path: Path, site: Site) -> None:
    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)
            does, cut_off, hangs = here.trainer.run, [], True

            async def run(job: Any, on_progress: object = None) -> Any:
                if isinstance(job, EvaluateJob) and hangs:
                    here.trainer.jobs.append(job)
                    try:
                        await asyncio.Event().wait()
                    finally:
                        cut_off.append(job)
                return await does(job, on_progress)

            here.trainer.run = run
            working = asyncio.create_task(here.follower.run())
            here.hear(site.candidate(7))
            # Again and again, for a round each: none of them counts as a try that failed.
            for rounds in range(1, 6):
                await begun(here, EvaluateJob)
                assert here.follower.is_measuring
                here.follower.see(free=False)
                await asyncio.sleep(0.02)
                assert (len(cut_off), here.follower.is_measuring) == (rounds, False)
                here.trainer.jobs.clear()
                await asyncio.sleep(0.02)
                assert here.trainer.jobs == []
                hangs = rounds < 5
                here.follower.see(free=True)
            await begun(here, EvaluateJob)
            working.cancel()
            await asyncio.wait({working})
            await here.rest()
            assert (here.in_use, [one.reason for one in here.reports]) == (7, [None])

    asyncio.run(scenario())


def test_without_free_time_nothing_is_fetched_or_measured_and_nothing_counts_as_a_try(
    tmp_path: Path, site: Site
) -> None:
    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)
            fetched, jobs = len(here.fetched), len(here.trainer.jobs)
            here.follower.see(free=False)
            # More lives than a trial may have tries.
            for _ in range(5):
                await here.rest(site.candidate(7))
            assert (len(here.fetched), len(here.trainer.jobs)) == (fetched, jobs)
            assert here.memory.begin_trial(1, 7) == 1
            here.memory.give_up_trial(1, 7)
            here.follower.see(free=True)
            await here.rest()
            assert (here.in_use, [one.outcome for one in here.reports]) == (7, [ACTIVE])

    asyncio.run(scenario())


def test_what_is_checked_without_examples_goes_on_beside_a_round(
    tmp_path: Path, site: Site
) -> None:
    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)

            def busy(job: object) -> None:
                here.follower.see(free=False)

            here.trainer.fail = busy
            await here.rest(site.candidate(7))
            assert [type(job) for job in here.trainer.jobs[1:]] == [ActivateJob]
            assert (
                (tmp_path / "d" / "models" / "model-7.onnx").is_file(),
                here.in_use,
                here.reports,
            ) == (True, 5, [])

    asyncio.run(scenario())


def test_a_candidate_takes_no_room_from_a_version_that_a_round_needs(
    tmp_path: Path, site: Site
) -> None:
    """And is fetched again if it was cleared away for that."""

    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)
            await here.versions.fetch(site.newest(9))
            await here.versions.bring(site.candidate(7), (site.stable(5).weights,))
            sizes = {path: path.stat().st_size for path in here.library.blobs.folder.iterdir()}
            ref = site.newest(10)
            # Both do not fit beside what is in use and what is in hand.
            here.library._cache_limit_bytes = sum(sizes.values()) + ref.golden.size_bytes
            await here.versions.fetch(ref)
            assert here.versions.held == ref
            assert not here.library.blobs.has(site.candidate(7).weights.sha256)
            # The version that was in hand is not, any more: there is room again.
            await here.rest(site.candidate(7))
            assert (here.in_use, [one.outcome for one in here.reports]) == (7, [ACTIVE])

    asyncio.run(scenario())
