"""The presence desk: when those who are known may be taken for everybody."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from fedge.coordinator.presence import QUIET_S, ROLL_GRACE_S, PresenceDesk
from fedge.schemas.messages import Presence
from fedge.schemas.topics import Topics


class Desk(PresenceDesk):
    """A desk with a clock of its own, over a link that takes everything and says nothing."""

    def __init__(self) -> None:
        self.now = 0.0

        async def taken(*_: object) -> None:
            return None

        super().__init__(
            journal=SimpleNamespace(saw=lambda *_, **__: None),  # type: ignore[arg-type] -- writes nothing
            publisher=SimpleNamespace(call_roll=taken),  # type: ignore[arg-type] -- says nothing
            control=SimpleNamespace(subscribe=taken, connected=True),  # type: ignore[arg-type] -- silent
            topics=Topics("p"),
            answers_per_s=100.0,
            clock=lambda: self.now,
            wake=lambda: None,
        )

    def at(self, now: float, *born: str) -> bool:
        self.now = now
        deadline = self.next_deadline
        if deadline is not None and now >= deadline:
            self.time_passed()
        for device in born:
            self.heard(device, Presence(boot=1, online=True), retained=True)
        return self.all_known


@pytest.fixture
def desk() -> Desk:
    desk = Desk()
    asyncio.run(desk.call_roll())
    return desk


def test_nobody_is_taken_for_everybody_until_the_first_answers_could_come(desk: Desk) -> None:
    assert not desk.at(0.5)
    assert desk.at(QUIET_S)
    assert desk.next_deadline == 1.0 + ROLL_GRACE_S


def test_those_who_are_known_are_not_everybody_while_more_appear(desk: Desk) -> None:
    step_s = 0.9 * QUIET_S
    for number in range(1, 5):
        assert not desk.at(number * step_s, f"d{number}")
    assert desk.at(4 * step_s + QUIET_S)
    assert len(desk.online) == 4


def test_who_comes_after_the_roll_has_settled_holds_up_nobody(desk: Desk) -> None:
    assert desk.at(QUIET_S, "a")
    assert desk.at(QUIET_S + 0.1, "b")


def test_a_device_that_comes_and_goes_holds_up_the_others_no_longer_than_the_roll(
    desk: Desk,
) -> None:
    now = 0.0
    while now < 1.0 + ROLL_GRACE_S:
        assert not desk.at(now, "flapping")
        desk.heard("flapping", Presence(boot=1, online=False), retained=False)
        now += 0.5
    assert desk.at(now)
