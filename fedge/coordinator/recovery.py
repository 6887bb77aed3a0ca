"""What a restart makes of the store: the round that was under way, as the machine knows it."""

from __future__ import annotations

from fedge.coordinator.rounds import Phase, Round
from fedge.coordinator.store import ParticipantStatus, RoundRecord, Store
from fedge.schemas.messages import RoundPhase


def resumed_round(
    store: Store, record: RoundRecord, *, now: float, wall_now: float, previous: str | None
) -> Round:
    """The round of `record` with who was asked, accepted and refused.

    `now`: the round machine's clock; `wall_now`: seconds since the epoch, as the record's times.
    Who had checked in is not kept: devices say it again when the round is announced again.
    """
    participants = store.participants(record.number)
    training = record.phase is RoundPhase.TRAINING
    until = record.train_until if training else record.gather_until
    failed = (ParticipantStatus.REJECTED, ParticipantStatus.FAILED)
    accepted = (p.device for p in participants if p.status is ParticipantStatus.ACCEPTED)
    return Round(
        number=record.number,
        base=record.base,
        seed=record.seed,
        until=now + max(0.0, (until or 0.0) - wall_now),
        phase=Phase.TRAINING if training else Phase.GATHERING,
        cohort=frozenset(p.device for p in participants),
        accepted=frozenset(accepted),
        failed=frozenset(p.device for p in participants if p.status in failed),
        previous=previous,
    )


def last_visited(store: Store, number: int) -> str | None:
    """The device that the last cyclic round before `number` asked, None before the first."""
    for earlier in range(number - 1, 0, -1):
        for participant in store.participants(earlier):
            return participant.device
    return None
