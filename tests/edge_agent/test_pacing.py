"""When a device speaks: in its share, in its spread, and after every rest that was asked for."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.edge_agent import pacing
from fedge.edge_agent.commands import CheckIn, Rest
from fedge.edge_agent.events import CheckInDue, Event, RetryDue
from fedge.edge_agent.pacing import Pacing, checkin_delay_s, draw, rest_s


def test_a_share_is_that_share_of_the_devices_and_another_one_in_each_round() -> None:
    devices = [f"d{index}" for index in range(4000)]
    chosen = {
        number: {device for device in devices if draw("p", device, number) < 0.25}
        for number in (1, 2)
    }
    # Standard deviation: sqrt(4000 * 0.25 * 0.75) = 27. Five of them on each side.
    assert all(865 < len(found) < 1135 for found in chosen.values())
    assert 165 < len(chosen[1] & chosen[2]) < 335  # a sixteenth: rounds are independent


def test_a_device_that_is_in_a_share_is_in_every_larger_one_and_still_is_after_a_restart() -> None:
    for device in ("a", "b", "c"):
        number = draw("p", device, 7)
        assert 0 <= number < 1
        assert draw("p", device, 7) == number


@given(st.floats(0, 1e6), st.booleans(), st.integers(0, 2**32))
def test_the_share_comes_within_the_spread_and_the_others_in_the_next_one(
    spread_s: float, drawn: bool, seed: int
) -> None:
    delay_s = checkin_delay_s(spread_s, drawn=drawn, rng=random.Random(seed))
    if drawn:
        assert 0 <= delay_s <= spread_s
    else:
        assert delay_s >= max(1.0, spread_s)
        assert delay_s <= 2 * max(1.0, spread_s)


def test_devices_deferred_together_come_back_apart() -> None:
    rng = random.Random(3)
    for rest, low_s, high_s in ((Rest(30), 30, 37.5), (Rest(30, 600), 30, 630), (Rest(0, 5), 0, 5)):
        times_s = sorted(rest_s(rest, rng) for _ in range(1000))
        assert low_s <= times_s[0]
        assert times_s[-1] <= high_s
        gaps_s = [b - a for a, b in itertools.pairwise(times_s)]
        assert max(gaps_s) < (high_s - low_s) / 50  # nowhere a crowd, nowhere a hole


class Hand:
    """Runs timers and notes what they feed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fed: list[Event] = []
        self.delays_s: list[float] = []
        self.gates: list[asyncio.Event] = []
        real = asyncio.sleep

        async def sleep(delay_s: float) -> None:
            self.delays_s.append(delay_s)
            gate = asyncio.Event()
            self.gates.append(gate)
            await gate.wait()

        monkeypatch.setattr(pacing.asyncio, "sleep", sleep)
        self.step = lambda: real(0)
        self.pacing = Pacing(
            "p", "d", random.Random(1), self.fed.append,
            lambda work, name: asyncio.get_running_loop().create_task(work, name=name),
        )  # fmt: skip

    async def settle(self) -> None:
        for _ in range(5):
            await self.step()


def test_a_new_check_in_takes_the_place_of_the_one_that_waits(monkeypatch) -> None:
    async def scenario() -> None:
        hand = Hand(monkeypatch)
        hand.pacing.check_in(CheckIn(1, 100.0))
        await hand.settle()
        hand.pacing.check_in(CheckIn(2, 100.0))
        await hand.settle()
        for gate in hand.gates:
            gate.set()
        await hand.settle()
        assert hand.fed == [CheckInDue(2, drawn=True)]

    asyncio.run(scenario())


def test_a_raised_share_brings_the_additional_devices_and_no_draw_changes(monkeypatch) -> None:
    async def scenario() -> None:
        hand = Hand(monkeypatch)
        number = next(n for n in range(1, 100) if 0.2 < draw("p", "d", n) < 0.8)
        for share in (0.1, 0.9, 0.1):
            hand.pacing.check_in(CheckIn(number, 100.0, share))
            await hand.settle()
            hand.gates[-1].set()
            await hand.settle()
        assert [event.drawn for event in hand.fed] == [False, True, False]
        assert hand.delays_s[0] >= 100 > hand.delays_s[1]

    asyncio.run(scenario())


def test_a_short_rest_does_not_end_a_long_one(monkeypatch) -> None:
    async def scenario() -> None:
        hand = Hand(monkeypatch)
        hand.pacing.rest(Rest(900, 0))
        await hand.settle()
        hand.pacing.rest(Rest(1, 0))
        await hand.settle()
        assert min(hand.delays_s) > 899
        hand.pacing.rest(Rest(2000, 0))
        await hand.settle()
        assert hand.delays_s[-1] >= 2000
        for gate in hand.gates:
            gate.set()
        await hand.settle()
        assert hand.fed == [RetryDue()]

    asyncio.run(scenario())
