"""Rollouts end to end: real programs, versions that are better and worse, and `kill -9`."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedge.coordinator.release import Releaser
from fedge.coordinator.serving import LoadedTask, stored_plan
from fedge.coordinator.store import Store, VersionRecord
from fedge.edge_agent.library import Library
from fedge.schemas.tensors import Tensors, read_tensors
from tests.brokers import MOSQUITTO, MosquittoBroker
from tests.e2e.test_restart import Running
from tests.fleet import TINY_TASK, tiny_examples

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(480),
    pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed"),
]

DEVICES = 4
LIMIT_S = 180.0


class StagedFleet:
    """A coordinator in mode manual and four devices in one process; versions 0 and 1 are there.

    `prepared`: a folder in which such a fleet has been, to go on from.
    """

    def __init__(self, folder: Path, port: int, prepared: Path | None, **rollout: Any) -> None:
        self.folder = folder
        if prepared is not None:
            shutil.copytree(prepared, folder, dirs_exist_ok=True)
            for log in folder.glob("*.log"):
                log.unlink()
        settings = {
            "mode": "manual",
            "stages": [0.25, 0.5, 1.0],
            "soak_s": 0.5,
            "min_devices": 1,
        } | rollout
        lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
        self.config = (
            f'population = "staged"\ntask = "{TINY_TASK}"\nstate_dir = "coordinator"\n'
            f'log_format = "json"\n[broker]\nport = {port}\nreconnect_cap_s = 1\n'
            "[round]\ngoal = 4\nquorum = 4\nover_selection = 1.0\nversions = 1\n"
            f"[training]\nlocal_epochs = 10\n[rollout]\n{lines}"
        )
        (folder / "fedge.toml").write_text(self.config)
        for index in range(DEVICES):
            device = folder / "devices" / f"d{index}"
            device.mkdir(parents=True, exist_ok=True)
            x, y = tiny_examples(200, seed=index)
            np.savez(device / "data.npz", x=x, y=y)
            (device / "agent.toml").write_text(
                f'population = "staged"\ndevice = "d{index}"\nstate_dir = "state"\n'
                f'log_format = "json"\nengine = "onnx"\n[broker]\nport = {port}\n'
                'reconnect_cap_s = 1\n[data]\npath = "data.npz"\nhold_out = 0.5\n'
                "[trainer]\nnice = 0\n"
            )
        self.coordinator = Running(
            folder, "coordinator", "fedge.coordinator", "serve", "--config", "fedge.toml"
        )
        self.agents = Running(folder, "agents", "fedge.edge_agent", "fleet", "--each", "devices")

    def close(self) -> None:
        for program in (self.coordinator, self.agents):
            program.kill()

    # ------------------------------------------------------------ looking

    def wait_until(self, what: Callable[[], object], told: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not what():
            assert time.monotonic() < deadline, f"{told}:\n{self.logs()}"
            assert self.coordinator.process.poll() is None, self.logs()
            assert self.agents.process.poll() is None, self.logs()
            time.sleep(0.05)

    def logs(self) -> str:
        return "\n".join(p.log.read_text()[-4000:] for p in (self.coordinator, self.agents))

    def in_use(self) -> list[int | None]:
        found = []
        for index in range(DEVICES):
            active = Library(self.folder / "devices" / f"d{index}" / "state").active()
            found.append(None if active is None else active.version)
        return found

    def wait_for_use(self, *versions: int) -> None:
        self.wait_until(lambda: self.in_use() == list(versions), f"{versions}, {self.in_use()}")

    def store(self) -> Store:
        return Store.open(self.folder / "coordinator")

    def fedge(self, *arguments: str, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "fedge.coordinator", *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == status, done.stderr + done.stdout
        return done.stdout + done.stderr

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.fedge("rollout", "status", "--json"))
        return found

    def phase(self) -> str:
        with self.store() as store:
            newest = store.newest_rollout()
        return "none" if newest is None else newest.phase.value

    # ------------------------------------------------------------ versions

    def ready(self) -> None:
        """Everybody uses version 0, and version 1 is there."""
        # A busy machine may take a minute to compile the task.
        self.wait_until(lambda: self.coordinator.events("goal_reached"), "version 1")
        self.wait_for_use(0, 0, 0, 0)

    def make_version(self, number: int, change: Callable[[Tensors], Tensors]) -> None:
        """Records a version whose weights are those of version 1, changed."""
        with self.store() as store:
            first = store.version(1)
            assert first is not None
            plan, _ = stored_plan(store, first)
            manifest = plan.manifest
            weights = change(
                read_tensors(store.blobs.path(first.weights.sha256), manifest.weight_specs)
            )
            files = (manifest.graphs.infer.sha256, manifest.golden.sha256)
            task = LoadedTask(TINY_TASK).get()
            releaser = Releaser(
                task.new_model,
                manifest,
                {digest: store.blobs.read(digest) for digest in files},
                infer=task.infer,
                chunk_bytes=plan.ref.chunk_bytes,
            )
            release = releaser.build(weights)
            store.blobs.put(release.weights)
            store.blobs.put(release.golden)
            store.record_version(
                VersionRecord(
                    number=number,
                    plan_sha256=first.plan_sha256,
                    weights=release.weights_ref,
                    golden=release.golden_ref,
                    model_sha256=release.model_sha256,
                    model_bytes=release.model_bytes,
                    created_at=time.time(),
                    base=first.number,
                    note="made by a test",
                )
            )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every test begins with: it takes half a minute to make."""
    folder = tmp_path_factory.mktemp("prepared")
    with MosquittoBroker(tmp_path_factory.mktemp("broker")) as broker:
        fleet = StagedFleet(folder, broker.port, None)
        try:
            fleet.ready()
        finally:
            fleet.close()
    return folder


@pytest.fixture
def staged(prepared: Path, tmp_path: Path) -> Iterator[Callable[..., StagedFleet]]:
    with contextlib.ExitStack() as stack:
        # One of its own: what is retained there belongs to one life of the fleet.
        broker = stack.enter_context(MosquittoBroker(tmp_path / "broker"))

        def begin(**rollout: Any) -> StagedFleet:
            fleet = StagedFleet(tmp_path / "fleet", broker.port, prepared, **rollout)
            stack.callback(fleet.close)
            fleet.ready()
            return fleet

        yield begin


def worse(weights: Tensors) -> Tensors:
    """The classes are taken for one another: what a device that trained on wrong labels learned."""
    turned = dict(weights)
    for name, tensor in weights.items():
        if tensor.shape[:1] == (3,):
            turned[name] = np.ascontiguousarray(np.roll(tensor, 1, axis=0))
    return turned


def same(weights: Tensors) -> Tensors:
    return {name: (t * np.float32(1.001)).astype(t.dtype) for name, t in weights.items()}


def test_a_good_version_goes_through_all_stages_and_is_stable_then(staged) -> None:
    fleet = staged()
    said = fleet.fedge("rollout", "start", "--version", "1")
    assert "rollout 1: version 1, beside version 0" in said
    assert "told the coordinator" in said
    fleet.coordinator.wait_for("rollout_done")
    fleet.wait_for_use(1, 1, 1, 1)
    reached = fleet.coordinator.events("rollout_reaches")
    assert [one["devices"] for one in reached] == [1, 2, 4]
    report = fleet.status()
    assert (report["stable"], report["active"], report["rolled_back"]) == (1, 4, 0)
    assert report["rollout"]["phase"] == "done"
    assert all(one["loss_ratio"] < 1 and one["hold_out"] >= 50 for one in report["trials"])
    # Everybody kept the version before.
    for index in range(DEVICES):
        assert Library(fleet.folder / "devices" / f"d{index}" / "state").standby() == 0


def test_a_version_that_is_worse_is_rolled_back_by_devices_and_stopped(staged) -> None:
    fleet = staged()
    fleet.fedge("rollout", "start", "--version", "1", "--straight")
    fleet.wait_for_use(1, 1, 1, 1)
    fleet.coordinator.wait_for("rollout_done")
    fleet.make_version(2, worse)
    fleet.fedge("rollout", "start", "--version", "2")
    fleet.coordinator.wait_for("rollout_halted")
    # The one device of the first stage has found out; apps have never seen it anywhere.
    report = fleet.status()
    assert report["rollout"]["phase"] == "halted"
    assert (report["stable"], report["active"], report["rolled_back"]) == (1, 0, 1)
    assert report["reasons"] == {"hold_out": 1}
    [trial] = report["trials"]
    assert trial["loss_ratio"] > 1.1
    used = {event["version"] for event in fleet.agents.events("version_activated")}
    assert used <= {0, 1}
    assert fleet.in_use() == [1, 1, 1, 1]
    said = fleet.fedge("rollout", "status")
    assert "hold_out" in said
    assert trial["device"] in said
    # A next one may be begun, and the stable version is still the good one.
    fleet.make_version(3, same)
    fleet.fedge("rollout", "start", "--version", "3", "--straight")
    fleet.wait_for_use(3, 3, 3, 3)
    # Long after it was announced, and although it was the newest, to train from.
    assert 2 not in {event["version"] for event in fleet.agents.events("version_activated")}


def test_programs_that_are_killed_in_the_midst_go_on_where_they_were(staged) -> None:
    fleet = staged(soak_s=3600.0)
    fleet.fedge("rollout", "start", "--version", "1")
    fleet.coordinator.wait_for("trial_counted")
    fleet.wait_until(lambda: sorted(map(str, fleet.in_use())) == ["0", "0", "0", "1"], "one uses 1")
    before = fleet.in_use()
    fleet.agents.kill()
    fleet.coordinator.kill()
    assert fleet.in_use() == before
    fleet.coordinator.start()
    fleet.agents.start()
    taken_up = fleet.coordinator.wait_for("rollout_taken_up", 2)
    assert (taken_up["rollout"], taken_up["stage"]) == (1, 1)
    fleet.agents.wait_for("agent_started", 2 * DEVICES)
    report = fleet.status()
    assert (report["active"], report["rolled_back"]) == (1, 0)
    assert fleet.in_use() == before
    assert fleet.phase() == "running"

    # Paused, it reaches nobody else, whatever is killed; aborted, everybody comes back.
    fleet.fedge("rollout", "pause")
    fleet.coordinator.wait_for("rollout_paused")
    fleet.coordinator.kill()
    said = fleet.fedge("rollout", "abort", "--reason", "second thoughts")
    assert "no coordinator is running: it will take it back at the next start" in said
    fleet.coordinator.start()
    fleet.coordinator.wait_for("rollout_aborted")
    fleet.wait_for_use(0, 0, 0, 0)
    report = fleet.status()
    assert report["rollout"]["reason"] == "aborted by the operator: second thoughts"


def test_an_abort_brings_everybody_back_without_fetching(staged) -> None:
    fleet = staged(soak_s=3600.0)
    fleet.fedge("rollout", "start", "--straight")
    fleet.wait_for_use(1, 1, 1, 1)
    fetched = len(fleet.agents.events("chunks_missing"))
    fleet.fedge("rollout", "abort")
    fleet.wait_for_use(0, 0, 0, 0)
    assert len(fleet.agents.events("version_put_back")) == DEVICES
    assert len(fleet.agents.events("chunks_missing")) == fetched
    said = fleet.fedge("rollout", "pause", status=2)
    assert "no rollout is under way" in said
    said = fleet.fedge("rollout", "start", "--version", "0", status=2)
    assert "what every device serves already" in said


def test_the_mode_every_takes_everything_back_and_serves_the_newest(staged) -> None:
    fleet = staged(soak_s=3600.0)
    fleet.fedge("rollout", "start", "--version", "1")
    fleet.coordinator.wait_for("trial_counted")
    fleet.coordinator.kill()
    every = fleet.config.replace('"manual"', '"every"')
    (fleet.folder / "fedge.toml").write_text(every)
    fleet.coordinator.start()
    fleet.wait_for_use(1, 1, 1, 1)
    assert fleet.phase() == "aborted"
    assert fleet.status()["stable"] is None
    said = fleet.fedge("rollout", "start", "--version", "0", status=2)
    assert "set it" in said.lower()
