"""The schedule is a pure function of the seed, and keeps its own rules."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.chaos import sabotage
from tests.chaos.__main__ import SABOTAGES
from tests.chaos.catalogue import BY_NAME, FAULTS, chosen
from tests.chaos.schedule import LAST_FAULT_BEFORE_END_S, plan, targets
from tests.chaos.world import ROOT

DEVICES = ("d0", "d1", "d2", "d3", "d4")
KINDS = [fault.kind() for fault in FAULTS]


def test_two_runs_with_one_seed_have_the_same_schedule():
    assert plan(1, 600, DEVICES, KINDS) == plan(1, 600, DEVICES, KINDS)
    assert plan(1, 600, DEVICES, KINDS) != plan(2, 600, DEVICES, KINDS)


def test_the_printed_schedule_is_the_same_in_every_process():
    command = [sys.executable, "-m", "tests.chaos", "--list", "--seconds", "60", "--seed", "9"]
    printed = {subprocess.check_output(command, cwd=ROOT) for _ in range(2)}
    assert len(printed) == 1
    assert len(printed.pop().splitlines()) >= 20


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_no_two_faults_fight_over_one_process(seed: int):
    free_at: dict[str, float] = {}
    for planned in plan(seed, 300, DEVICES, KINDS):
        fault = BY_NAME[planned.kind]
        assert planned.target in targets(fault.aim, DEVICES)
        assert planned.at_s <= 300 - LAST_FAULT_BEFORE_END_S
        if fault.occupies:
            # Rounded to milliseconds, where it was compared.
            assert planned.at_s >= free_at.get(planned.target, 0.0) - 0.002
            free_at[planned.target] = planned.at_s + planned.duration_s + fault.recovery_s


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_ten_minutes_hold_two_hundred_faults_of_every_kind(seed: int):
    counts = Counter(planned.kind for planned in plan(seed, 600, DEVICES, KINDS))
    assert counts.total() >= 200
    assert set(counts) == set(BY_NAME)


def test_every_kind_of_fault_has_a_name_of_its_own():
    assert len(BY_NAME) == len(FAULTS)


def test_faults_are_chosen_by_the_beginnings_of_their_names():
    assert [fault.name for fault in chosen("reset")] == ["reset"]
    assert {fault.name for fault in chosen("disk_full")} == {
        "disk_full_agent",
        "disk_full_coordinator",
    }
    assert not any(fault.name.startswith("disk_") for fault in chosen("-disk_"))
    assert chosen(None) == FAULTS
    with pytest.raises(ValueError, match="no fault begins with 'earthquake'"):
        chosen("earthquake")


def test_the_command_line_knows_every_sabotage():
    assert set(SABOTAGES) == set(sabotage.KINDS)
