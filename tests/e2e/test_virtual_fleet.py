"""`fedge-agent fleet`: many virtual devices in one process, on the code path of real ones."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import numpy as np
import pytest

from fedge.coordinator.store import ParticipantStatus
from tests.brokers import MosquittoBroker
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
