"""Whatever is killed, the fleet goes on: real processes, `kill -9`, no human."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedge.coordinator.store import Outcome, ParticipantStatus, Store
from tests.brokers import MOSQUITTO, MosquittoBroker
from tests.fleet import TINY_TASK, tiny_examples

pytestmark = pytest.mark.e2e

LIMIT_S = 150.0


class Running:
    """One of our programs as a process that writes JSON lines to a file."""

    def __init__(self, folder: Path, name: str, *arguments: str) -> None:
        self.folder = folder
        self.name = name
        self.arguments = arguments
        self.log = folder / f"{name}.log"
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.arguments], stderr=log, stdout=log, cwd=self.folder
            )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def events(self, name: str) -> list[dict[str, object]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        found = [json.loads(line) for line in lines if line.startswith("{")]
        return [line for line in found if line["event"] == name]

    def wait_for(self, event: str, count: int = 1) -> dict[str, object]:
        """The newest such line, once there are `count` of them."""
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            found = self.events(event)
            if len(found) >= count:
                return found[-1]
            assert self.process.poll() is None, f"{self.name} ended: {self.log.read_text()[-2000:]}"
            time.sleep(0.02)
        raise AssertionError(f"{self.name}: no {event}:\n{self.log.read_text()[-3000:]}")


@contextlib.contextmanager
def running_fleet(folder: Path, port: int, *, versions: int) -> Iterator[dict[str, Running]]:
    (folder / "fedge.toml").write_text(
        f'population = "restart"\ntask = "{TINY_TASK}"\nstate_dir = "coordinator"\n'
        f'log_format = "json"\n[broker]\nport = {port}\nreconnect_cap_s = 1\n'
        f"[round]\ngoal = 2\nover_selection = 1.0\nversions = {versions}\n"
        "[training]\nlocal_epochs = 40\n"
    )
    programs = {}
    for index in range(2):
        x, y = tiny_examples(400, seed=index)
        np.savez(folder / f"d{index}.npz", x=x, y=y)
        (folder / f"d{index}.toml").write_text(
            f'population = "restart"\ndevice = "d{index}"\nstate_dir = "d{index}"\n'
            f'log_format = "json"\nengine = "onnx"\n[broker]\nport = {port}\n'
            f'reconnect_cap_s = 1\n[data]\npath = "d{index}.npz"\n'
        )
        arguments = ("fedge.edge_agent", "run", "--config", f"d{index}.toml")
        programs[f"d{index}"] = Running(folder, f"d{index}", *arguments)
    programs["coordinator"] = Running(
        folder, "coordinator", "fedge.coordinator", "serve", "--config", "fedge.toml"
    )
    try:
        yield programs
    finally:
        for program in programs.values():
            program.kill()


@pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
def test_a_fleet_survives_kill_9_of_each_of_its_programs(tmp_path: Path) -> None:
    versions = 6
    with (
        MosquittoBroker(tmp_path) as broker,
        running_fleet(tmp_path, broker.port, versions=versions) as programs,
    ):
        coordinator = programs["coordinator"]
        coordinator.wait_for("round_training", 1)
        coordinator.kill()  # perhaps before the assignments went out, perhaps after
        coordinator.start()
        assert coordinator.wait_for("round_resumed")["round"] == 1
        coordinator.wait_for("version_made", 2)  # version 0, and 1 from the resumed round

        coordinator.wait_for("round_training", 2)
        programs["d1"].kill()  # while it trains
        programs["d1"].start()
        coordinator.wait_for("version_made", 3)

        broker.kill()  # everything retained is gone with it
        broker.start()
        goal = coordinator.wait_for("goal_reached")
        assert goal["version"] == versions
        check_the_promise(tmp_path, versions)
        # Nobody trained the resumed round twice.
        for device in ("d0", "d1"):
            first_round = [e for e in programs[device].events("trained") if e["round"] == 1]
            assert len(first_round) == 1


def check_the_promise(folder: Path, versions: int) -> None:
    """From the stores: an accepted update is in exactly one version, or its round says why not."""
    with Store.open(folder / "coordinator") as store:
        assert [v.number for v in store.versions()] == list(range(versions + 1))
        for record in store.rounds():
            assert record.outcome is not None or record.closed_at is None
            accepted = [
                p
                for p in store.participants(record.number)
                if p.status is ParticipantStatus.ACCEPTED
            ]
            if record.outcome is Outcome.AGGREGATED:
                version = store.version(record.version or -1)
                assert version is not None
                assert version.round == record.number
                assert accepted
            if record.outcome is Outcome.ABANDONED:
                assert record.reason
    for index in range(2):
        waiting = list((folder / f"d{index}" / "outbox").iterdir())
        assert waiting == [], "updates without a receipt"
