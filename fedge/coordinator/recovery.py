"""What a restart makes of the store: the round that was under way, as the machines know it.

Deadlines are kept in seconds since the epoch, so that they mean the same after a restart; a clock
that was set back meanwhile must not prolong them, so none is further away than a whole one.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedge.coordinator.buffer import Buffer, Flight, Key
from fedge.coordinator.rounds import Mode, Phase, Round, RoundPolicy
from fedge.coordinator.store import ParticipantStatus, RoundRecord, Store
from fedge.schemas.messages import RoundPhase

GRACE_S = 15.0
"""A deadline that passed while the coordinator was away is put off by so much: devices have their
updates ready, and need a moment to hear of it. Never beyond a whole deadline."""


def resumed_round(
    store: Store,
    record: RoundRecord,
    policy: RoundPolicy,
    *,
    now: float,
    wall_now: float,
    previous: str | None,
) -> Round:
    """The synchronous round of `record` with who was asked, accepted and refused.

    `now`: the round machine's clock; `wall_now`: seconds since the epoch, as the record's times.
    Who had checked in is not kept: the round gathers anew when it is announced again.
    """
    participants = store.participants(record.number)
    training = record.phase is RoundPhase.TRAINING
    until = record.train_until if training else record.gather_until
    longest = policy.deadline_s if training else policy.gather_s
    failed = (ParticipantStatus.REJECTED, ParticipantStatus.FAILED)
    accepted = (p.device for p in participants if p.status is ParticipantStatus.ACCEPTED)
    return Round(
        number=record.number,
        base=record.base,
        seed=record.seed,
        # Who had checked in is not kept: they need the whole time to do it again.
        until=now + _left(until, wall_now, longest, grace_s=GRACE_S if training else longest),
        phase=Phase.TRAINING if training else Phase.GATHERING,
        cohort=frozenset(p.device for p in participants),
        accepted=frozenset(accepted),
        failed=frozenset(p.device for p in participants if p.status in failed),
        previous=previous,
    )


def resumed_buffer(
    store: Store,
    record: RoundRecord,
    policy: RoundPolicy,
    flights: Mapping[Key, Flight],
    *,
    now: float,
    wall_now: float,
) -> Buffer:
    """The asynchronous round of `record`, with what is in its buffer and what is under way."""
    participants = store.participants(record.number)
    opened_until = record.opened_at + policy.deadline_s
    # Its deadline is that of whom it asked first.
    until = min((p.until for p in participants if p.until is not None), default=opened_until)
    return Buffer(
        number=record.number,
        base=record.base,
        seed=record.seed,
        until=now + _left(until, wall_now, policy.deadline_s, grace_s=GRACE_S),
        asked=frozenset(p.device for p in participants),
        flights=flights,
        accepted=frozenset((p.round, p.device) for p in store.accepted_in(record.number)),
    )


def flights_of(
    store: Store, newest: int, policy: RoundPolicy, now: float, wall_now: float
) -> dict[Key, Flight]:
    """The work that is under way in asynchronous mode; what is not wanted any more is let go of.

    That is what is too late, too stale, or made from a version that a rollback has taken back. In
    synchronous mode there is none.
    """
    wanted: dict[Key, Flight] = {}
    given_up: dict[int, list[str]] = {}
    flying = store.in_flight()
    oldest = _oldest_wanted_base(store, newest, policy) if flying else 0
    for p in flying:
        late = (p.until or 0.0) + GRACE_S < wall_now
        if p.base is None or p.base < oldest or late or policy.mode is not Mode.ASYNC:
            given_up.setdefault(p.round, []).append(p.device)
        else:
            left_s = _left(p.until, wall_now, policy.deadline_s, grace_s=GRACE_S)
            wanted[(p.round, p.device)] = Flight(p.base, now + left_s)
    for asked_in, devices in given_up.items():
        store.silence(asked_in, devices, at=wall_now)
    return wanted


def _oldest_wanted_base(store: Store, newest: int, policy: RoundPolicy) -> int:
    oldest = max(0, newest - policy.max_staleness)
    for number in range(newest, oldest, -1):
        version = store.version(number)
        if version is not None and version.round is None:
            # No round made it: it is a rollback, and what came before belongs to another line.
            return number
    return oldest


def last_visited(store: Store, number: int) -> str | None:
    """The device that the last cyclic round before `number` asked, None before the first."""
    return store.last_participant_before(number)


def _left(until: float | None, wall_now: float, longest_s: float, *, grace_s: float) -> float:
    return min(longest_s, max(grace_s, (until or 0.0) - wall_now))
