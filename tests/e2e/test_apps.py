"""An app and a real agent: texts come while it trains, answers go on while versions change.

The agent is its own process, the broker a real Mosquitto, the coordinator a real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedge.edge_agent.example_store import FILE_NAME, ExampleStore
from fedge.schemas import messages
from fedge.schemas.link.broker import BrokerSettings
from fedge.schemas.link.protocol import Delivery
from fedge.schemas.messages import Checkin
from tests.brokers import MosquittoBroker
from tests.edge_agent.app_clients import Reply, UnixConnection, ask_on
from tests.fleet import Fleet, fleet

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

LIMIT_S = 240.0
"""Compiling a plan alone may take a minute where other programs have the processors."""
RUNTIME = "onnxruntime_pybind11_state"
TASK = """
from fedge.coordinator.tasks.next_word import next_word
from fedge.schemas.words import Vocabulary


def task():
    return next_word(Vocabulary("see you soon at home my secret is".split()), cells=24,
                     dimensions=8, window=4)
"""
IN_STATE = 'socket = "apps.sock"'
ROUND = {"goal": 1, "gather_s": 0.5, "deadline_s": 180}
LONG = {"local_epochs": 800}
"""Training that lasts for seconds."""


class Agent:
    """`fedge-agent run` on a device with nothing but what apps give it."""

    def __init__(self, folder: Path, population: str, port: int, apps: str = IN_STATE) -> None:
        self.state = folder / "phone"
        self.socket = self.state / "apps.sock"
        self.log = folder / "agent.log"
        self.config = folder / "agent.toml"
        self.config.write_text(
            f'population = "{population}"\ndevice = "phone"\nstate_dir = "phone"\n'
            f'engine = "onnx"\nlog_format = "json"\n[broker]\nport = {port}\n'
            f'[data]\npath = "phone/{FILE_NAME}"\nformat = "store"\n'
            f"[trainer]\nnice = 0\n[apps]\n{apps}\n"
        )
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "fedge.edge_agent", "run", "--config", str(self.config)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stderr=log, stdout=log)

    def ask(self, method: str, path: str, asked: Any = None) -> Reply:
        with contextlib.closing(UnixConnection(self.socket)) as connection:
            return ask_on(connection, method, path, asked)

    def add(self, *texts: str) -> None:
        assert self.ask("POST", "/v1/examples", {"texts": list(texts)}).status == 201

    def status(self) -> dict[str, Any]:
        reply = self.ask("GET", "/v1/status")
        assert reply.status == 200
        found: dict[str, Any] = reply.json
        return found

    def until_it_listens(self) -> None:
        deadline = time.monotonic() + LIMIT_S
        while True:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                self.status()
                return
            time.sleep(0.05)

    def until(self, **training: Any) -> None:
        """Until its status says so of the training."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            found = self.status()["training"]
            if training.items() <= found.items():
                return
            assert time.monotonic() < deadline, (found, self.log.read_text()[-3000:])
            time.sleep(0.02)

    def has_loaded(self, library: str) -> bool:
        return library in Path(f"/proc/{self.process.pid}/maps").read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.log.read_text().splitlines() if line[:1] == "{"]
        return [line for line in found if line["event"] == name]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def agent(folder: Path, population: str, port: int, apps: str = IN_STATE) -> Iterator[Agent]:
    made = Agent(folder, population, port, apps)
    try:
        made.until_it_listens()
        yield made
    finally:
        made.close()


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fleet.LIMIT_S", LIMIT_S)


@dataclass
class Asking:
    """An app that asks for suggestions on and on, on one connection. `versions`: that answered."""

    device: Agent
    versions: list[int] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    _done: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Asking:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        with contextlib.closing(UnixConnection(self.device.socket)) as connection:
            while not self._done.is_set():
                reply = ask_on(connection, "POST", "/v1/predict", {"text": "See you "})
                if reply.status == 200:
                    self.versions.append(reply.json["version"])
                    assert len(reply.json["words"]) == 3
                else:
                    self.refusals.append(f"{reply.status} {reply.code} after {self.versions[-1:]}")
                self._done.wait(0.02)

    def until(self, version: int) -> None:
        deadline = time.monotonic() + LIMIT_S
        while version not in self.versions:
            assert self._thread.is_alive(), "see its traceback"
            assert time.monotonic() < deadline, (self.versions[-1:], self.refusals[-1:])
            time.sleep(0.02)


class CheckIns:
    """Every check-in of the device, as the coordinator gets it."""

    def __init__(self, here: Fleet) -> None:
        self._topic = here.topics.up("phone", Checkin)
        broker = BrokerSettings(port=here.port)
        self._link = broker.link(f"{here.population}.listener", random.Random(1))
        self.examples: dict[int, int] = {}

    async def __aenter__(self) -> CheckIns:
        await self._link.subscribe(self._topic)
        await self._link.start()
        self._task = asyncio.create_task(self._listen())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._link.close()

    async def _listen(self) -> None:
        while True:
            event = await self._link.next_event()
            if isinstance(event, Delivery):
                found = messages.decode(Checkin, event.payload)
                self.examples[found.round] = found.examples


def to_train_on(device: Agent) -> int:
    with ExampleStore.configured(device.config) as store:
        return store.count().training.examples


def test_an_app_adds_texts_while_training_runs_and_asks_on_while_versions_change(
    tmp_path: Path,
) -> None:
    (tmp_path / "words_task.py").write_text(TASK)

    async def scenario(port: int) -> None:
        rounds = {**ROUND, "versions": 3}
        task = f"{tmp_path}/words_task.py:task"
        async with fleet(port, tmp_path, task=task, round=rounds, training=LONG) as here:
            coordinator = here.start_coordinator()
            with agent(tmp_path, here.population, port) as device:
                async with CheckIns(here) as check_ins:
                    await here.during(asyncio.to_thread(life, device, here, check_ins))
                    # Nobody is asked any more.
                    await here.stop([coordinator])

    def life(device: Agent, here: Fleet, check_ins: CheckIns) -> None:
        device.add(*(f"See you soon at home {n}." for n in range(30)))
        before = to_train_on(device)
        assert not device.has_loaded(RUNTIME), "nobody has asked for an answer yet"
        with Asking(device) as app:
            app.until(0)
            # Until then there was no version.
            assert {one[:14] for one in app.refusals} == {"503 no_version"}
            assert device.has_loaded(RUNTIME)
            app.refusals.clear()
            device.until(stage="training", round=2)
            device.add(*(f"My secret is at home {n}." for n in range(20)))
            during = device.status()["training"]
            assert (during["stage"], during["round"]) == ("training", 2)
            after = to_train_on(device)
            assert after > before
            app.until(3)
            assert app.refusals == []
            # Others may have been replaced before they were put into use.
            assert app.versions == sorted(app.versions)
        assert check_ins.examples == {1: before, 2: before, 3: after}
        for number, examples in check_ins.examples.items():
            (one,) = here.report(number).participants
            assert one.contribution is not None
            assert one.contribution.examples == examples
        assert "secret" not in device.log.read_text()

    with MosquittoBroker(tmp_path / "broker") as broker:
        asyncio.run(scenario(broker.port))


def test_what_an_app_takes_back_in_mid_training_is_not_learned(tmp_path: Path) -> None:
    (tmp_path / "words_task.py").write_text(TASK)

    async def scenario(port: int) -> None:
        rounds = {**ROUND, "versions": 1}
        task = f"{tmp_path}/words_task.py:task"
        async with fleet(port, tmp_path, task=task, round=rounds, training=LONG) as here:
            here.start_coordinator()
            with agent(tmp_path, here.population, port) as device:
                await here.during(asyncio.to_thread(life, device))
                await here.version(1)
                (one,) = here.report(1).participants
                assert one.contribution is not None
                assert one.contribution.examples == to_train_on(device)

    def life(device: Agent) -> None:
        texts = [f"See you soon {n}." for n in range(20)]
        device.add(*texts, *(f"My secret is {n}." for n in range(20)))
        device.until(stage="training", round=1)
        reply = device.ask("DELETE", "/v1/examples", {"containing": "secret"})
        assert (reply.status, reply.json["examples"]) == (200, 20)
        assert device.status()["training"]["round"] == 1

    with MosquittoBroker(tmp_path / "broker") as broker:
        asyncio.run(scenario(broker.port))


def test_a_killed_agent_s_socket_is_taken_over_and_a_stopped_one_takes_it_along(
    tmp_path: Path, free_port: int
) -> None:
    """Without a broker, too: an app is served whatever the network does."""
    with agent(tmp_path, "p", free_port) as device:
        device.add("Before the power cut")
        device.close()
        assert device.socket.exists()
        device.start()
        device.until_it_listens()
        status = device.status()
        assert (sum(status["kept"].values()), status["connected"]) == (1, False)
        device.process.send_signal(signal.SIGTERM)
        assert device.process.wait(30) == 0
        assert not device.socket.exists()


def test_a_second_agent_with_the_same_socket_ends_and_says_why(
    tmp_path: Path, free_port: int
) -> None:
    with agent(tmp_path, "p", free_port) as device:
        other = tmp_path / "other"
        other.mkdir()
        second = Agent(other, "p", free_port, f"socket = '{device.socket}'")
        try:
            assert second.process.wait(60) == 2
        finally:
            second.close()
        said = second.log.read_text().strip().splitlines()[-1]
        assert said.startswith("error: socket in [apps]: another program listens at ")
        assert device.status()["device"] == "phone"


def test_a_socket_path_that_is_too_long_is_said_at_the_start(
    tmp_path: Path, free_port: int
) -> None:
    device = Agent(tmp_path, "p", free_port, f"socket = '{'s' * 108}'")
    try:
        assert device.process.wait(60) == 2
    finally:
        device.close()
    assert "at most 107" in device.log.read_text()
