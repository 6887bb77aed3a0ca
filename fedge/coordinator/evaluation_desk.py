"""The evaluation desk: carries out what the evaluation machine decides, one evaluation at a time.

A command puts a request into the store and wakes the coordinator; this takes up the oldest one that
is open, brings the version's weights to the broker if they are not there, asks devices, and counts
an answer when it is durable. Which devices, and when it is over, is `evaluations.step`'s to decide;
what the sums say is `fleet_measures`' business. Rounds go on beside it and do not wait for it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import partial

from fedge.coordinator import evaluations
from fedge.coordinator.distribution import Distribution
from fedge.coordinator.evaluations import Evaluation
from fedge.coordinator.journal import Journal
from fedge.coordinator.latest import LatestOnly
from fedge.coordinator.store import EvaluationReport, Store, VersionRecord
from fedge.coordinator.succession import Succession
from fedge.coordinator.surroundings import Surroundings
from fedge.coordinator.workers import Workers
from fedge.schemas.blobs import BlobRef
from fedge.schemas.errors import (
    LinkClosed,
    LinkError,
    PeerError,
    RejectReason,
    StoreError,
    StoreUnavailable,
)
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import EvaluationRequest, EvaluationResult, EvaluationStatus
from fedge.schemas.plan import PlanManifest

log = EventLog(__name__)

LOOK_SOON_S = 1.0
"""Who came, who went and who answered is looked at together, so often at the most."""
REFUSED_AGAIN_S = 5.0
"""Weights that the broker or the disk refused are brought again after so long."""


@dataclass(slots=True)
class _UnderWay:
    """The evaluation of this moment.

    `begun`: its weights are on their way to the broker; `ready`: they have been there. `look_at`:
    when it is looked at who is here, None if nobody came, went or answered. `heard`: the durable
    answers since the last look; `heard_wanted` of them are such as are wanted.
    """

    state: Evaluation
    weights: BlobRef
    begun: bool = False
    ready: bool = False
    look_at: float | None = None
    heard: dict[str, EvaluationStatus] = field(default_factory=dict)
    heard_wanted: int = 0


class EvaluationDesk:
    """The evaluations of one population, whose plan `manifest` is."""

    def __init__(
        self,
        *,
        store: Store,
        plan: BlobRef,
        manifest: PlanManifest,
        distribution: Distribution,
        succession: Succession,
        journal: Journal,
        workers: Workers,
        around: Surroundings,
    ) -> None:
        self._store = store
        self._plan = plan
        self._manifest = manifest
        self._distribution = distribution
        self._succession = succession
        self._journal = journal
        self._workers = workers
        self._around = around
        self._under_way: _UnderWay | None = None
        self._one_at_a_time = asyncio.Lock()
        self._answers = LatestOnly(self._record, around.start, "evaluated")

    # ------------------------------------------------------------ looking

    @property
    def number(self) -> int | None:
        """The evaluation that is under way."""
        return None if self._under_way is None else self._under_way.state.number

    @property
    def next_deadline(self) -> float | None:
        """When `time_passed` should be called, in `clock` seconds."""
        now = self._under_way
        if now is None or now.state.closed:
            return None
        due = now.state.next_deadline
        return due if now.look_at is None else min(due, now.look_at)

    # ------------------------------------------------------------ what happens

    async def recover(self) -> None:
        """Takes up what was under way, before anything is heard: the broker kept some answers."""
        async with self._one_at_a_time:
            await self._take_up()

    async def look(self) -> None:
        """Begins with the oldest request in the store, if none is under way."""
        async with self._one_at_a_time:
            await self._take_up()
            now = self._under_way
            if now is not None and not now.begun:
                now.begun = True
                self._around.start(self._bring(now), f"evaluation-{now.state.number}")

    async def _take_up(self) -> None:
        while self._under_way is None:
            found = await self._workers.insist(self._oldest)
            if found is None:
                return
            report, version = found
            obstacle = self._obstacle(version)
            if obstacle is None and version is not None:
                self._under_way = self._opened(report, version)
                return
            await self._keep_closed(report.evaluation.number, obstacle or "")

    def time_passed(self) -> None:
        """The clock may have reached `next_deadline`."""
        due = self.next_deadline
        if due is not None and self._around.clock() >= due:
            self._look()

    def presence_changed(self) -> None:
        """Somebody came or went."""
        now = self._under_way
        if now is not None:
            self._look_soon(now)

    def reconnected(self) -> None:
        """The broker may have lost what it kept."""
        now = self._under_way
        if now is not None and now.begun:
            self._around.start(self._bring(now), f"evaluation-{now.state.number}")

    def answered(self, device: str, result: EvaluationResult) -> None:
        """A device's answer, perhaps not for the first time.

        Raises `PeerError`: late if that evaluation is not under way, not_in_cohort if the device
        was not asked.
        """
        now = self._under_way
        if now is None or now.state.closed or result.evaluation != now.state.number:
            raise PeerError(
                RejectReason.LATE, f"an answer to evaluation {result.evaluation}, not under way"
            )
        if device not in now.state.asked:
            raise PeerError(
                RejectReason.NOT_IN_COHORT,
                f"{device} was not asked in evaluation {now.state.number}",
            )
        if device in now.heard or now.state.has_answered(device):
            return
        try:
            self._check(result, now.state)
        except PeerError as error:
            # It would be asked again and again for what it cannot give.
            self._journal.refused(device, error, None)
            result = EvaluationResult(
                evaluation=now.state.number,
                number=now.state.version,
                status=EvaluationStatus.FAILED,
                detail=f"its answer was refused: {error}"[:500],
            )
        self._answers.put(device, result)

    # ------------------------------------------------------------ beginning

    def _oldest(self) -> tuple[EvaluationReport, VersionRecord | None] | None:
        record = self._store.oldest_open_evaluation()
        if record is None:
            return None
        if record.opened_at is None:
            at = self._around.wall_clock()
            self._store.open_evaluation(record.number, at=at, until=at + record.deadline_s)
        report = self._store.evaluation_report(record.number)
        return None if report is None else (report, self._store.version(record.version))

    def _obstacle(self, version: VersionRecord | None) -> str | None:
        if version is None or not version.files_kept:
            return "the version's files are not here"
        if version.plan_sha256 != self._plan.sha256:
            return "the version is of another plan"
        return None

    def _opened(self, report: EvaluationReport, version: VersionRecord) -> _UnderWay:
        record, wall_now = report.evaluation, self._around.wall_clock()
        until = wall_now if record.until is None else record.until
        state = evaluations.opened(
            record.number,
            record.version,
            wanted=record.wanted,
            seed=record.seed,
            deadline_s=record.deadline_s,
            left_s=evaluations.left_s(until, record.deadline_s, wall_now),
            now=self._around.clock(),
        )
        state = evaluations.resumed(state, {one.device: one.status for one in report.answers})
        log.info(
            "evaluation_resumed" if state.asked else "evaluation_opened",
            evaluation=record.number,
            version=record.version,
            wanted=record.wanted,
            asked=len(state.asked),
            answered=len(state.answered),
        )
        self._around.wake()
        return _UnderWay(state, version.weights)

    async def _bring(self, now: _UnderWay) -> None:
        while self._under_way is now:
            try:
                await self._distribution.hold(now.weights)
            except LinkClosed:
                raise
            except (LinkError, StoreUnavailable) as error:
                log.error("evaluation_waits", evaluation=now.state.number, reason=str(error))
                await asyncio.sleep(REFUSED_AGAIN_S)
            except StoreError as error:
                # Nothing that a later try could mend.
                if not now.state.closed:
                    now.state = evaluations.given_up(now.state)
                    await self._close(now, f"the version's weights cannot be read: {error}")
                return
            else:
                now.ready = True
                self._look()
                return

    # ------------------------------------------------------------ carrying out

    def _online(self) -> frozenset[str] | None:
        now = self._under_way
        known = now is not None and now.ready and self._around.all_known()
        return self._around.online() if known else None

    def _look_soon(self, now: _UnderWay) -> None:
        if now.look_at is None:
            now.look_at = self._around.clock() + LOOK_SOON_S
            self._around.wake()

    def _look(self) -> None:
        now = self._under_way
        if now is None:
            return
        online = self._online()
        event: evaluations.Event = (
            evaluations.Answered(now.heard, online) if now.heard else evaluations.Looked(online)
        )
        now.look_at, now.heard, now.heard_wanted = None, {}, 0
        now.state, commands = evaluations.step(now.state, event, self._around.clock())
        self._around.wake()
        number = now.state.number
        for command in commands:
            match command:
                case evaluations.Ask(devices):
                    self._around.start(self._ask(now, devices), f"evaluation-ask-{number}")
                case evaluations.AskAgain(devices):
                    self._request(now, devices)
                case evaluations.Close(reason):
                    self._around.start(self._close(now, reason), f"evaluation-close-{number}")

    async def _ask(self, now: _UnderWay, devices: tuple[str, ...]) -> None:
        number, at = now.state.number, self._around.wall_clock()
        # Whom it asks it must know after a restart: nobody else's answer counts.
        record = partial(self._store.record_evaluation_asked, number, devices, at=at)
        if await self._workers.insist(record) and not now.state.closed:
            log.info("evaluation_asks", evaluation=number, devices=len(devices))
            self._request(now, devices)

    def _request(self, now: _UnderWay, devices: tuple[str, ...]) -> None:
        left_s = max(1.0, now.state.until - self._around.clock())
        request = EvaluationRequest(
            evaluation=now.state.number,
            number=now.state.version,
            plan=self._plan,
            weights=now.weights,
            deadline_s=left_s,
        )
        for device in devices:
            self._around.tell(device, request)

    # ------------------------------------------------------------ answers

    def _check(self, result: EvaluationResult, state: Evaluation) -> None:
        if result.number != state.version:
            raise PeerError(
                RejectReason.WRONG_BASE,
                f"version {result.number}; the evaluation is of version {state.version}",
            )
        for sums in (result.sums, result.personal):
            if sums is None:
                continue
            if sums.metrics.keys() != set(self._manifest.metrics):
                raise PeerError(
                    RejectReason.INVALID_FIELD, "the sums are not those that the plan names"
                )
            why = self._manifest.impossible(sums.metrics, sums.rows)
            if why is not None:
                raise PeerError(RejectReason.INVALID_FIELD, f"nobody can have measured this: {why}")
        personal, own = result.personal, result.sums
        if personal is not None and own is not None and personal.rows != own.rows:
            raise PeerError(
                RejectReason.INVALID_FIELD, "the two sums are not over the same examples"
            )

    async def _record(self, device: str, result: EvaluationResult) -> None:
        at = self._around.wall_clock()
        try:
            await self._workers.durable(
                lambda: self._store.record_evaluation_answer(device, result, at=at)
            )
        except PeerError as error:
            # It was closed while the answer waited for its turn.
            self._journal.refused(device, error, None)
            return
        log.info(
            "evaluation_answered",
            evaluation=result.evaluation,
            device=device,
            status=result.status.value,
        )
        now = self._under_way
        if now is None or now.state.number != result.evaluation or device in now.heard:
            return
        now.heard[device] = result.status
        now.heard_wanted += evaluations.counts(result.status)
        # Who is here matters if answers are missing, and then it takes its time in a large fleet.
        if now.heard_wanted >= now.state.missing:
            self._look()
        else:
            self._look_soon(now)

    # ------------------------------------------------------------ the end

    async def _close(self, now: _UnderWay, reason: str) -> None:
        await self._keep_closed(now.state.number, reason)
        self._distribution.let_go(now.weights)
        self._under_way = None
        await self.look()
        try:
            await self._distribution.clear_before(self._succession.newest)
        except LinkClosed:
            raise
        except (LinkError, StoreError) as error:
            # It is noted as lying there: the next version's turn takes it back.
            log.error("not_taken_back", evaluation=now.state.number, reason=str(error))

    async def _keep_closed(self, number: int, reason: str) -> None:
        at = self._around.wall_clock()
        await self._workers.insist(partial(self._store.close_evaluation, number, reason, at=at))
        log.info("evaluation_closed", evaluation=number, reason=reason)
