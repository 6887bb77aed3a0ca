"""A plan's `eval` graph in onnxruntime: measures weights, and changes nothing.

Much smaller than an engine: neither the training graph nor the optimizer's state is loaded, so a
device that only measures a version needs little more memory than one that predicts with it.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedge.edge_agent.engines.interface import check_eval_graph, measure_names
from fedge.edge_agent.engines.onnx_session import RUNTIME_ERRORS, open_session
from fedge.edge_agent.engines.protocol import Evaluation
from fedge.schemas.errors import TrainingFailed
from fedge.schemas.plan import PlanManifest
from fedge.schemas.tensors import Array


class OnnxEvaluator:
    """The graph passed `fedge.edge_agent.engines.interface` before.

    Raises `PlanRefused` if onnxruntime cannot load it.
    """

    def __init__(self, manifest: PlanManifest, graph: bytes, *, threads: int = 1) -> None:
        self._session = open_session(graph, threads=threads)
        self._measures = measure_names(manifest)

    def run(self, feeds: Mapping[str, Array]) -> Evaluation:
        """What one batch measures. `feeds`: by the names of the graph's inputs.

        Raises `TrainingFailed` if the runtime fails.
        """
        try:
            values = self._session.run(list(self._measures), feeds)
        except RUNTIME_ERRORS as error:
            raise TrainingFailed(f"onnxruntime could not evaluate: {error}") from error
        loss, *metrics = (float(value.item()) for value in values)
        names = (name.removeprefix("metric.") for name in self._measures[1:])
        return Evaluation(loss, dict(zip(names, metrics, strict=True)))


def open_evaluator(manifest: PlanManifest, graph: bytes, *, threads: int = 1) -> OnnxEvaluator:
    """The evaluator of a plan, for weights that `run` is given.

    Raises `PlanRefused` for a graph that breaks the rules or is not the manifest's.
    """
    check_eval_graph(manifest, graph)
    return OnnxEvaluator(manifest, graph, threads=threads)
