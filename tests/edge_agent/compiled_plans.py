"""Plans that the compiler made, each compiled once for a run of the tests."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from fedge.coordinator.compiler import CompiledPlan, compile_task
from fedge.coordinator.task import load_task
from fedge.schemas.plan import PlanManifest
from tests.coordinator.compiler.compiler_models import ZOO


@cache
def compiled(name: str) -> CompiledPlan:
    """The plan of a built-in task, or of `zoo:NAME`."""
    torch.set_num_threads(1)
    kind, _, model = name.rpartition(":")
    return compile_task(ZOO[model]() if kind == "zoo" else load_task(name))


def graphs_of(plan: CompiledPlan) -> tuple[PlanManifest, bytes, bytes]:
    """What an engine is made of."""
    graphs = plan.manifest.graphs
    return plan.manifest, plan.blobs[graphs.train.sha256], plan.blobs[graphs.eval.sha256]


def random_batch(
    manifest: PlanManifest, rows: int, seed: int, *, tokens: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """`rows` inputs and targets of the plan's kinds: classes from 0 to 2, tokens from 0 to 11."""
    rng = np.random.default_rng(seed)
    shape = (rows, *manifest.features.tensor.shape[1:])
    if manifest.target.kind == "next_word":
        # A few words only, padded on the right.
        words = rng.integers(1, 12, (rows, shape[1] + 1))
        kept = np.arange(shape[1]) < rng.integers(1, shape[1] + 1, (rows, 1))
        return np.where(kept, words[:, :-1], 0), np.where(kept, words[:, 1:], 0)
    if manifest.target.kind == "class":
        target = rng.integers(0, 3, rows)
    else:
        target = rng.standard_normal((rows, manifest.target.width)).astype(np.float32)
    inputs = rng.integers(0, 12, shape) if tokens else rng.standard_normal(shape)
    return inputs.astype(np.float32), target
