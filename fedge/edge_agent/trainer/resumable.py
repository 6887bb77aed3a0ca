"""An engine that can be left in the midst of a training and put back there.

What a training step moves is the weights, the buffers and the optimizer's state; with them, the
next step gives the bits that it would have given. Only onnxruntime's engine can do it: the hosts
that train with torch have a GPU and are on mains, and begin again.
"""

from __future__ import annotations

from fedge.edge_agent.engines.interface import check_train_graph
from fedge.edge_agent.engines.onnx_engine import OnnxEngine
from fedge.schemas.plan import PlanManifest
from fedge.schemas.tensor_spec import TensorSpec
from fedge.schemas.tensors import Array, Tensors, check_tensors


class ResumableEngine(OnnxEngine):
    """The `Engine` of onnxruntime, and its position."""

    def position(self) -> dict[str, Array]:
        """What a step moves, by the names of the graph's inputs. Copies."""
        return {name: array.copy() for name, array in self._sides[self._read].items()}

    def put_back(self, position: Tensors) -> None:
        """Goes on from `position`; `load` was called with the same weights before.

        Raises `PeerError` if it is not one of this plan.
        """
        side = self._sides[self._read]
        check_tensors(
            position,
            [
                TensorSpec(name=name, dtype=str(array.dtype), shape=array.shape)
                for name, array in side.items()
            ],
        )
        for name, array in side.items():
            array[...] = position[name]


def open_resumable(manifest: PlanManifest, train_graph: bytes, *, threads: int) -> ResumableEngine:
    """The engine with a plan loaded and no weights yet.

    Raises `PlanRefused` for a graph that breaks the rules or is not the manifest's.
    """
    check_train_graph(manifest, train_graph)
    return ResumableEngine(manifest, train_graph, None, threads=threads)
