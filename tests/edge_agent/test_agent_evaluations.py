"""An agent that is asked to measure: over a real broker, beside rounds, versions and rules."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from fedge.edge_agent.data.hold_out import held_out
from fedge.schemas.messages import (
    Checkin,
    EvaluationRequest,
    EvaluationResult,
    EvaluationStatus,
    Offer,
    Report,
    ReportKind,
    RoundPhase,
)
from tests.brokers import MosquittoBroker
from tests.edge_agent.plans import examples
from tests.edge_agent.scripted_coordinator import (
    ScriptedCoordinator,
    running_agent,
    scripted_coordinator,
)

pytestmark = pytest.mark.e2e

ROWS, SHARE = 400, 0.2


def with_hold_out(here: ScriptedCoordinator, **changes: object):
    here.settings()  # writes the examples
    data = {"path": here.folder / "data.npz", "hold_out": SHARE}
    return here.settings(data=data, **changes)


def request(here: ScriptedCoordinator, number: int, evaluation: int = 1) -> EvaluationRequest:
    announcement, _ = here.version(number)
    return EvaluationRequest(
        evaluation=evaluation,
        number=number,
        plan=announcement.plan,
        weights=announcement.weights,
        deadline_s=60,
    )


def squares(here: ScriptedCoordinator, number: int) -> tuple[int, float]:
    x, y = (one.astype(float)[held_out(ROWS, SHARE)] for one in examples(ROWS))
    weights = here.weights(number)
    errors = (x * weights["scale"]) @ weights["w"].astype(float) + weights["b"] - y
    return len(x), float(np.sum(errors**2))


def test_an_agent_measures_what_it_is_asked_for_in_this_life_and_in_the_next(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with scripted_coordinator(mosquitto.port, tmp_path) as here:
            settings = with_hold_out(here)
            await here.publish_blobs(here.version(2)[1])
            async with running_agent(settings):
                await here.publish_version(7)
                await here.receive(Report, kind=ReportKind.ACTIVATED, version=7)
                await here.tell(request(here, 2))
                first = await here.receive(EvaluationResult)
                await here.tell(request(here, 2))
                assert (await here.receive(EvaluationResult)).sums == first.sums
            count, loss_sum = squares(here, 2)
            assert first.sums is not None
            assert (first.sums.rows, first.sums.examples) == (count, count)
            assert first.sums.loss_sum == pytest.approx(loss_sum, rel=1e-5)
            async with running_agent(settings):
                await here.tell(request(here, 2))
                again = await here.receive(EvaluationResult)
            assert again.sums == first.sums

    asyncio.run(scenario())


def test_training_goes_first(mosquitto: MosquittoBroker, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            scripted_coordinator(mosquitto.port, tmp_path) as here,
            running_agent(with_hold_out(here)),
        ):
            await here.publish_version(0)
            await here.announce_round(1, 0)
            checkin = await here.receive(Checkin, round=1)
            assert checkin.examples == ROWS - squares(here, 0)[0]
            await here.announce_round(1, 0, RoundPhase.TRAINING)
            assignment = here.assignment(1, 0, local_epochs=60, learning_rate=1e-6)
            await here.tell(assignment)
            await here.tell(request(here, 0))
            offer = await here.receive(Offer, round=1)
            assert here.heard(EvaluationResult) == []
            await here.take_upload(offer)
            # What waits for a receipt is in nobody's way.
            result = await here.receive(EvaluationResult)
            assert result.status is EvaluationStatus.OK
            await here.send_receipt(offer)

    asyncio.run(scenario())


def test_weights_that_are_nowhere_hold_up_no_version(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with (
            scripted_coordinator(mosquitto.port, tmp_path) as here,
            running_agent(with_hold_out(here)),
        ):
            await here.publish_version(5)
            await here.receive(Report, kind=ReportKind.ACTIVATED, version=5)
            await here.tell(request(here, 2))
            await here.listen(0.5)
            await here.publish_version(6)
            await here.receive(Report, kind=ReportKind.ACTIVATED, version=6)
            assert here.heard(EvaluationResult) == []
            await here.publish_blobs(here.version(2)[1])
            assert (await here.receive(EvaluationResult)).status is EvaluationStatus.OK

    asyncio.run(scenario())


def test_a_device_measures_when_its_rules_allow_it_to_work(
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
            await here.publish_version(0)
            await here.receive(Report, kind=ReportKind.ACTIVATED)
            await here.tell(request(here, 0))
            await here.listen(1.5)
            assert here.heard(EvaluationResult) == []
            readings.write_text(json.dumps({"charging": True}))
            assert (await here.receive(EvaluationResult)).status is EvaluationStatus.OK

    asyncio.run(scenario())
