"""The training process: reads jobs from stdin, one a line, and answers on stdout.

A line may tell it to stop the training under way, which then leaves a checkpoint. It keeps the last
plan's engine, so the next round starts at once. It ends when its stdin does, in the midst of a job
too, so it cannot outlive an agent that was killed. A failure that it understands is an answer; any
other is a crash, and the agent starts a new process.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import queue
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from pydantic import ValidationError

from fedge.edge_agent.data.examples import Examples, count_examples, open_examples
from fedge.edge_agent.durable import replace_file
from fedge.edge_agent.engines import EngineName, choose_engine, open_engine
from fedge.edge_agent.engines.protocol import Engine
from fedge.edge_agent.example_text import Split
from fedge.edge_agent.forgetting import ForgottenMeanwhile, nothing_forgotten
from fedge.edge_agent.trainer.checkpoint_file import (
    TrainingKey,
    digest_of_examples,
    digest_of_file,
    take_checkpoint,
    write_checkpoint,
)
from fedge.edge_agent.trainer.jobs import (
    MAX_LINE_BYTES,
    STOP_LINE,
    Activated,
    ActivateJob,
    Answer,
    Counted,
    CountJob,
    Evaluated,
    EvaluateJob,
    Failed,
    Interrupted,
    Job,
    Personalised,
    PersonaliseJob,
    Progressed,
    Trained,
    TrainJob,
    decode_job,
)
from fedge.edge_agent.training import Paused, Progress, no_training, train
from fedge.schemas.blob_files import disk
from fedge.schemas.blobs import describe
from fedge.schemas.errors import FedgeError, PeerError, StoreError, TrainingFailed
from fedge.schemas.ids import Digest
from fedge.schemas.plan import PlanManifest
from fedge.schemas.plan_words import word_encoder
from fedge.schemas.quantization import as_stored
from fedge.schemas.tensors import Array, encode_tensors, read_tensors
from fedge.schemas.words import Vocabulary, WordEncoder

if TYPE_CHECKING:
    from fedge.edge_agent.trainer.resumable import ResumableEngine

log = logging.getLogger(__name__)

_PROGRESS_INTERVAL_S = 0.5
_PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""

Say = Callable[[Answer], None]
_Lines = queue.SimpleQueue[tuple[bytes, threading.Event]]
"""Each job with its own sign to stop."""


class Worker:
    """Does jobs one after another. Knows files, and neither pipes nor processes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._engine: Engine | None = None
        self._resumable: ResumableEngine | None = None
        self._engine_key: tuple[Digest, EngineName, int] | None = None

    def do(self, job: Job, say: Say, stop: Callable[[], bool] = lambda: False) -> Answer:
        """The answer to `job`; what happens meanwhile goes to `say`. Raises `FedgeError`.

        `stop`: whether a training is to stop where it is.
        """
        match job:
            case TrainJob():
                return self._train(job, say, stop)
            case ActivateJob():
                return _activate(job)
            case EvaluateJob():
                return _evaluate(job, stop, self._clock)
            case PersonaliseJob():
                # Two engines may not fit.
                self._engine = self._resumable = self._engine_key = None
                return _personalise(job, say, stop, self._clock)
            case CountJob():
                counts = count_examples(job.data)
                return Counted(examples=counts.training, hold_out=counts.hold_out)

    def _train(self, job: TrainJob, say: Say, stop: Callable[[], bool]) -> Trained | Interrupted:
        manifest = PlanManifest.decode(_read(job.manifest))
        examples = open_examples(job.data, _words(job, manifest), job.limits)
        chosen: EngineName | None = None
        first_step = 0
        if job.settings.asks_for_no_step:
            result = no_training(manifest, examples.examples)
        else:
            chosen = choose_engine(job.engine)
            engine = self._engine_for(job, manifest, chosen)
            weights = read_tensors(job.weights, manifest.weight_specs)
            left = _LeftTraining(job, manifest, examples, self._resumable)
            done = train(
                engine,
                manifest,
                weights,
                examples,
                job.settings,
                on_step=_throttled(say, self._clock),
                stop=stop,
                earlier=left.paused,
                put_back=left.put_back,
            )
            if isinstance(done, Paused):
                return Interrupted(step=done.step, steps=done.steps, kept=left.keep(done))
            result = done
            first_step = 0 if left.paused is None else left.paused.step
            del weights
        update = encode_tensors(result.delta)
        replace_file(job.output, update)
        return Trained(
            update=describe(update, job.chunk_bytes),
            examples=result.examples,
            steps=result.steps,
            first_step=first_step,
            loss=result.loss,
            metrics=dict(result.metrics),
            training_s=result.training_s,
            engine=chosen,
            peak_rss_bytes=peak_rss_bytes(),
            generation=examples.generation,
        )

    def _engine_for(self, job: TrainJob, manifest: PlanManifest, chosen: EngineName) -> Engine:
        key = (manifest.digest, chosen, job.threads)
        if self._engine is None or key != self._engine_key:
            # The old plan's memory goes first: two at a time may not fit.
            self._engine = self._resumable = None
            graph = _read(job.train_graph)
            if chosen is EngineName.ONNX:
                # Only here: training with torch does not need onnxruntime.
                from fedge.edge_agent.trainer.resumable import open_resumable  # noqa: PLC0415

                self._resumable = open_resumable(manifest, graph, threads=job.threads)
                self._engine = self._resumable
            else:
                self._engine = open_engine(chosen, manifest, graph, threads=job.threads)
            self._engine_key = key
        return self._engine


class _LeftTraining:
    """A training's checkpoint: the one that it goes on from, and the one that it leaves."""

    def __init__(
        self,
        job: TrainJob,
        manifest: PlanManifest,
        examples: Examples,
        engine: ResumableEngine | None,
    ) -> None:
        self.paused: Paused | None = None
        self._position: dict[str, Array] = {}
        self._path = job.checkpoint
        self._data, self._limits = job.data, job.limits
        self._generation = examples.generation
        self._engine = engine
        if self._path is None or engine is None:
            return
        self._key = TrainingKey(
            plan_sha256=manifest.digest,
            weights_sha256=digest_of_file(job.weights),
            settings=job.settings,
            engine=EngineName.ONNX,
            examples=digest_of_examples(examples),
        )
        found = take_checkpoint(self._path, self._key)
        if found is not None:
            self.paused, self._position = found

    def put_back(self) -> None:
        if self.paused is None or self._engine is None:
            return
        try:
            self._engine.put_back(self._position)
        except PeerError as error:
            # Its digest was right, so this program wrote it: the file is gone, and the next try
            # begins at the beginning.
            raise TrainingFailed(f"the checkpoint does not fit its plan: {error}") from error
        self._position = {}

    def keep(self, paused: Paused) -> bool:
        if self._path is None or self._engine is None:
            return False
        try:
            with nothing_forgotten(self._data, self._limits, self._generation):
                write_checkpoint(self._path, self._key, paused, self._engine.position())
        except (StoreError, ForgottenMeanwhile) as error:
            log.warning("checkpoint_not_written %s", error)
            return False
        return True


def _words(
    job: TrainJob | EvaluateJob | PersonaliseJob, manifest: PlanManifest
) -> WordEncoder | None:
    vocabulary = None if job.vocabulary is None else Vocabulary.decode(_read(job.vocabulary))
    return word_encoder(manifest, vocabulary)


def _evaluate(job: EvaluateJob, stop: Callable[[], bool], clock: Callable[[], float]) -> Evaluated:
    # Only here, as for activation.
    from fedge.edge_agent.engines.onnx_evaluator import open_evaluator  # noqa: PLC0415
    from fedge.edge_agent.evaluation import evaluate  # noqa: PLC0415

    started = clock()
    manifest = PlanManifest.decode(_read(job.manifest))
    examples = open_examples(job.data, _words(job, manifest), job.limits, Split.HOLD_OUT)
    evaluator = open_evaluator(manifest, _read(job.eval_graph), threads=job.threads)
    weights = read_tensors(job.weights, manifest.weight_specs)
    sums = evaluate(evaluator, manifest, as_stored(manifest, weights), examples, stop=stop)
    return Evaluated(
        examples=sums.examples,
        rows=sums.rows,
        loss_sum=sums.loss_sum,
        metrics=sums.metrics,
        evaluation_s=clock() - started,
        generation=examples.generation,
    )


def _personalise(
    job: PersonaliseJob, say: Say, stop: Callable[[], bool], clock: Callable[[], float]
) -> Personalised | Interrupted:
    # Only here, as for activation.
    from fedge.edge_agent.trainer.personal_job import personalise  # noqa: PLC0415

    manifest = PlanManifest.decode(_read(job.manifest))
    words = _words(job, manifest)
    done = personalise(
        job,
        manifest,
        open_examples(job.data, words, job.limits),
        open_examples(job.data, words, job.limits, Split.HOLD_OUT),
        on_step=_throttled(say, clock),
        stop=stop,
        clock=clock,
    )
    if isinstance(done, Interrupted):
        return done
    return done.model_copy(update={"peak_rss_bytes": peak_rss_bytes()})


def _activate(job: ActivateJob) -> Activated:
    # Only here: activation needs onnxruntime, training with torch does not.
    from fedge.edge_agent.activation import activate, build_model  # noqa: PLC0415

    manifest = PlanManifest.decode(_read(job.manifest))
    weights = read_tensors(job.weights, manifest.weight_specs)
    model = build_model(manifest, _read(job.infer_graph), weights, job.model_sha256)
    del weights
    done = activate(
        manifest,
        model,
        read_tensors(job.golden_inputs),
        read_tensors(job.golden_outputs),
        job.output,
        beside=job.beside,
    )
    return Activated(
        latency_ms=done.latency_ms,
        largest_difference=done.largest_difference,
        beside_ms=done.beside_ms,
    )


def _throttled(say: Say, clock: Callable[[], float]) -> Callable[[Progress], None]:
    next_s = clock()

    def on_step(progress: Progress) -> None:
        nonlocal next_s
        if clock() >= next_s:
            next_s = clock() + _PROGRESS_INTERVAL_S
            say(
                Progressed(
                    epoch=progress.epoch,
                    step=progress.step,
                    steps=progress.steps,
                    loss=progress.loss,
                )
            )

    return on_step


def _read(path: Path) -> bytes:
    with disk(f"read {path}"):
        return path.read_bytes()


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident since it started."""
    # Linux' getrusage counts what the parent had when it forked; VmHWM is this program's own.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    """Runs until stdin ends."""
    parser = argparse.ArgumentParser(prog="python -m fedge.edge_agent.trainer")
    parser.add_argument("--nice", type=int, default=0)
    parser.add_argument("--memory-limit-bytes", type=int, default=None)
    arguments = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
    _end_with_the_parent()
    # Control-C reaches the whole terminal; when to end is the agent's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(arguments.nice)
    if arguments.memory_limit_bytes is not None:
        # Private writable memory. Address space (RLIMIT_AS) says little: runtimes reserve it.
        resource.setrlimit(resource.RLIMIT_DATA, (arguments.memory_limit_bytes,) * 2)
    answers = _take_stdout()

    def say(answer: Answer) -> None:
        try:
            answers.write(answer.encode())
            answers.flush()
        except BrokenPipeError:
            # The agent is gone: there is nobody to answer, and nothing to tidy up.
            os._exit(0)

    lines: _Lines = queue.SimpleQueue()
    threading.Thread(target=_read_lines, args=(lines,), name="jobs", daemon=True).start()
    worker = Worker()
    while True:
        line, stop = lines.get()
        say(_answer(worker, line, say, stop.is_set))


def _answer(worker: Worker, line: bytes, say: Say, stop: Callable[[], bool]) -> Answer:
    try:
        job = decode_job(line)
    except ValidationError as error:
        return Failed.of(TrainingFailed(f"a job that cannot be read: {error}"))
    try:
        return worker.do(job, say, stop)
    except FedgeError as error:
        log.warning("%s_failed %s: %s", job.job, type(error).__name__, error)
        return Failed.of(error)
    except MemoryError as error:
        log.warning("%s_failed out of memory", job.job)
        return Failed.of(TrainingFailed(f"the job needs more memory than it may have: {error}"))


def _read_lines(lines: _Lines) -> None:
    stop = threading.Event()
    while line := sys.stdin.buffer.readline(MAX_LINE_BYTES):
        if line == STOP_LINE:
            # Of the job before it, which may be done: then it stops nothing.
            stop.set()
        else:
            stop = threading.Event()
            lines.put((line, stop))
    # The agent is gone or wants no more, and nobody would read an answer: end within a job too.
    os._exit(0)


def _take_stdout() -> BinaryIO:
    """The real stdout for answers only; what a library prints goes to stderr instead."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers


def _end_with_the_parent() -> None:
    # The end of stdin does this too; the kernel does it even if a job holds the interpreter.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
