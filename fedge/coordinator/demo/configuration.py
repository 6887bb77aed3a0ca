"""The configuration files of a demonstration's programs: the same that an operator would write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from fedge.coordinator.demo.brokers import HOST, DemoBroker
from fedge.coordinator.demo.examples import TEST_FILE
from fedge.coordinator.demo.experiment import Experiment

POPULATION = "demo"
STATE, EXAMPLES, TEXTS = "state", "examples.npz", "texts.jsonl"


def coordinator_settings(experiment: Experiment, broker: DemoBroker) -> dict[str, Any]:
    """`fedge.toml`: a round waits for every device, and the rounds end at the last version."""
    count = len(experiment.devices)
    return {
        "population": POPULATION,
        "task": experiment.reference,
        "state_dir": STATE,
        "seed": experiment.seed,
        "log_format": "json",
        "broker": _broker(broker),
        "round": {
            "goal": count,
            "quorum": count,
            "over_selection": 1.0,
            "deadline_s": 3600.0,
            "strategy": experiment.strategy.value,
            "versions": experiment.rounds,
        },
        "training": {
            "batch_size": experiment.batch_size,
            "learning_rate": experiment.learning_rate,
            "local_epochs": experiment.local_epochs,
        },
        "evaluation": {"path": f"../data/{TEST_FILE}"},
    }


def device_settings(experiment: Experiment, device: str, broker: DemoBroker) -> dict[str, Any]:
    """`agent.toml` of one device. It names the device's own examples only."""
    return {
        "population": POPULATION,
        "device": device,
        "state_dir": STATE,
        "log_format": "json",
        "broker": _broker(broker),
        "data": {"path": TEXTS if experiment.source == "texts" else EXAMPLES},
    }


def write_toml(path: Path, settings: Mapping[str, Any]) -> Path:
    """Writes the file and returns its path."""
    path.write_text(tomli_w.dumps(settings), encoding="utf-8")
    return path


def _broker(broker: DemoBroker) -> dict[str, Any]:
    # Everything is on one computer: whoever starts before the broker need not wait long.
    return {
        "host": HOST,
        "port": broker.port,
        "protocol": broker.protocol,
        "reconnect_cap_s": 2.0,
    }
