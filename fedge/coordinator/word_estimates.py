"""Which words a fleet types, from one noisy word of each device.

Each report supports the words that its hash function throws into its bucket: the word that was
drawn more often than chance has it, any other exactly as often (Wang, Blocki, Li, Jha 2017, section
4.4). So a word's share is the surplus of its support. A word that nobody typed has a support of
Binomial(reports, 1/buckets), whatever else was typed, and no normal approximation of it: of a few
hundred reports the tail is far heavier. A word stands out above what the luckiest of all
candidates would reach once in twenty word counts.

Only candidates can be found: a word that is on nobody's list stays unknown. Knows no store; numpy,
and scipy for the one quantile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedge.schemas.word_reports import (
    NOTHING,
    bucket_count,
    digest_of,
    edge_of,
    numbers_of,
    truth_probability,
)

FALSE_WORDS = 0.05
"""The probability that a list holds any word that no device has told."""
REPORTS_A_BLOCK = 64
CANDIDATES_A_BLOCK = 4096
"""Together 2 MiB of sums at a time, which fit a processor's cache, however many there are."""

Numbers = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class WordReport:
    """What one device has named; see `messages.WordCountAnswer`."""

    key: str
    bucket: int


@dataclass(frozen=True, slots=True)
class WordShare:
    """A word that stood out. `share`: estimated, of the devices that drew it; may exceed 1."""

    word: str
    share: float


@dataclass(frozen=True, slots=True)
class WordEstimate:
    """What a word count found.

    `standard_error`: of the share of a rare word; None without devices. `visible_share`: a word
    that so many of the devices draw is found in one word count of two, None if no word is.
    `without_words`: the estimated share of devices that had no word to draw. `found`: the most
    frequent first.
    """

    devices: int
    epsilon: float
    candidates: int
    standard_error: float | None
    visible_share: float | None
    without_words: float
    found: tuple[WordShare, ...]


def estimate(
    reports: Sequence[WordReport], epsilon: float, candidates: Iterable[str]
) -> WordEstimate:
    """The words of `candidates` that stand out. With no report none does.

    Two devices never draw the same hash function: of such reports the first one counts.
    """
    words = tuple(dict.fromkeys(candidates))
    reports = tuple({one.key: one for one in reversed(reports)}.values())
    devices, buckets = len(reports), bucket_count(epsilon)
    counts = support(reports, buckets, (*words, NOTHING))
    least = least_support(devices, epsilon, len(words))
    shares = [_share(int(count), devices, epsilon) for count in counts]
    standing_out = [
        WordShare(word, share)
        for word, share, count in zip(words, shares, counts, strict=False)
        if count >= least
    ]
    return WordEstimate(
        devices=devices,
        epsilon=epsilon,
        candidates=len(words),
        standard_error=standard_error(devices, epsilon) if devices else None,
        visible_share=visible_share(devices, epsilon, len(words)),
        without_words=shares[-1],
        # Equals in the candidates' order.
        found=tuple(sorted(standing_out, key=lambda one: -one.share)),
    )


def support(
    reports: Sequence[WordReport], buckets: int, words: Sequence[str]
) -> npt.NDArray[np.int64]:
    """For each word, how many reports support it. `buckets`: of every report's hash function."""
    digests = np.array([digest_of(word) for word in words], np.uint64)
    low, high = digests & np.uint64(2**32 - 1), digests >> np.uint64(32)
    # Shifted so that a word is in the bucket if what its sum leaves is below the bucket's width.
    rows = [(*numbers_of(one.key), *_range_of(one.bucket, buckets)) for one in reports]
    each = np.array(
        [(a, b, (c - begin) % 2**64, width) for a, b, c, begin, width in rows], np.uint64
    ).reshape(-1, 4)
    counts = np.zeros(len(words), np.int64)
    shape = (min(REPORTS_A_BLOCK, len(rows)), min(CANDIDATES_A_BLOCK, len(words)))
    sums, part = np.empty(shape, np.uint64), np.empty(shape, np.uint64)
    for first in range(0, len(words), CANDIDATES_A_BLOCK):
        at = slice(first, first + CANDIDATES_A_BLOCK)
        for begin in range(0, len(rows), REPORTS_A_BLOCK):
            a, b, c, width = (one[:, np.newaxis] for one in each[begin : begin + REPORTS_A_BLOCK].T)
            some = slice(len(a)), slice(len(low[at]))
            np.multiply(a, low[at], out=sums[some])
            np.multiply(b, high[at], out=part[some])
            sums[some] += part[some]
            sums[some] += c
            counts[at] += np.count_nonzero(sums[some] < width, axis=0)
    return counts


def standard_error(devices: int, epsilon: float) -> float:
    """Of the estimated share of a word that hardly any device draws. `devices`: at least 1."""
    chance = 1 / bucket_count(epsilon)
    return math.sqrt(chance * (1 - chance) / devices) / (truth_probability(epsilon) - chance)


def least_support(devices: int, epsilon: float, candidates: int) -> int:
    """The support above chance: any of so many unknown words has it once in 20 word counts."""
    from scipy.stats import binom  # noqa: PLC0415 -- slow to load, and not needed for the rest

    if devices == 0 or candidates == 0:
        return devices + 1
    chance = 1 / bucket_count(epsilon)
    return int(binom.isf(FALSE_WORDS / candidates, devices, chance)) + 1


def visible_share(devices: int, epsilon: float, candidates: int) -> float | None:
    """The share of devices that must draw a word for it to be found in one word count of two.

    None if no word would be: not even one that every device draws.
    """
    least = least_support(devices, epsilon, candidates)
    share = _share(least, devices, epsilon)
    return share if devices and share <= 1 else None


def word_list(found: WordEstimate, base: Iterable[str], words: int) -> tuple[str, ...]:
    """A vocabulary of so many words: those that stood out, then those of a list in its order."""
    first = (one.word for one in found.found)
    return tuple(dict.fromkeys((*first, *base)))[:words]


def _share(count: int, devices: int, epsilon: float) -> float:
    if devices == 0:
        return 0.0
    chance = 1 / bucket_count(epsilon)
    return (count / devices - chance) / (truth_probability(epsilon) - chance)


def _range_of(bucket: int, buckets: int) -> tuple[int, int]:
    """Where a bucket begins among the 64-bit sums, and how wide it is."""
    begin = edge_of(bucket, buckets)
    return begin << 32, (edge_of(bucket + 1, buckets) - begin) << 32
