from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.coordinator.cohort import cyclic_next, over_selected, select_cohort

NAMES = st.lists(st.from_regex(r"[a-z0-9][a-z0-9_-]{0,8}", fullmatch=True), unique=True)


@given(names=NAMES, size=st.integers(0, 12), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_the_order_of_checkins_does_not_change_the_cohort(names, size, seed, data):
    arrived = data.draw(st.permutations(names))
    expected = select_cohort(names, size, np.random.default_rng(seed))
    assert select_cohort(arrived, size, np.random.default_rng(seed)) == expected


@given(names=NAMES, size=st.integers(0, 12), seed=st.integers(0, 2**32 - 1))
def test_a_cohort_has_the_size_asked_for_and_nobody_twice(names, size, seed):
    cohort = select_cohort(names, size, np.random.default_rng(seed))
    assert len(cohort) == min(size, len(names))
    assert len(set(cohort)) == len(cohort)
    assert set(cohort) <= set(names)


def test_a_device_that_checks_in_twice_is_one_device():
    assert select_cohort(["b", "a", "b"], 5, np.random.default_rng(0)) == ("a", "b")


def test_every_device_is_chosen_equally_often():
    rng = np.random.default_rng(7)
    names = [f"pi-{index}" for index in range(5)]
    chosen = Counter(name for _ in range(4000) for name in select_cohort(names, 2, rng))
    # 4000 draws of 2 out of 5: 1600 each, with a standard deviation of 31.
    assert all(abs(chosen[name] - 1600) < 5 * 31 for name in names)


def test_a_negative_size_is_refused():
    with pytest.raises(ValueError, match="-1 devices"):
        select_cohort(["a"], -1, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("goal", "factor", "asked"),
    [(10, 1.3, 13), (3, 1.3, 4), (1, 1.3, 2), (10, 1.1, 11), (4, 1.0, 4), (100, 1.3, 130)],
)
def test_over_selection_rounds_up_and_no_further(goal, factor, asked):
    assert over_selected(goal, factor) == asked


@pytest.mark.parametrize(("goal", "factor"), [(0, 1.3), (3, 0.9)])
def test_over_selection_never_asks_for_less_than_the_goal(goal, factor):
    with pytest.raises(ValueError, match="at least 1"):
        over_selected(goal, factor)


def test_the_ring_visits_every_device_in_name_order_and_begins_again():
    visits, last = [], None
    for _ in range(7):
        last = cyclic_next(["c", "a", "b"], last)
        visits.append(last)
    assert visits == ["a", "b", "c", "a", "b", "c", "a"]


def test_the_ring_goes_on_where_a_device_left():
    assert cyclic_next(["a", "c"], "b") == "c"
    assert cyclic_next(["a", "b"], "c") == "a"


def test_an_empty_ring_is_refused():
    with pytest.raises(ValueError, match="no devices"):
        cyclic_next([], None)
