"""A version is measured by a real fleet, whatever is killed, and the sums are the right ones."""

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
from safetensors.numpy import load

from fedge.coordinator.store import EvaluationAnswer, EvaluationReport, Store
from fedge.edge_agent.data.hold_out import held_out
from fedge.schemas.messages import EvaluationStatus
from tests.brokers import MOSQUITTO, MosquittoBroker
from tests.e2e.test_restart import LIMIT_S, Running
from tests.fleet import TINY_TASK, tiny_examples

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed"),
]

HOLD_OUT = {"d0": 0.2, "d1": 0.5, "d2": 0.0, "d3": 0.3}
ROWS = {"d0": 120, "d1": 80, "d2": 100, "d3": 60}
WAITING = ("d1", "d3")
"""These may not work until their power is plugged in."""


def examples_of(device: str) -> tuple[np.ndarray, np.ndarray]:
    return tiny_examples(ROWS[device], seed=int(device[1:]))


def plug_in(folder: Path, device: str, *, charging: bool) -> None:
    partial = folder / f"{device}.readings.tmp"
    partial.write_text(json.dumps({"charging": charging}))
    partial.replace(folder / f"{device}.readings.json")


@contextlib.contextmanager
def running_fleet(folder: Path, port: int) -> Iterator[dict[str, Running]]:
    (folder / "fedge.toml").write_text(
        f'population = "measured"\ntask = "{TINY_TASK}"\nstate_dir = "coordinator"\n'
        f'log_format = "json"\n[broker]\nport = {port}\nreconnect_cap_s = 1\n'
        "[round]\ngoal = 2\nover_selection = 1.0\nversions = 2\n"
    )
    programs = {}
    for device, share in HOLD_OUT.items():
        x, y = examples_of(device)
        np.savez(folder / f"{device}.npz", x=x, y=y)
        rules = ""
        if device in WAITING:
            plug_in(folder, device, charging=False)
            rules = (
                f'[eligibility]\ncharging = true\nreadings_file = "{device}.readings.json"\n'
                "steady_for_s = 0\nlook_every_s = 0.5\n"
            )
        (folder / f"{device}.toml").write_text(
            f'population = "measured"\ndevice = "{device}"\nstate_dir = "{device}"\n'
            f'log_format = "json"\nengine = "onnx"\n[broker]\nport = {port}\nkeepalive_s = 5\n'
            f'reconnect_cap_s = 1\n[data]\npath = "{device}.npz"\nhold_out = {share}\n{rules}'
        )
        arguments = ("fedge.edge_agent", "run", "--config", f"{device}.toml")
        programs[device] = Running(folder, device, *arguments)
    programs["coordinator"] = Running(
        folder, "coordinator", "fedge.coordinator", "serve", "--config", "fedge.toml"
    )
    try:
        yield programs
    finally:
        for program in programs.values():
            program.kill()


def start_evaluation(folder: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "fedge.coordinator", "evaluate", *options),
            *("--config", "fedge.toml", "--json"),
        ],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def by_hand(weights: dict[str, np.ndarray], device: str) -> tuple[int, float, int]:
    """Rows, the sum of cross entropies and the hits of a device, in float64."""
    x, y = examples_of(device)
    kept = held_out(ROWS[device], HOLD_OUT[device])
    x, y = x[kept].astype(float), y[kept]
    w = {name: array.astype(float) for name, array in weights.items()}
    hidden = np.tanh(x @ w["0.weight"].T + w["0.bias"])
    output = hidden @ w["2.weight"].T + w["2.bias"]
    logs = output - np.log(np.exp(output).sum(axis=1, keepdims=True))
    return (
        len(y),
        float(-logs[np.arange(len(y)), y].sum()),
        int((output.argmax(axis=1) == y).sum()),
    )


def check_sums(folder: Path, report: EvaluationReport, devices: set[str]) -> None:
    with Store.open(folder / "coordinator") as store:
        version = store.version(report.evaluation.version)
        assert version is not None
        weights = load(store.blobs.read(version.weights.sha256))
    measured = [one for one in report.answers if one.status is EvaluationStatus.OK]
    assert {one.device for one in measured} == devices
    for one in measured:
        rows, loss_sum, hits = by_hand(weights, one.device)
        assert one.sums is not None
        assert (one.sums.rows, one.sums.examples) == (rows, rows)
        assert one.sums.loss_sum == pytest.approx(loss_sum, rel=1e-4)
        assert one.sums.metrics == {"accuracy": hits}


def kept(folder: Path, number: int) -> tuple[EvaluationReport, dict[str, EvaluationAnswer]]:
    with Store.open(folder / "coordinator") as store:
        report = store.evaluation_report(number)
    assert report is not None
    return report, {one.device: one for one in report.answers}


def wait_until_taken_back(folder: Path, number: int) -> None:
    """Returns when the version's weights do not lie on the broker by the coordinator's doing."""
    deadline = time.monotonic() + LIMIT_S
    with Store.open(folder / "coordinator") as store:
        version = store.version(number)
        assert version is not None
        while version.weights.sha256 in store.retained():
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_what_a_fleet_measures_is_right_although_its_programs_are_killed(tmp_path: Path) -> None:
    with (
        MosquittoBroker(tmp_path) as broker,
        running_fleet(tmp_path, broker.port) as programs,
    ):
        coordinator = programs["coordinator"]
        coordinator.wait_for("plan_compiled")
        coordinator.wait_for("goal_reached")
        coordinator.wait_for("device_online", 4)
        wait_until_taken_back(tmp_path, 0)

        # Of version 0 nothing is on the broker any more.
        command = start_evaluation(tmp_path, "--version", "0", "--devices", "4")
        coordinator.wait_for("evaluation_answered", 2)
        coordinator.kill()  # two have answered, two cannot yet
        coordinator.start()
        resumed = coordinator.wait_for("evaluation_resumed")
        assert (resumed["asked"], resumed["answered"]) == (4, 2)
        programs["d3"].kill()
        plug_in(tmp_path, "d1", charging=True)
        output, errors = command.communicate(timeout=LIMIT_S)

        assert command.returncode == 0, errors
        report, answers = kept(tmp_path, 1)
        assert {name: one.status for name, one in answers.items()} == {
            "d0": EvaluationStatus.OK,
            "d1": EvaluationStatus.OK,
            "d2": EvaluationStatus.NO_HOLD_OUT,
            "d3": None,
        }
        check_sums(tmp_path, report, {"d0", "d1"})
        found = json.loads(output)
        said = found["counts"]
        assert (said["asked"], said["ok"], said["no_hold_out"]) == (4, 2, 1)
        assert (said["failed"], said["no_answer"]) == (0, 1)
        rows = sum(one.sums.rows for one in answers.values() if one.sums is not None)
        loss = sum(one.sums.loss_sum for one in answers.values() if one.sums is not None)
        assert (found["devices"], found["rows"]) == (2, rows)
        by_name = {measure["name"]: measure for measure in found["measures"]}
        assert by_name["loss"]["mean"] == pytest.approx(loss / rows)
        # Nobody measured twice, and nobody's training saw what is held out.
        assert len(programs["d0"].events("evaluation_done")) == 1
        assert answers["d0"].sums is not None
        counted = programs["d0"].wait_for("examples_counted")
        assert counted["examples"] == ROWS["d0"] - answers["d0"].sums.rows
        wait_until_taken_back(tmp_path, 0)
        check_what_is_said_when_nobody_measures_or_asks(tmp_path, programs)


def check_what_is_said_when_nobody_measures_or_asks(
    folder: Path, programs: dict[str, Running]
) -> None:
    """On the fleet that is there: a second one would compile the task again."""
    coordinator = programs["coordinator"]
    offline = len(coordinator.events("device_offline"))
    for device in ("d0", "d1"):
        programs[device].kill()
        offline += 1
        coordinator.wait_for("device_offline", offline)
    command = start_evaluation(folder)
    output, _ = command.communicate(timeout=LIMIT_S)
    assert command.returncode == 1
    assert json.loads(output)["counts"]["no_hold_out"] == 1
    coordinator.kill()
    command = start_evaluation(folder)
    output, errors = command.communicate(timeout=LIMIT_S)
    assert (command.returncode, output) == (2, "")
    assert "no coordinator serves" in errors
    with Store.open(folder / "coordinator") as store:
        assert len(store.evaluations()) == 2
