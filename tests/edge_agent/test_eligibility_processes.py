"""A real agent whose host changes under it: it stops, waits, goes on, and loses nothing.

The broker is a real Mosquitto; the coordinator is played by hand; the host is a readings file.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedge.edge_agent.data.examples import Examples
from fedge.edge_agent.engines.onnx_engine import OnnxEngine
from fedge.edge_agent.training import TrainingResult, train
from fedge.edge_agent.training_settings import TrainingSettings
from fedge.schemas.ids import sha256
from fedge.schemas.messages import (
    Assignment,
    Checkin,
    Offer,
    Presence,
    Report,
    ReportKind,
    RoundPhase,
)
from fedge.schemas.tensors import encode_tensors
from tests.brokers import MosquittoBroker
from tests.edge_agent.plans import examples
from tests.edge_agent.scripted_coordinator import ScriptedCoordinator, scripted_coordinator
from tests.edge_agent.test_agent_processes import Process, agent_process, has_ended

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux'"),
]

PROMISED_S = 2.0
NOISE_S = 2.0
"""What this machine may lay on top: other tests run on its two cores."""
GOOD = {"charging": True, "battery": 0.9}
ON_BATTERY = {"charging": False, "battery": 0.9}
RULES = """
[eligibility]
charging = true
battery_above = 0.4
steady_for_s = 0
look_every_s = 0.5
readings_file = "readings.json"
"""


def supply(here: ScriptedCoordinator, readings: object) -> None:
    """The host is so from now on."""
    beside = here.folder / "readings.new"
    beside.write_text(json.dumps(readings))
    beside.replace(here.folder / "readings.json")


@contextlib.contextmanager
def device(here: ScriptedCoordinator, more: str = "") -> Iterator[Process]:
    supply(here, GOOD)
    with agent_process(here, RULES + more) as agent:
        yield agent


def long_work(here: ScriptedCoordinator, **changes: Any) -> Assignment:
    """Tens of thousands of steps: seconds."""
    return here.assignment(1, 0, local_epochs=600, learning_rate=1e-5, **changes)


async def in_training(here: ScriptedCoordinator, agent: Process, work: Assignment) -> None:
    await here.publish_version(0)
    await here.announce_round(1, 0)
    await here.receive(Checkin, round=1)
    await here.announce_round(1, 0, RoundPhase.TRAINING)
    await here.tell(work)
    await agent.logged("training")


async def taken_off_the_charger(here: ScriptedCoordinator, agent: Process) -> float:
    """Seconds until the training process had ended."""
    trainer = os.pidfd_open(agent.trainer_pid)
    begun_s = time.monotonic()
    supply(here, ON_BATTERY)
    assert await asyncio.to_thread(has_ended, trainer)
    took_s = time.monotonic() - begun_s
    await agent.logged("training_suspended")
    return took_s


def expected(here: ScriptedCoordinator, work: Assignment) -> TrainingResult:
    """What nobody interrupts."""
    plan = here.plan
    engine = OnnxEngine(plan.manifest, plan.train, None)
    data, settings = Examples(*examples(400)), TrainingSettings.of(work)
    result = train(engine, plan.manifest, here.weights(0), data, settings)
    assert isinstance(result, TrainingResult)
    return result


def checkpoints(here: ScriptedCoordinator) -> list[str]:
    folder = here.folder / "state" / "checkpoint"
    return [path.name for path in folder.iterdir()] if folder.exists() else []


async def the_update_is_as_if_nothing_had_been(
    here: ScriptedCoordinator, agent: Process, work: Assignment, interruptions: int
) -> None:
    offer = await here.receive(Offer, round=1)
    whole = await asyncio.to_thread(expected, here, work)
    assert offer.update.sha256 == sha256(encode_tensors(whole.delta))
    assert (offer.loss, offer.metrics) == (whole.loss, whole.metrics)
    (trained,) = agent.events("trained")
    left = agent.events("training_suspended")
    assert len(left) == interruptions
    assert all(one["checkpoint"] for one in left)
    assert 0 < left[-1]["step"] == trained["first_step"] < trained["steps"] == whole.steps
    assert checkpoints(here) == []


def test_training_stops_when_the_charger_is_pulled_and_goes_on_where_it_was(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with scripted_coordinator(mosquitto.port, tmp_path) as here:
            with device(here) as agent:
                work = long_work(here)
                await in_training(here, agent, work)
                for number in (1, 2):
                    took_s = await taken_off_the_charger(here, agent)
                    print(f"stopped after {took_s:.3f} s")
                    assert took_s < PROMISED_S + NOISE_S
                    assert checkpoints(here) == ["1.checkpoint"]
                    assert here.heard(Offer) == []
                    supply(here, GOOD)
                    await agent.logged("trainer_started", number + 1)
                    progress = len(agent.events("training"))
                    await agent.logged("training", progress + 1)
                await the_update_is_as_if_nothing_had_been(here, agent, work, 2)
                assert here.heard(Report, kind=ReportKind.TRAINING_FAILED) == []

    asyncio.run(scenario())


def test_an_agent_killed_while_it_waits_goes_on_from_the_checkpoint_in_its_next_life(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with scripted_coordinator(mosquitto.port, tmp_path) as here:
            with device(here) as agent:
                work = long_work(here)
                await in_training(here, agent, work)
                await taken_off_the_charger(here, agent)
                agent.kill()
                supply(here, GOOD)
                agent.start()
                # It asks for the assignment that it lost.
                await here.receive(Checkin, round=1)
                await here.tell(work)
                await the_update_is_as_if_nothing_had_been(here, agent, work, 1)

    asyncio.run(scenario())


def test_an_agent_killed_in_the_midst_of_stopping_leaves_nothing_that_misleads(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    """Wherever the kill falls: with a checkpoint, with none, with half of one."""

    async def scenario() -> None:
        async with scripted_coordinator(mosquitto.port, tmp_path) as here:
            with device(here) as agent:
                work = long_work(here)
                await in_training(here, agent, work)
                supply(here, ON_BATTERY)
                while not checkpoints(here):
                    await here.listen(0.001)
                agent.kill()
                supply(here, GOOD)
                agent.start()
                await here.receive(Checkin, round=1)
                await here.tell(work)
                offer = await here.receive(Offer, round=1)
                whole = await asyncio.to_thread(expected, here, work)
                assert offer.update.sha256 == sha256(encode_tensors(whole.delta))
                assert checkpoints(here) == []

    asyncio.run(scenario())


def test_a_training_that_cannot_go_on_in_time_is_said_and_costs_the_device_no_rest(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with scripted_coordinator(mosquitto.port, tmp_path) as here:
            with device(here) as agent:
                await in_training(here, agent, long_work(here, deadline_s=4.0))
                await taken_off_the_charger(here, agent)
                failed = await here.receive(Report, kind=ReportKind.TRAINING_FAILED, round=1)
                assert "not eligible (charging: on battery" in failed.detail
                assert checkpoints(here) == []
                await here.announce_round(2, 0)
                await here.listen(1.5)
                assert here.heard(Checkin, round=2) == []
                supply(here, GOOD)
                await here.receive(Checkin, round=2)
                assert agent.events("rests_after_failures") == []

    asyncio.run(scenario())


def test_a_round_that_is_over_takes_the_checkpoint_with_it(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with scripted_coordinator(mosquitto.port, tmp_path) as here:
            with device(here) as agent:
                await in_training(here, agent, long_work(here))
                await taken_off_the_charger(here, agent)
                assert checkpoints(here) == ["1.checkpoint"]
                await here.announce_round(2, 0)
                while checkpoints(here):
                    await here.listen(0.05)
                # A life that finds one of an old round removes it, too.
                agent.kill()
                (here.folder / "state" / "checkpoint" / "1.checkpoint").write_bytes(b"old")
                agent.start()
                while checkpoints(here):
                    await here.listen(0.05)

    asyncio.run(scenario())


def test_a_device_checks_in_only_while_it_is_eligible_and_says_why_not_once(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with scripted_coordinator(mosquitto.port, tmp_path) as here:
            with device(here) as agent:
                supply(here, ON_BATTERY)
                await here.publish_version(0)
                await here.receive(Report, kind=ReportKind.ACTIVATED, version=0)
                await agent.logged("not_eligible")
                await here.announce_round(1, 0)
                await here.listen(2)
                assert here.heard(Checkin) == []
                assert len(agent.events("not_eligible")) == 1
                # Broken readings are no readings.
                supply(here, ["?"])
                await agent.logged("reading_unknown", 2)
                await here.listen(2)
                assert here.heard(Checkin) == []
                rules = [line["rule"] for line in agent.events("reading_unknown")]
                assert sorted(rules) == ["battery_above", "charging"]
                supply(here, GOOD)
                await here.receive(Checkin, round=1)

    asyncio.run(scenario())


def test_a_day_s_limit_stops_a_training_and_holds_in_the_next_life(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with scripted_coordinator(mosquitto.port, tmp_path) as here:
            with device(here, "[participation]\ndaily_training_s = 2\n") as agent:
                # Two hundred thousand steps.
                work = here.assignment(1, 0, local_epochs=1000, batch_size=2, learning_rate=1e-7)
                await in_training(here, agent, work)
                await agent.logged("training_suspended")
                await agent.logged("not_eligible")
                (reason,) = [line["reason"] for line in agent.events("not_eligible")]
                assert str(reason).startswith("daily_training_s: ")
                agent.kill()
                agent.start()
                await here.receive(Presence, online=True)
                await agent.logged("not_eligible", 2)
                await here.listen(2)
                assert here.heard(Checkin) == []

    asyncio.run(scenario())


def test_rounds_that_are_too_near_to_the_last_one_pass_also_in_the_next_life(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with scripted_coordinator(mosquitto.port, tmp_path) as here:
            with device(here, "[participation]\nevery_rounds = 4\n") as agent:
                await here.publish_version(0)
                await here.announce_round(1, 0)
                await here.receive(Checkin, round=1)
                await here.tell(here.assignment(1, 0))
                offer = await here.receive(Offer, round=1)
                await here.send_receipt(offer)
                await agent.logged("receipt")
                for number in (2, 3):
                    await here.announce_round(number, 0)
                    await here.listen(1)
                agent.kill()
                agent.start()
                await agent.logged("eligible", 2)
                await agent.logged("takes_no_part", 2)
                await here.announce_round(4, 0)
                await here.listen(1)
                assert here.heard(Checkin) == []
                # Once in each life.
                said = [line["reason"] for line in agent.events("takes_no_part")]
                assert said == ["every_rounds: 4 from the last one, 1"] * 2
                await here.announce_round(5, 0)
                await here.receive(Checkin, round=5)

    asyncio.run(scenario())
