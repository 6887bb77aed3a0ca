"""Two agents on one state folder would share an outbox and take each other's sessions."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fedge.edge_agent.agent import EdgeAgent
from fedge.edge_agent.settings import Settings
from fedge.edge_agent.trainer.process import TrainerProcess
from fedge.schemas.errors import ConfigError


def test_a_second_agent_with_the_same_state_folder_is_refused(tmp_path: Path) -> None:
    settings = Settings.model_validate({"population": "p", "device": "d", "state_dir": tmp_path})
    first = EdgeAgent(settings, TrainerProcess(), random.Random(1))
    with pytest.raises(ConfigError, match=r"another agent \(process \d+\) uses"):
        EdgeAgent(settings, TrainerProcess(), random.Random(2))
    del first
