"""The buffer machine: rounds that wait for nobody in particular (asynchronous mode, FedBuff).

Each device trains at its own pace, from the version that was the newest when it was asked. Its
update goes into the buffer that is open when it arrives, and `goal` updates make the next version
(Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation", Algorithm 1). A
round is one filling of the buffer. A device's work outlives the round that asked for it: its
*flight* goes on until it lands, fails, is too stale, or its own deadline comes. A contribution is
still (round, device), the round being the one that asked: so a device is asked once in a round.

    event                             next
    --------------------------------  ---------------------------------------------------------
    a device is ready                 asked at once while fewer than `concurrency` are flying,
                                      else it waits in line
    a flight lands, fails, expires    the first in line is asked
    goal reached                      CLOSING
    deadline, or later, with quorum   CLOSING
    deadline without quorum           open while somebody flies: what was accepted is not thrown
                                      away for being early; nobody new is asked when a second
                                      deadline has passed
    … and nobody flies any more       ABANDONED: in the next round everybody may be asked again
    superseded                        ABANDONED, and every flight is called back

The deadline counts from the first asking. Places that the silent held until then go to those who
wait; so a buffer ends within three deadlines of its first asking, whoever is silent.

Pure, as `rounds` is, whose events and commands it shares.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedge.coordinator.rounds import (
    Abandon,
    Accepted,
    Aggregate,
    Assign,
    CheckedIn,
    Command,
    Dismiss,
    Event,
    Failed,
    Phase,
    RoundPolicy,
    Superseded,
    TimePassed,
)
from fedge.schemas.errors import RejectReason

Key = tuple[int, str]
"""A contribution: the round that asked, and the device."""


@dataclass(frozen=True, slots=True)
class Flight:
    """Work under way: the version it started from, and when it is given up (caller's clock)."""

    base: int
    until: float


@dataclass(frozen=True, slots=True)
class Buffer:
    """The state. `until`: from then on a quorum is enough (caller's clock, from the first asking).

    `asked`: devices that were asked in this round. `waiting`: devices that are ready, first come
    first. `flights`: work under way, of this round and of earlier ones. `accepted`: what is in the
    buffer.
    """

    number: int
    base: int
    seed: int
    until: float
    phase: Phase = Phase.TRAINING
    asked: frozenset[str] = frozenset()
    waiting: tuple[str, ...] = ()
    flights: Mapping[Key, Flight] = field(default_factory=dict)
    accepted: frozenset[Key] = frozenset()

    @property
    def is_open(self) -> bool:
        """Whether updates still go into this buffer."""
        return self.phase is Phase.TRAINING

    @property
    def oldest(self) -> int:
        """The oldest round whose work is still wanted."""
        return min((asked_in for asked_in, _ in self.flights), default=self.number)


def open_buffer(
    number: int,
    base: int,
    *,
    seed: int,
    policy: RoundPolicy,
    now: float,
    flights: Mapping[Key, Flight] | None = None,
) -> tuple[Buffer, Sequence[Command]]:
    """An empty buffer, with the flights of earlier rounds that may still land in it.

    Flights that would be too stale are called back. `now`: seconds of the caller's clock.
    """
    state = Buffer(number, base, seed, until=now + policy.deadline_s, flights=flights or {})
    stale = [
        key for key, flight in state.flights.items() if base - flight.base > policy.max_staleness
    ]
    return _called_back(state, stale, RejectReason.STALE)


def step(
    state: Buffer, event: Event, policy: RoundPolicy, now: float
) -> tuple[Buffer, Sequence[Command]]:
    """The next state and what to do. Events that mean nothing in a phase change nothing."""
    match event:
        case CheckedIn(device, _):
            return _checked_in(state, device, policy, now)
        case Accepted(device, asked_in):
            key = (state.number if asked_in is None else asked_in, device)
            state = replace(_without(state, [key]), accepted=state.accepted | {key})
            return _go_on(state, policy, now)
        case Failed(device, asked_in):
            key = (state.number if asked_in is None else asked_in, device)
            return _go_on(_without(state, [key]), policy, now)
        case TimePassed():
            late = [key for key, flight in state.flights.items() if flight.until <= now]
            state, called_back = _called_back(state, late, RejectReason.LATE)
            state, commands = _go_on(state, policy, now)
            return state, (*called_back, *commands)
        case Superseded(by):
            return _superseded(state, by)


def _checked_in(
    state: Buffer, device: str, policy: RoundPolicy, now: float
) -> tuple[Buffer, Sequence[Command]]:
    if (state.number, device) in state.flights:
        # It has lost its assignment on the way: it gets it again.
        return state, (Assign((device,)),)
    if not state.is_open or device in state.asked or device in state.waiting:
        return state, ()
    return _ask(replace(state, waiting=(*state.waiting, device)), policy, now)


def _go_on(state: Buffer, policy: RoundPolicy, now: float) -> tuple[Buffer, Sequence[Command]]:
    if not state.is_open:
        return state, ()
    enough = policy.goal if now < state.until else policy.quorum
    if len(state.accepted) >= enough:
        return replace(state, phase=Phase.CLOSING, waiting=()), (Aggregate(),)
    state, commands = _ask(state, policy, now)
    if now >= state.until and state.asked and not state.flights:
        short = Abandon("the deadline came", needed=policy.quorum)
        return replace(state, phase=Phase.ABANDONED), (short,)
    return state, commands


def _ask(state: Buffer, policy: RoundPolicy, now: float) -> tuple[Buffer, Sequence[Command]]:
    """Gives the free places to those who wait longest."""
    if state.asked and now >= state.until + policy.deadline_s:
        return state, ()
    flying = {device for _, device in state.flights}
    free = policy.concurrency - len(flying)
    chosen: list[str] = []
    for device in state.waiting:
        # One that still flies in an earlier round has a place already.
        if device not in flying:
            if free <= 0:
                continue
            free -= 1
        chosen.append(device)
    if not chosen:
        return state, ()
    flight = Flight(state.base, now + policy.deadline_s)
    flights = dict(state.flights) | {(state.number, device): flight for device in chosen}
    state = replace(
        state,
        until=state.until if state.asked else flight.until,
        flights=flights,
        asked=state.asked | set(chosen),
        waiting=tuple(device for device in state.waiting if device not in chosen),
    )
    return state, (Assign(tuple(chosen)),)


def _superseded(state: Buffer, by: int) -> tuple[Buffer, Sequence[Command]]:
    # Also while it closes: the version that is being made has lost its base.
    reason = f"version {by} took the place of its base, version {state.base}"
    was_open = state.is_open
    state, called_back = _called_back(state, list(state.flights), RejectReason.ROUND_ABANDONED)
    if not was_open:
        return state, called_back
    return replace(state, phase=Phase.ABANDONED, waiting=()), (Abandon(reason), *called_back)


def _called_back(
    state: Buffer, keys: Sequence[Key], reason: RejectReason
) -> tuple[Buffer, Sequence[Command]]:
    by_round: dict[int, list[str]] = {}
    for asked_in, device in sorted(keys):
        by_round.setdefault(asked_in, []).append(device)
    dismissals = [
        Dismiss(tuple(devices), reason, asked_in) for asked_in, devices in by_round.items()
    ]
    return _without(state, keys), dismissals


def _without(state: Buffer, keys: Iterable[Key]) -> Buffer:
    gone = set(keys)
    if gone.isdisjoint(state.flights):
        return state
    return replace(state, flights={k: f for k, f in state.flights.items() if k not in gone})


def staleness_weight(staleness: int) -> float:
    """How much an update counts whose base is `staleness` versions behind: (1 + s)^-1/2.

    Nguyen et al. 2022, section 5; Xie et al. 2019, "Asynchronous Federated Optimization", 5.2.
    """
    return float((1 + staleness) ** -0.5)
