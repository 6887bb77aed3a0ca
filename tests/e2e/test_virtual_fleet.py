"""`fedge-agent fleet`: many virtual devices in one process, on the code path of real ones."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fedge.coordinator.store import ParticipantStatus
from tests.brokers import MosquittoBroker
from tests.e2e.demo_process import run_demo
from tests.fleet import fleet, tiny_examples

pytestmark = pytest.mark.e2e

DEVICES = 12


def test_virtual_devices_learn_from_their_parts_of_one_data_set(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    x, y = tiny_examples(240, seed=3)
    np.savez(tmp_path / "all.npz", x=x, y=y)
    config = tmp_path / "agent.toml"

    async def scenario() -> None:
        async with fleet(
            mosquitto.port,
            tmp_path,
            round={"goal": 8, "over_selection": 1.25, "versions": 3},
        ) as here:
            config.write_text(
                f'population = "{here.population}"\ndevice = "v"\nstate_dir = "fleet"\n'
                f'engine = "onnx"\n[broker]\nport = {mosquitto.port}\n[data]\npath = "all.npz"\n'
            )
            here.start_coordinator()
            process = await asyncio.create_subprocess_exec(
                # Fewer files than so many devices open: a fleet takes what the host lets it have.
                *("sh", "-c", 'ulimit -S -n 60 && exec "$@"', "sh"),
                *(sys.executable, "-m", "fedge.edge_agent", "fleet", "--config", str(config)),
                *("--devices", str(DEVICES), "--split", "dirichlet:0.5", "--workers", "2"),
                stderr=asyncio.subprocess.DEVNULL,
            )
            try:
                await here.version(3)
            finally:
                process.terminate()
                assert await process.wait() == 0
            for number in (1, 2, 3):
                report = here.report(number)
                names = {p.device for p in report.participants}
                assert names <= {f"v-{index:04d}" for index in range(DEVICES)}
                # Over-selection: ten are asked, eight are enough.
                assert len(names) == 10
                accepted = [
                    p for p in report.participants if p.status is ParticipantStatus.ACCEPTED
                ]
                assert len(accepted) >= 8
            with here.store() as store:
                devices = store.devices()
            assert len(devices) == DEVICES
            assert sum(device.examples or 0 for device in devices) == 240

    asyncio.run(scenario())


def test_a_fleet_divides_only_what_is_not_divided(tmp_path: Path) -> None:
    config = tmp_path / "agent.toml"
    config.write_text('population = "p"\ndevice = "v"\nstate_dir = "s"\n')

    async def run() -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fedge.edge_agent", "fleet", "--config", str(config)),
            *("--devices", "2"),
            stderr=asyncio.subprocess.PIPE,
        )
        _, errors = await process.communicate()
        return process.returncode, errors.decode()

    status, errors = asyncio.run(run())
    assert status == 2
    assert errors == "error: a fleet needs [data] to divide among its devices\n"


TYPED_TASK = """
from fedge.coordinator.tasks.next_word import next_word
from fedge.schemas.words import Vocabulary

task = next_word(Vocabulary(["good", "morning", "night"]), cells=8, dimensions=8, window=4)
"""


def test_each_virtual_keyboard_learns_from_one_users_texts(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    typed = {"ann": 9, "bob": 4, "cy": 3}
    lines = [
        {"user": user, "text": "good morning" if n % 2 else "good night"}
        for user, count in typed.items()
        for n in range(count)
    ]
    (tmp_path / "typed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "typed_task.py").write_text(TYPED_TASK)
    config = tmp_path / "agent.toml"

    async def scenario() -> None:
        async with fleet(
            mosquitto.port,
            tmp_path,
            task=f"{tmp_path / 'typed_task.py'}:task",
            round={"goal": 5, "over_selection": 1.0, "versions": 2},
        ) as here:
            config.write_text(
                f'population = "{here.population}"\ndevice = "k"\nstate_dir = "fleet"\n'
                f'engine = "onnx"\n[broker]\nport = {mosquitto.port}\n'
                f'[data]\npath = "typed.jsonl"\n'
            )
            here.start_coordinator()
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "fedge.edge_agent", "fleet", "--config", str(config)),
                *("--devices", "5", "--split", "users"),
                stderr=asyncio.subprocess.DEVNULL,
            )
            try:
                await here.version(2)
            finally:
                process.terminate()
                assert await process.wait() == 0
            trained = {
                one.device: one.contribution.examples
                for one in here.report(2).participants
                if one.contribution is not None
            }
        # Ann's and Bob's on two devices each, the earlier and the later ones, Cy's on one.
        assert trained == {"k-0000": 5, "k-0001": 2, "k-0002": 3, "k-0003": 4, "k-0004": 2}

    asyncio.run(scenario())


@pytest.mark.timeout(180)
def test_a_demonstration_of_many_devices_hosts_them_in_one_process(tmp_path: Path) -> None:
    options = ("--devices", "33", "--rounds", "1", "--no-central", "--out", "out", "--json")
    done = run_demo(*options, cwd=tmp_path, timeout_s=150)
    assert done.returncode == 0, done.stderr
    assert "a coordinator and 33 agents in one process" in done.stderr
    summary = json.loads(done.stdout)
    names = [f"device-{number:02d}" for number in range(1, 34)]
    assert list(summary["devices"]) == names
    assert sum(curve["examples"] for curve in summary["devices"].values()) == 1437
    assert all(curve["steps"] > 0 for curve in summary["devices"].values())
    assert {answer["device"] for answer in summary["predictions"]} == set(names[:10])
    assert Path(summary["report"]).stat().st_size > 0
    logs = {path.name for path in (tmp_path / "out" / "logs").iterdir()}
    assert "fleet.log" in logs
    assert "device-01.log" not in logs
    # Each still has its own part of the data, its own state and its own configuration.
    for name in names:
        here = {path.name for path in (tmp_path / "out" / "devices" / name).iterdir()}
        assert here == {"agent.toml", "examples.npz", "state"}
    assert "update" not in done.stderr.replace("33 updates from 1,437 examples", "")
