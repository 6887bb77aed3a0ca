"""The agent as its own process: killed, stopped, continued; nothing is left, nothing is lost.

The broker is a real Mosquitto; the coordinator is played by hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedge.schemas.ids import sha256
from fedge.schemas.messages import Checkin, Offer, Presence, Report, ReportKind, RoundPhase
from tests.brokers import MosquittoBroker
from tests.edge_agent.scripted_coordinator import (
    DEVICE,
    ScriptedCoordinator,
    scripted_coordinator,
)

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux'"),
]

LIMIT_S = 60.0


class Process:
    """`fedge-agent run`, and the training process below it. `more`: of its configuration."""

    def __init__(self, here: ScriptedCoordinator, more: str = "") -> None:
        here.settings()  # writes the examples
        self.log = here.folder / "agent.log"
        config = here.folder / "agent.toml"
        config.write_text(
            f'population = "{here.population}"\ndevice = "{DEVICE}"\nstate_dir = "state"\n'
            f'engine = "onnx"\nlog_format = "json"\n[broker]\nport = {here.port}\n'
            'keepalive_s = 5\nreconnect_cap_s = 1\n[data]\npath = "data.npz"\n'
            f"[trainer]\nnice = 0\n{more}"
        )
        self.command = [sys.executable, "-m", "fedge.edge_agent", "run", "--config", str(config)]
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stderr=log, stdout=log)

    def events(self, name: str) -> list[dict[str, object]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        found = [json.loads(line) for line in lines if line.startswith("{")]
        return [line for line in found if line["event"].startswith(name)]

    async def logged(self, name: str, count: int = 1) -> None:
        """Returns when there are so many such lines."""
        deadline = time.monotonic() + LIMIT_S
        while len(self.events(name)) < count:
            assert time.monotonic() < deadline, f"no {name}:\n{self.log.read_text()[-3000:]}"
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            await asyncio.sleep(0.02)

    @property
    def trainer_pid(self) -> int:
        task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        (pid,) = task.read_text().split()
        return int(pid)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def agent_process(here: ScriptedCoordinator, more: str = "") -> Iterator[Process]:
    made = Process(here, more)
    try:
        yield made
    finally:
        made.kill()


def has_ended(pidfd: int) -> bool:
    try:
        return bool(select.select([pidfd], [], [], LIMIT_S)[0])
    finally:
        os.close(pidfd)


async def in_training(here: ScriptedCoordinator, agent: Process, number: int = 1) -> None:
    """The device trains, for a while: 400 examples, a thousand times."""
    await here.publish_version(0)
    await here.announce_round(number, 0)
    await here.receive(Checkin, round=number)
    await here.announce_round(number, 0, RoundPhase.TRAINING)
    await here.tell(here.assignment(number, 0, local_epochs=1000, learning_rate=1e-6))
    await agent.logged("training")


def test_an_agent_killed_in_training_leaves_no_process_and_trains_again_when_asked(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with scripted_coordinator(mosquitto.port, tmp_path) as here:
            with agent_process(here) as agent:
                await in_training(here, agent)
                trainer = os.pidfd_open(agent.trainer_pid)
                agent.kill()
                assert await asyncio.to_thread(has_ended, trainer)
                first = await here.receive(Presence, online=True)
                await here.receive(Presence, online=False, boot=first.boot)
                agent.start()
                # It asks for the assignment that it lost, in its own next life.
                again = await here.receive(Checkin, round=1)
                assert again.boot > first.boot
                assert again.version == 0
                await here.tell(here.assignment(1, 0))
                offer = await here.receive(Offer, round=1)
                assert sha256(await here.take_upload(offer)) == offer.update.sha256
                await here.send_receipt(offer)
                await agent.logged("receipt")
                agent.kill()
                agent.start()
                await agent.logged("agent_started", 3)
                await here.receive(Presence, online=True)
                await here.listen(1)
                assert here.heard(Offer) == [], "an update with a receipt was offered again"
            # The version's blobs came once: later lives found them.
            assert len(agent.events("version_fetched")) == 1

    asyncio.run(scenario())


def test_an_update_without_a_receipt_is_offered_again_by_the_next_life_and_not_retrained(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with scripted_coordinator(mosquitto.port, tmp_path) as here:
            with agent_process(here) as agent:
                await here.publish_version(0)
                await here.announce_round(1, 0)
                await here.receive(Checkin, round=1)
                await here.tell(here.assignment(1, 0))
                offer = await here.receive(Offer, round=1)
                for life in range(2, 4):
                    agent.kill()
                    agent.start()
                    again = await here.receive(Offer, round=1)
                    assert again.update == offer.update, f"life {life}"
                assert sha256(await here.take_upload(offer)) == offer.update.sha256
                assert len(agent.events("trained")) == 1

    asyncio.run(scenario())


def test_a_training_process_killed_from_outside_costs_the_round_nothing(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with scripted_coordinator(mosquitto.port, tmp_path) as here:
            with agent_process(here) as agent:
                await in_training(here, agent)
                os.kill(agent.trainer_pid, signal.SIGKILL)
                await agent.logged("training_again")
                await agent.logged("trainer_started", 2)
                os.kill(agent.trainer_pid, signal.SIGKILL)
                # Twice is the machine's fault, and the coordinator is told at once.
                failed = await here.receive(Report, kind=ReportKind.TRAINING_FAILED, round=1)
                assert "SIGKILL" in failed.detail
                assert agent.process.poll() is None

    asyncio.run(scenario())


def test_a_training_process_that_is_stopped_is_given_up(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with scripted_coordinator(mosquitto.port, tmp_path) as here:
            with agent_process(here) as agent:
                await in_training(here, agent)
                stopped = agent.trainer_pid
                watched = os.pidfd_open(stopped)
                os.kill(stopped, signal.SIGSTOP)
                await agent.logged("training_again")
                assert await asyncio.to_thread(has_ended, watched)
                await agent.logged("trainer_started", 2)
                assert agent.trainer_pid != stopped

    asyncio.run(scenario())


def test_an_agent_that_slept_past_its_keep_alive_comes_back_and_goes_on(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with scripted_coordinator(mosquitto.port, tmp_path) as here:
            with agent_process(here) as agent:
                await here.publish_version(0)
                born = await here.receive(Presence, online=True)
                await here.receive(Report, kind=ReportKind.ACTIVATED, version=0)
                agent.signal(signal.SIGSTOP)
                # The broker finds out by the keep-alive; the world goes on.
                await here.receive(Presence, online=False, boot=born.boot)
                await here.publish_version(1)
                await here.announce_round(7, 1)
                agent.signal(signal.SIGCONT)
                await here.receive(Presence, online=True, boot=born.boot)
                await here.receive(Report, kind=ReportKind.ACTIVATED, version=1)
                await here.receive(Checkin, round=7)
                await here.tell(here.assignment(7, 1))
                offer = await here.receive(Offer, round=7)
                assert sha256(await here.take_upload(offer)) == offer.update.sha256

    asyncio.run(scenario())


def test_an_agent_that_slept_in_training_delivers_or_says_why_not(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    """Its deadline and every other timer run out in its sleep, and all of them go off at once."""

    async def scenario() -> None:
        async with scripted_coordinator(mosquitto.port, tmp_path) as here:
            with agent_process(here) as agent:
                await here.publish_version(0)
                await here.announce_round(1, 0)
                await here.receive(Checkin, round=1)
                born = await here.receive(Presence, online=True)
                work = here.assignment(1, 0, local_epochs=1000, learning_rate=1e-6, deadline_s=6)
                await here.tell(work)
                await agent.logged("training")
                agent.signal(signal.SIGSTOP)
                await here.receive(Presence, online=False, boot=born.boot)
                agent.signal(signal.SIGCONT)
                await here.receive(Presence, online=True, boot=born.boot)
                # 50,000 steps in 6 s: too many, or just done. Either way it is said.
                answers: list[Report | Offer] = []
                while not answers:
                    await here.listen(0.2)
                    answers += here.heard(Report, kind=ReportKind.TRAINING_FAILED, round=1)
                    answers += here.heard(Offer, round=1)
                await here.announce_round(2, 0)
                if isinstance(answers[0], Offer):
                    await here.send_receipt(answers[0])
                await here.receive(Checkin, round=2)

    asyncio.run(scenario())
