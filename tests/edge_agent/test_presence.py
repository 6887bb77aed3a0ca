"""The boot number rises with each start, whatever was lost and whatever the clock says."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.edge_agent.presence import Presence, next_boot
from fedge.edge_agent.state import AgentState
from fedge.schemas import messages
from fedge.schemas.errors import StoreUnavailable
from fedge.schemas.topics import Topics
from tests.edge_agent.small_disks import small_disk

NOW_S = 1_760_000_000.5


def start(folder: Path, clock_s: float) -> int:
    memory = AgentState.open_whole(folder / "agent.sqlite")
    try:
        return next_boot(memory, folder / "boot", clock_s)
    finally:
        memory.close()


def test_the_first_number_is_the_time_and_each_start_counts_one_more(tmp_path: Path) -> None:
    # Ten starts within a second: more than any device manages.
    assert [start(tmp_path, NOW_S) for _ in range(10)] == list(range(int(NOW_S), int(NOW_S) + 10))


@pytest.mark.parametrize("clock_s", [0.0, 30.0, -5.0, NOW_S - 10 * 365 * 86400, 2.0**60])
def test_a_clock_that_is_wrong_never_takes_the_number_back(tmp_path: Path, clock_s: float) -> None:
    before = start(tmp_path, NOW_S)
    assert start(tmp_path, clock_s) == before + 1


def test_a_clock_that_was_right_at_last_leaves_a_low_number_behind(tmp_path: Path) -> None:
    assert start(tmp_path, 12.0) == 12
    assert start(tmp_path, 12.0) == 13
    assert start(tmp_path, NOW_S) == int(NOW_S)


@pytest.mark.parametrize("lost", ["agent.sqlite", "boot"])
@pytest.mark.parametrize("harm", [lambda path: path.unlink(), lambda path: path.write_bytes(b"?")])
def test_one_of_the_two_files_is_enough_even_in_1970(tmp_path: Path, lost: str, harm) -> None:
    before = start(tmp_path, NOW_S)
    harm(tmp_path / lost)
    assert start(tmp_path, 0.0) == before + 1


def test_a_new_card_with_a_right_clock_goes_on_above_the_old_numbers(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    before = [start(tmp_path / "old", NOW_S + each) for each in range(0, 100, 10)]
    assert start(tmp_path / "new", NOW_S + 200) > max(before)


# Each start is real, with its fsyncs: few examples, and no deadline.
@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(-1e3, 1e13, allow_nan=False), st.sampled_from(["", "agent.sqlite", "boot"])
        ),
        min_size=2,
        max_size=8,
    )
)
def test_whatever_the_clock_does_the_numbers_rise_while_one_file_is_left(
    tmp_path_factory, history
) -> None:
    folder = tmp_path_factory.mktemp("boots")
    numbers = []
    for clock_s, lost in history:
        numbers.append(start(folder, clock_s))
        if lost:
            (folder / lost).unlink()
    assert numbers == sorted(set(numbers))
    assert all(messages.Presence(boot=number, online=True) for number in numbers)


def test_a_full_disk_at_the_start_is_told_as_unavailable(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 256 * 1024) as disk:
        start(disk.folder, NOW_S)
        disk.fill()
        with pytest.raises(StoreUnavailable, match=r"No space|full"):
            start(disk.folder, NOW_S)
        disk.empty()
        assert start(disk.folder, NOW_S) > int(NOW_S)


def test_the_will_is_a_death_of_this_life() -> None:
    will = Presence(Topics("p"), "d", 41).will
    death = messages.decode(messages.Presence, will.payload)
    assert (will.topic, death.boot, death.online) == ("fedge/1/p/state/d", 41, False)
