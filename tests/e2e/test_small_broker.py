"""Whole fleets through a broker with small limits: packets, messages in flight, queues."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from fedge.coordinator.store import Outcome, ParticipantStatus
from fedge.schemas.logs import JsonFormatter
from tests.brokers import MosquittoBroker
from tests.fleet import Fleet, fleet, tiny_examples

pytestmark = pytest.mark.e2e

WIDE_TASK = """
from torch import nn

from fedge.coordinator.task import Task, cross_entropy
from fedge.schemas.features import ClassTarget, TabularFeatures
from fedge.schemas.plan import TrainingDefaults


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 1024), nn.Tanh(), nn.Linear(1024, 256), nn.Linear(256, 3))


task = Task(
    name="wide",
    model=Net,
    loss=cross_entropy,
    features=TabularFeatures(columns=4),
    target=ClassTarget(classes=3),
    metrics={},
    defaults=TrainingDefaults(batch_size=8, learning_rate=0.01, local_epochs=1),
)
"""
"""1.1 MB of weights: 19 chunks of the default size."""
SMALL = ("max_packet_size 61440", "max_inflight_messages 10", "max_queued_messages 100")
PROTOCOLS = ["5", "3.1.1"]


@pytest.fixture
def wide_task(tmp_path: Path) -> str:
    path = tmp_path / "wide_task.py"
    path.write_text(WIDE_TASK)
    return f"{path}:task"


def events(caplog: pytest.LogCaptureFixture, event: str) -> list[str]:
    """The lines of this event as an operator's log has them."""
    formatter = JsonFormatter()
    return [formatter.format(r) for r in list(caplog.records) if r.getMessage().startswith(event)]


async def logged(here: Fleet, caplog: pytest.LogCaptureFixture, event: str) -> str:
    """Returns the first line of that event as soon as it is there."""

    async def watch() -> str:
        while not events(caplog, event):  # noqa: ASYNC110 -- a log has nothing to wait on
            await asyncio.sleep(0.05)
        return events(caplog, event)[0]

    found: str = await here.during(watch())
    return found


def start_agents(here: Fleet, count: int, protocol: str) -> None:
    for number in range(count):
        here.start_agent(
            f"d{number}",
            tiny_examples(8, seed=number),
            broker={"port": here.port, "protocol": protocol, "reconnect_cap_s": 1},
        )


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_fleet_makes_versions_through_a_broker_of_60_kb_10_in_flight_and_100_queued(
    tmp_path: Path, wide_task: str, protocol: str
) -> None:
    agents, versions = 8, 3

    async def scenario(port: int) -> None:
        async with fleet(
            port,
            tmp_path,
            task=wide_task,
            broker={"port": port, "protocol": protocol},
            round={"goal": agents, "over_selection": 1.0, "versions": versions},
        ) as here:
            here.start_coordinator()
            start_agents(here, agents, protocol)
            await here.version(versions)
            for number in range(1, versions + 1):
                report = here.report(number)
                assert report.round.outcome is Outcome.AGGREGATED
                statuses = [each.status for each in report.participants]
                assert statuses == [ParticipantStatus.ACCEPTED] * agents

    with MosquittoBroker(tmp_path / "broker", settings=SMALL) as broker:
        asyncio.run(scenario(broker.port))
        assert "oversize" not in broker.log_path.read_text().lower()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_broker_below_the_chunk_size_is_named_and_a_larger_limit_is_taken_up(
    tmp_path: Path, wide_task: str, protocol: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    settings = (*SMALL[1:], "max_packet_size 20000")
    broker = MosquittoBroker(tmp_path / "broker", settings=settings)

    async def scenario() -> None:
        async with fleet(
            broker.port,
            tmp_path,
            task=wide_task,
            broker={"port": broker.port, "protocol": protocol, "reconnect_cap_s": 1},
            round={"goal": 2, "over_selection": 1.0, "versions": 1},
        ) as here:
            here.start_coordinator()
            start_agents(here, 2, protocol)
            line = await logged(here, caplog, "not_published")
            if protocol == "5":
                # The broker told its limit: nothing was tried in vain.
                assert "exceed the broker's limit" in line
                assert "lower chunk_bytes or raise the broker's max_packet_size" in line
            else:
                assert "it closes the connection whenever this is sent" in line
                assert events(caplog, "broker_limit")
            assert here.newest is None
            broker.kill()
            broker.settings = SMALL
            broker.start()
            assert (await here.version(1)).number == 1

    with broker:
        asyncio.run(scenario())


def test_a_broker_that_takes_20_kb_carries_a_population_with_smaller_chunks(
    tmp_path: Path, wide_task: str
) -> None:
    protocol = "3.1.1"  # where it cannot say so

    async def scenario(port: int) -> None:
        async with fleet(
            port,
            tmp_path,
            task=wide_task,
            chunk_bytes=16 * 1024,
            broker={"port": port, "protocol": protocol},
            round={"goal": 4, "over_selection": 1.0, "versions": 2},
        ) as here:
            here.start_coordinator()
            start_agents(here, 4, protocol)
            assert (await here.version(2)).weights.chunk_bytes == 16 * 1024
            updates = [each.contribution for each in here.report(1).participants]
            assert [u.update.chunk_bytes for u in updates if u is not None] == [16 * 1024] * 4

    settings = (*SMALL[1:], "max_packet_size 20000")
    with MosquittoBroker(tmp_path / "broker", settings=settings) as broker:
        asyncio.run(scenario(broker.port))
