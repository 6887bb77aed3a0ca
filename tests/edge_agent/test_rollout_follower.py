"""A device in rollouts: real models are tried, used and taken back; killed at any moment."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from fedge.edge_agent.evaluations import NOT_HERE
from fedge.edge_agent.trainer.jobs import ActivateJob, EvaluateJob
from fedge.edge_agent.trainer.process import TrainerKilled
from fedge.schemas.errors import TrainingFailed
from fedge.schemas.ids import sha256
from fedge.schemas.messages import (
    CandidatePhase,
    ReportKind,
    TrialChecks,
    TrialCounted,
    TrialOutcome,
    TrialReason,
)
from tests.edge_agent.rollout_bench import Deaths, Killed, Site, deaths, device, settled, site

__all__ = ["deaths", "site"]

ACTIVE, ROLLED_BACK = TrialOutcome.ACTIVE, TrialOutcome.ROLLED_BACK


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_a_candidate_that_is_better_is_used_and_the_one_before_stands_by(tmp_path, site) -> None:
    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)
            await here.rest(site.candidate(7))
            assert (here.in_use, here.library.standby()) == (7, 5)
            [report] = here.reports
            assert (report.outcome, report.reason) == (ACTIVE, None)
            assert report.hold_out is not None
            assert 80 < report.hold_out < 120
            assert report.loss_ratio is not None
            assert 0 < report.loss_ratio < 0.9
            assert report.latency_ms is not None
            # Not by what is newest, which is for training.
            assert 9 not in here.used

    run(scenario())


def test_a_candidate_that_is_worse_is_never_used_and_not_tried_again(tmp_path, site) -> None:
    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)
            await here.rest(site.candidate(8))
            assert here.in_use == 5
            [report] = here.reports
            assert (report.outcome, report.reason) == (ROLLED_BACK, TrialReason.HOLD_OUT)
            assert "version 5 has" in report.detail
            jobs = len(here.trainer.jobs)
            await here.rest(site.candidate(8, share=1.0), site.candidate(8))
            assert len(here.trainer.jobs) == jobs
            # Not even when the others found it good.
            await here.rest(site.stable(8), site.candidate(8, phase=CandidatePhase.DONE))
            assert (here.in_use, len(here.trainer.jobs)) == (5, jobs)
        with device(tmp_path / "d", site) as again:
            await again.rest(site.newest(9), site.stable(8), site.candidate(8))
            assert again.in_use == 5
            assert again.trainer.jobs == []
            # Another rollout of it is another trial.
            await again.rest(site.candidate(8, rollout=2))
            assert [type(job) for job in again.trainer.jobs] == [
                *(ActivateJob, EvaluateJob, EvaluateJob),
            ]

    run(scenario())


@pytest.mark.parametrize(
    ("facts", "checks", "reason"),
    [
        ({"model_sha256": "0" * 64}, TrialChecks(), TrialReason.BUILD),
        ({"golden": "of version 8"}, TrialChecks(), TrialReason.PARITY),
        ({}, TrialChecks(max_latency_ms=1e-6), TrialReason.LATENCY),
    ],
)
def test_each_check_has_its_reason(tmp_path, site, facts, checks, reason) -> None:
    if "golden" in facts:
        facts = {"golden": site.versions[8]["golden"]}
    site.versions[7].update(facts)

    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)
            await here.rest(site.candidate(7, checks=checks))
            [report] = here.reports
            assert (report.outcome, report.reason) == (ROLLED_BACK, reason)
            assert report.detail
            assert here.in_use == 5

    run(scenario())


def test_the_latency_is_compared_with_that_of_the_version_in_use(tmp_path, site) -> None:
    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)
            await here.rest(site.candidate(7, checks=TrialChecks(max_latency_ratio=1.5)))
            built = here.trainer.jobs[-1]
            assert built.beside == tmp_path / "d" / "models" / "model-5.onnx"
            # Both take microseconds here: a difference below a millisecond is none.
            assert here.in_use == 7

    run(scenario())


@pytest.mark.parametrize(("hold_out", "note"), [(0.0, "no examples"), (0.05, "20 wanted")])
def test_what_cannot_be_measured_is_not_asked_and_the_report_says_so(
    tmp_path, site, hold_out, note
) -> None:
    async def scenario() -> None:
        with device(tmp_path / "d", site, hold_out=hold_out) as here:
            await settled(here, site)
            await here.rest(site.candidate(8))
            [report] = here.reports
            assert (report.outcome, report.loss_ratio) == (ACTIVE, None)
            assert "hold-out not measured" in report.detail
            assert note in report.detail

    run(scenario())


def test_a_candidate_that_cannot_be_measured_is_rolled_back(tmp_path, site, caplog) -> None:
    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)
            weights = here.library.blobs.path(site.versions[7]["weights"].sha256)
            here.trainer.fail = lambda job: (
                TrainingFailed("a sum is not finite")
                if isinstance(job, EvaluateJob) and job.weights == weights
                else None
            )
            await here.rest(site.candidate(7))
            [report] = here.reports
            assert (report.reason, here.in_use) == (TrialReason.HOLD_OUT, 5)
            assert report.detail == NOT_HERE
            assert any("not finite" in str(vars(record)) for record in caplog.records)

    run(scenario())


def test_a_candidate_that_does_not_fit_is_rolled_back_and_the_rest_stays(tmp_path, site) -> None:
    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)
        size_bytes = sum(path.stat().st_size for path in (tmp_path / "d" / "blobs").iterdir())
        with device(tmp_path / "d", site, cache_limit_bytes=size_bytes) as here:
            await here.rest(site.newest(9), site.stable(5), site.candidate(7))
            [report] = here.reports
            assert (report.reason, here.in_use) == (TrialReason.FETCH, 5)
            assert "cache_limit_bytes" in report.detail

    run(scenario())


def test_who_is_not_reached_and_what_is_paused_stays_as_it_is(tmp_path, site) -> None:
    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)
            await here.rest(site.candidate(7, share=0.0))
            await here.rest(site.candidate(7, phase=CandidatePhase.PAUSED))
            assert (here.in_use, here.reports) == (5, [])

    run(scenario())


@pytest.mark.parametrize("phase", [CandidatePhase.WITHDRAWN, CandidatePhase.PAUSED])
def test_a_trial_under_way_ends_when_the_rollout_does(tmp_path, site, phase) -> None:
    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)
            begun = asyncio.Event()

            async def hang(*_: object) -> None:
                begun.set()
                await asyncio.Event().wait()

            does, here.trainer.run = here.trainer.run, hang
            working = asyncio.create_task(here.follower.run())
            here.hear(site.candidate(7))
            await asyncio.wait_for(begun.wait(), 10)
            here.hear(site.candidate(7, phase=phase))
            await asyncio.sleep(0.05)
            working.cancel()
            await asyncio.wait({working})
            here.trainer.run = does
            assert (here.in_use, here.reports) == (5, [])
            # It does not count as one that failed: it may be tried later.
            for _ in range(3):
                await here.rest(site.candidate(7))
            assert here.in_use == 7

    run(scenario())


def test_what_is_withdrawn_goes_at_once_without_fetching(tmp_path, site) -> None:
    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)
            await here.rest(site.candidate(7))
            site.blobs.clear()
            fetched, jobs = len(here.fetched), len(here.trainer.jobs)
            await here.rest(site.candidate(7, phase=CandidatePhase.WITHDRAWN))
            assert (here.in_use, len(here.fetched), len(here.trainer.jobs)) == (5, fetched, jobs)
            last = here.said[-1]
            assert (last.kind, last.version) == (ReportKind.ACTIVATED, 5)

    run(scenario())


def test_a_training_process_that_is_killed_again_and_again_is_the_candidates_end(
    tmp_path, site, monkeypatch
) -> None:
    monkeypatch.setattr("fedge.edge_agent.rollout_follower.TRY_AGAIN_S", 0.0)

    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)
            here.trainer.fail = lambda _: TrainerKilled("was ended by SIGKILL")
            jobs = len(here.trainer.jobs)
            await here.rest(site.candidate(7))
            [report] = here.reports
            assert (report.reason, here.in_use) == (TrialReason.INTERRUPTED, 5)
            assert len(here.trainer.jobs) == jobs + 3

    run(scenario())


def test_a_report_is_said_again_until_it_is_counted(tmp_path, site) -> None:
    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)
            await here.rest(site.candidate(7))
            here.follower.say_again()
            await here.rest()
            # As in another life, with the broker's announcements.
        with device(tmp_path / "d", site) as again:
            await again.rest(site.newest(9), site.stable(5), site.candidate(7))
            assert [one.outcome for one in again.reports] == [ACTIVE]
            await again.rest(TrialCounted(rollout=1))
            again.said.clear()
            again.follower.say_again()
            await again.rest(site.candidate(7))
            assert again.reports == []
        assert len({one.model_copy(update={"id": "0" * 16}) for one in here.reports}) == 1
        assert len(here.reports) == 2

    run(scenario())


def test_without_stages_nothing_is_put_into_use_here(tmp_path, site) -> None:
    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await here.rest(site.newest(9, staged=False), site.stable(5), site.candidate(7))
            assert (here.in_use, here.said, here.trainer.jobs) == (None, [], [])

    run(scenario())


def test_a_damaged_record_of_what_is_used_is_replaced_by_the_last_good_one(tmp_path, site) -> None:
    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)
            await here.rest(site.candidate(7))
        (tmp_path / "d" / "active.json").write_text("{")
        with device(tmp_path / "d", site) as again:
            await again.rest(site.newest(9), site.stable(5), site.candidate(7))
            assert again.in_use == 7
            assert again.used == [5, 7]

    run(scenario())


@pytest.mark.parametrize(
    ("number", "then", "ends"),
    [
        (8, None, 5),
        (7, CandidatePhase.WITHDRAWN, 5),
        (7, CandidatePhase.DONE, 7),
    ],
)
def test_killed_before_any_change_a_good_model_is_in_use_and_it_goes_on(
    tmp_path: Path, site: Site, deaths: Deaths, number: int, then: CandidatePhase | None, ends: int
) -> None:
    """Each durable change in turn is the one that is not made any more."""

    async def life(folder: Path) -> None:
        with device(folder, site) as here:
            stable = site.stable(number if then is CandidatePhase.DONE else 5)
            await here.rest(site.newest(9), site.stable(5), site.candidate(number))
            if then is not None:
                await here.rest(stable, site.candidate(number, phase=then))

    async def scenario() -> None:
        changes, killed = 0, True
        while killed:
            killed = False
            folder = tmp_path / f"d{changes}"
            with device(folder, site) as here:
                await settled(here, site)
            deaths.count, deaths.die_at = 0, changes
            try:
                await life(folder)
            except Killed:
                killed = True
            deaths.die_at = None
            with device(folder, site) as left:
                active = left.library.active()
                assert active is not None
                assert active.version in (5, ends, number if then else ends)
                announced = site.versions[active.version]["model_sha256"]
                assert sha256(active.model.read_bytes()) == announced
                if active.version == number:
                    trial = left.memory.trial(1, number)
                    assert trial is not None
                    assert trial.report.outcome is ACTIVE
            await life(folder)
            with device(folder, site) as at_the_end:
                assert at_the_end.in_use == ends
                trial = at_the_end.memory.trial(1, number)
                assert trial is not None
                assert trial.report.outcome is (ROLLED_BACK if number == 8 else ACTIVE)
            changes += 1
        # begin, model, end; where it is used also both records, and its way back.
        assert changes > {8: 3, 7: 5}[number]

    run(scenario())
