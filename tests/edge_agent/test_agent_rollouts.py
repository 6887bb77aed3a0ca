"""An agent that tries a rollout's candidate: over a real broker, beside rounds and rules."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from fedge.schemas.messages import (
    CandidateAnnouncement,
    CandidatePhase,
    Checkin,
    Offer,
    Report,
    ReportKind,
    RoundPhase,
    StableAnnouncement,
    TrialChecks,
    TrialOutcome,
    TrialReport,
    VersionAnnouncement,
)
from tests.brokers import MosquittoBroker
from tests.edge_agent.scripted_coordinator import (
    ScriptedCoordinator,
    running_agent,
    scripted_coordinator,
)
from tests.edge_agent.test_agent_evaluations import with_hold_out

pytestmark = pytest.mark.e2e

CHECKS = TrialChecks(max_loss_increase=1000.0, min_hold_out=20)


def facts(here: ScriptedCoordinator, number: int) -> dict[str, Any]:
    announcement, _ = here.version(number)
    kept = ("number", "plan", "weights", "golden", "model_sha256", "model_bytes")
    return {name: getattr(announcement, name) for name in kept}


async def stage(here: ScriptedCoordinator, newest: int, stable: int) -> None:
    """The newest version is for training, and apps use the stable one."""
    for number in {newest, stable}:
        await here.publish_blobs(here.version(number)[1])
    await here.announce(StableAnnouncement(**facts(here, stable)))
    await here.announce(candidate(here, stable, rollout=0, share=0.0))
    await here.announce(VersionAnnouncement(**facts(here, newest), staged=True))


def candidate(
    here: ScriptedCoordinator, number: int, rollout: int = 1, share: float = 1.0
) -> CandidateAnnouncement:
    return CandidateAnnouncement(
        **facts(here, number),
        rollout=rollout,
        share=share,
        phase=CandidatePhase.RUNNING,
        checks=CHECKS,
    )


def test_a_candidate_that_is_nowhere_holds_up_no_round(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with (
            scripted_coordinator(mosquitto.port, tmp_path) as here,
            running_agent(with_hold_out(here)),
        ):
            await stage(here, 5, 5)
            await here.receive(Report, kind=ReportKind.ACTIVATED, version=5)
            await here.announce(candidate(here, 7))
            await here.listen(0.5)
            await here.publish_blobs(here.version(6)[1])
            await here.announce(VersionAnnouncement(**facts(here, 6), staged=True))
            await here.announce_round(1, 6)
            await here.receive(Checkin, round=1)
            await here.announce_round(1, 6, RoundPhase.TRAINING)
            await here.tell(here.assignment(1, 6))
            offer = await here.receive(Offer, round=1, base=6)
            assert here.heard(TrialReport) == []
            await here.publish_blobs(here.version(7)[1])
            report = await here.receive(TrialReport)
            assert (report.version, report.outcome) == (7, TrialOutcome.ACTIVE)
            assert report.loss_ratio is not None
            await here.receive(Report, kind=ReportKind.ACTIVATED, version=7)
            await here.take_upload(offer)

    asyncio.run(scenario())


def test_a_candidate_is_tried_when_the_rules_allow_the_device_to_work(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    readings = tmp_path / "readings.json"
    readings.write_text(json.dumps({"charging": False}))
    rules = {"charging": True, "readings_file": readings, "look_every_s": 0.5, "steady_for_s": 0}

    async def scenario() -> None:
        async with (
            scripted_coordinator(mosquitto.port, tmp_path) as here,
            running_agent(with_hold_out(here, eligibility=rules)),
        ):
            # What is used by everybody is used whatever the rules for training say.
            await stage(here, 5, 5)
            await here.receive(Report, kind=ReportKind.ACTIVATED, version=5)
            await here.publish_blobs(here.version(7)[1])
            await here.announce(candidate(here, 7))
            await here.listen(2.0)
            assert here.heard(TrialReport) == []
            readings.write_text(json.dumps({"charging": True}))
            assert (await here.receive(TrialReport)).outcome is TrialOutcome.ACTIVE

    asyncio.run(scenario())
