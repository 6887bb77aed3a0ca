"""A fleet tells noisy words: who agreed, once each, the same however often, whatever is killed."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest

from fedge.coordinator.store import Store
from fedge.coordinator.vocabularies import read_words
from fedge.edge_agent.word_ledger import FILE_NAME, WordLedger
from fedge.schemas.messages import WordCountAnnouncement, encode
from fedge.schemas.topics import Topics
from tests.brokers import MOSQUITTO, MosquittoBroker
from tests.e2e.test_restart import LIMIT_S, Running
from tests.fleet import TINY_TASK

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(420),
    pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed"),
]

POPULATION = "worded"
AGREED = tuple(f"d{number}" for number in range(6))
NOT_ASKED = "d6"
EPSILON = 3.0
LIMIT = 5.0


def start_device(folder: Path, device: str, port: int) -> Running:
    (folder / f"{device}.txt").write_text("see you soon at home\n" * 4 + "once\n")
    agreed = f"[word_counts]\nepsilon_limit = {LIMIT}\n" if device in AGREED else ""
    (folder / f"{device}.toml").write_text(
        f'population = "{POPULATION}"\ndevice = "{device}"\nstate_dir = "{device}"\n'
        f'log_format = "json"\nengine = "onnx"\n[broker]\nport = {port}\n'
        f'reconnect_cap_s = 1\n[data]\npath = "{device}.txt"\nformat = "text"\n{agreed}'
    )
    return Running(folder, device, "fedge.edge_agent", "run", "--config", f"{device}.toml")


@contextlib.contextmanager
def running_fleet(folder: Path, port: int) -> Iterator[dict[str, Running]]:
    (folder / "fedge.toml").write_text(
        f'population = "{POPULATION}"\ntask = "{TINY_TASK}"\nstate_dir = "coordinator"\n'
        f'log_format = "json"\n[broker]\nport = {port}\nreconnect_cap_s = 1\n'
        "[round]\ngoal = 50\n"
    )
    programs = {
        "coordinator": Running(
            folder, "coordinator", "fedge.coordinator", "serve", "--config", "fedge.toml"
        )
    }
    try:
        deadline = time.monotonic() + 3 * LIMIT_S
        while not programs["coordinator"].events("plan_compiled"):
            # A tiny plan, but a program that loads slowly where others run beside it.
            assert time.monotonic() < deadline
            time.sleep(0.1)
        programs["coordinator"].wait_for("version_published")
        for device in (*AGREED[:3], NOT_ASKED):
            programs[device] = start_device(folder, device, port)
        yield programs
    finally:
        for program in programs.values():
            program.kill()


def vocabulary(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*(sys.executable, "-m", "fedge.coordinator", "vocabulary"), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def devices_that_answered(folder: Path) -> int:
    with Store.open(folder / "coordinator") as store:
        return store.word_counts()[-1][1]


def wait_for_answers(folder: Path, number: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while devices_that_answered(folder) < number:
        assert time.monotonic() < deadline, f"{devices_that_answered(folder)} of {number} answered"
        time.sleep(0.1)


def answer_of(folder: Path, device: str) -> tuple[bytes, float]:
    """What it has told in the newest word count, and what all that it told has cost."""
    with Store.open(folder / "coordinator") as store, WordLedger(folder / device) as ledger:
        told = ledger.told(store.word_counts()[-1][0].campaign)
        assert told is not None
        return encode(told.answer), ledger.spent()


Heard = list[tuple[str, bytes]]


@contextlib.contextmanager
def listening(port: int) -> Iterator[Heard]:
    """Topic and payload of all that anybody says of words, as it comes."""
    heard: Heard = []
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
    client.on_message = lambda _client, _data, message: heard.append(
        (message.topic, message.payload)
    )
    client.on_connect = lambda *_: client.subscribe(
        [("fedge/1/+/up/+/words", 1), ("fedge/1/+/all/words", 1)]
    )
    client.connect("127.0.0.1", port)
    client.loop_start()
    try:
        yield heard
    finally:
        client.disconnect()
        client.loop_stop()


def by_devices(heard: Heard) -> Heard:
    return [(topic, payload) for topic, payload in heard if "/up/" in topic]


def test_who_agreed_counts_once_with_the_same_bytes_whatever_is_killed(tmp_path: Path) -> None:
    with (
        MosquittoBroker(tmp_path) as broker,
        listening(broker.port) as heard,
        running_fleet(tmp_path, broker.port) as programs,
    ):
        coordinator = programs["coordinator"]
        for device in (*AGREED[:3], NOT_ASKED):
            programs[device].wait_for("version_activated")
        said = vocabulary(
            tmp_path, *("collect", "--epsilon", str(EPSILON), "--deadline", "3600"), "--json"
        )
        assert said.returncode == 0, said.stderr
        assert json.loads(said.stdout)["coordinator"] == coordinator.process.pid
        wait_for_answers(tmp_path, 3)
        coordinator.kill()
        # These answer while nobody is there to hear them: the broker still has the question.
        for device in AGREED[3:]:
            programs[device] = start_device(tmp_path, device, broker.port)
            programs[device].wait_for("word_told")
        coordinator.start()
        wait_for_answers(tmp_path, len(AGREED))

        # The device dies and is asked again; it knows what it said, and so does the coordinator.
        programs["d0"].kill()
        before = answer_of(tmp_path, "d0")
        with WordLedger(tmp_path / "d0") as ledger:
            # As if the acknowledgement had been lost with the power.
            ledger._db.execute("UPDATE told SET heard = 0")
        before_it_starts = len(by_devices(heard))
        programs["d0"].start()
        deadline = time.monotonic() + LIMIT_S
        while len(by_devices(heard)) == before_it_starts:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert answer_of(tmp_path, "d0") == before
        assert before[1] == EPSILON
        assert devices_that_answered(tmp_path) == len(AGREED)

        # Another word count would cost more than the devices allow: they are silent.
        assert vocabulary(tmp_path, "stop").returncode == 0
        again = vocabulary(tmp_path, *("collect", "--epsilon", str(EPSILON), "--deadline", "8"))
        assert again.returncode == 0
        for device in AGREED:
            programs[device].wait_for("word_count_declined")
        assert devices_that_answered(tmp_path) == 0
        assert coordinator.wait_for("word_count_closed")["word_count"] == 2
        topics = Topics(POPULATION)
        while heard[-1] != (topics.announcement(WordCountAnnouncement), b""):
            assert time.monotonic() < deadline + LIMIT_S
            time.sleep(0.1)

        said_by: dict[str, set[bytes]] = {}
        for topic, payload in by_devices(heard):
            said_by.setdefault(topic, set()).add(payload)
        assert set(said_by) == {f"{topics.prefix}/up/{device}/words" for device in AGREED}
        assert all(len(payloads) == 1 for payloads in said_by.values())
        # Who did not agree has not even a ledger.
        assert not (tmp_path / NOT_ASKED / FILE_NAME).exists()

    estimated = vocabulary(
        tmp_path,
        *("estimate", "1", "--candidates", "words-known.txt", "--words", "5"),
        *("--out", "words.txt", "--json"),
    )
    assert estimated.returncode == 2
    (tmp_path / "words-known.txt").write_text("see\nyou\nsoon\nat\nhome\nonce\n")
    estimated = vocabulary(
        tmp_path,
        *("estimate", "1", "--candidates", "words-known.txt", "--words", "5"),
        *("--out", "words.txt", "--json"),
    )
    assert estimated.returncode == 0, estimated.stderr
    found = json.loads(estimated.stdout)["estimate"]
    assert (found["devices"], found["candidates"]) == (6, 6)
    assert len(read_words(tmp_path / "words.txt").words) == 5
    nobody = vocabulary(tmp_path, "estimate", "2", "--candidates", "words-known.txt")
    assert (nobody.returncode, nobody.stdout) == (2, "")
    assert "no device has answered word count 2" in nobody.stderr
    later = vocabulary(tmp_path, "collect")
    assert "no coordinator is running" in later.stdout
    status = subprocess.run(
        [sys.executable, "-m", "fedge.edge_agent", "status", "--config", "d0.toml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"words    1 told, epsilon {EPSILON:g} of {LIMIT:g} spent" in status.stdout
