"""How good a version is: the plan's `eval` graph over a test set, in onnxruntime.

The same graph and the same arithmetic as on a device, so a number measured here is the number that
a device would get. It knows no model code: a version's tensors go in by their graph names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from fedge.coordinator.datasets import Examples
from fedge.coordinator.onnx_session import RUNTIME_ERRORS, open_session
from fedge.schemas.errors import PlanError
from fedge.schemas.plan import PlanManifest
from fedge.schemas.tensors import Tensors

DEFAULT_BATCH_SIZE = 256
INT8_PREFIX = "int8_"
"""Of the name of what a version's inference file gives, where its weights are int8."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Over `examples` examples: the mean loss, and each measure by its name in the plan."""

    examples: int
    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)


def beside(float32: Evaluation, int8: Evaluation) -> Evaluation:
    """One evaluation of a version with both: what its int8 weights give is named `int8_…`."""
    measures = {"loss": int8.loss, **int8.metrics}
    named = {f"{INT8_PREFIX}{name}": value for name, value in measures.items()}
    return replace(float32, metrics={**float32.metrics, **named})


class Evaluator:
    """Measures versions of one plan on one test set.

    `eval_graph`: the bytes of the plan's `eval` graph. `threads`: of onnxruntime; one leaves the
    other cores to the rounds. Raises `PlanRefused` if onnxruntime cannot load the graph, and
    `TrainingFailed` at the first batch whose examples do not fit the plan's features.
    """

    def __init__(
        self,
        manifest: PlanManifest,
        eval_graph: bytes,
        test_set: Examples,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        threads: int = 1,
    ) -> None:
        self._manifest = manifest
        self._test_set = test_set
        self._batch_size = batch_size
        self._session = open_session(eval_graph, threads)
        self._inputs = {tensor.name for tensor in self._session.get_inputs()}

    def evaluate(self, weights: Tensors) -> Evaluation:
        """The means of a version with these tensors.

        Raises `PlanError` if a sum is not finite, or the graph cannot be run on the test set.
        """
        outputs = ("loss", *(f"metric.{name}" for name in self._manifest.metrics))
        fed = {
            spec.graph_name: weights[spec.tensor.name]
            for spec in self._manifest.weights
            if spec.graph_name in self._inputs
        }
        sums = np.zeros(len(outputs))
        for start in range(0, len(self._test_set), self._batch_size):
            stop = min(start + self._batch_size, len(self._test_set))
            sums += self._run(outputs, fed, slice(start, stop))
        if not np.isfinite(sums).all():
            named = {name: float(value) for name, value in zip(outputs, sums, strict=True)}
            raise PlanError(f"the evaluation is not finite: sums {named}")
        examples = len(self._test_set)
        by_metric = dict(zip(self._manifest.metrics, map(float, sums[1:]), strict=True))
        metrics = self._manifest.measured(by_metric, examples)
        return Evaluation(examples, float(sums[0]) / examples, metrics)

    def _run(self, outputs: tuple[str, ...], fed: Tensors, rows: slice) -> list[float]:
        batch = {
            "input": self._manifest.features.encode(self._test_set.x[rows]),
            "target": self._manifest.target.encode(self._test_set.y[rows]),
            "mask": np.ones(rows.stop - rows.start, np.float32),
        }
        feeds = {**fed, **{name: array for name, array in batch.items() if name in self._inputs}}
        try:
            found = self._session.run(outputs, feeds)
        except RUNTIME_ERRORS as error:
            raise PlanError(f"the eval graph cannot be run on the test set: {error}") from error
        return [float(value) for value in found]
