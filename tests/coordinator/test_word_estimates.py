"""What is made of many noisy words: against a slow reference, unbiased, and no word from noise."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.coordinator import word_estimates
from fedge.coordinator.word_estimates import (
    FALSE_WORDS,
    WordReport,
    estimate,
    least_support,
    standard_error,
    support,
    visible_share,
    word_list,
)
from fedge.schemas.word_reports import (
    NOTHING,
    bucket_count,
    bucket_of,
    named_bucket,
    truth_probability,
)


def told(word: str, epsilon: float, seeded: random.Random) -> WordReport:
    key = seeded.randbytes(24).hex()
    true = bucket_of(word, key, bucket_count(epsilon))
    return WordReport(key, named_bucket(true, epsilon, seeded.randrange))


def told_by(counts: dict[str, int], epsilon: float, seeded: random.Random) -> list[WordReport]:
    return [told(word, epsilon, seeded) for word, n in counts.items() for _ in range(n)]


def one_by_one(reports: list[WordReport], buckets: int, words: list[str]) -> list[int]:
    """The support by the definition, in Python's own numbers."""
    return [sum(bucket_of(w, one.key, buckets) == one.bucket for one in reports) for w in words]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    reports=st.integers(0, 40),
    words=st.integers(1, 30),
    buckets=st.sampled_from([2, 3, 8, 56, 2982]),
)
def test_the_support_is_that_of_a_slow_reference(seed, reports, words, buckets):
    seeded = random.Random(seed)
    some = [
        WordReport(seeded.randbytes(24).hex(), seeded.randrange(buckets)) for _ in range(reports)
    ]
    names = [f"w{number}" for number in range(words)]
    with pytest.MonkeyPatch.context() as small:
        small.setattr(word_estimates, "REPORTS_A_BLOCK", 7)
        small.setattr(word_estimates, "CANDIDATES_A_BLOCK", 11)
        found = support(some, buckets, names)
    assert found.tolist() == one_by_one(some, buckets, names)


def test_shares_are_unbiased_and_as_exact_as_is_said():
    seeded, epsilon = random.Random(22), 2.0
    counts, devices, trials = {"the": 150, "cat": 30, NOTHING: 120}, 300, 50
    error = standard_error(devices, epsilon)
    found = {"the": [], "absent": [], NOTHING: []}
    chance = 1 / bucket_count(epsilon)
    for _ in range(trials):
        reports = told_by(counts, epsilon, seeded)
        some = support(reports, bucket_count(epsilon), list(found))
        for word, count in zip(found, some, strict=True):
            share = (count / devices - chance) / (truth_probability(epsilon) - chance)
            found[word].append(share)
    for word, true in (("the", 0.5), ("absent", 0.0), (NOTHING, 0.4)):
        mean = sum(found[word]) / trials
        spread = math.sqrt(sum((share - true) ** 2 for share in found[word]) / trials)
        # What is frequent varies a little more: whether its device names the truth is chance, too.
        assert abs(mean - true) < 4.5 * spread / math.sqrt(trials)
        assert 0.7 * error < spread < 1.8 * error


def test_the_standard_error_is_that_of_the_paper():
    """Wang et al. 2017, equation 8: 4 e^ε / (n (e^ε - 1)²), but for the rounding of the buckets."""
    for epsilon in (1.0, 2.0, 4.0, 8.0):
        odds = math.exp(epsilon)
        paper = math.sqrt(4 * odds / (1000 * (odds - 1) ** 2))
        assert standard_error(1000, epsilon) == pytest.approx(paper, rel=0.02)


@pytest.mark.parametrize(("devices", "epsilon", "candidates"), [(98, 4.0, 50_000), (40, 1.0, 10)])
def test_the_least_support_is_exact(devices, epsilon, candidates):
    buckets = bucket_count(epsilon)

    def above(least: int) -> Fraction:
        ways = (
            math.comb(devices, k) * (buckets - 1) ** (devices - k)
            for k in range(least, devices + 1)
        )
        return Fraction(sum(ways), buckets**devices)

    least = least_support(devices, epsilon, candidates)
    assert above(least) <= Fraction(FALSE_WORDS) / candidates < above(least - 1)


@pytest.mark.parametrize(("devices", "epsilon"), [(98, 4.0), (300, 1.0)])
def test_hardly_a_list_in_twenty_holds_a_word_that_nobody_told(devices, epsilon):
    seeded, lists = random.Random(23), 40
    candidates = [f"candidate {number}" for number in range(300)]
    false = sum(
        bool(
            estimate(
                told_by({NOTHING: devices // 2, "the": devices // 2}, epsilon, seeded),
                epsilon,
                candidates,
            ).found
        )
        for _ in range(lists)
    )
    # Of 40 at 5% more than 7 would come once in 300 times; of the seeds, one was tried.
    assert false <= 7


def test_what_many_tell_is_found_and_comes_first():
    # With 24, a word of the base is the one that a list in twenty may hold.
    seeded, epsilon = random.Random(27), 4.0
    rare = {f"rare {number}": 1 for number in range(500)}
    reports = told_by({"the": 250, "yeet": 150, NOTHING: 100, **rare}, epsilon, seeded)
    base = [f"base {number}" for number in range(3000)]
    found = estimate(reports, epsilon, ["yeet", "the", *base, "the"])
    assert [one.word for one in found.found] == ["the", "yeet"]
    assert (found.devices, found.candidates) == (1000, 3002)
    assert found.standard_error is not None
    for one, true in zip(found.found, (0.25, 0.15), strict=True):
        assert abs(one.share - true) < 4 * found.standard_error
    assert abs(found.without_words - 0.1) < 4 * found.standard_error
    assert word_list(found, [*base, "the"], 5) == ("the", "yeet", "base 0", "base 1", "base 2")


def test_a_visible_word_is_found_every_second_time():
    seeded, epsilon, devices = random.Random(25), 4.0, 200
    candidates = ["the", *(f"w{number}" for number in range(99))]
    visible = visible_share(devices, epsilon, len(candidates))
    assert visible is not None
    telling = round(visible * devices)
    trials = 60
    found = sum(
        any(
            one.word == "the"
            for one in estimate(
                told_by({"the": telling, NOTHING: devices - telling}, epsilon, seeded),
                epsilon,
                ["the", *candidates[1:]],
            ).found
        )
        for _ in range(trials)
    )
    assert 0.3 * trials < found < 0.75 * trials


def test_a_fleet_of_nobody_or_of_few_sees_nothing():
    found = estimate([], 4.0, ["the"])
    assert (found.devices, found.found, found.standard_error) == (0, (), None)
    assert found.visible_share is None
    assert visible_share(3, 1.0, 50_000) is None
    seeded = random.Random(26)
    assert estimate([told("the", 8.0, seeded)], 8.0, ["the", *map(str, range(999))]).found == ()


def test_more_devices_and_less_privacy_see_more():
    shares = [visible_share(devices, 4.0, 50_000) for devices in (100, 10_000, 1_000_000)]
    assert None not in shares
    assert shares == sorted(shares, reverse=True)
    costs = [visible_share(10_000, epsilon, 50_000) for epsilon in (1.0, 2.0, 4.0, 8.0)]
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("key", ["0" * 48, ("0" * 15 + "1") * 2 + "0" * 16, "8" + "0" * 47])
def test_no_key_makes_a_hash_function_that_lifts_all_words(key):
    """These, as multipliers, would throw all words into a bucket or two."""
    seeded, epsilon, candidates = random.Random(28), 4.0, [f"w{number}" for number in range(5000)]
    buckets = bucket_count(epsilon)
    counts = support([WordReport(key, 0)], buckets, candidates)
    sigma = math.sqrt(len(candidates) / buckets)
    assert abs(int(counts.sum()) - len(candidates) / buckets) < 5 * sigma
    honest = told_by({NOTHING: 1000}, epsilon, seeded)
    liars = [WordReport(key, 0)] * 40
    found = estimate(honest + liars, epsilon, candidates)
    # One hash function is one device, however many name it.
    assert found.devices == 1001
    assert len(found.found) <= 1
