"""A `PersonaliseJob`, done: from the files that it names to those that it writes.

What is learned and compared is `fedge.edge_agent.personal_training`'s; when it is written at all,
`fedge.edge_agent.forgetting`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from fedge.edge_agent.data.examples import Examples
from fedge.edge_agent.durable import disk
from fedge.edge_agent.forgetting import write_unless_forgotten
from fedge.edge_agent.personal_models import HeldOutSums
from fedge.edge_agent.personal_training import FineTuned, compare, fine_tune, personal_model
from fedge.edge_agent.trainer.jobs import Interrupted, Personalised, PersonaliseJob
from fedge.edge_agent.training import Paused, Progress
from fedge.schemas.errors import TrainingFailed
from fedge.schemas.ids import Digest, sha256
from fedge.schemas.plan import PlanManifest
from fedge.schemas.tensors import encode_tensors, read_tensors


def personalise(
    job: PersonaliseJob,
    manifest: PlanManifest,
    examples: Examples,
    held_out: Examples,
    *,
    on_step: Callable[[Progress], None],
    stop: Callable[[], bool],
    clock: Callable[[], float],
) -> Personalised | Interrupted:
    """What came of it; its memory is the caller's to say. Raises `FedgeError`; nothing is left.

    `examples`, `held_out`: of the same store or file, the first opened first. `stop`: whether to
    stop where it is, also while it measures.
    """
    if len(held_out) == 0:
        raise TrainingFailed("this device has no examples that are held out to compare on")
    weights = read_tensors(job.weights, manifest.weight_specs)
    with disk(f"read {job.train_graph}"):
        train_graph = job.train_graph.read_bytes()
    tuned = fine_tune(
        manifest,
        train_graph,
        weights,
        examples,
        settings=job.settings,
        layers=job.layers,
        threads=job.threads,
        on_step=on_step,
        stop=stop,
    )
    if isinstance(tuned, Paused):
        return Interrupted(step=tuned.step, steps=tuned.steps, kept=False)
    started = clock()
    with disk(f"read {job.eval_graph}"):
        eval_graph = job.eval_graph.read_bytes()
    try:
        compared = compare(
            manifest,
            eval_graph,
            weights,
            tuned.weights,
            held_out,
            threads=job.threads,
            stop=stop,
        )
    except TrainingFailed:
        if stop():
            return Interrupted(step=tuned.steps, steps=tuned.steps, kept=False)
        raise
    evaluation_s = clock() - started
    del weights
    better = compared.personal_is_better
    return Personalised(
        examples=tuned.examples,
        steps=tuned.steps,
        training_s=tuned.training_s,
        evaluation_s=evaluation_s,
        common=HeldOutSums.model_validate(asdict(compared.common)),
        personal=HeldOutSums.model_validate(asdict(compared.personal)),
        weights_sha256=_write(job, manifest, tuned, examples.generation) if better else None,
        peak_rss_bytes=0,
        generation=examples.generation,
    )


def _write(
    job: PersonaliseJob, manifest: PlanManifest, tuned: FineTuned, generation: int | None
) -> Digest:
    """Writes the model and its weights; the digest of these."""
    with disk(f"read {job.infer_graph}"):
        infer_graph = job.infer_graph.read_bytes()
    golden_inputs = read_tensors(job.golden_inputs)
    model = personal_model(manifest, infer_graph, tuned.weights, golden_inputs)
    weights = encode_tensors(tuned.weights)
    files = {job.weights_output: weights, job.model_output: model}
    write_unless_forgotten(job.data, job.limits, generation, files)
    return sha256(weights)
