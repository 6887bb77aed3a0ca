"""The engine of a personal training: some layers stay as they are.

A plan's graph moves every parameter; there is no other graph for "the last layers only". Here the
graph still computes what the fixed tensors would become, each step reads what they were, and those
results are written where nobody reads. The other layers become, bit for bit, what they would if the
fixed ones were put back after each step. That equals a training in which they are frozen, because
an optimizer of a plan moves each parameter by its own gradient and its own state. So it saves no
time, and costs no memory.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnxruntime

from fedge.edge_agent.engines.onnx_engine import OnnxEngine
from fedge.schemas.plan import PlanManifest
from fedge.schemas.tensors import Array, Tensors


class PartlyFixedEngine(OnnxEngine):
    """An `Engine` on onnxruntime. `fixed`: the tensors of a version that stay, by name.

    The graph passed `fedge.edge_agent.engines.interface` before. Raises as `OnnxEngine` does.
    """

    def __init__(
        self,
        manifest: PlanManifest,
        train_graph: bytes,
        fixed: Collection[str],
        *,
        threads: int = 1,
    ) -> None:
        super().__init__(manifest, train_graph, None, threads=threads)
        self._kept: dict[str, Array] = {}
        self._to_keep = [
            weight
            for weight in manifest.weights
            if weight.tensor.name in fixed and weight.role != "frozen"
        ]

    def load(self, weights: Tensors) -> None:
        """See `Engine.load`."""
        super().load(weights)
        for weight in self._to_keep:
            given = np.ascontiguousarray(weights[weight.tensor.name])
            self._kept[weight.graph_name] = given.reshape(weight.tensor.shape)
        for binding in self._bindings:
            for name, array in self._kept.items():
                value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
                binding.bind_ortvalue_input(name, value)

    def _present(self) -> list[Array]:
        named = zip(self._manifest.weights, super()._present(), strict=True)
        return [self._kept.get(weight.graph_name, array) for weight, array in named]
