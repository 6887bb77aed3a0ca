"""What a version is worth on this device: the plan's measures over examples it was not trained on.

Sums only, so that those of many devices can be added. Every example counts once, whatever the size
of the batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedge.edge_agent.batching import batch_of
from fedge.edge_agent.data.examples import Examples, in_task_scale
from fedge.edge_agent.engines.onnx_evaluator import OnnxEvaluator
from fedge.schemas.errors import TrainingFailed
from fedge.schemas.plan import PlanManifest
from fedge.schemas.tensors import Array, Tensors, check_tensors


@dataclass(frozen=True, slots=True)
class MeasuredSums:
    """Sums over all examples. `rows`: what the loss is summed over, windows of text for one.

    `examples`: what the device says that it has, texts for one. `metrics`: by the manifest's names.
    """

    examples: int
    rows: int
    loss_sum: float
    metrics: dict[str, float]


def evaluate(
    evaluator: OnnxEvaluator,
    manifest: PlanManifest,
    weights: Tensors,
    examples: Examples,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> MeasuredSums:
    """Measures `weights` (the tensors of a version) on all of `examples`.

    Raises `TrainingFailed` if there is no example, they do not fit the plan, the runtime fails, a
    sum is not finite, or `stop` says so after a batch; `PeerError` if `weights` break the manifest.
    """
    if len(examples) == 0:
        raise TrainingFailed("this device has no examples to measure on")
    check_tensors(weights, manifest.weight_specs)
    fixed: dict[str, Array] = {
        weight.graph_name: weights[weight.tensor.name] for weight in manifest.weights
    }
    loss_sum, metrics = 0.0, dict.fromkeys(manifest.metrics, 0.0)
    batch_size = manifest.defaults.batch_size
    for start in range(0, len(examples), batch_size):
        end = min(start + batch_size, len(examples))
        rows, mask = batch_of(np.arange(start, end), batch_size, manifest.padding)
        measured = evaluator.run(
            {
                **fixed,
                "input": manifest.features.encode(in_task_scale(examples, rows, manifest.features)),
                "target": manifest.target.encode(examples.raw_targets[rows]),
                "mask": mask,
            }
        )
        loss_sum += measured.loss_sum
        for name, value in measured.metrics.items():
            metrics[name] += value
        if end < len(examples) and stop():
            raise TrainingFailed("the evaluation was told to stop")
    for name, value in {"loss": loss_sum, **metrics}.items():
        if not math.isfinite(value):
            raise TrainingFailed(f"the sum of {name} over this device's examples is {value}")
    return MeasuredSums(examples.examples, len(examples), loss_sum, metrics)
