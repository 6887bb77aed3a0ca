"""What an engine is: one training plan, loaded with weights, that takes steps.

The loop in `fedge.edge_agent.training` knows engines by this protocol only. An engine knows the
graphs' interface (`fedge.schemas.plan`) and nothing of examples, epochs, files or rounds. Two
engines run the same graphs, so each can check the other: onnxruntime and torch.

Construction is the same for all of them:

    OnnxEngine(manifest, train_graph, eval_graph, threads=1)
    TorchEngine(manifest, train_graph, eval_graph, threads=1)

with `manifest: PlanManifest`, `train_graph: bytes`, `eval_graph: bytes | None` (None: `evaluate`
is never called) and `threads: int`. The graphs passed `engines.interface` before:
their inputs and outputs are exactly the manifest's. It raises `PlanRefused` if its runtime cannot
load a graph.

The scalars of the graphs: `lr` and `mu` are float32 of shape `[]`, `seed` is int64 of shape `[]`,
`mask` is float32 `[batch]`, `loss` and each `metric.*` are float32 with one element.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedge.schemas.tensors import Array, Tensors

Mask = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step measured, with the weights as they were before it.

    `loss`: the objective of the batch, reduced as the manifest's `loss_reduction` says; it may be
    NaN or infinite: the loop refuses that, not the engine.
    `metrics`: sums over the rows that the mask keeps, named as in the manifest.
    """

    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one batch measured without training: sums over the rows that the mask keeps."""

    loss_sum: float
    metrics: Mapping[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """A training plan in a runtime. One thread uses it."""

    def load(self, weights: Tensors) -> None:
        """Starts from `weights`: the tensors of a version, named as in the manifest.

        Each state tensor gets its `StateSpec.fill`; `global.*` stays at the given parameters until
        the next `load`. The arrays are copied, or never written. May be called again at any time.
        Raises `PeerError` if the tensors do not obey the manifest.
        """
        ...

    def step(
        self, inputs: Array, target: Array, mask: Mask, *, lr: float, mu: float, seed: int
    ) -> StepResult:
        """Takes one optimizer step on one batch; the weights, buffers and state change.

        `inputs`, `target`: as the manifest's `features.tensor` and `target.tensor`, C-contiguous,
        the same number of rows as `mask`, which is 1 for an example and 0 for padding.
        `lr`: learning rate. `mu`: proximal weight (Li et al. 2020). `seed`: 0 to 2**32 - 1, of
        this step's randomness.

        Raises `TrainingFailed` if the runtime fails.
        """
        ...

    def weights(self) -> dict[str, Array]:
        """Every tensor of a version as it is now, named as in the manifest, on the host.

        The arrays stay as they are when the engine goes on.
        """
        ...

    def evaluate(self, inputs: Array, target: Array, mask: Mask) -> Evaluation:
        """Runs the `eval` graph on one batch with the present weights; nothing changes.

        Raises `TrainingFailed` if the runtime fails or the engine has no `eval` graph.
        """
        ...
