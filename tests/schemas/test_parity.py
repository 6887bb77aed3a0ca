"""The parity check, with numbers that can be worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.schemas.errors import ParityFailed
from fedge.schemas.parity import check_parity, largest_difference, rounding_effect


@pytest.mark.parametrize(
    ("actual", "expected", "difference"),
    [
        ([1.5], [1.0], 0.5),
        ([0.25], [0.0], 0.25),
        ([110.0, 0.0], [100.0, 0.0], 0.1),
        ([math.nan], [1.0], math.inf),
        ([math.inf], [math.inf], math.inf),
        ([1.0, 1.0], [1.0], math.inf),
        ([], [], math.inf),
    ],
)
def test_differences_are_relative_where_outputs_are_large(
    actual: list[float], expected: list[float], difference: float
) -> None:
    assert largest_difference(np.array(actual), np.array(expected)) == pytest.approx(difference)


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), min_size=1, max_size=9))
def test_the_difference_is_relative_above_one_and_absolute_below(
    pairs: list[tuple[float, float]],
) -> None:
    ours, theirs = (np.array(numbers) for numbers in zip(*pairs, strict=True))
    expected = max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)
    assert largest_difference(ours, theirs) == pytest.approx(expected)


def test_nothing_that_is_not_a_number_passes() -> None:
    with pytest.raises(ParityFailed):
        check_parity("here", np.array([math.nan]), np.array([0.0]), tolerance=1e-2)
    assert check_parity("here", np.array([0.001]), np.array([0.0]), 1e-2) == pytest.approx(0.001)


EXACT = np.array([[4.0, 2.0, 0.0, 2.0], [0.0, 1.0, 3.0, 1.0]])
"""Two examples, four answers: the best leads the middling ones by 2."""


@pytest.mark.parametrize(
    ("rounded", "effect"),
    [
        (EXACT, 0.0),
        (EXACT * 0.9 + 0.3, 0.0),
        ([[2.0, 4.0, 0.0, 2.0], [0.0, 1.0, 3.0, 1.0]], 0.5),
        ([[0.0, 2.0, 4.0, 2.0], [3.0, 1.0, 0.0, 1.0]], 1.75),
        ([[math.nan, 2.0, 0.0, 2.0], [0.0, 1.0, 3.0, 1.0]], math.inf),
        ([[4.0, 2.0, 0.0, 2.0]], math.inf),
    ],
)
def test_rounding_costs_what_the_exact_scores_say_of_the_answers_chosen(
    rounded: list[list[float]], effect: float
) -> None:
    assert rounding_effect(np.array(rounded), EXACT, scores=True) == pytest.approx(effect)


def test_a_choice_between_equals_costs_nothing() -> None:
    exact = np.array([[1.0, 1.0, 0.0], [2.0, 2.0, 2.0]])
    other = np.array([[0.9, 1.1, 0.0], [1.9, 2.0, 2.1]])
    assert rounding_effect(other, exact, scores=True) == 0.0
    wrong = np.array([[0.9, 1.1, 1.2], [1.9, 2.0, 2.1]])
    assert rounding_effect(wrong, exact, scores=True) == 0.5


def test_values_are_compared_by_their_sums() -> None:
    exact = np.array([[1.0], [-3.0]])
    assert rounding_effect(np.array([[1.1], [-2.9]]), exact, scores=False) == pytest.approx(0.05)
    assert rounding_effect(np.zeros((2, 1)), exact, scores=False) == 1.0
    assert rounding_effect(np.zeros((2, 1)), np.zeros((2, 1)), scores=False) == 0.0
    assert rounding_effect(np.ones((2, 1)), np.zeros((2, 1)), scores=False) == math.inf
