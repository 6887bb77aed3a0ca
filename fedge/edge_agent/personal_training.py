"""A version fine-tuned on this device's own examples, and whether that made it better here.

The plan's own training graph, from the version's own weights, on the training side; then both are
measured on the side that was never trained on, by the same evaluator, as applications would get
them. Fine-tuning and comparing is what Wang et al. 2019 ("Federated Evaluation of On-device
Personalization") did for Google's keyboard: some users gain much, some lose, so each device decides
for itself. Knows arrays and graphs, and neither files nor processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedge.edge_agent.data.examples import Examples
from fedge.edge_agent.engines.interface import (
    check_eval_graph,
    check_infer_graph,
    check_train_graph,
)
from fedge.edge_agent.engines.onnx_evaluator import OnnxEvaluator
from fedge.edge_agent.engines.onnx_partly_fixed import PartlyFixedEngine
from fedge.edge_agent.engines.onnx_session import RUNTIME_ERRORS, open_session
from fedge.edge_agent.evaluation import MeasuredSums, evaluate
from fedge.edge_agent.layers import Layers, fixed_weights
from fedge.edge_agent.training import Paused, Progress, train
from fedge.edge_agent.training_settings import TrainingSettings
from fedge.schemas.errors import PlanRefused, TrainingFailed
from fedge.schemas.model_file import complete_model
from fedge.schemas.plan import PlanManifest
from fedge.schemas.quantization import as_stored
from fedge.schemas.tensors import Array, Tensors, check_tensors


@dataclass(frozen=True, slots=True)
class FineTuned:
    """The weights after training. `training_s`: wall time of the steps and their batches."""

    weights: dict[str, Array]
    examples: int
    steps: int
    training_s: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """The version's own weights and the personal ones, on the same examples."""

    common: MeasuredSums
    personal: MeasuredSums

    @property
    def personal_is_better(self) -> bool:
        """Strictly, by the loss: at a tie the version stays as it is."""
        return self.personal.loss_sum < self.common.loss_sum


def fine_tune(
    manifest: PlanManifest,
    train_graph: bytes,
    weights: Tensors,
    examples: Examples,
    *,
    settings: TrainingSettings,
    layers: Layers,
    threads: int = 1,
    on_step: Callable[[Progress], None] = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
) -> FineTuned | Paused:
    """Trains `layers` from `weights`, which are not changed; `Paused` if `stop` said so.

    The engine is gone when this returns: there is never one beside an evaluator.
    Raises as `train` does, `PlanRefused` for a graph that breaks the rules, and `ConfigError` if
    `layers` names none.
    """
    check_train_graph(manifest, train_graph)
    fixed = fixed_weights(manifest, layers)
    engine = PartlyFixedEngine(manifest, train_graph, fixed, threads=threads)
    done = train(engine, manifest, weights, examples, settings, on_step=on_step, stop=stop)
    if isinstance(done, Paused):
        return done
    # The difference was for its check alone: added to the base it would not give the same bits.
    own, steps, training_s = done.examples, done.steps, done.training_s
    del done
    return FineTuned(engine.weights(), own, steps, training_s)


def compare(
    manifest: PlanManifest,
    eval_graph: bytes,
    common: Tensors,
    personal: Tensors,
    held_out: Examples,
    *,
    threads: int = 1,
    stop: Callable[[], bool] = lambda: False,
) -> Comparison:
    """Measures both on `held_out`, which is not empty.

    Where the plan's inference file is quantised, both as it has them. Raises as `evaluate` does,
    and `PlanRefused` for a graph that breaks the rules.
    """
    check_eval_graph(manifest, eval_graph)
    evaluator = OnnxEvaluator(manifest, eval_graph, threads=threads)
    measured = [
        evaluate(evaluator, manifest, as_stored(manifest, weights), held_out, stop=stop)
        for weights in (common, personal)
    ]
    return Comparison(*measured)


def personal_model(
    manifest: PlanManifest, infer_graph: bytes, weights: Tensors, golden_inputs: Tensors
) -> bytes:
    """The `model.onnx` of these weights. `golden_inputs`: `input`, as the manifest says.

    Nobody can say what its outputs should be: it loads, and all of them are finite. Raises
    `PlanRefused` if it does not run, `TrainingFailed` if one is not finite.
    """
    check_infer_graph(manifest, infer_graph)
    check_tensors(golden_inputs, [manifest.features.tensor.of("input")])
    model = complete_model(manifest, infer_graph, weights)
    session = open_session(model)
    try:
        output = session.run(["output"], {"input": golden_inputs["input"]})[0]
    except RUNTIME_ERRORS as error:
        raise PlanRefused(f"the personal model does not run here: {error}") from error
    check_tensors({"output": output}, [manifest.output.of("output")])
    if np.issubdtype(output.dtype, np.floating) and not np.isfinite(output).all():
        raise TrainingFailed("the personal model gives NaN or infinity for the golden inputs")
    return model
