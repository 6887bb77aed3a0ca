"""From an assignment to an update in the outbox: the device's part of one round.

Starts the training, watches its time, and keeps what it made. It decides one thing: a training
whose process was killed is tried once more while there is time, because the kernel kills for want
of memory that another program may have taken. Whatever else goes wrong is the round's to know.
A training that is suspended leaves a checkpoint, and the next one for the same round goes on there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fedge.edge_agent.checkpoints import Checkpoints
from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.engines import EngineName
from fedge.edge_agent.events import Trained, TrainingStopped
from fedge.edge_agent.library import Library
from fedge.edge_agent.outbox import Outbox
from fedge.edge_agent.trainer import jobs
from fedge.edge_agent.trainer.jobs import Progressed, TrainJob
from fedge.edge_agent.trainer.process import Trainer, TrainerKilled, TrainingInterrupted
from fedge.edge_agent.training_settings import TrainingSettings
from fedge.edge_agent.typed_texts import TypedTexts
from fedge.edge_agent.usage import UsageMeter
from fedge.schemas.errors import FedgeError, TrainingFailed
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import Assignment, Offer, VersionAnnouncement

log = EventLog(__name__)


class _Forgotten(TrainingFailed):
    """The update was made from a text that its user took back."""


class Contributor:
    """Trains for one device, one assignment at a time.

    `data`: its examples, None if it has none. `held`: the newest version that is here.
    `checkpoints`: where suspended trainings are left, None: none is ever suspended. `meter`: is
    told of the time and bytes, None: nobody counts them.
    """

    def __init__(
        self,
        device: str,
        *,
        data: DataConfig | None,
        engine: EngineName,
        threads: int,
        trainer: Trainer,
        library: Library,
        outbox: Outbox,
        held: Callable[[], VersionAnnouncement | None],
        checkpoints: Checkpoints | None = None,
        meter: UsageMeter | None = None,
        typed: TypedTexts | None = None,
    ) -> None:
        self._device = device
        self._data = data
        self._engine: EngineName = engine
        self._threads = threads
        self._trainer = trainer
        self._library = library
        self._outbox = outbox
        self._held = held
        self._checkpoints = checkpoints
        self._meter = meter
        self._typed = typed
        self._due = (0, 0.0)
        self._job_under_way: TrainJob | None = None
        self._task: asyncio.Task[None] | None = None
        self._suspended = False

    def asked(self, assignment: Assignment) -> None:
        """An assignment has just arrived: its time runs from now, whenever its base is here."""
        now_s = asyncio.get_running_loop().time()
        if assignment.round >= self._due[0]:
            self._due = (assignment.round, now_s + assignment.deadline_s)

    def suspend(self) -> None:
        """Has the training under way, if any, stop within `STOP_GRACE_S` and leave a checkpoint.

        Its `contribute` returns None then, or is cancelled if the training has not begun.
        """
        if self._job_under_way is None or self._suspended:
            return
        self._suspended = True
        if not self._trainer.interrupt(self._job_under_way) and self._task is not None:
            self._task.cancel()

    async def contribute(self, assignment: Assignment) -> Trained | TrainingStopped | None:
        """Trains and keeps the update; what became of it. Cancel it to stop.

        None: it was suspended.
        """
        number = assignment.round
        due_s = self.due_s(assignment)
        self._suspended = False
        if self._checkpoints is not None:
            self._checkpoints.keep_only(number)
        try:
            async with asyncio.timeout_at(due_s):
                trained = await self._train(assignment, due_s)
            self._outbox.keep(
                Offer(
                    round=number,
                    base=assignment.base,
                    update=trained.update,
                    examples=trained.examples,
                    steps=trained.steps,
                    training_s=trained.training_s,
                    loss=trained.loss,
                    metrics=trained.metrics,
                ),
                trained.generation,
            )
        except (FedgeError, TimeoutError) as error:
            if self._suspended:
                self._log_suspended(number, error)
                return None
            reason = str(error) or f"not done by the deadline, {assignment.deadline_s:.0f} s"
            log.warning("training_failed", device=self._device, round=number, reason=reason)
            self._forget_checkpoint(number)
            return TrainingStopped(number, reason)
        finally:
            if number not in self._outbox:
                # Stopped between the file and its row, or the row could not be written.
                self._outbox.forget(number)
        self._forget_checkpoint(number)
        self._log_trained(number, trained)
        return Trained(number)

    def _forget_checkpoint(self, number: int) -> None:
        if self._checkpoints is not None:
            self._checkpoints.forget(number)

    async def _train(self, assignment: Assignment, due_s: float) -> jobs.Trained:
        job = self._job(assignment)
        try:
            return await self._run(job)
        except (TrainerKilled, _Forgotten) as error:
            left_s = due_s - asyncio.get_running_loop().time()
            if left_s <= assignment.deadline_s / 2:
                raise
            log.warning(
                "training_again", device=self._device, round=assignment.round, reason=str(error)
            )
        return await self._run(job)

    async def _run(self, job: TrainJob) -> jobs.Trained:
        self._job_under_way, self._task = job, asyncio.current_task()
        upload_bytes = 0
        if self._meter is not None:
            self._meter.begin()
        try:
            trained = await self._trainer.run(job, self._progressed)
            if self._typed is not None and trained.generation != self._typed.generation():
                job.output.unlink(missing_ok=True)
                raise _Forgotten("some of what it was trained on was forgotten meanwhile")
            upload_bytes = trained.update.size_bytes
            return trained
        finally:
            self._job_under_way = self._task = None
            if self._meter is not None:
                self._meter.end(upload_bytes)

    def due_s(self, assignment: Assignment) -> float:
        """When the assignment's time is over, in the event loop's clock."""
        number, due_s = self._due
        if number == assignment.round:
            return due_s
        return asyncio.get_running_loop().time() + assignment.deadline_s

    def _job(self, assignment: Assignment) -> TrainJob:
        # The machine trains from a version that is held, and only a device with data checks in.
        held = self._held()
        if held is None or self._data is None:
            raise TrainingFailed(f"version {assignment.base} or the data is not here")
        if (held.number, held.plan.sha256) != (assignment.base, assignment.plan_sha256):
            raise TrainingFailed(f"version {assignment.base} of the assignment's plan is not here")
        path = self._library.blobs.path
        manifest = self._library.manifest(held.plan)
        words = manifest.vocabulary
        return TrainJob(
            manifest=path(held.plan.sha256),
            train_graph=path(manifest.graphs.train.sha256),
            weights=path(held.weights.sha256),
            vocabulary=None if words is None else path(words.sha256),
            data=self._data,
            limits=None if self._typed is None else self._typed.limits,
            settings=TrainingSettings.of(assignment),
            output=self._outbox.path(assignment.round),
            checkpoint=(
                None if self._checkpoints is None else self._checkpoints.path(assignment.round)
            ),
            engine=self._engine,
            threads=self._threads,
            # As the coordinator cuts its own blobs: what its broker is known to carry.
            chunk_bytes=held.weights.chunk_bytes,
        )

    def _progressed(self, progress: Progressed) -> None:
        if self._meter is not None:
            self._meter.goes_on()
        log.info(
            "training",
            device=self._device,
            epoch=progress.epoch + 1,
            step=progress.step,
            steps=progress.steps,
            loss=progress.loss,
        )

    def _log_suspended(self, number: int, error: Exception) -> None:
        left = error if isinstance(error, TrainingInterrupted) else None
        log.info(
            "training_suspended",
            device=self._device,
            round=number,
            step=None if left is None else left.step,
            steps=None if left is None else left.steps,
            checkpoint=left is not None and left.kept,
        )

    def _log_trained(self, number: int, trained: jobs.Trained) -> None:
        log.info(
            "trained",
            device=self._device,
            round=number,
            examples=trained.examples,
            steps=trained.steps,
            first_step=trained.first_step,
            training_s=trained.training_s,
            engine=None if trained.engine is None else trained.engine.value,
            peak_rss_bytes=trained.peak_rss_bytes,
        )
