"""Pace steering: how a fleet of any size is invited and sent away."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedge.coordinator.pace import BURST, DRAW_S, SURPLUS, invitation, return_spread_s


def test_a_small_fleet_that_is_asked_as_a_whole_comes_at_once():
    found = invitation(80, 80, checkins_per_s=500)
    assert (found.share, found.spread_s) == (1.0, 0.0)


def test_where_not_all_are_asked_chance_and_not_the_quickest_way_says_who():
    found = invitation(20, 5, checkins_per_s=500)
    assert (found.share, found.spread_s) == (1.0, DRAW_S)


def test_of_a_large_fleet_a_part_comes_spread_over_the_time_it_takes_to_hear_it():
    found = invitation(100_000, 1000, checkins_per_s=500)
    assert found.share == SURPLUS * 1000 / 100_000
    assert found.spread_s == 4.0  # two thousand at 500 a second


def test_the_operators_spread_is_the_least():
    assert invitation(5, 5, checkins_per_s=500, least_spread_s=30).spread_s == 30


@given(st.integers(0, 10**6), st.integers(1, 10**5), st.floats(1, 1e4))
def test_enough_are_invited_and_never_more_at_a_time_than_can_be_heard(online, wanted, rate):
    found = invitation(online, wanted, checkins_per_s=rate)
    comers = found.share * online
    assert comers >= min(online, wanted) * 0.999
    assert comers <= max(BURST, comers if found.spread_s == 0 else found.spread_s * rate * 1.001)


def test_devices_that_were_sent_away_together_come_back_apart():
    assert return_spread_s(10, 60, checkins_per_s=100) == 15
    assert return_spread_s(5000, 60, checkins_per_s=100) == 50
