"""From an assignment to an update in the outbox: the device's part of one round.

Starts the training, watches its time, and keeps what it made. It decides one thing: a training
whose process was killed is tried once more while there is time, because the kernel kills for want
of memory that another program may have taken. Whatever else goes wrong is the round's to know.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.engines import EngineName
from fedge.edge_agent.events import Trained, TrainingStopped
from fedge.edge_agent.library import Library
from fedge.edge_agent.outbox import Outbox
from fedge.edge_agent.trainer import jobs
from fedge.edge_agent.trainer.jobs import Progressed, TrainJob
from fedge.edge_agent.trainer.process import Trainer, TrainerKilled
from fedge.edge_agent.training_settings import TrainingSettings
from fedge.schemas.errors import FedgeError, TrainingFailed
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import Assignment, Offer, VersionAnnouncement

log = EventLog(__name__)


class Contributor:
    """Trains for one device, one assignment at a time.

    `data`: its examples, None if it has none. `held`: the newest version that is here.
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
    ) -> None:
        self._device = device
        self._data = data
        self._engine: EngineName = engine
        self._threads = threads
        self._trainer = trainer
        self._library = library
        self._outbox = outbox
        self._held = held
        self._due = (0, 0.0)

    def asked(self, assignment: Assignment) -> None:
        """An assignment has just arrived: its time runs from now, whenever its base is here."""
        now_s = asyncio.get_running_loop().time()
        if assignment.round >= self._due[0]:
            self._due = (assignment.round, now_s + assignment.deadline_s)

    async def contribute(self, assignment: Assignment) -> Trained | TrainingStopped:
        """Trains and keeps the update; what became of it. Cancel it to stop."""
        number = assignment.round
        due_s = self._due_s(assignment)
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
                )
            )
        except (FedgeError, TimeoutError) as error:
            reason = str(error) or f"not done by the deadline, {assignment.deadline_s:.0f} s"
            log.warning("training_failed", device=self._device, round=number, reason=reason)
            return TrainingStopped(number, reason)
        finally:
            if number not in self._outbox:
                # Stopped between the file and its row, or the row could not be written.
                self._outbox.forget(number)
        self._log_trained(number, trained)
        return Trained(number)

    async def _train(self, assignment: Assignment, due_s: float) -> jobs.Trained:
        job = self._job(assignment)
        try:
            return await self._trainer.run(job, self._log_progress)
        except TrainerKilled as error:
            left_s = due_s - asyncio.get_running_loop().time()
            if left_s <= assignment.deadline_s / 2:
                raise
            log.warning(
                "training_again", device=self._device, round=assignment.round, reason=str(error)
            )
        return await self._trainer.run(job, self._log_progress)

    def _due_s(self, assignment: Assignment) -> float:
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
        return TrainJob(
            manifest=path(held.plan.sha256),
            train_graph=path(manifest.graphs.train.sha256),
            weights=path(held.weights.sha256),
            data=self._data,
            settings=TrainingSettings.of(assignment),
            output=self._outbox.path(assignment.round),
            engine=self._engine,
            threads=self._threads,
            # As the coordinator cuts its own blobs: what its broker is known to carry.
            chunk_bytes=held.weights.chunk_bytes,
        )

    def _log_progress(self, progress: Progressed) -> None:
        log.info(
            "training",
            device=self._device,
            epoch=progress.epoch + 1,
            step=progress.step,
            steps=progress.steps,
            loss=progress.loss,
        )

    def _log_trained(self, number: int, trained: jobs.Trained) -> None:
        log.info(
            "trained",
            device=self._device,
            round=number,
            examples=trained.examples,
            steps=trained.steps,
            training_s=trained.training_s,
            engine=None if trained.engine is None else trained.engine.value,
            peak_rss_bytes=trained.peak_rss_bytes,
        )
