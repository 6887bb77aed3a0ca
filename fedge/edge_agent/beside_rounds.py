"""What a device does beside rounds, and in what order it gives way.

Rollouts, evaluations, a model of its own, word counts, and answers to apps. Each is a part that
knows its own matter; this brings them together: it makes those that the settings ask for, hands
them what they are told, and tells them when the device is free. A round goes before them all, then
evaluations and what a rollout measures, then the device's own model.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any

from fedge.edge_agent import machine
from fedge.edge_agent.activator import Activator
from fedge.edge_agent.download import Downloads
from fedge.edge_agent.eligibility_watch import EligibilityWatch
from fedge.edge_agent.evaluations import Evaluations
from fedge.edge_agent.events import Event
from fedge.edge_agent.free_time import FreeTime
from fedge.edge_agent.library import Library
from fedge.edge_agent.personaliser import Personaliser, Seen
from fedge.edge_agent.rollout_follower import RolloutFollower
from fedge.edge_agent.settings import Settings
from fedge.edge_agent.state import AgentState
from fedge.edge_agent.storage_watch import StorageWatch
from fedge.edge_agent.trainer.process import Trainer
from fedge.edge_agent.trial import Trials
from fedge.edge_agent.typed_texts import TypedTexts
from fedge.edge_agent.usage import UsageMeter
from fedge.edge_agent.versions import Versions
from fedge.edge_agent.word_counts import WordCounts
from fedge.schemas import messages
from fedge.schemas.messages import Message

if TYPE_CHECKING:
    from fedge.edge_agent.apps.server import AppServer

_WITHDRAWN_BY_SILENCE = (messages.StableAnnouncement, messages.CandidateAnnouncement)


class BesideRounds:
    """The parts of one device that are no part of a round.

    `state`: the machine's, as it is now. `feed`: gives it an event. `send`: to the coordinator,
    returns when the broker has it. `meter`: of what a model of its own takes. `pace_changed`: an
    evaluation or a training of its own has begun or ended.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        library: Library,
        versions: Versions,
        downloads: Downloads,
        activator: Activator,
        trainer: Trainer,
        memory: AgentState,
        storage: StorageWatch,
        typed: TypedTexts | None,
        watch: EligibilityWatch | None,
        meter: UsageMeter,
        state: Callable[[], machine.Agent],
        feed: Callable[[Event], None],
        send: Callable[[Message], Awaitable[None]],
        pace_changed: Callable[[], None],
        rng: random.Random,
        wall_clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._library = library
        self._versions = versions
        self._downloads = downloads
        self._activator = activator
        self._trainer = trainer
        self._memory = memory
        self._storage = storage
        self._typed = typed
        self._watch = watch
        self._meter = meter
        self._state = state
        self._feed = feed
        self._send = send
        self._pace_changed = pace_changed
        self._rng = rng
        self._wall_clock = wall_clock
        self._rollouts = self._rollouts_of()
        self._evaluations = self._evaluations_of()
        self._personaliser = self._personaliser_of()
        self._words = self._word_counts_of()
        self._apps = self._service_for_apps()
        self._in_use: int | None = None

    @property
    def is_working(self) -> bool:
        """Whether the device measures or trains for itself now."""
        trains = self._personaliser is not None and self._personaliser.is_training
        return trains or self._measures

    @property
    def _measures(self) -> bool:
        return self._evaluations.is_running or self._rollouts.is_measuring

    def works(self) -> Iterator[tuple[Coroutine[Any, Any, None], str]]:
        """What has to run until cancelled, with its names."""
        yield self._rollouts.run(), "rollouts"
        yield self._evaluations.run(), "measure"
        if self._personaliser is not None:
            yield self._personaliser.run(), "personalise"
        if self._words is not None:
            yield self._words.run(), "words"
        if self._apps is not None:
            yield self._apps.run(), "apps"

    def recover(self) -> None:
        """Clears what an earlier life with other settings left."""
        if self._personaliser is None:
            self._storage.attempt("sweep", self._library.personal.forget)

    # ------------------------------------------------------------ hearing

    def came_up(self) -> None:
        """The coordinator may hear now what it did not say that it has."""
        self._rollouts.say_again()
        if self._words is not None:
            self._words.say_again()

    def hears(self, message: Message) -> None:
        """Takes what is for one of these parts; anything else is none of its business."""
        match message:
            case messages.StableAnnouncement():
                self._rollouts.heard_stable(message)
            case messages.CandidateAnnouncement():
                self._rollouts.heard_candidate(message)
            case messages.TrialCounted():
                self._rollouts.heard_counted(message)
            case messages.VersionAnnouncement():
                self._rollouts.heard_version(message)
            case messages.EvaluationRequest():
                self._evaluations.asked(message)
            case messages.WordCountAnnouncement() if self._words is not None:
                self._words.asked(message)
            case messages.WordCountHeard() if self._words is not None:
                self._words.heard(message)

    def withdrawn(self, kind: type[Message]) -> bool:
        """An empty message of this kind: it is not kept at the broker any more.

        Returns whether that means something; otherwise an empty message is a broken one.
        """
        if kind is messages.WordCountAnnouncement:
            if self._words is not None:
                self._words.withdrawn()
            return True
        # The broker forgets them: the newest version says what holds instead.
        return kind in _WITHDRAWN_BY_SILENCE

    def see(self) -> None:
        """The machine has moved, or an evaluation has: who may work now?"""
        state = self._state()
        if self._apps is not None and state.active != self._in_use:
            self._in_use = state.active
            self._apps.look_again()
        free = machine.is_idle(state)
        self._rollouts.see(free=free)
        self._evaluations.see(free=free)
        if self._words is not None:
            self._words.see(free=free)
        if self._personaliser is not None:
            self._personaliser.see(_seen_in(state, measuring=self._measures))
        self._pace_changed()

    def counted(self) -> None:
        """The number of examples has changed."""
        if self._personaliser is not None:
            self._personaliser.look_again()

    def _own_model_changed(self) -> None:
        if self._apps is not None:
            self._apps.look_again()
        self._pace_changed()

    async def forgotten(self) -> None:
        """Something that was typed was taken back."""
        if self._apps is not None:
            self._apps.look_again()
        if self._personaliser is not None:
            self._personaliser.look_again(forgotten=True)
        self._rollouts.forgotten()
        await self._evaluations.forgotten()

    # ------------------------------------------------------------ making

    def _rollouts_of(self) -> RolloutFollower:
        settings = self._settings
        free = FreeTime(changed=self.see)
        trials = Trials(
            settings.device,
            library=self._library,
            versions=self._versions,
            memory=self._memory,
            trainer=self._trainer,
            storage=self._storage,
            data=settings.data,
            typed=self._typed,
            threads=settings.trainer.threads,
            until_idle=self._activator.until_not_training,
            free=free,
            minimum_hold_out=settings.participation.minimum_hold_out,
        )
        return RolloutFollower(
            settings.population,
            settings.device,
            library=self._library,
            versions=self._versions,
            trials=trials,
            memory=self._memory,
            trainer=self._trainer,
            storage=self._storage,
            feed=self._feed,
            send=self._send,
            until_idle=self._activator.until_not_training,
            free=free,
        )

    def _evaluations_of(self) -> Evaluations:
        settings = self._settings
        return Evaluations(
            settings.device,
            data=settings.data,
            typed=self._typed,
            minimum_hold_out=settings.participation.minimum_hold_out,
            threads=settings.trainer.threads,
            trainer=self._trainer,
            library=self._library,
            in_hand=lambda: self._versions.held,
            fetch=self._downloads.fetch,
            send=self._send,
            changed=self.see,
            personal_weights=self._library.personal.weights_of,
        )

    def _personaliser_of(self) -> Personaliser | None:
        settings = self._settings
        if settings.personalisation is None or settings.data is None:
            return None
        return Personaliser(
            settings.device,
            settings.population,
            settings.personalisation,
            data=settings.data,
            typed=self._typed,
            threads=settings.trainer.threads,
            trainer=self._trainer,
            library=self._library,
            held=lambda: self._versions.held,
            fetch=self._downloads.fetch,
            meter=self._meter if settings.participation.has_limits else None,
            changed=self._own_model_changed,
            wall_clock=self._wall_clock,
        )

    def _word_counts_of(self) -> WordCounts | None:
        settings = self._settings
        if settings.word_counts.epsilon_limit <= 0:
            return None

        def known() -> frozenset[str] | None:
            held = self._versions.held
            if held is None:
                return None
            vocabulary = self._library.vocabulary(self._library.manifest(held.plan))
            return frozenset(() if vocabulary is None else vocabulary.words)

        return WordCounts(
            settings.device,
            limit=settings.word_counts.epsilon_limit,
            least_typed=settings.word_counts.least_typed,
            state_dir=settings.state_dir,
            data=settings.data,
            typed=self._typed,
            known=known,
            send=self._send,
            rng=self._rng,
        )

    def _service_for_apps(self) -> AppServer | None:
        if not self._settings.apps.is_on:
            return None
        from fedge.edge_agent.apps.server import AppServer  # noqa: PLC0415 -- most agents have none

        return AppServer(
            self._settings,
            self._library,
            self._storage,
            state=self._state,
            standing=lambda: None if self._watch is None else self._watch.standing,
            changed=lambda: None if self._typed is None else self._typed.look_again(),
        )


def _seen_in(state: machine.Agent, *, measuring: bool) -> Seen:
    """What a personal training has to yield to. An update that waits for its receipt is nothing."""
    stage = None if state.work is None else state.work.stage
    busy = measuring or stage not in (None, machine.Stage.OFFERED)
    return Seen(state.active, state.held, state.eligible, busy)
