"""From a configuration to a running coordinator: opens the state, finds or compiles the plan.

A population keeps its plan: the first start compiles the task and stores what came out; later
starts read it back, and refuse a task whose interface has changed since. Torch is imported here and
below.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from fedge.coordinator.evaluation import Evaluation, Evaluator
from fedge.coordinator.release import Releaser
from fedge.coordinator.server_optimizer import server_optimizer
from fedge.coordinator.service import Coordinator, Plan
from fedge.coordinator.settings import Settings
from fedge.coordinator.store import PlanRecord, Store, VersionRecord
from fedge.coordinator.task import Task, load_task
from fedge.coordinator.testset import load_test_set
from fedge.coordinator.uploads import UploadDesk
from fedge.coordinator.version_maker import VersionMaker
from fedge.schemas.blob_files import BlobDirectory
from fedge.schemas.blobs import describe
from fedge.schemas.errors import ConfigError, PlanError
from fedge.schemas.ids import Digest
from fedge.schemas.logs import EventLog
from fedge.schemas.plan import PlanManifest
from fedge.schemas.tensors import Tensors, read_tensors

log = EventLog(__name__)


async def serve(settings: Settings) -> None:
    """Serves until cancelled. SIGHUP makes it look at the store again.

    Raises `ConfigError` for a configuration that does not fit the state or the task.
    """
    # From the moment that the state is locked, other commands may send the signal.
    look_again = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, look_again.set)
    task = await asyncio.to_thread(load_task, settings.task)
    with Store.open(settings.state_dir, create=True, serve=True) as store:
        store.bind_population(settings.population)
        plan, initial = await prepare_plan(store, task, settings)
        coordinator = _coordinator(
            settings, store, task, plan, initial=initial, look_again=look_again
        )
        del initial
        await coordinator.run()


async def prepare_plan(store: Store, task: Task, settings: Settings) -> tuple[Plan, Tensors]:
    """The population's plan: stored by an earlier start, or compiled now and stored.

    With it the initial weights, which are empty where there is a version already.

    Raises `ConfigError` if the task is not the one that the stored plan was compiled from, and
    `PlanError` if it cannot be compiled.
    """
    fingerprint = fingerprint_of(task)
    newest = store.newest_version()
    if newest is not None:
        record = store.plan(newest.plan_sha256)
        if record is None or record.task_fingerprint != fingerprint:
            made_from = "a lost plan" if record is None else f"task {record.task!r}"
            raise ConfigError(
                f"this state holds versions of {made_from}, compiled from other settings than "
                f"task {task.name!r} has now; serve a changed task as a new population with a "
                "state_dir of its own"
            )
        return Plan(PlanManifest.decode(store.blobs.read(record.ref.sha256)), record.ref), {}
    started = time.monotonic()
    log.info("plan_compiling", task=task.name)
    plan_sha256, weights_sha256 = await _compile(settings.task, store.blobs)
    encoded = store.blobs.read(plan_sha256)
    manifest = PlanManifest.decode(encoded)
    ref = describe(encoded, settings.chunk_bytes)
    store.record_plan(PlanRecord(ref, task.name, fingerprint, time.time()))
    log.info(
        "plan_compiled",
        task=task.name,
        plan=ref.sha256[:12],
        graphs_bytes=sum(
            graph.size_bytes
            for graph in (manifest.graphs.train, manifest.graphs.eval, manifest.graphs.infer)
        ),
        seconds=time.monotonic() - started,
    )
    weights = read_tensors(store.blobs.path(weights_sha256), manifest.weight_specs)
    return Plan(manifest, ref), weights


async def _compile(task: str, blobs: BlobDirectory) -> tuple[Digest, Digest]:
    """The digests of the manifest and of the initial weights, compiled in another process."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fedge.coordinator.compiler", task, str(blobs.folder)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        answer, complaints = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    if process.returncode != 0:
        text = complaints.decode(errors="replace").strip()
        raise PlanError(
            text.rpartition("error: ")[2]
            or f"the compiler ended with status {process.returncode} and said nothing"
        )
    compiled = json.loads(answer)
    return compiled["plan"], compiled["weights"]


def fingerprint_of(task: Task) -> str:
    """A digest of everything about a task that its plan fixes, except the code of the model.

    A changed `forward` is found when a version is exported, since torch and the plan then disagree.
    A changed loss or metric of the same name is not found: the plan keeps the old one.
    """
    model = task.new_model()
    facts = {
        "name": task.name,
        "features": task.features.model_dump(),
        "target": task.target.model_dump(),
        "metrics": sorted(task.metrics),
        "optimizer": repr(task.optimizer),
        "reduction": task.loss_reduction,
        "defaults": task.defaults.model_dump(),
        "tensors": [
            (name, str(tensor.dtype), list(tensor.shape))
            for name, tensor in model.state_dict().items()
        ],
        "trained": [name for name, p in model.named_parameters() if p.requires_grad],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _coordinator(
    settings: Settings,
    store: Store,
    task: Task,
    plan: Plan,
    *,
    initial: Tensors,
    look_again: asyncio.Event,
) -> Coordinator:
    manifest = plan.manifest
    plan_files = (manifest.graphs.infer.sha256, manifest.golden.sha256)
    releaser = Releaser(
        task.new_model,
        manifest,
        {digest: store.blobs.read(digest) for digest in plan_files},
        chunk_bytes=settings.chunk_bytes,
    )
    maker = VersionMaker(
        blobs=store.blobs,
        manifest=manifest,
        plan_sha256=plan.ref.sha256,
        build=releaser.build,
        optimizer=server_optimizer(settings.server_optimizer, manifest.weights),
        initial=initial,
        weighting=settings.round.weighting,
    )
    uploads = settings.uploads
    desk = UploadDesk(
        settings.state_dir / "uploads",
        slots=uploads.slots,
        window=uploads.window,
        silence_s=uploads.silence_s,
    )
    # Dots are in no name, so no device can have this session's identifier, nor another's.
    client = f"fedge.{settings.population}.coordinator"
    rng = random.SystemRandom()
    return Coordinator(
        population=settings.population,
        store=store,
        plan=plan,
        maker=maker,
        desk=desk,
        control=settings.broker.link(client, rng, receive_maximum=256),
        # Each delivery is a chunk that lies in memory until it is written.
        bulk=settings.broker.link(f"{client}.bulk", rng, receive_maximum=32),
        round_settings=settings.round,
        training=settings.training.over(manifest.defaults),
        seed=settings.seed,
        look_again=look_again,
        evaluate=_evaluation(settings, store, manifest),
        evaluate_every=1 if settings.evaluation is None else settings.evaluation.every,
    )


def _evaluation(
    settings: Settings, store: Store, manifest: PlanManifest
) -> Callable[[VersionRecord], Evaluation] | None:
    if settings.evaluation is None:
        return None
    evaluator = Evaluator(
        manifest,
        store.blobs.read(manifest.graphs.eval.sha256),
        load_test_set(settings.evaluation.path),
        threads=settings.evaluation.threads,
    )

    def evaluate(version: VersionRecord) -> Evaluation:
        path = store.blobs.path(version.weights.sha256)
        return evaluator.evaluate(read_tensors(path, manifest.weight_specs))

    return evaluate
