"""The policies: what a day may take, how far apart two rounds are, which round is the device's."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedge.edge_agent import state
from fedge.edge_agent.participation import (
    DAY_S,
    ParticipationSettings,
    Usage,
    allowances,
    first_round_after,
    is_sampled,
)
from fedge.edge_agent.state import AgentState
from fedge.edge_agent.storage_watch import StorageWatch
from fedge.edge_agent.usage import UsageMeter
from fedge.schemas.errors import StoreUnavailable

NOW_S = 1_800_000_000.0


def in_the_way(
    policies: ParticipationSettings, used: list[Usage], examples: int | None = 10
) -> set[str]:
    found = allowances(policies, used, examples, NOW_S)
    return {one.policy for one in found if not one.holds}


def test_a_limit_is_reached_by_what_the_last_24_hours_took_and_no_more() -> None:
    policies = ParticipationSettings(
        daily_training_s=100, daily_upload_bytes=1000, daily_energy_wh=0.5, watts=18
    )
    old = Usage(NOW_S - DAY_S, 1e6, 10**9)
    # 18 W for 100 s are 0.5 Wh.
    assert in_the_way(policies, [old, Usage(NOW_S - DAY_S + 1, 99, 999)]) == set()
    assert in_the_way(policies, [Usage(NOW_S - 60, 60, 500), Usage(NOW_S, 40, 500)]) == {
        "daily_training_s",
        "daily_upload_bytes",
        "daily_energy_wh",
    }


def test_fewer_examples_than_the_minimum_are_in_the_way_once_they_are_counted() -> None:
    policies = ParticipationSettings(minimum_examples=10)
    assert in_the_way(policies, [], 9) == {"minimum_examples"}
    assert in_the_way(policies, [], 10) == in_the_way(policies, [], None) == set()


def test_no_policy_is_in_the_way_of_a_device_without_any() -> None:
    assert allowances(ParticipationSettings(), [Usage(NOW_S, 1e9, 10**12)], 0, NOW_S) == []
    assert not ParticipationSettings().has_limits


def test_a_limit_of_energy_needs_the_power() -> None:
    for wrong in ({"daily_energy_wh": 1}, {"watts": 5}):
        with pytest.raises(ValidationError, match="together"):
            ParticipationSettings.model_validate(wrong)


@given(
    period=st.integers(1, 50),
    first=st.integers(0, 1000),
    device=st.text("abcdef-", min_size=1, max_size=8),
)
def test_of_each_period_exactly_one_round_is_the_devices(
    period: int, first: int, device: str
) -> None:
    rounds = range(first * period, (first + 1) * period)
    assert sum(is_sampled("p", device, number, period) for number in rounds) == 1


def test_a_fleet_is_spread_over_the_rounds_of_a_period() -> None:
    each = [sum(is_sampled("p", f"d{n}", 30 + k, 10) for n in range(1000)) for k in range(10)]
    assert sum(each) == 1000
    assert all(60 < count < 140 for count in each)


def test_two_participations_are_every_rounds_apart() -> None:
    assert first_round_after(0, 10) == 0
    assert first_round_after(7, 1) == 8
    assert first_round_after(7, 10) == 17


# ---------------------------------------------------------------- the ledger


class Clock:
    def __init__(self) -> None:
        self.wall_s = NOW_S

    def __call__(self) -> float:
        return self.wall_s


def spend(path: Path, clock: Clock, seconds: float, upload_bytes: int) -> None:
    """One stretch of training in a life of its own."""

    async def scenario() -> None:
        memory = AgentState(path)
        meter = UsageMeter(memory, StorageWatch("d"), clock)
        meter.begin()
        # The loop's clock cannot be turned, so the meter's own beginning is.
        meter._since_s -= seconds
        assert sum(line.training_s for line in meter.lines()) >= seconds
        meter.end(upload_bytes)
        memory.close()

    asyncio.run(scenario())


def totals(path: Path, clock: Clock) -> tuple[float, int]:
    async def scenario() -> tuple[float, int]:
        memory = AgentState(path)
        lines = UsageMeter(memory, StorageWatch("d"), clock).lines()
        memory.close()
        recent = [line for line in lines if line.at_s > clock() - DAY_S]
        return sum(x.training_s for x in recent), sum(x.upload_bytes for x in recent)

    return asyncio.run(scenario())


def test_what_was_used_survives_restarts_and_goes_after_a_day(tmp_path: Path) -> None:
    path, clock = tmp_path / "agent.sqlite", Clock()
    spend(path, clock, 100, 5)
    clock.wall_s += 3600
    spend(path, clock, 50, 7)
    assert totals(path, clock) == (pytest.approx(150, abs=2), 12)
    clock.wall_s += DAY_S - 1800
    assert totals(path, clock) == (pytest.approx(50, abs=2), 7)
    clock.wall_s += DAY_S
    assert totals(path, clock) == (0, 0)


def test_a_clock_that_is_set_back_neither_forgets_nor_remembers_for_ever(tmp_path: Path) -> None:
    path, clock = tmp_path / "agent.sqlite", Clock()
    clock.wall_s += 10 * 365 * DAY_S
    spend(path, clock, 100, 5)
    clock.wall_s = NOW_S
    assert totals(path, clock) == (pytest.approx(100, abs=2), 5)
    clock.wall_s += DAY_S - 60
    assert totals(path, clock) == (pytest.approx(100, abs=2), 5)
    clock.wall_s += 120
    assert totals(path, clock) == (0, 0)


def test_a_clock_that_runs_ahead_for_a_while_forgets_nothing(tmp_path: Path) -> None:
    path, clock = tmp_path / "agent.sqlite", Clock()
    spend(path, clock, 100, 5)
    clock.wall_s += 365 * DAY_S
    spend(path, clock, 10, 1)
    clock.wall_s = NOW_S + 60
    assert totals(path, clock) == (pytest.approx(110, abs=2), 6)


def test_the_ledger_of_what_was_used_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "LEDGER_LINES", 3)
    memory = AgentState(tmp_path / "agent.sqlite")
    for number in range(10):
        line = memory.add_usage(Usage(NOW_S, 1.0, number), None)
        memory.add_usage(Usage(NOW_S, 1.0, 0), line)
    assert memory.usage(0.0) == [Usage(NOW_S, 2.0, number) for number in (7, 8, 9)]
    memory.close()


def test_what_a_full_disk_kept_from_the_ledger_is_counted_all_the_same(tmp_path: Path) -> None:
    async def scenario() -> None:
        memory, clock = AgentState(tmp_path / "agent.sqlite"), Clock()
        meter = UsageMeter(memory, StorageWatch("d"), clock)
        with on_a_full_disk(memory):
            meter.begin()
            meter._since_s -= 40
            meter.goes_on()
            meter.end(7)
        assert memory.usage(0.0) == []
        (line,) = meter.lines()
        assert (line.training_s, line.upload_bytes) == (pytest.approx(40, abs=2), 7)
        meter.begin()
        meter.end(1)
        (line,) = memory.usage(0.0)
        assert (line.training_s, line.upload_bytes) == (pytest.approx(40, abs=2), 8)
        memory.close()

    asyncio.run(scenario())


@contextlib.contextmanager
def on_a_full_disk(memory: AgentState) -> Iterator[None]:
    """Its disk is full."""

    def refuse(used: Usage, line: int | None) -> int:
        raise StoreUnavailable("no room")

    memory.add_usage = refuse
    yield
    del memory.add_usage


def test_a_long_training_is_written_down_while_it_runs(tmp_path: Path) -> None:
    path, clock = tmp_path / "agent.sqlite", Clock()

    async def killed() -> None:
        memory = AgentState(path)
        meter = UsageMeter(memory, StorageWatch("d"), clock)
        meter.begin()
        for _ in range(3):
            meter._since_s -= 31
            meter.goes_on()
        memory.close()

    asyncio.run(killed())
    assert totals(path, clock) == (pytest.approx(93, abs=2), 0)
    with_lines = AgentState(path)
    assert len(with_lines.usage(0.0)) == 1, "a training is one line"
    with_lines.close()
