"""The device's part of a federated evaluation: a version measured on what was never trained on.

It keeps nothing: the coordinator asks until it has the answer, so a request that was lost or cut
off by a restart comes again, and one that was answered is answered the same. A round goes first: an
assignment, a newer version or a rule that breaks stops the measuring at once, and it begins anew
when the device is free, until the time is over. What leaves the device is sums over at least
`minimum_hold_out` examples, or that there are none; why it failed is told in words that hold
nothing of the examples, and in full only in the device's own log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

from pydantic import ValidationError

from fedge.edge_agent.cache import CacheTooSmall
from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.example_store import MAX_TEXTS, ExampleStore
from fedge.edge_agent.forgetting import ForgottenMeanwhile
from fedge.edge_agent.library import Library
from fedge.edge_agent.trainer.jobs import CountJob, Evaluated, EvaluateJob
from fedge.edge_agent.trainer.process import Trainer, TrainerKilled
from fedge.edge_agent.typed_texts import TypedTexts
from fedge.schemas.blobs import BlobRef
from fedge.schemas.errors import (
    FedgeError,
    LinkClosed,
    LinkError,
    PeerError,
    PlanRefused,
    StoreUnavailable,
)
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import (
    EvaluationRequest,
    EvaluationResult,
    EvaluationStatus,
    EvaluationSums,
    VersionAnnouncement,
)

log = EventLog(__name__)

AGAIN_S = 5.0
"""After a disk that is full, or a training process that was killed."""
TRIES = 3
"""Of a job whose process is killed, or whose examples change under it."""

CUT_OFF = "its training process was killed, or its examples changed, again and again"
NOT_HERE = "the version could not be measured on its examples; the device's own log says why"
TOO_LARGE = "its sums are too large to be told"


class _Refused(FedgeError):  # noqa: N818 -- the device's answer
    """The version cannot be measured here. The text may be told: it is not about examples."""


class Evaluations:
    """The evaluations that `device` is asked for, one at a time, while `run` runs.

    `data`: its examples, None if it has none; `typed`: their store, None for other data.
    `minimum_hold_out`: with fewer it says that it has none. `in_hand`: the newest version that is
    here. `fetch`: brings blobs that are missing. `send`: returns when the broker has it. `changed`:
    called when the measuring begins or has ended. `personal_weights`: where the weights of this
    device's own copy of a version lie, if it keeps one.
    """

    def __init__(
        self,
        device: str,
        *,
        data: DataConfig | None,
        typed: TypedTexts | None,
        minimum_hold_out: int,
        threads: int,
        trainer: Trainer,
        library: Library,
        in_hand: Callable[[], VersionAnnouncement | None],
        fetch: Callable[[Iterable[BlobRef]], Awaitable[None]],
        send: Callable[[EvaluationResult], Awaitable[None]],
        changed: Callable[[], None] = lambda: None,
        personal_weights: Callable[[int], Path | None] = lambda version: None,
    ) -> None:
        self._device = device
        self._data = data
        self._typed = typed
        self._minimum_hold_out = minimum_hold_out
        self._threads = threads
        self._trainer = trainer
        self._library = library
        self._in_hand = in_hand
        self._fetch = fetch
        self._send = send
        self._changed = changed
        self._personal_weights = personal_weights

        self._free = False
        self._woken = asyncio.Event()
        self._request: EvaluationRequest | None = None
        self._due_s = 0.0
        self._time: asyncio.Timeout | None = None
        self._said: EvaluationResult | None = None
        self._task: asyncio.Task[None] | None = None
        self._counted: int | None = None

    @property
    def is_running(self) -> bool:
        """Whether a version is being measured, so that a rule that breaks must stop it."""
        return self._task is not None and self._said is None

    def asked(self, request: EvaluationRequest) -> None:
        """The coordinator asks, perhaps not for the first time. One at a time: the newest."""
        due_s = asyncio.get_running_loop().time() + request.deadline_s
        now = self._request
        if now is not None and _same(now, request):
            self._due_s = due_s
            if self._time is not None and not self._time.expired():
                # It is being measured.
                self._time.reschedule(due_s)
            return
        self._request, self._due_s = request, due_s
        if self._said is None or not _same(self._said, request):
            log.info(
                "evaluation_asked",
                device=self._device,
                evaluation=request.evaluation,
                version=request.number,
            )
            self._stop()
            self._said = None
        self._woken.set()

    async def forgotten(self) -> None:
        """Examples were taken back: what was measured on them is told to nobody any more."""
        self._said = None
        self._stop()
        self._woken.set()

    def see(self, *, free: bool) -> None:
        """Whether the device has nothing to do that a round waits for, and may work at all."""
        if free == self._free:
            return
        self._free = free
        if free:
            self._woken.set()
        else:
            self._stop()

    async def run(self) -> None:
        """Answers what is asked, until cancelled."""
        while True:
            await self._woken.wait()
            self._woken.clear()
            request = self._request
            if request is None:
                continue
            if self._said is not None or self._keeps_nothing_apart or self._free:
                await self._attempt(request)

    @property
    def _keeps_nothing_apart(self) -> bool:
        return self._data is None or (self._typed is None and not self._data.hold_out)

    def _stop(self) -> None:
        # What is only being said is in nobody's way.
        if self._task is not None and self.is_running:
            self._task.cancel()

    async def _attempt(self, request: EvaluationRequest) -> None:
        work = self._answer(request)
        self._task = asyncio.create_task(work, name=f"evaluation-{request.evaluation}")
        self._changed()
        try:
            await self._task
        except asyncio.CancelledError:
            own = asyncio.current_task()
            if own is not None and own.cancelling():
                raise
            # It made way; whatever it made way for wakes it again.
            log.info("evaluation_cut_off", device=self._device, evaluation=request.evaluation)
        except LinkClosed:
            return
        except LinkError as error:
            # It is asked again.
            log.error("not_sent", device=self._device, what="evaluation", reason=str(error))
        finally:
            self._task = None
            self._changed()

    async def _answer(self, request: EvaluationRequest) -> None:
        if self._said is None:
            try:
                async with asyncio.timeout_at(self._due_s) as self._time:
                    self._said = await self._result(request)
            except TimeoutError:
                log.info("evaluation_overdue", device=self._device, evaluation=request.evaluation)
            finally:
                self._time = None
        self._finished(request)
        if self._said is not None:
            # While the link is down this takes as long as that, and is no work.
            self._changed()
            await self._send(self._said)

    def _finished(self, request: EvaluationRequest) -> None:
        if self._request is request:
            self._request = None
        try:
            self._library.stop_measuring(self._in_hand())
        except FedgeError as error:
            # The next version's fetch clears it away.
            log.warning("not_cleared", device=self._device, reason=str(error))

    # ------------------------------------------------------------ measuring

    async def _result(self, request: EvaluationRequest) -> EvaluationResult:
        def said(status: EvaluationStatus, **facts: object) -> EvaluationResult:
            log.info(
                "evaluation_done",
                device=self._device,
                evaluation=request.evaluation,
                version=request.number,
                status=status.value,
            )
            return EvaluationResult.model_validate(
                {
                    "evaluation": request.evaluation,
                    "number": request.number,
                    "status": status,
                    **facts,
                }
            )

        try:
            found = await self._measured(request)
        except _Refused as error:
            return said(EvaluationStatus.FAILED, detail=str(error)[:500])
        if found is None:
            return said(EvaluationStatus.NO_HOLD_OUT)
        sums, personal = found
        return said(EvaluationStatus.OK, sums=sums, personal=personal)

    async def _measured(
        self, request: EvaluationRequest
    ) -> tuple[EvaluationSums, EvaluationSums | None] | None:
        """The sums of the version and of the personal copy; None: too few examples are held out."""
        if self._data is None or self._keeps_nothing_apart:
            return None
        tries = TRIES
        while True:
            try:
                return await self._measured_once(request, self._data)
            except (_Refused, LinkError):
                raise
            except StoreUnavailable as error:
                self._warn(request, error)
            except (TrainerKilled, ForgottenMeanwhile) as error:
                self._warn(request, error)
                tries -= 1
                if tries == 0:
                    raise _Refused(CUT_OFF) from error
            except FedgeError as error:
                log.warning("evaluation_failed", device=self._device, reason=str(error))
                is_of_the_version = isinstance(error, (CacheTooSmall, PlanRefused, PeerError))
                raise _Refused(str(error) if is_of_the_version else NOT_HERE) from error
            await asyncio.sleep(AGAIN_S)

    async def _measured_once(
        self, request: EvaluationRequest, data: DataConfig
    ) -> tuple[EvaluationSums, EvaluationSums | None] | None:
        if await self._hold_out(data) < self._minimum_hold_out:
            return None
        job = await self._job(request, data)
        done = await self._run(job)
        if done.examples < self._minimum_hold_out:
            # Some were taken back since they were counted.
            return None
        return _sums(done), await self._personal(request, job, done)

    async def _hold_out(self, data: DataConfig) -> int:
        if self._typed is not None:
            # It may wait for an app's transaction.
            return await asyncio.to_thread(_held_out_in_store, data, self._typed)
        if self._counted is None:
            self._counted = (await self._trainer.run(CountJob(data=data))).hold_out
        return self._counted

    async def _job(self, request: EvaluationRequest, data: DataConfig) -> EvaluateJob:
        """The job, once everything that it takes is here."""
        plan, weights = request.plan, request.weights
        self._library.make_room_to_measure((plan, weights), self._in_hand())
        await self._fetch([plan])
        manifest = self._library.manifest(plan)
        words = () if manifest.vocabulary is None else (manifest.vocabulary,)
        needed = (plan, manifest.graphs.eval, *words, weights)
        # Now the size of its graph is known, too.
        self._library.make_room_to_measure(needed, self._in_hand())
        await self._fetch(needed)
        path = self._library.blobs.path
        return EvaluateJob(
            manifest=path(plan.sha256),
            eval_graph=path(manifest.graphs.eval.sha256),
            weights=path(weights.sha256),
            vocabulary=path(words[0].sha256) if words else None,
            data=data,
            limits=None if self._typed is None else self._typed.limits,
            threads=self._threads,
        )

    async def _run(self, job: EvaluateJob) -> Evaluated:
        done = await self._trainer.run(job)
        log.info(
            "measured", device=self._device, rows=done.rows, evaluation_s=done.evaluation_s
        )  # fmt: skip
        if self._typed is not None:
            generation = await asyncio.to_thread(self._typed.generation)
            if done.generation != generation:
                raise ForgottenMeanwhile
        return done

    async def _personal(
        self, request: EvaluationRequest, job: EvaluateJob, own: Evaluated
    ) -> EvaluationSums | None:
        path = self._personal_weights(request.number)
        if path is None:
            return None
        try:
            done = await self._run(job.model_copy(update={"weights": path}))
            # Only over the same examples do the two say something about one another.
            return _sums(done) if done.rows == own.rows else None
        except (StoreUnavailable, TrainerKilled, ForgottenMeanwhile):
            raise
        except FedgeError as error:
            # What was asked for are the version's own sums.
            log.warning("personal_not_measured", device=self._device, reason=str(error))
            return None

    def _warn(self, request: EvaluationRequest, error: FedgeError) -> None:
        log.warning(
            "evaluation_again",
            device=self._device,
            evaluation=request.evaluation,
            reason=str(error),
        )


def _sums(done: Evaluated) -> EvaluationSums:
    try:
        return EvaluationSums(
            examples=done.examples,
            rows=done.rows,
            loss_sum=done.loss_sum,
            metrics=done.metrics,
        )
    except ValidationError as error:
        raise _Refused(TOO_LARGE) from error


def _held_out_in_store(data: DataConfig, typed: TypedTexts) -> int:
    with ExampleStore(data.path, typed.limits) as store:
        return min(store.count().hold_out.examples, data.limit or MAX_TEXTS)


def _same(one: EvaluationRequest | EvaluationResult, other: EvaluationRequest) -> bool:
    return (one.evaluation, one.number) == (other.evaluation, other.number)
