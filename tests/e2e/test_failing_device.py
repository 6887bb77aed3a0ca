"""A fleet that cannot train is not asked again and again without a pause."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from fedge.coordinator.store import Outcome, ParticipantStatus
from fedge.schemas import messages, topics
from fedge.schemas.link.protocol import Delivery
from fedge.schemas.messages import RoundAnnouncement, RoundPhase
from tests.brokers import MosquittoBroker
from tests.fleet import Fleet, fleet, tiny_examples

pytestmark = pytest.mark.e2e


async def round_gathers(here: Fleet, number: int) -> None:
    while True:
        event = await here.observer.next_event()
        if isinstance(event, Delivery):
            here.observer.ack(event)
            if topics.parse(event.topic).message is RoundAnnouncement:
                seen = messages.decode(RoundAnnouncement, event.payload)
                if seen.round >= number and seen.phase is RoundPhase.GATHERING:
                    return


def test_after_each_failed_round_the_coordinator_rests_longer(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    x, y = tiny_examples(20, seed=1)

    async def scenario() -> None:
        async with fleet(
            mosquitto.port, tmp_path, round={"goal": 1, "over_selection": 1.0}
        ) as here:
            here.start_coordinator()
            here.start_agent("broken", (x, np.full_like(y, 99)))  # no such class
            await here.during(round_gathers(here, 4))
            first, second, third = (here.report(number) for number in (1, 2, 3))
            for report in (first, second, third):
                assert report.round.outcome is Outcome.ABANDONED
                (device,) = report.participants
                assert device.status is ParticipantStatus.FAILED
                assert "labels from 99 to 99" in device.detail
            # Seconds from the end of one to the beginning of the next: 1, then 2.
            assert second.round.opened_at - (first.round.closed_at or 0) >= 0.99
            assert third.round.opened_at - (second.round.closed_at or 0) >= 1.99

    asyncio.run(scenario())
