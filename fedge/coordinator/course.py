"""The course of rounds: the one that is under way, and what is carried from one to the next.

It puts the two round machines behind one face, for the conductor that carries out what they
decide: which round is open, who is waited for in it, what is announced, how many are asked. No
store, no broker, no clock of its own; `now` is the machines' clock in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedge.coordinator import buffer, pace, rounds
from fedge.coordinator.buffer import Buffer, Flight, Key
from fedge.coordinator.over_selection import Delivery, OverSelection, devices_to_ask, learned
from fedge.coordinator.rounds import Mode, Phase, Round, RoundPolicy, Strategy
from fedge.schemas.messages import RoundAnnouncement, RoundPhase

AnyRound = Round | Buffer


@dataclass(frozen=True, slots=True)
class Awaited:
    """What a device was asked for.

    `base`: the version to train from. `claim`: the examples that it said it has when it checked in,
    if that was heard by this process; weight cannot be claimed afterwards.
    """

    base: int
    claim: int | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """What an event led to. `asked`: devices that are asked now for the first time."""

    state: AnyRound
    commands: Sequence[rounds.Command]
    asked: frozenset[str]


class Course:
    """Rounds of one policy. `checkins_per_s`, `least_spread_s`: see `pace.invitation`."""

    def __init__(
        self, policy: RoundPolicy, *, checkins_per_s: float, least_spread_s: float = 0.0
    ) -> None:
        self.policy = policy
        self._checkins_per_s = checkins_per_s
        self._least_spread_s = least_spread_s
        self._flights: Mapping[Key, Flight] = {}
        self._claims: dict[Key, int] = {}
        self.belief = OverSelection()
        self._interrupted = False
        self._time_was = -math.inf
        self.round: AnyRound | None = None
        self.last_number = 0

    # ------------------------------------------------------------ looking

    @property
    def number(self) -> int | None:
        """The number of the round that is under way, None between two."""
        return None if self.round is None else self.round.number

    @property
    def flights(self) -> Mapping[Key, Flight]:
        """Work under way in asynchronous mode, also between two rounds."""
        return self.round.flights if isinstance(self.round, Buffer) else self._flights

    def awaited(self, device: str, asked_in: int) -> Awaited | None:
        """What the device was asked for in that round, None if nothing is waited for."""
        state = self.round
        if isinstance(state, Round):
            training = state.phase is Phase.TRAINING and asked_in == state.number
            if training and device in state.cohort - state.accepted:
                return Awaited(state.base, self._claims.get((asked_in, device)))
            return None
        # Between two buffers, too: an update waits for the next one to open.
        flight = self.flights.get((asked_in, device))
        claim = self._claims.get((asked_in, device))
        return None if flight is None else Awaited(flight.base, claim)

    def is_foreign(self, device: str, asked_in: int) -> bool:
        """Whether a device speaks of the open round without having been asked in it."""
        state = self.round
        return isinstance(state, Round) and asked_in == state.number and device not in state.cohort

    def has_failed(self, device: str) -> bool:
        """Whether the open round has written the device off already."""
        return isinstance(self.round, Round) and device in self.round.failed

    def announcement(self, newest: int, online: int) -> RoundAnnouncement | None:
        """What devices should be told about the newest round, None before the first.

        `newest`: the newest version. `online`: devices that are connected.
        """
        state = self.round
        if state is None:
            if self.last_number == 0:
                return None
            return RoundAnnouncement(
                round=self.last_number,
                base=newest,
                phase=RoundPhase.CLOSED,
                oldest=min((asked_in for asked_in, _ in self._flights), default=None),
            )
        # A buffer takes devices for as long as it is open.
        gathering = state.phase is Phase.GATHERING or isinstance(state, Buffer)
        invited = self._invitation(self.online_at_least(online))
        return RoundAnnouncement(
            round=state.number,
            base=state.base,
            phase=RoundPhase.GATHERING if gathering else RoundPhase.TRAINING,
            checkin_spread_s=invited.spread_s,
            checkin_share=invited.share,
            oldest=state.oldest if isinstance(state, Buffer) else None,
        )

    def online_at_least(self, online: int) -> int:
        """Connected devices: as many as are known, or as many as are ready."""
        ready = len(self.round.ready) if isinstance(self.round, Round) else 0
        return max(online, ready)

    def next_deadline(self) -> float | None:
        """When time changes something by itself, None if it does not.

        A deadline counts until the machine was told that it has passed, however late that is.
        """
        state = self.round
        if state is None or not state.is_open:
            return None
        due = [] if self._time_was >= state.until else [state.until]
        if isinstance(state, Buffer):
            due += [flight.until for flight in state.flights.values()]
        elif state.phase is Phase.TRAINING:
            due = [state.until]
        # A round that gathers beyond its time waits for a device, not for the clock.
        return min(due, default=None)

    def waits_for_devices(self, now: float) -> bool:
        """Whether the round only goes on when a device speaks, and nobody is known to be at it."""
        state = self.round
        if isinstance(state, Buffer):
            return state.is_open and not state.flights
        return state is not None and state.phase is Phase.GATHERING and now >= state.until

    def rounds_with_files(self) -> set[int]:
        """The rounds whose uploads are still wanted: the open one's, and those in flight."""
        kept = {asked_in for asked_in, _ in self.flights}
        if self.round is not None:
            kept.add(self.round.number)
        if isinstance(self.round, Buffer):
            kept |= {asked_in for asked_in, _ in self.round.accepted}
        return kept

    def waiting_for(self) -> tuple[str, ...]:
        """The devices that were asked in the open round and have not answered."""
        match self.round:
            case Round() as state if state.phase is Phase.TRAINING:
                return tuple(sorted(state.cohort - state.accepted - state.failed))
            case Buffer() as state:
                return tuple(sorted(d for asked_in, d in state.flights if asked_in == state.number))
            case _:
                return ()

    # ------------------------------------------------------------ going on

    def recover(
        self, number: int, flights: Mapping[Key, Flight], belief: OverSelection | None = None
    ) -> None:
        """What the store says of earlier rounds: the last number, the flights, who delivers."""
        self.last_number = number
        self._flights = flights
        if belief is not None:
            self.belief = belief

    def resume(self, state: AnyRound) -> None:
        """Goes on with a round that the store says is open.

        It shows nothing about who delivers: nobody could, while the coordinator was away.
        """
        self.round = state
        self._interrupted = True

    def begin(
        self, number: int, base: int, *, seed: int, previous: str | None, now: float
    ) -> Sequence[rounds.Command]:
        """Opens a round. `previous`: the device that the last cyclic round visited."""
        self.last_number = number
        self._interrupted = False
        commands: Sequence[rounds.Command] = ()
        if self.policy.mode is Mode.ASYNC:
            self.round, commands = buffer.open_buffer(
                number, base, seed=seed, policy=self.policy, now=now, flights=self._flights
            )
        else:
            self.policy = replace(self.policy, ask=self.devices_to_ask)
            self.round = rounds.open_round(
                number, base, seed=seed, policy=self.policy, now=now, previous=previous
            )
        return commands

    @property
    def devices_to_ask(self) -> int:
        """How many the next synchronous round asks, by what past rounds have shown."""
        return devices_to_ask(self.belief, self.policy.goal, self.policy.over_selection)

    def claims(self, device: str, examples: int) -> None:
        """What a device that checks in says it has; only while it may still be asked."""
        match self.round:
            case Round(phase=Phase.GATHERING) as state:
                self._claims[state.number, device] = examples
            case Buffer() as state if device not in state.asked:
                self._claims[state.number, device] = examples

    def feed(self, event: rounds.Event, now: float) -> Turn | None:
        """The machine's answer to an event, None between two rounds."""
        if isinstance(event, rounds.TimePassed):
            self._time_was = now
        elif isinstance(event, rounds.Superseded):
            # Who was told to stop for that has not failed to deliver.
            self._interrupted = True
        match self.round:
            case None:
                if isinstance(event, rounds.Failed) and event.asked_in is not None:
                    gone = (event.asked_in, event.device)
                    self._flights = {k: f for k, f in self._flights.items() if k != gone}
                return None
            case Buffer() as before:
                after, commands = buffer.step(before, event, self.policy, now)
                self.round = after
                return Turn(after, commands, after.asked - before.asked)
            case Round() as before_sync:
                next_state, commands = rounds.step(before_sync, event, self.policy, now)
                self.round = next_state
                return Turn(next_state, commands, next_state.cohort - before_sync.cohort)

    def end(self) -> None:
        """The round has its outcome; in asynchronous mode, work under way goes on."""
        state = self.round
        if isinstance(state, Buffer):
            self._flights = state.flights
            self._claims = {key: n for key, n in self._claims.items() if key in state.flights}
        elif state is not None:
            cyclic = self.policy.strategy is Strategy.CYCLIC
            if state.cohort and not cyclic and not self._interrupted:
                seen = Delivery(len(state.cohort), len(state.accepted), self.policy.goal)
                self.belief = learned(self.belief, seen, self.policy.over_selection)
            self._claims.clear()
        self.round = None

    def call_back_all(self) -> list[Key]:
        """Lets go of all work under way: no further round will open."""
        keys, self._flights = sorted(self._flights), {}
        return keys

    def _invitation(self, online: int) -> pace.Invitation:
        wanted = self.policy.cohort_size
        if self.policy.mode is Mode.ASYNC:
            wanted = self.policy.concurrency
        if self.policy.strategy is Strategy.CYCLIC:
            wanted = online
        return pace.invitation(
            online,
            wanted,
            checkins_per_s=self._checkins_per_s,
            least_spread_s=self._least_spread_s,
        )
