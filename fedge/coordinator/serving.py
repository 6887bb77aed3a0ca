"""From a configuration to a running coordinator: opens the state, finds or compiles the plan.

A population keeps its plan: the first start compiles the task and stores what came out; later
starts read it back, and refuse a task whose interface has changed since. Only the inference file
may change: its quantization is the operator's, who gets a plan that differs in nothing else, and a
version with the newest weights under it. Importing torch takes seconds, in which a fleet would wait
for nothing: a start that has its plan serves at once, and loads the task beside that.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from fedge.coordinator.server_optimizer import server_optimizer
from fedge.coordinator.service import Coordinator, Plan
from fedge.coordinator.settings import Settings
from fedge.coordinator.store import PlanRecord, Store, VersionRecord
from fedge.coordinator.store.housekeeping import plan_digests
from fedge.coordinator.testset import check_test_set, load_test_set
from fedge.coordinator.uploads import UploadDesk
from fedge.coordinator.version_maker import VersionMaker
from fedge.schemas.blob_files import BlobDirectory
from fedge.schemas.blobs import describe
from fedge.schemas.errors import ConfigError, PlanError
from fedge.schemas.ids import Digest, sha256
from fedge.schemas.logs import EventLog
from fedge.schemas.plan import PlanManifest
from fedge.schemas.plan_words import word_encoder
from fedge.schemas.quantization import Scheme, as_stored
from fedge.schemas.tensors import Tensors, read_tensors
from fedge.schemas.words import Vocabulary

if TYPE_CHECKING:
    from fedge.coordinator.evaluation import Evaluation
    from fedge.coordinator.release import Release, Releaser
    from fedge.coordinator.task import Task

log = EventLog(__name__)


async def serve(settings: Settings) -> None:
    """Serves until cancelled. SIGHUP makes it look at the store again.

    Raises `ConfigError` for a configuration that does not fit the state or the task.
    """
    # From the moment that the state is locked, other commands may send the signal.
    look_again = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, look_again.set)
    task = LoadedTask(settings.task)
    if settings.evaluation is not None:
        # Compiling takes long; what is missing for later is said before.
        check_test_set(settings.evaluation.path)
    with Store.open(
        settings.state_dir,
        settings.store.database,
        blobs=settings.store.blobs,
        create=True,
        serve=True,
    ) as store:
        store.bind_population(settings.population)
        newest = store.newest_version()
        if newest is None:
            plan, initial = await compile_plan(store, task, settings)
            fingerprint = None
        else:
            plan, fingerprint = stored_plan(store, newest)
            if settings.export.quantization not in (None, scheme_of(plan.manifest)):
                plan = await requantize(store, task, settings, newest)
            initial = {}
        coordinator = _coordinator(
            settings, store, task, plan, initial=initial, look_again=look_again
        )
        del initial
        async with asyncio.TaskGroup() as group:
            group.create_task(coordinator.run(), name="coordinator")
            if fingerprint is not None:
                group.create_task(_check_task(task, fingerprint), name="check-task")


class LoadedTask:
    """The operator's task, loaded when it is first asked for, once. For several threads."""

    def __init__(self, reference: str) -> None:
        self._reference = reference
        self._lock = threading.Lock()
        self._task: Task | None = None

    def get(self) -> Task:
        """The task. Raises `ConfigError` if it cannot be loaded."""
        from fedge.coordinator.task import load_task  # noqa: PLC0415 -- imports torch

        with self._lock:
            if self._task is None:
                self._task = load_task(self._reference)
            return self._task


def stored_plan(store: Store, newest: VersionRecord) -> tuple[Plan, str]:
    """The plan of the population's versions, and the fingerprint of the task it was made from.

    Raises `ConfigError` if the store has lost it.
    """
    record = store.plan(newest.plan_sha256)
    if record is None:
        raise ConfigError(
            f"this state holds versions of a plan that is not in it ({newest.plan_sha256[:12]}): "
            "see `fedge db check`, and restore a backup"
        )
    manifest = PlanManifest.decode(store.blobs.read(record.ref.sha256))
    return Plan(manifest, record.ref), record.task_fingerprint


async def _check_task(task: LoadedTask, fingerprint: str) -> None:
    loaded = await asyncio.to_thread(task.get)
    await asyncio.to_thread(_check_fingerprint, loaded, fingerprint)
    log.info("task_loaded", task=loaded.name)


def _check_fingerprint(loaded: Task, fingerprint: str) -> None:
    if fingerprint_of(loaded) != fingerprint:
        raise ConfigError(
            f"this state holds versions of a task compiled from other settings than task "
            f"{loaded.name!r} has now; serve a changed task as a new population with a state_dir "
            "of its own"
        )


def scheme_of(manifest: PlanManifest) -> Scheme:
    """How a plan's inference file is quantised."""
    return Scheme.NONE if manifest.quantization is None else Scheme.INT8


async def requantize(
    store: Store, task: LoadedTask, settings: Settings, newest: VersionRecord
) -> Plan:
    """The population's plan with the inference file that `[export]` wants, and a version under it.

    The version has the weights of `newest` and the next number: devices fetch a graph of a few
    kilobytes and no weights. Both are recorded. Raises `ConfigError` if the task has changed since
    the plan was made, `PlanError` if it cannot be compiled or the file fails its checks.
    """
    from fedge.coordinator.export import requantized  # noqa: PLC0415 -- for once in a long time

    before, fingerprint = stored_plan(store, newest)
    loaded = await asyncio.to_thread(task.get)
    await asyncio.to_thread(_check_fingerprint, loaded, fingerprint)
    wanted = settings.export.quantization or loaded.quantization
    log.info("plan_compiling", task=loaded.name, quantization=wanted.value)
    compiled_sha256, _ = await _compile(settings.task, store.blobs, wanted)
    compiled = PlanManifest.decode(store.blobs.read(compiled_sha256))
    manifest = with_inference_of(compiled, before.manifest)
    encoded = manifest.encode()
    await asyncio.to_thread(store.blobs.put, encoded)
    ref = describe(encoded, settings.chunk_bytes)
    await asyncio.to_thread(store.blobs.secure, plan_digests(manifest, ref.sha256))
    weights = read_tensors(store.blobs.path(newest.weights.sha256), manifest.weight_specs)
    build = _build(task, manifest, store.blobs, settings.chunk_bytes)
    release = await asyncio.to_thread(build, weights)
    await asyncio.to_thread(store.blobs.put, release.golden)
    store.record_plan(PlanRecord(ref, loaded.name, fingerprint, time.time()))
    note = f"version {newest.number} with {_weights_told(manifest)}"
    made = requantized(newest, ref.sha256, release, time.time(), note)
    store.record_version(made, copy_of=newest.number)
    log.info(
        "plan_requantized",
        plan=ref.sha256[:12],
        version=made.number,
        weights_of=newest.number,
        model_bytes=made.model_bytes,
        model_bytes_before=newest.model_bytes,
        rounding=release.rounding,
        **_quantization_told(manifest),
    )
    return Plan(manifest, ref)


def with_inference_of(compiled: PlanManifest, before: PlanManifest) -> PlanManifest:
    """The plan `before` with the inference graph of `compiled`, a plan of the same task.

    Raises `ConfigError` if that graph would not fit the versions of `before`.
    """
    for what in ("weights", "features", "target", "output"):
        if getattr(compiled, what) != getattr(before, what):
            raise ConfigError(
                f"[export] quantization cannot be changed: the task compiles to other {what} than "
                "this population's plan has; serve a changed task as a new population with a "
                "state_dir of its own"
            )
    graphs = before.graphs.model_copy(update={"infer": compiled.graphs.infer})
    changes = {"graphs": graphs, "quantization": compiled.quantization}
    return before.model_copy(update=changes)


def _quantization_told(manifest: PlanManifest) -> dict[str, str]:
    """Which weights of the inference file are what, for the log."""
    if manifest.quantization is None:
        return {"quantization": Scheme.NONE.value}
    int8 = manifest.quantization.int8
    names = [weight.tensor.name for weight in manifest.weights if weight.tensor.name not in int8]
    return {
        "quantization": Scheme.INT8.value,
        "int8": " ".join(int8) or "none: no weight is large enough",
        "float32": " ".join(names),
    }


def _weights_told(manifest: PlanManifest) -> str:
    return "float32 weights" if manifest.quantization is None else "int8 weights in its ONNX file"


async def compile_plan(store: Store, task: LoadedTask, settings: Settings) -> tuple[Plan, Tensors]:
    """A new population's plan, compiled now and stored, and the initial weights.

    Raises `ConfigError` if the task cannot be loaded, `PlanError` if it cannot be compiled.
    """
    loaded = await asyncio.to_thread(task.get)
    started = time.monotonic()
    wanted = settings.export.quantization or loaded.quantization
    log.info("plan_compiling", task=loaded.name, quantization=wanted.value)
    plan_sha256, weights_sha256 = await _compile(settings.task, store.blobs, wanted)
    encoded = store.blobs.read(plan_sha256)
    manifest = PlanManifest.decode(encoded)
    ref = describe(encoded, settings.chunk_bytes)
    # The compiler's process has written its files into the folder, and no further.
    await asyncio.to_thread(store.blobs.secure, plan_digests(manifest, plan_sha256))
    store.record_plan(PlanRecord(ref, loaded.name, fingerprint_of(loaded), time.time()))
    log.info(
        "plan_compiled",
        task=loaded.name,
        plan=ref.sha256[:12],
        graphs_bytes=sum(
            graph.size_bytes
            for graph in (manifest.graphs.train, manifest.graphs.eval, manifest.graphs.infer)
        ),
        seconds=time.monotonic() - started,
        **_quantization_told(manifest),
    )
    weights = read_tensors(store.blobs.path(weights_sha256), manifest.weight_specs)
    return Plan(manifest, ref), weights


async def _compile(task: str, blobs: BlobDirectory, quantization: Scheme) -> tuple[Digest, Digest]:
    """The digests of the manifest and of the initial weights, compiled in another process."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fedge.coordinator.compiler"),
        *(task, str(blobs.folder), quantization.value),
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

    Neither is its `quantization` in it, a suggestion that a population need not follow.
    A changed `forward` is found when a version is exported, since torch and the plan then disagree.
    A changed loss or metric of the same name is not found: the plan keeps the old one.
    """
    model = task.new_model()
    facts = {
        "name": task.name,
        "features": task.features.model_dump(),
        "target": task.target.model_dump(),
        "metrics": sorted(task.metrics),
        "ratios": [ratio.model_dump() for ratio in task.ratios],
        "vocabulary": None if task.vocabulary is None else sha256(task.vocabulary.encode()),
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
    task: LoadedTask,
    plan: Plan,
    *,
    initial: Tensors,
    look_again: asyncio.Event,
) -> Coordinator:
    manifest = plan.manifest
    maker = VersionMaker(
        blobs=store.blobs,
        manifest=manifest,
        plan_sha256=plan.ref.sha256,
        build=_build(task, manifest, store.blobs, settings.chunk_bytes),
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
        rollout_settings=settings.rollout,
        retention=settings.retention.wish,
        evaluate=_evaluation(settings, store, manifest),
        evaluate_every=1 if settings.evaluation is None else settings.evaluation.every,
    )


def _build(
    task: LoadedTask, manifest: PlanManifest, blobs: BlobDirectory, chunk_bytes: int
) -> Callable[[Tensors], Release]:
    """Exports and checks a version's weights; what that takes is loaded with the first version."""
    releasers: list[Releaser] = []

    def build(weights: Tensors) -> Release:
        if not releasers:
            from fedge.coordinator.release import Releaser  # noqa: PLC0415 -- imports torch

            files = (manifest.graphs.infer.sha256, manifest.golden.sha256)
            releasers.append(
                Releaser(
                    task.get().new_model,
                    manifest,
                    {digest: blobs.read(digest) for digest in files},
                    infer=task.get().infer,
                    chunk_bytes=chunk_bytes,
                )
            )
        return releasers[0].build(weights)

    return build


def _evaluation(
    settings: Settings, store: Store, manifest: PlanManifest
) -> Callable[[VersionRecord], Evaluation] | None:
    if settings.evaluation is None:
        return None
    from fedge.coordinator.evaluation import Evaluator, beside  # noqa: PLC0415 -- onnxruntime

    words = manifest.vocabulary
    vocabulary = None if words is None else Vocabulary.decode(store.blobs.read(words.sha256))
    evaluator = Evaluator(
        manifest,
        store.blobs.read(manifest.graphs.eval.sha256),
        load_test_set(settings.evaluation.path, word_encoder(manifest, vocabulary)),
        threads=settings.evaluation.threads,
    )

    def evaluate(version: VersionRecord) -> Evaluation:
        path = store.blobs.path(version.weights.sha256)
        weights = read_tensors(path, manifest.weight_specs)
        found = evaluator.evaluate(weights)
        if manifest.quantization is None:
            return found
        return beside(found, evaluator.evaluate(as_stored(manifest, weights)))

    return evaluate
