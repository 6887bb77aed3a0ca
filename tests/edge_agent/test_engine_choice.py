"""Which engine runs, and what is imported for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fedge.edge_agent import engines
from fedge.edge_agent.engines import EngineName, choose_engine, open_engine
from fedge.edge_agent.engines.onnx_engine import OnnxEngine
from fedge.schemas.errors import ConfigError
from tests.edge_agent.plans import linear_plan


def imported_with(module: str) -> set[str]:
    """The top-level packages that a fresh interpreter has after importing `module`."""
    program = f"import {module}, sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "fedge.edge_agent.trainer.process",
        "fedge.edge_agent.trainer.child",
        "fedge.edge_agent.engines",
    ],
)
def test_no_runtime_is_imported_before_a_job_needs_one(module):
    assert not imported_with(module) & {"onnxruntime", "torch", "onnx", "paho", "PIL"}


def test_the_training_process_has_no_event_loop():
    assert "asyncio" not in imported_with("fedge.edge_agent.trainer.child")


def test_onnxruntime_is_the_engine_of_a_device_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(engines, "_NVIDIA_DRIVER", tmp_path / "absent")
    assert choose_engine(EngineName.AUTO) is EngineName.ONNX
    plan = linear_plan()
    assert isinstance(open_engine(EngineName.AUTO, plan.manifest, plan.train), OnnxEngine)


def test_an_engine_that_is_not_installed_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=r"needs torch.*fedge\[torch\]"):
        choose_engine(EngineName.TORCH)
