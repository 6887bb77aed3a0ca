"""Which engine runs a plan: onnxruntime everywhere, torch where there is a GPU.

Nothing is imported before it is chosen: a device without torch never looks for it, and one that
trains with torch need not have onnxruntime in memory.
"""

from __future__ import annotations

from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fedge.schemas.errors import ConfigError
from fedge.schemas.plan import PlanManifest

if TYPE_CHECKING:
    from fedge.edge_agent.engines.protocol import Engine

__all__ = ["EngineName", "choose_engine", "open_engine"]

_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


class EngineName(StrEnum):
    """What an agent's `engine` setting may say."""

    AUTO = "auto"
    """torch if it is installed and sees a GPU, else onnxruntime."""
    ONNX = "onnx"
    TORCH = "torch"


def choose_engine(wanted: EngineName) -> EngineName:
    """ONNX or TORCH: `wanted`, or what suits this device.

    Raises `ConfigError` if the runtime of the engine is not installed.
    """
    if wanted is EngineName.AUTO:
        wanted = EngineName.TORCH if _torch_sees_a_gpu() else EngineName.ONNX
    package = {EngineName.ONNX: "onnxruntime", EngineName.TORCH: "torch"}[wanted]
    if find_spec(package) is None:
        extra = "fedge[torch]" if wanted is EngineName.TORCH else "fedge"
        raise ConfigError(
            f"engine = {wanted.value!r} needs {package}, which is not installed: "
            f"pip install '{extra}', or choose the other engine"
        )
    return wanted


def open_engine(
    name: EngineName,
    manifest: PlanManifest,
    train_graph: bytes,
    eval_graph: bytes | None = None,
    *,
    threads: int = 1,
) -> Engine:
    """The engine `name` (see `choose_engine`) with a plan loaded and no weights yet.

    Raises `PlanRefused` for graphs that break the rules or are not the manifest's, `ConfigError`
    for a runtime that is not installed.
    """
    from fedge.edge_agent.engines.interface import (  # noqa: PLC0415 -- see above
        check_eval_graph,
        check_train_graph,
    )

    check_train_graph(manifest, train_graph)
    if eval_graph is not None:
        check_eval_graph(manifest, eval_graph)
    if choose_engine(name) is EngineName.TORCH:
        from fedge.edge_agent.engines.torch_engine import TorchEngine  # noqa: PLC0415 -- see above

        return TorchEngine(manifest, train_graph, eval_graph, threads=threads)
    from fedge.edge_agent.engines.onnx_engine import OnnxEngine  # noqa: PLC0415 -- see above

    return OnnxEngine(manifest, train_graph, eval_graph, threads=threads)


def _torch_sees_a_gpu() -> bool:
    # Importing torch takes a second and 200 MB: not without a sign of a GPU.
    if find_spec("torch") is None or not _NVIDIA_DRIVER.exists():
        return False
    import torch  # noqa: PLC0415 -- see above

    return torch.cuda.is_available()
