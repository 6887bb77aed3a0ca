"""A keyboard that is like its user: learned by the fleet, fine-tuned on the device, and forgotten.

The broker is a real Mosquitto, the coordinator the real one, each device a process of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fedge.edge_agent.example_store import FILE_NAME, ExampleStore
from fedge.edge_agent.personal_models import PersonalModels
from tests.brokers import MosquittoBroker
from tests.fleet import Fleet, fleet

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

VERSIONS = 3
TASK = """
from fedge.coordinator.tasks.next_word import next_word
from fedge.schemas.words import Vocabulary

WORDS = "see you soon at home tomorrow the train my secret is red blue green one two three four"


def task():
    words = Vocabulary(WORDS.split())
    return next_word(words, cells=16, dimensions=12, window=4, learning_rate=2.0)
"""
COMMON = [
    f"see you {when} {where} {number}"
    for when, where, number in itertools.product(
        ("soon", "tomorrow"), ("at home", "the train"), ("one", "two", "three", "four")
    )
]
OWN = [
    f"my {thing} is {colour} {number}"
    for thing, colour, number in itertools.product(
        ("secret", "train", "home"), ("red", "blue", "green"), ("one", "two", "three", "four")
    )
]


class Phone:
    """A device as its own process, with what its user typed."""

    def __init__(self, here: Fleet, name: str, texts: list[str]) -> None:
        self.folder = here.folder / name
        self.folder.mkdir()
        self.config = self.folder / "agent.toml"
        self.config.write_text(
            f'population = "{here.population}"\ndevice = "{name}"\nstate_dir = "."\n'
            f'engine = "onnx"\n[broker]\nport = {here.port}\n'
            f'[data]\npath = "{FILE_NAME}"\nformat = "store"\n'
            "[examples]\nhold_out = 0.3\n"
            "[personalisation]\nepochs = 15\nmin_hold_out = 2\nmin_examples = 5\nsettle_s = 0.5\n"
        )
        (self.folder / "typed.txt").write_text("".join(f"{text}\n" for text in texts))
        with (self.folder / "typed.txt").open() as typed:
            self.run("examples", "add", "-", stdin=typed)
        log = (self.folder / "agent.log").open("w")
        self.process = subprocess.Popen(self.command("run"), stdout=log, stderr=log)

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "fedge.edge_agent", *words, "--config", str(self.config)]

    def run(self, *words: str, stdin: Any = None) -> str:
        done = subprocess.run(
            self.command(*words), stdin=stdin, capture_output=True, text=True, timeout=60,
            check=True,
        )  # fmt: skip
        return done.stdout

    def asked(self, *words: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run(*words, "--json"))
        return found

    def suggested(self, typed: str) -> dict[str, Any]:
        done = subprocess.run(
            [*self.command("predict"), "--json", "--", typed],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    async def personalised(self, version: int) -> dict[str, Any]:
        """The status once a personal training for this version has come to its end."""
        deadline = time.monotonic() + 90
        while True:
            status = await asyncio.to_thread(self.asked, "personal", "status")
            if status["last"] is not None and status["last"]["version"] == version:
                return status
            assert time.monotonic() < deadline, (self.folder / "agent.log").read_text()[-3000:]
            await asyncio.sleep(0.3)

    def personal_files(self) -> list[str]:
        return sorted(path.name for path in self.folder.rglob("*") if "personal" in path.name)


def test_a_device_unlike_the_fleet_gets_a_better_model_of_its_own_and_forgets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The plan is compiled first.
    monkeypatch.setattr("tests.fleet.LIMIT_S", 150.0)
    (tmp_path / "phrases_task.py").write_text(TASK)

    async def scenario(port: int) -> None:
        rounds = {"goal": 3, "versions": VERSIONS, "gather_s": 0.5}
        async with fleet(
            port, tmp_path, task=f"{tmp_path}/phrases_task.py:task", round=rounds
        ) as here:
            here.start_coordinator()
            await here.version(0)
            phones: list[Phone] = []
            try:
                for name, texts in (("like", COMMON), ("alike", COMMON), ("unlike", OWN)):
                    phones.append(await asyncio.to_thread(Phone, here, name, texts))
                for version in range(1, VERSIONS + 1):
                    await here.version(version)
                await learns_and_forgets(phones[-1])
            finally:
                for phone in phones:
                    phone.process.kill()
                    phone.process.wait()

    with MosquittoBroker(tmp_path / "broker") as broker:
        asyncio.run(scenario(broker.port))


async def learns_and_forgets(unlike: Phone) -> None:
    """Commands block this loop, and with it the coordinator, which has nothing more to do."""
    status = await unlike.personalised(VERSIONS)
    last = status["last"]
    print(json.dumps(last))
    assert (last["outcome"], status["personal"]) == ("better", True)
    assert last["personal"]["loss"] < 0.8 * last["common"]["loss"]
    assert last["personal"]["top1_recall"] > last["common"]["top1_recall"]
    answer = unlike.suggested("my ")
    assert (answer["version"], answer["personal"]) == (VERSIONS, True)
    # Of its own words: which comes first, so few texts and another hold-out each time decide.
    assert answer["words"][0]["word"] in {word for text in OWN for word in text.split()}
    assert len(unlike.personal_files()) == 3

    # The command alone does it: the agent is not asked.
    unlike.process.send_signal(signal.SIGSTOP)
    forgotten = unlike.asked("examples", "forget", "--containing", "secret")
    assert forgotten["examples"] == 12
    assert unlike.personal_files() == []
    assert not unlike.suggested("my ")["personal"]
    unlike.process.send_signal(signal.SIGCONT)

    # It is made again, from what is left.
    status = await unlike.personalised(VERSIONS)
    record = PersonalModels(unlike.folder).record()
    assert record is not None
    assert record.generation == forgotten["generation"]
    with ExampleStore.configured(unlike.config) as store:
        left = store.count()
    assert (record.training, record.hold_out) == (left.training.examples, left.hold_out.examples)
    assert status["personal"] == (status["last"]["outcome"] == "better")
