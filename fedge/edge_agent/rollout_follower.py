"""A device in rollouts: hears what is announced, chooses, acts, and tells the coordinator.

What apps use changes only here while the fleet is in stages, one change at a time, each a single
replacement of a file: whenever this process is killed, a good model is in use, and the next start
chooses again from what is on disk and what the broker keeps announced. How a trial ended is written
down before it has any consequence, and said until the coordinator has counted it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial

from fedge.edge_agent.events import Activated, Event
from fedge.edge_agent.library import Library
from fedge.edge_agent.serving_choice import (
    Candidate,
    Choice,
    PutBack,
    Standing,
    Stay,
    Take,
    Try,
    choose,
)
from fedge.edge_agent.state import AgentState
from fedge.edge_agent.storage_watch import StorageWatch
from fedge.edge_agent.trainer.process import Trainer, TrainerKilled
from fedge.edge_agent.trial import Trials
from fedge.edge_agent.versions import Versions
from fedge.schemas.errors import FedgeError, LinkClosed, LinkError, StoreError, StoreUnavailable
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import (
    CandidateAnnouncement,
    Message,
    PublishedVersion,
    Report,
    ReportKind,
    StableAnnouncement,
    TrialCounted,
    TrialOutcome,
    TrialReason,
    TrialReport,
    VersionAnnouncement,
)
from fedge.schemas.rollout_share import place_of

log = EventLog(__name__)

MAX_TRIES = 3
"""A trial that was begun so often and never ended is what ends it: it kills the process."""
TRY_AGAIN_S = 1.0
FIRST_SAY_AGAIN_S = 60.0
LONGEST_SAY_AGAIN_S = 3600.0
"""A report that was not counted is said again after a minute, then ever more rarely."""


class RolloutFollower:
    """The rollouts of a population on one device. `run` runs for as long as the agent.

    `feed`: takes what happened. `send`: to the coordinator, returns when the broker has it.
    `until_idle`: returns when no training is under way.
    """

    def __init__(
        self,
        population: str,
        device: str,
        *,
        library: Library,
        versions: Versions,
        trials: Trials,
        memory: AgentState,
        trainer: Trainer,
        storage: StorageWatch,
        feed: Callable[[Event], None],
        send: Callable[[Message], Awaitable[None]],
        until_idle: Callable[[], Awaitable[None]],
    ) -> None:
        self._population = population
        self._device = device
        self._library = library
        self._versions = versions
        self._trials = trials
        self._memory = memory
        self._trainer = trainer
        self._storage = storage
        self._feed = feed
        self._send = send
        self._until_idle = until_idle
        self._due = asyncio.Event()
        self._is_staged: bool | None = None
        self._stable: StableAnnouncement | None = None
        self._candidate: CandidateAnnouncement | None = None
        self._refused: set[int] = set()
        self._switching = asyncio.Lock()
        self._say_again_s = FIRST_SAY_AGAIN_S
        self._says = False

    # ------------------------------------------------------------ hearing

    def heard_version(self, version: VersionAnnouncement) -> None:
        """The newest version says whether rollouts say what is used."""
        if self._is_staged != bool(version.staged):
            self._is_staged = self._library.is_staged = bool(version.staged)
            log.info("serves_in_stages", device=self._device, staged=self._is_staged)
            if not self._is_staged:
                self._storage.attempt("model", self._library.forget_standby)
            self._due.set()

    def heard_stable(self, stable: StableAnnouncement) -> None:
        """The version of who is in no rollout."""
        self._stable = stable
        self._refused.discard(stable.number)
        self._due.set()

    def heard_candidate(self, candidate: CandidateAnnouncement) -> None:
        """The newest rollout, or a change of it."""
        self._candidate = candidate
        self._refused.discard(candidate.number)
        self.say_again()

    def heard_counted(self, counted: TrialCounted) -> None:
        """The coordinator knows how the trial ended here."""
        self._storage.attempt("trial", lambda: self._memory.count_trial(counted.rollout))

    def say_again(self) -> None:
        """What was said may have been lost."""
        self._says, self._say_again_s = True, FIRST_SAY_AGAIN_S
        self._due.set()

    # ------------------------------------------------------------ acting

    async def run(self) -> None:
        """Chooses and acts whenever something has changed, until cancelled."""
        while True:
            self._due.clear()
            choice = self._choice()
            if not isinstance(choice, Stay):
                await self._act(choice)
                continue
            waiting = await self._say()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._say_again_s if waiting else None):
                    await self._due.wait()
                    continue
            self._says, self._say_again_s = True, min(2 * self._say_again_s, LONGEST_SAY_AGAIN_S)

    def _choice(self) -> Choice:
        stable, candidate = self._stable, self._candidate
        if not self._is_staged or stable is None or candidate is None:
            return Stay()
        try:
            trial = self._memory.trial(candidate.rollout, candidate.number)
            failed = self._memory.failed_versions()
        except StoreError as error:
            log.error("rollout_state_lost", device=self._device, reason=str(error))
            return Stay()
        place = place_of(self._population, candidate.rollout, self._device)
        return choose(
            Standing(
                stable=stable.number,
                candidate=Candidate(candidate.rollout, candidate.number, candidate.phase),
                is_in=place < candidate.share,
                serving=self._serving(),
                standby=self._library.standby(),
                verdict=None if trial is None else trial.report.outcome,
                failed=failed | self._refused,
            )
        )

    def _serving(self) -> int | None:
        try:
            active = self._library.active()
        except StoreError:
            return None
        return None if active is None else active.version

    async def _act(self, choice: Choice) -> None:
        """Does what was chosen, unless something else is to be done meanwhile."""
        work = asyncio.create_task(self._do(choice), name=f"rollout-{self._device}")
        try:
            while not work.done():
                heard = asyncio.create_task(self._due.wait(), name=f"heard-{self._device}")
                try:
                    await asyncio.wait({work, heard}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    heard.cancel()
                self._due.clear()
                if not work.done() and self._choice() != choice:
                    break
        finally:
            work.cancel()
            await asyncio.wait({work})
        if not work.cancelled():
            # What it could not deal with ends the agent, as anywhere else.
            work.result()

    async def _do(self, choice: Choice) -> None:
        stable, candidate = self._stable, self._candidate
        if stable is None or candidate is None:
            return
        match choice:
            case Try():
                await self._try(candidate, stable)
            case Take(version):
                await self._take(candidate if candidate.number == version else stable)
            case PutBack(version):
                await self._put_back(version)
            case Stay():
                return

    async def _try(self, candidate: CandidateAnnouncement, stable: StableAnnouncement) -> None:
        rollout, version = candidate.rollout, candidate.number

        async def begin() -> int:
            return self._memory.begin_trial(rollout, version)

        tries = await self._storage.until_done("trial", begin)
        log.info("trial_begun", device=self._device, rollout=rollout, version=version, tries=tries)
        try:
            if tries > MAX_TRIES:
                report = TrialReport(
                    rollout=rollout,
                    version=version,
                    outcome=TrialOutcome.ROLLED_BACK,
                    reason=TrialReason.INTERRUPTED,
                    detail=f"begun {MAX_TRIES} times, and killed each time before it ended",
                )
            else:
                report = await self._trials.run(candidate, stable)
        except TrainerKilled as error:
            log.warning("trial_again", device=self._device, rollout=rollout, reason=str(error))
            await asyncio.sleep(TRY_AGAIN_S)
            return
        except asyncio.CancelledError:
            # On purpose, and not by what is tried.
            self._storage.attempt("trial", lambda: self._memory.give_up_trial(rollout, version))
            raise
        finally:
            self._library.pin("rollout", ())

        async def end() -> None:
            self._memory.end_trial(report)

        await self._storage.until_done("trial", end)
        self.say_again()

    async def _take(self, version: PublishedVersion) -> None:
        try:
            await self._storage.until_done("model", partial(self._make_and_switch, version))
        except FedgeError as error:
            self._refused.add(version.number)
            log.error(
                "version_refused", device=self._device, version=version.number, reason=str(error)
            )
            kind = ReportKind.ACTIVATION_FAILED
            await self._tell(Report(kind=kind, version=version.number, detail=str(error)[:500]))

    async def _make_and_switch(self, version: PublishedVersion) -> None:
        if not await asyncio.to_thread(self._library.has_model, version):
            await self._versions.bring(version)
            await self._until_idle()
            await self._trainer.run(self._library.activation_of(version))
        await asyncio.shield(self._switch(partial(self._library.activate, version, stand_by=True)))
        log.info("version_activated", device=self._device, version=version.number)
        self._library.pin("rollout", ())
        await self._in_use(version.number)

    async def _put_back(self, version: int) -> None:
        try:
            await self._storage.until_done(
                "model", lambda: asyncio.shield(self._switch(self._library.put_back))
            )
        except FedgeError as error:
            log.error("not_put_back", device=self._device, version=version, reason=str(error))
            self._storage.attempt("model", self._library.forget_standby)
            return
        log.warning("version_put_back", device=self._device, version=version)
        await self._in_use(version, "put back: the rollout was stopped")

    async def _switch(self, change: Callable[[], object]) -> None:
        # A change that nobody waits for any more is still finished before the next one begins.
        async with self._switching:
            await asyncio.to_thread(change)

    async def _in_use(self, version: int, detail: str = "") -> None:
        self._feed(Activated(version))
        self._says = True
        await self._tell(Report(kind=ReportKind.ACTIVATED, version=version, detail=detail))

    # ------------------------------------------------------------ saying

    async def _say(self) -> bool:
        """Says how the trial ended, if that is due; whether the coordinator may not know."""
        candidate = self._candidate
        if candidate is None or not self._is_staged:
            return False
        try:
            trial = self._memory.trial(candidate.rollout, candidate.number)
        except StoreUnavailable:
            return True
        if trial is None or trial.counted:
            return False
        passed = trial.report.outcome is TrialOutcome.ACTIVE
        if passed and self._serving() != candidate.number:
            return False
        if self._says:
            self._says = False
            await self._tell(trial.report)
        return True

    async def _tell(self, message: Message) -> None:
        try:
            await self._send(message)
        except LinkClosed:
            return
        except LinkError as error:
            log.error("not_sent", device=self._device, reason=str(error))
