"""The noisy word: private by its own rule, exactly, and hashed the same on both sides."""

from __future__ import annotations

import random
from collections import Counter
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.schemas.word_reports import (
    MAX_EPSILON,
    MIN_EPSILON,
    bucket_count,
    bucket_of,
    edge_of,
    named_bucket,
    truth_bound,
)

EPSILONS = (MIN_EPSILON, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, MAX_EPSILON)
DRAWS = 2**64
GOLDEN = [47, 47, 34, 36, 3]


class Scripted:
    """A source of chance that gives what it is told, and keeps what it was asked for."""

    def __init__(self, *values: int) -> None:
        self.values = list(values)
        self.asked: list[int] = []

    def __call__(self, n: int) -> int:
        self.asked.append(n)
        value = self.values.pop(0)
        assert 0 <= value < n
        return value


def named_exactly(true: int, epsilon: float) -> dict[int, Fraction]:
    """How probable each answer is, by every way in which the code can draw."""
    # The first draw decides by one bound alone: found by halving, whatever the code says it is.
    low, high = 0, DRAWS
    while low < high:
        middle = (low + high) // 2
        chance = Scripted(middle, 0)
        named_bucket(true, epsilon, chance)
        low, high = (middle + 1, high) if len(chance.asked) == 1 else (low, middle)
    assert chance.asked[0] == DRAWS
    found = {true: Fraction(low, DRAWS)}
    chance = Scripted(DRAWS - 1, 0)
    named_bucket(true, epsilon, chance)
    others = chance.asked[1]
    for value in range(others):
        bucket = named_bucket(true, epsilon, Scripted(DRAWS - 1, value))
        found[bucket] = found.get(bucket, Fraction(0)) + (1 - Fraction(low, DRAWS)) / others
    assert sum(found.values()) == 1
    return found


def at_most_e_to_the(epsilon: float, ratio: Fraction) -> bool:
    with localcontext() as exact:
        exact.prec = 80
        return Decimal(ratio.numerator) <= Decimal(epsilon).exp() * Decimal(ratio.denominator)


@pytest.mark.parametrize("epsilon", EPSILONS[:-1])
def test_no_answer_is_more_than_e_to_the_epsilon_times_as_likely_with_another_word(epsilon):
    buckets = bucket_count(epsilon)
    by_word = [named_exactly(true, epsilon) for true in range(buckets)]
    for named in range(buckets):
        likely = [one[named] for one in by_word]
        assert min(likely) > 0
        assert at_most_e_to_the(epsilon, max(likely) / min(likely))
    # And no less is told than was paid for.
    assert not at_most_e_to_the(epsilon - 1e-9, max(likely) / min(likely))


def test_the_largest_epsilon_keeps_its_word_too():
    bound, others = truth_bound(MAX_EPSILON), bucket_count(MAX_EPSILON) - 1
    assert others == 22026
    assert at_most_e_to_the(MAX_EPSILON, Fraction(bound * others, DRAWS - bound))


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0])
def test_what_is_named_is_as_probable_as_enumerated(epsilon):
    seeded, tries = random.Random(20), 20_000
    for true in (0, bucket_count(epsilon) - 1):
        expected = named_exactly(true, epsilon)
        found = Counter(named_bucket(true, epsilon, seeded.randrange) for _ in range(tries))
        assert found.keys() == expected.keys()
        for bucket, probability in expected.items():
            sigma = float(probability * (1 - probability) * tries) ** 0.5
            assert abs(found[bucket] - float(probability * tries)) < 4.5 * sigma


def test_the_buckets_are_as_many_as_make_the_noise_least():
    """By the variance of Wang et al. 2017, equation 7, tried for every number of buckets."""

    def variance(odds: float, buckets: int) -> float:
        truth = odds / (odds + buckets - 1)
        chance = 1 / buckets
        return chance * (1 - chance) / (truth - chance) ** 2

    for epsilon in EPSILONS[2:-1]:
        odds = float(Decimal(epsilon).exp())
        best = min(range(2, 200), key=lambda buckets: variance(odds, buckets))
        assert variance(odds, bucket_count(epsilon)) <= 1.001 * variance(odds, best)


keys = st.binary(min_size=24, max_size=24).map(bytes.hex)


@given(key=keys, word=st.text(max_size=10), buckets=st.integers(2, 22_027))
def test_a_bucket_is_between_its_edges(key, word, buckets):
    hashed = bucket_of(word, key, 2**32)
    bucket = bucket_of(word, key, buckets)
    assert edge_of(bucket, buckets) <= hashed < edge_of(bucket + 1, buckets)


def test_the_hash_is_the_one_that_devices_in_the_field_have():
    key = "00112233445566778899aabbccddeeff0123456789abcdef"
    assert [bucket_of(word, key, 56) for word in ("", "the", "don't", "straße", "привет")] == GOLDEN


def test_two_words_meet_in_one_bucket_as_often_as_chance_has_it():
    seeded, buckets, tries = random.Random(21), 8, 20_000
    # The last two are nearly the same text.
    for one, other in (("the", ""), ("cat", "dog"), ("walked", "walker")):
        met, at = 0, Counter()
        for _ in range(tries):
            key = seeded.randbytes(24).hex()
            first = bucket_of(one, key, buckets)
            at[first] += 1
            met += first == bucket_of(other, key, buckets)
        sigma = (tries * (1 / buckets) * (1 - 1 / buckets)) ** 0.5
        assert abs(met - tries / buckets) < 4.5 * sigma
        assert all(abs(at[bucket] - tries / buckets) < 4.5 * sigma for bucket in range(buckets))
