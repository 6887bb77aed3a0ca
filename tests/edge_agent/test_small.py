"""What an agent that waits does not load: it is the memory of every device, all day."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("numpy", "onnxruntime", "PIL", "torch", "safetensors.numpy")


def test_an_agent_that_waits_loads_no_numbers_and_no_runtime() -> None:
    program = (
        "import sys, fedge.edge_agent.agent, fedge.edge_agent.settings\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
