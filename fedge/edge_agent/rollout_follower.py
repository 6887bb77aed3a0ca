"""A device in rollouts: hears what is announced, chooses, acts, and tells the coordinator.

What apps use changes only here while the fleet is in stages, one change at a time, each a single
replacement of a file: whenever this process is killed, a good model is in use, and the next start
chooses again from what is on disk and what the broker keeps announced. How a trial ended is written
down before it has any consequence, and said until the coordinator has counted it. A change that was
begun is ended and told, whatever is heard meanwhile; what is to be said waits for a network, and
nothing waits for that.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial

from fedge.edge_agent.events import Activated, Event
from fedge.edge_agent.free_time import FreeTime
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
from fedge.edge_agent.trial import Trials, without_measures
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
    TrialReport,
    VersionAnnouncement,
)
from fedge.schemas.rollout_share import place_of

log = EventLog(__name__)

TRY_AGAIN_S = 1.0
FIRST_SAY_AGAIN_S = 60.0
LONGEST_SAY_AGAIN_S = 3600.0
"""A report that was not counted is said again after a minute, then ever more rarely."""


class RolloutFollower:
    """The rollouts of a population on one device. `run` runs for as long as the agent.

    `feed`: takes what happened. `send`: to the coordinator, returns when the broker has it.
    `until_idle`: returns when no training is under way. `free`: what `trials` waits for.
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
        free: FreeTime,
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
        self._free = free
        self._due = asyncio.Event()
        self._is_staged: bool | None = None
        self._stable: StableAnnouncement | None = None
        self._candidate: CandidateAnnouncement | None = None
        self._refused: set[int] = set()
        self._damaged_standby: int | None = None
        self._switching = asyncio.Lock()
        self._say_again_s = FIRST_SAY_AGAIN_S
        self._says = False
        self._unsaid: dict[object, Message] = {}
        self._saying: tuple[Message, asyncio.Task[None]] | None = None
        self._something_to_say = asyncio.Event()
        self._forgets = 0
        # Something may have been taken back while this agent was not running.
        self._must_forget = trials.may_be_asked_to_forget

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

    def forgotten(self) -> None:
        """Examples were taken back: what was measured on them is told to nobody any more."""
        self._forgets += 1
        self._must_forget = self._says = True
        for what, message in tuple(self._unsaid.items()):
            if isinstance(message, TrialReport):
                del self._unsaid[what]
        if self._saying is not None and isinstance(self._saying[0], TrialReport):
            self._saying[1].cancel()
        self._due.set()

    def see(self, *, free: bool) -> None:
        """Whether the device has nothing to do that a round waits for, and may work at all."""
        self._free.see(free=free)

    @property
    def is_measuring(self) -> bool:
        """Whether a candidate is being measured, so that a rule that breaks must stop it."""
        return self._free.is_working

    # ------------------------------------------------------------ acting

    async def run(self) -> None:
        """Chooses and acts whenever something has changed, until cancelled."""
        works = [
            asyncio.create_task(self._keep_acting(), name=f"act-{self._device}"),
            asyncio.create_task(self._keep_saying(), name=f"say-{self._device}"),
        ]
        try:
            done, _ = await asyncio.wait(works, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for work in works:
                work.cancel()
            await asyncio.wait(works)
        for work in done:
            work.result()

    async def _keep_acting(self) -> None:
        while True:
            self._due.clear()
            choice = self._choice()
            if not isinstance(choice, Stay):
                await self._act(choice)
                continue
            waiting = self._say()
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
                standby=self._standby(),
                verdict=None if trial is None else trial.report.outcome,
                failed=failed | self._refused,
            )
        )

    def _standby(self) -> int | None:
        standby = self._library.standby()
        return None if standby == self._damaged_standby else standby

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
            await _until_ended(work)
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
        log.info("trial_begun", device=self._device, rollout=rollout, version=version)
        forgets = self._forgets
        try:
            report = await self._trials.run(candidate, stable)
        except TrainerKilled as error:
            log.warning("trial_again", device=self._device, rollout=rollout, reason=str(error))
            await asyncio.sleep(TRY_AGAIN_S)
            return
        finally:
            self._versions.let_go()

        async def end() -> None:
            forgotten = forgets != self._forgets
            self._memory.end_trial(without_measures(report) if forgotten else report)

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
            self._tell(Report(kind=kind, version=version.number, detail=str(error)[:500]))
        finally:
            self._versions.let_go()

    async def _make_and_switch(self, version: PublishedVersion) -> None:
        if not await asyncio.to_thread(self._library.has_model, version):
            await self._versions.bring(version)
            await self._until_idle()
            await self._trainer.run(self._library.activation_of(version))
        await self._switch(
            version.number, partial(self._library.activate, version, stand_by=True), put_back=False
        )

    async def _put_back(self, version: int) -> None:
        switch = partial(self._switch, version, self._library.put_back, put_back=True)
        try:
            await self._storage.until_done("model", switch)
        except FedgeError as error:
            log.error("not_put_back", device=self._device, version=version, reason=str(error))
            # Where its record cannot be removed, it is not tried again for that.
            self._damaged_standby = version
            self._storage.attempt("model", self._library.forget_standby)

    async def _switch(self, version: int, change: Callable[[], object], *, put_back: bool) -> None:
        """Makes the change and tells of it. Cancelled in the midst, it does both nevertheless.

        Raises what `change` raises.
        """
        work = asyncio.create_task(
            self._switch_and_tell(version, change, put_back=put_back),
            name=f"switch-{self._device}",
        )
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            # A thread cannot be stopped, and what it has changed must be known.
            await _until_ended(work)
            if not work.cancelled() and (error := work.exception()) is not None:
                log.error("not_switched", device=self._device, version=version, reason=str(error))
            raise

    async def _switch_and_tell(
        self, version: int, change: Callable[[], object], *, put_back: bool
    ) -> None:
        async with self._switching:
            await asyncio.to_thread(change)
        self._damaged_standby = None
        if not self._is_staged:
            # It was forgotten while it was written.
            self._storage.attempt("model", self._library.forget_standby)
        detail = ""
        if put_back:
            detail = "put back: the rollout was stopped"
            log.warning("version_put_back", device=self._device, version=version)
        else:
            log.info("version_activated", device=self._device, version=version)
        self._feed(Activated(version))
        self._says = True
        self._tell(Report(kind=ReportKind.ACTIVATED, version=version, detail=detail))

    # ------------------------------------------------------------ saying

    def _say(self) -> bool:
        """Says how the trial ended, if that is due; whether the coordinator may not know."""
        candidate = self._candidate
        if candidate is None or not self._is_staged:
            return False
        if self._must_forget and not self._storage.attempt("trial", self._memory.forget_measures):
            return True
        self._must_forget = False
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
            self._tell(trial.report)
        return True

    def _tell(self, message: Message) -> None:
        """Has it said in its turn; the newest alone where one replaces the other."""
        what: object = type(message)
        if isinstance(message, Report):
            of_one_version = message.kind is not ReportKind.ACTIVATED
            what = (message.kind, message.version if of_one_version else None)
        self._unsaid.pop(what, None)
        self._unsaid[what] = message
        self._something_to_say.set()

    async def _keep_saying(self) -> None:
        while True:
            await self._something_to_say.wait()
            self._something_to_say.clear()
            while self._unsaid:
                message = self._unsaid.pop(next(iter(self._unsaid)))
                await self._say_one(message)

    async def _say_one(self, message: Message) -> None:
        task = asyncio.create_task(self._sent(message), name=f"send-{self._device}")
        self._saying = (message, task)
        try:
            await task
        except asyncio.CancelledError:
            own = asyncio.current_task()
            if own is not None and own.cancelling():
                raise
            # It was taken back.
        except LinkClosed:
            return
        except LinkError as error:
            log.error("not_sent", device=self._device, reason=str(error))
        finally:
            self._saying = None

    async def _sent(self, message: Message) -> None:
        await self._send(message)


async def _until_ended(work: asyncio.Task[None]) -> None:
    """Returns when it has, however often this is cancelled meanwhile; then raises that."""
    cancelled = False
    while not work.done():
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
