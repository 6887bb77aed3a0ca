"""A device in rollouts that hears something in the midst of a change, or whose disk fails it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from fedge.edge_agent.trainer.process import TrainerKilled
from fedge.schemas.errors import StoreUnavailable
from fedge.schemas.messages import (
    CandidatePhase,
    Message,
    Report,
    ReportKind,
    TrialOutcome,
    TrialReport,
)
from tests.edge_agent.rollout_bench import Device, Site, device, settled, site, until

__all__ = ["site"]

WITHDRAWN = CandidatePhase.WITHDRAWN


def said_to_be_in_use(here: Device) -> list[int]:
    return [
        message.version
        for message in here.said
        if isinstance(message, Report) and message.kind is ReportKind.ACTIVATED
    ]


@pytest.mark.parametrize("name", ["activate", "put_back"])
def test_what_is_heard_while_the_file_is_switched_hides_the_change_from_nobody(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)
            if name == "put_back":
                await here.rest(site.candidate(7))
                here.said.clear()
                here.used.clear()
            loop = asyncio.get_running_loop()
            change = getattr(here.library, name)

            def slow(*arguments: object, **named: object) -> object:
                done = change(*arguments, **named)
                # The new record is there, and the folder is still being synced.
                loop.call_soon_threadsafe(here.follower.say_again)
                time.sleep(0.05)
                return done

            monkeypatch.setattr(here.library, name, slow)
            phase = WITHDRAWN if name == "put_back" else CandidatePhase.RUNNING
            expected = 5 if name == "put_back" else 7
            working = asyncio.create_task(here.follower.run())
            here.hear(site.candidate(7, phase=phase))
            await until(lambda: here.in_use == expected)
            await asyncio.sleep(0.2)
            working.cancel()
            await asyncio.wait({working})
            assert here.used == said_to_be_in_use(here) == [expected]

    asyncio.run(scenario())


def test_what_is_put_into_use_is_said_however_often_the_choice_changes_meanwhile(
    tmp_path: Path, site: Site
) -> None:
    """The network is slow: before one report is through, something else is to be done."""

    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)
            said, through = [], asyncio.Event()

            async def send(message: Message) -> None:
                await through.wait()
                said.append(message)

            here.follower._send = send
            working = asyncio.create_task(here.follower.run())
            here.hear(site.candidate(7))
            await until(lambda: here.in_use == 7)
            # Nothing waits for the network: what is bad goes at once.
            here.hear(site.candidate(7, phase=WITHDRAWN))
            await until(lambda: here.in_use == 5)
            through.set()
            await until(lambda: any(isinstance(one, Report) and one.version == 5 for one in said))
            working.cancel()
            await asyncio.wait({working})

    asyncio.run(scenario())


def test_a_version_that_is_not_fetched_any_more_holds_no_room(tmp_path: Path, site: Site) -> None:
    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)
            here.library._cache_limit_bytes = sum(here.library._present().values()) + 10
            # It does not fit, and is given up with its report.
            await here.rest(site.stable(7))
            assert here.library._pinned["rollout"] == {}
            assert [one.kind for one in here.said] == [ReportKind.ACTIVATION_FAILED]
            # Nor does one hold any whose fetch was cut off.
            here.library._cache_limit_bytes = None
            fetching = asyncio.Event()

            async def nowhere(*_: object, **__: object) -> None:
                fetching.set()
                await asyncio.Event().wait()

            here.fetch = nowhere  # type: ignore[method-assign]
            working = asyncio.create_task(here.follower.run())
            here.hear(site.stable(8))
            await asyncio.wait_for(fetching.wait(), 10)
            assert here.library._pinned["rollout"] != {}
            here.hear(site.stable(5))
            await asyncio.sleep(0.05)
            assert here.library._pinned["rollout"] == {}
            working.cancel()
            await asyncio.wait({working})

    asyncio.run(scenario())


def test_a_damaged_standby_on_a_disk_that_is_read_only_is_tried_once(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)
            await here.rest(site.candidate(7))
            (tmp_path / "d" / "models" / "model-5.onnx").write_bytes(b"damaged")
            tries, put_back, forget = [], here.library.put_back, here.library.forget_standby

            def read_only() -> None:
                raise StoreUnavailable("read-only file system")

            monkeypatch.setattr(here.library, "forget_standby", read_only)
            monkeypatch.setattr(here.library, "put_back", lambda: (tries.append(1), put_back()))
            # The stable version is made anew instead.
            await here.rest(site.candidate(7, phase=WITHDRAWN))
            assert (len(tries), here.in_use) == (1, 5)
            monkeypatch.setattr(here.library, "forget_standby", forget)

    asyncio.run(scenario())


def test_a_verdict_that_cannot_be_read_is_written_anew(tmp_path: Path, site: Site) -> None:
    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)
            await here.rest(site.candidate(8))
            here.memory._run('UPDATE trials SET report = \'{"of": "another release"}\'')
            here.said.clear()
            jobs = len(here.trainer.jobs)
            await here.rest(site.candidate(8))
            [report] = here.reports
            assert report.outcome is TrialOutcome.ROLLED_BACK
            assert len(here.trainer.jobs) == jobs + 3
            trial = here.memory.trial(1, 8)
            assert trial is not None
            assert trial.report == report

    asyncio.run(scenario())


def test_a_verdict_that_the_disk_does_not_take_yet_is_no_try_that_failed(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)
            refused, end = [], here.memory.end_trial

            def full(report: TrialReport) -> None:
                refused.append(report)
                raise StoreUnavailable("disk full")

            monkeypatch.setattr(here.memory, "end_trial", full)
            # Paused in the midst, and resumed, more often than a trial may be tried.
            for _ in range(5):
                await here.rest(site.candidate(7))
            assert len(refused) >= 5
            monkeypatch.setattr(here.memory, "end_trial", end)
            await here.rest(site.candidate(7))
            assert [one.reason for one in here.reports] == [None]
            assert here.in_use == 7

    asyncio.run(scenario())


def test_a_candidate_that_kills_only_the_measuring_has_as_many_tries(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedge.edge_agent.rollout_follower.TRY_AGAIN_S", 0.0)

    async def scenario() -> None:
        with device(tmp_path / "d", site) as here:
            await settled(here, site)
            weights = here.library.blobs.path(site.versions[7]["weights"].sha256)
            killed = []

            def fail(job: object) -> TrainerKilled | None:
                if getattr(job, "job", "") != "evaluate" or job.weights != weights:
                    return None
                killed.append(job)
                return TrainerKilled("was ended by SIGKILL")

            here.trainer.fail = fail
            await here.rest(site.candidate(7))
            [report] = here.reports
            assert (len(killed), here.in_use) == (3, 5)
            assert "begun 3 times" in report.detail

    asyncio.run(scenario())
