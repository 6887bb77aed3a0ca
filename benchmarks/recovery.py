"""A coordinator killed with -9 in mid round: how soon it serves again, and what is trained twice.

    python benchmarks/recovery.py                    a table and JSON
    python benchmarks/recovery.py --kills 10

Four real agents train for some seconds a round; in each of several rounds the coordinator is killed
while they train, and started again at once. Serving again means: the same round is resumed, both
sessions are up, and the version and the round are announced. Beside it, in the same run, what
`import torch` alone takes in a new process: the coordinator does not wait for it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from processes import mosquitto, print_table, program, wait_for_event

DEVICES = 4


def write_configs(folder: Path, port: int) -> None:
    (folder / "fedge.toml").write_text(
        f'population = "bench"\ntask = "digits"\nstate_dir = "coordinator"\nlog_format = "json"\n'
        f"[broker]\nport = {port}\n[round]\ngoal = {DEVICES}\nover_selection = 1.0\n"
        "[training]\nlocal_epochs = 200\n"
    )
    rng = np.random.default_rng(1)
    for index in range(DEVICES):
        x, y = rng.integers(0, 17, (300, 8, 8), np.uint8), rng.integers(0, 10, 300)
        np.savez(folder / f"part-{index}.npz", x=x, y=y)
        (folder / f"agent-{index}.toml").write_text(
            f'population = "bench"\ndevice = "d{index}"\nstate_dir = "d{index}"\n'
            f'log_format = "json"\nengine = "onnx"\n[broker]\nport = {port}\n'
            f'[data]\npath = "part-{index}.npz"\n'
        )


def torch_import_s() -> float:
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.monotonic() - started


@contextlib.contextmanager
def coordinator_of(folder: Path, life: int) -> Any:
    arguments = ["-m", "fedge.coordinator", "serve", "--config", "fedge.toml"]
    with program(f"coordinator-{life}", arguments, folder) as one:
        yield one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/recovery.json"))
    wanted = parser.parse_args()
    serving_s, resumed_s, reference_s = [], [], []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        port, _ = stack.enter_context(mosquitto(folder))
        write_configs(folder, port)
        agents = [
            stack.enter_context(
                program(
                    f"d{index}",
                    ["-m", "fedge.edge_agent", "run", "--config", f"agent-{index}.toml"],
                    folder,
                )
            )
            for index in range(DEVICES)
        ]
        coordinator = stack.enter_context(coordinator_of(folder, 0))
        rounds: set[int] = set()
        for life in range(1, wanted.kills + 1):
            training = wait_for_event(coordinator, "round_training")
            rounds.add(training["round"])
            # While they train: their first steps are logged.
            for agent in agents:
                wait_for_event(agent, "training", limit_s=60)
            time.sleep(0.5)
            coordinator.process.kill()
            coordinator.process.wait()
            started = time.time()
            coordinator = stack.enter_context(coordinator_of(folder, life))
            resumed = wait_for_event(coordinator, "round_resumed")
            assert resumed["round"] == training["round"]
            published = wait_for_event(coordinator, "version_published")
            resumed_s.append(resumed["ts"] - started)
            serving_s.append(published["ts"] - started)
            made = wait_for_event(coordinator, "version_made")
            assert made["round"] == training["round"], made
            reference_s.append(torch_import_s())
        trained = Counter(
            (agent.name, event["round"])
            for agent in agents
            for event in agent.events()
            if event["event"] == "trained"
        )
    twice = {f"{name}, round {number}": n for (name, number), n in trained.items() if n > 1}
    report = {
        "serving_s": serving_s,
        "resumed_s": resumed_s,
        "import_torch_s": reference_s,
        "rounds_killed": sorted(rounds),
        "trainings": sum(trained.values()),
        "trained_twice": twice,
    }
    median = statistics.median
    print_table(
        [
            ("kills of the coordinator", str(wanted.kills), "each in mid round"),
            ("the round resumed after", f"{median(resumed_s):.2f} s", f"most {max(resumed_s):.2f}"),
            (
                "serving again after",
                f"{median(serving_s):.2f} s",
                f"most {max(serving_s):.2f}; wanted: under 5 s",
            ),
            ("reference: import torch", f"{median(reference_s):.2f} s", ""),
            ("trained twice", f"{len(twice)} of {len(trained)}", "wanted: none"),
        ]
    )
    wanted.out.parent.mkdir(parents=True, exist_ok=True)
    wanted.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
