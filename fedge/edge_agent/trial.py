"""A trial: a rollout's candidate is fetched, built and checked beside the version in use.

The checks, in order: its file is the announced one and runs here (build), gives the coordinator's
outputs (parity), is not too slow (latency), and is not worse on the examples that this device never
trains on (hold-out). What cannot be measured here is not asked, and the report says so. Nothing is
put into use here: until somebody does, apps see no difference. A candidate that passes every check
and later brings down the app that runs it is beyond what a trial can find.

A round goes first: fetching and measuring are cut off when the device is not free, and begun anew
when it is. Both versions are measured on the same examples, or it was not measured. What leaves the
device about them is sums and numbers; an error of a job that reads examples is told in words that
hold nothing of them, and in full only in the device's own log.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.evaluations import NOT_HERE
from fedge.edge_agent.free_time import FreeTime
from fedge.edge_agent.library import Active, Library
from fedge.edge_agent.state import AgentState
from fedge.edge_agent.storage_watch import StorageWatch
from fedge.edge_agent.trainer.jobs import Activated, Evaluated, EvaluateJob
from fedge.edge_agent.trainer.process import Trainer, TrainerKilled
from fedge.edge_agent.typed_texts import TypedTexts
from fedge.edge_agent.versions import Versions
from fedge.schemas.blobs import BlobRef
from fedge.schemas.errors import FedgeError, ParityFailed, StoreError, StoreUnavailable
from fedge.schemas.ids import Digest
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import (
    CandidateAnnouncement,
    StableAnnouncement,
    TrialChecks,
    TrialOutcome,
    TrialReason,
    TrialReport,
)
from fedge.schemas.plan import PlanManifest

log = EventLog(__name__)

T = TypeVar("T")

MAX_TRIES = 3
"""A check that was begun so often and never ended is what ends it: it kills the process."""
MEASURINGS = 3
"""Of both versions, while the examples change under them."""
LITTLE_MS = 1.0
"""A difference in latency below this is no difference: nobody waits for it, and clocks jitter."""
LITTLE_LOSS = 1e-9
"""The same for the loss of a version that makes no mistake."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What the hold-out said. `ratio`: of the losses, None if it was not measured, as `note` says.

    `worse`: by more than is allowed.
    """

    note: str
    ratio: float | None = None
    examples: int | None = None
    worse: bool = False


class _Failed(Exception):  # noqa: N818 -- an outcome of a check, raised and caught here
    def __init__(self, reason: TrialReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class _NotMeasured(Exception):  # noqa: N818 -- as above
    """The hold-out says nothing, and not because of the candidate."""


class Trials:
    """Tries candidates on `device`.

    `data`: its examples, `typed`: their store, None: it has none. `memory`: counts the tries.
    `until_idle`: returns when no training is under way, which nothing here may delay. `free`: when
    fetching and measuring are in nobody's way. `minimum_hold_out`: with fewer examples held out the
    device says nothing of what a version is worth on them, whatever the coordinator asks for.
    """

    def __init__(
        self,
        device: str,
        *,
        library: Library,
        versions: Versions,
        memory: AgentState,
        trainer: Trainer,
        storage: StorageWatch,
        data: DataConfig | None,
        typed: TypedTexts | None,
        threads: int,
        until_idle: Callable[[], Awaitable[None]],
        free: FreeTime,
        minimum_hold_out: int = 1,
    ) -> None:
        self._device = device
        self._library = library
        self._versions = versions
        self._memory = memory
        self._trainer = trainer
        self._storage = storage
        self._data = data
        self._typed = typed
        self._threads = threads
        self._until_idle = until_idle
        self._free = free
        self._minimum_hold_out = minimum_hold_out

    @property
    def may_be_asked_to_forget(self) -> bool:
        """Whether the examples are of a kind that is taken back."""
        return self._typed is not None

    async def run(
        self, candidate: CandidateAnnouncement, stable: StableAnnouncement
    ) -> TrialReport:
        """How the trial ended. Cancel it to give up; it may be run again.

        Waits until the device is free, for a network and for a disk that cannot be written now.
        Raises `TrainerKilled` if the training process was killed: perhaps memory was short, and the
        next try ends otherwise. One that was begun `MAX_TRIES` times, and killed this process or
        that one each time, has failed.
        """
        latency_ms: float | None = None
        measured = Measured("")
        reason: TrialReason | None = None
        detail = ""
        try:
            activated = await self._fetch_and_build(candidate, stable)
            latency_ms = activated.latency_ms
            _check_latency(activated, candidate.checks)
            if candidate.checks.max_loss_increase is not None:
                measure = partial(self._fetch_and_measure, candidate, stable)
                measured = await self._free.run(measure, computes=True)
            detail = measured.note
            if measured.worse:
                reason = TrialReason.HOLD_OUT
        except _Failed as failed:
            reason, detail = failed.reason, str(failed)
        outcome = TrialOutcome.ACTIVE if reason is None else TrialOutcome.ROLLED_BACK
        log.info(
            "trial_ended",
            device=self._device,
            rollout=candidate.rollout,
            version=candidate.number,
            outcome=outcome.value,
            reason=None if reason is None else reason.value,
            detail=detail,
            latency_ms=latency_ms,
            loss_ratio=measured.ratio,
        )
        return TrialReport(
            rollout=candidate.rollout,
            version=candidate.number,
            outcome=outcome,
            reason=reason,
            detail=detail[:500],
            latency_ms=latency_ms,
            loss_ratio=measured.ratio,
            hold_out=measured.examples,
        )

    async def _fetch(
        self, candidate: CandidateAnnouncement, stable: StableAnnouncement
    ) -> PlanManifest:
        bring = partial(self._versions.bring, candidate, self._kept_for_all(stable))
        try:
            return await self._storage.until_done("candidate", bring)
        except FedgeError as error:
            raise _Failed(TrialReason.FETCH, str(error)) from error

    async def _fetch_and_build(
        self, candidate: CandidateAnnouncement, stable: StableAnnouncement
    ) -> Activated:
        fetch = partial(self._fetch, candidate, stable)
        while True:
            await self._free.run(fetch, computes=False)
            await self._until_idle()
            try:
                return await self._build(candidate)
            except _Failed:
                if self._is_here(candidate):
                    raise
                # Since it was fetched, a version that a round needs has taken its room.

    async def _fetch_and_measure(
        self, candidate: CandidateAnnouncement, stable: StableAnnouncement
    ) -> Measured:
        manifest = await self._fetch(candidate, stable)
        return await self._at_risk(candidate, partial(self._measure, candidate, manifest, stable))

    def _is_here(self, candidate: CandidateAnnouncement) -> bool:
        try:
            return self._library.holds(candidate)
        except FedgeError:
            return False

    async def _build(self, candidate: CandidateAnnouncement) -> Activated:
        in_use = self._in_use()
        try:
            job = self._library.activation_of(candidate)
            if candidate.checks.max_latency_ratio is not None and in_use is not None:
                job = job.model_copy(update={"beside": in_use.model})
            build = partial(self._at_risk, candidate, partial(self._trainer.run, job))
            return await self._storage.until_done("model", build)
        except TrainerKilled:
            raise
        except ParityFailed as error:
            raise _Failed(TrialReason.PARITY, str(error)) from error
        except FedgeError as error:
            raise _Failed(TrialReason.BUILD, str(error)) from error

    async def _at_risk(
        self, candidate: CandidateAnnouncement, work: Callable[[], Awaitable[T]]
    ) -> T:
        """What `work` returns. A process that dies meanwhile is held against the candidate."""
        rollout, version = candidate.rollout, candidate.number

        async def begin() -> int:
            return self._memory.begin_trial(rollout, version)

        tries = await self._storage.until_done("trial", begin)
        if tries > MAX_TRIES:
            detail = f"begun {MAX_TRIES} times, and killed each time before it ended"
            raise _Failed(TrialReason.INTERRUPTED, detail)
        try:
            done = await work()
        except TrainerKilled:
            raise
        except (asyncio.CancelledError, FedgeError, _Failed, _NotMeasured):
            # It ended, or was cut off on purpose: whatever it was, nothing died of it.
            self._give_up(candidate)
            raise
        self._give_up(candidate)
        return done

    def _give_up(self, candidate: CandidateAnnouncement) -> None:
        self._storage.attempt(
            "trial", lambda: self._memory.give_up_trial(candidate.rollout, candidate.number)
        )

    async def _measure(
        self,
        candidate: CandidateAnnouncement,
        manifest: PlanManifest,
        stable: StableAnnouncement,
    ) -> Measured:
        """Both versions on the same examples; without a ratio if that cannot be had."""
        max_increase = candidate.checks.max_loss_increase or 0.0
        try:
            for _ in range(MEASURINGS):
                look = self._look()
                job, version = self._baseline(stable)
                before = await self._ask(job)
                wanted = max(self._minimum_hold_out, candidate.checks.min_hold_out)
                if before.examples < wanted:
                    return Measured(
                        f"hold-out not measured: {before.examples} examples, {wanted} wanted",
                        examples=before.examples,
                    )
                try:
                    after = await self._ask_of_candidate(candidate, manifest)
                except _Failed:
                    # The version in use may not be measurable either by now.
                    again = await self._ask(job)
                    if await self._are_the_same(before, again, look):
                        raise
                    continue
                if await self._are_the_same(before, after, look):
                    return compared(before, after, max_increase, version)
        except _NotMeasured as reason:
            return Measured(f"hold-out not measured: {reason}")
        return Measured("hold-out not measured: the examples changed again and again")

    async def _are_the_same(
        self, one: Evaluated, other: Evaluated, look: tuple[object, ...]
    ) -> bool:
        """Whether both were measured on the same examples, of which none is forgotten by now."""
        if (one.rows, one.examples, one.generation) != (
            *(other.rows, other.examples, other.generation),
        ):
            return False
        if self._typed is None:
            return look == self._look()
        try:
            return other.generation == await asyncio.to_thread(self._typed.generation)
        except FedgeError as error:
            raise self._not_measured(error) from error

    def _look(self) -> tuple[object, ...]:
        """Of the files that the examples are in: another one when one was written anew."""
        data = self._data
        if data is None or self._typed is not None:
            # A store says itself what was forgotten.
            return ()
        paths = (data.path, data.path / data.labels, data.targets)
        return tuple(_written(path) for path in paths if path is not None)

    def _not_measured(self, error: FedgeError) -> _NotMeasured:
        log.warning("trial_not_measured", device=self._device, reason=str(error))
        return _NotMeasured(NOT_HERE)

    def _baseline(self, stable: StableAnnouncement) -> tuple[EvaluateJob, int]:
        """The measuring of the version in use, and its number. Raises `_NotMeasured`."""
        in_use = self._in_use()
        if in_use is None:
            raise _NotMeasured("no version was in use")
        blobs, version = self._library.blobs, in_use.version
        weights_sha256 = self._library.weights_in_use()
        if weights_sha256 is None and stable.number == version:
            weights_sha256 = stable.weights.sha256
        try:
            manifest = PlanManifest.decode(blobs.read(in_use.manifest.name))
        except FedgeError as error:
            raise self._not_measured(error) from error
        words = () if manifest.vocabulary is None else (manifest.vocabulary.sha256,)
        if weights_sha256 is None or not all(
            blobs.has(digest) for digest in (weights_sha256, manifest.graphs.eval.sha256, *words)
        ):
            raise _NotMeasured(f"what version {version} was made from is not here any more")
        return self._job(in_use.manifest.name, manifest, weights_sha256), version

    async def _ask_of_candidate(
        self, candidate: CandidateAnnouncement, manifest: PlanManifest
    ) -> Evaluated:
        try:
            job = self._job(candidate.plan.sha256, manifest, candidate.weights.sha256)
            return await self._trainer.run(job)
        except TrainerKilled:
            raise
        except StoreUnavailable as error:
            # A disk that cannot be read now is not the candidate's fault.
            raise self._not_measured(error) from error
        except FedgeError as error:
            log.warning("candidate_not_measured", device=self._device, reason=str(error))
            raise _Failed(TrialReason.HOLD_OUT, NOT_HERE) from error

    async def _ask(self, job: EvaluateJob) -> Evaluated:
        try:
            return await self._trainer.run(job)
        except TrainerKilled:
            raise
        except FedgeError as error:
            # Nothing to compare with, whatever the candidate is worth.
            raise self._not_measured(error) from error

    def _job(
        self, plan_sha256: Digest, manifest: PlanManifest, weights_sha256: Digest
    ) -> EvaluateJob:
        if self._data is None:
            raise _NotMeasured("this device has no examples")
        path, words = self._library.blobs.path, manifest.vocabulary
        return EvaluateJob(
            manifest=path(plan_sha256),
            eval_graph=path(manifest.graphs.eval.sha256),
            weights=path(weights_sha256),
            vocabulary=None if words is None else path(words.sha256),
            data=self._data,
            limits=None if self._typed is None else self._typed.limits,
            threads=self._threads,
        )

    def _in_use(self) -> Active | None:
        try:
            return self._library.active()
        except StoreError:
            return None

    def _kept_for_all(self, stable: StableAnnouncement) -> tuple[BlobRef, ...]:
        """What measuring the version in use takes, if that is published for everybody."""
        in_use = self._in_use()
        if in_use is None or in_use.version != stable.number:
            # Perhaps it is here; nobody could bring it.
            return ()
        try:
            manifest = self._library.manifest(stable.plan)
        except StoreError:
            return (stable.weights,)
        return (stable.weights, manifest.graphs.eval)


def without_measures(report: TrialReport) -> TrialReport:
    """The same end, and nothing that was found on the device's examples."""
    return report.model_copy(update={"detail": "", "loss_ratio": None, "hold_out": None})


def _written(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_ino, found.st_size, found.st_mtime_ns)


def compared(before: Evaluated, after: Evaluated, max_increase: float, version: int) -> Measured:
    """What the losses of two versions on the same examples say; `version`: the one in use."""
    old, new = before.loss_sum / before.rows, after.loss_sum / after.rows
    allowed = old + max_increase * abs(old) + LITTLE_LOSS
    note = f"hold-out: loss {new:.6g}, version {version} has {old:.6g}, allowed {allowed:.6g}"
    ratio = new / old if abs(old) > LITTLE_LOSS else None
    if ratio is not None and not math.isfinite(ratio):
        ratio = None
    return Measured(note, ratio, after.examples, worse=new > allowed)


def _check_latency(found: Activated, checks: TrialChecks) -> None:
    limit_ms, limit_ratio = checks.max_latency_ms, checks.max_latency_ratio
    if limit_ms is not None and found.latency_ms > limit_ms:
        raise _Failed(
            TrialReason.LATENCY, f"{found.latency_ms:.3g} ms an example, allowed {limit_ms:.3g}"
        )
    if limit_ratio is None or found.beside_ms is None:
        return
    if found.latency_ms > max(limit_ratio * found.beside_ms, found.beside_ms + LITTLE_MS):
        raise _Failed(
            TrialReason.LATENCY,
            f"{found.latency_ms:.3g} ms an example, the version in use takes "
            f"{found.beside_ms:.3g}: more than {limit_ratio:g} times that",
        )
