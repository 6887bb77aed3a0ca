"""One noisy word: how a device tells of what was typed on it without telling it.

Optimal local hashing (Wang, Blocki, Li, Jha 2017, "Locally Differentially Private Protocols for
Frequency Estimation", section 4.4). A device draws a hash function at random, which throws all
words into few buckets, and names the bucket of one of its words, or with a known probability
another bucket. What is named says as good as nothing of one device; over many devices it can be
counted. Here is what both sides must agree on to the bit; which word is drawn, and what is made of
many reports, is theirs.

The privacy is that of the drawing alone and asks nothing of the hash: whatever a device has typed,
no report is more than e^epsilon times as likely as with anything else. The counting asks that two
words meet in one bucket as often as chance has it, which the hash keeps for any two (Thorup 2015,
"High Speed Hashing for Integers and Strings", section 3.3): 64-bit digests, as two halves each, to
the upper half of `a·low + b·high + c`, with a, b, c as good as drawn from all 64-bit numbers. They
are the digest of what is drawn and told: who could choose them would choose a function that throws
all words into one bucket, and lift them all with one report.
"""

from __future__ import annotations

import decimal
import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated

from pydantic import Field, StringConstraints

MIN_EPSILON = 0.1
MAX_EPSILON = 10.0
Epsilon = Annotated[float, Field(ge=MIN_EPSILON, le=MAX_EPSILON, allow_inf_nan=False)]
"""The privacy parameter of one report; the buckets of the largest are 22,027."""
HashKey = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{48}$")]
"""Of which a hash function is made; 24 random bytes."""

NOTHING = ""
"""What a device draws that has no word to draw: no word is empty, and taking part says nothing."""

_DRAW = 2**64
_HALF = 2**32
_DIGITS = decimal.Context(prec=60)


def bucket_count(epsilon: float) -> int:
    """Into how many buckets words are hashed: e^epsilon + 1, rounded, where the noise is least."""
    return int(_power_of_e(epsilon).to_integral_value(decimal.ROUND_HALF_EVEN)) + 1


@lru_cache(maxsize=64)
def truth_bound(epsilon: float) -> int:
    """A number drawn evenly from 2^64 is below this when the true bucket is named.

    Rounded down, so never more often than epsilon allows.
    """
    odds, others = _power_of_e(epsilon), bucket_count(epsilon) - 1
    truth = _DIGITS.divide(odds, _DIGITS.add(odds, others))
    return int(_DIGITS.multiply(truth, _DRAW).to_integral_value(decimal.ROUND_FLOOR))


def truth_probability(epsilon: float) -> float:
    """How often the true bucket is named."""
    return truth_bound(epsilon) / _DRAW


def digest_of(word: str) -> int:
    """The 64 bits that are hashed instead of a word."""
    found = hashlib.blake2b(word.encode(), digest_size=8, person=b"fedge words")
    return int.from_bytes(found.digest())


def numbers_of(key: HashKey) -> tuple[int, int, int]:
    """a, b and c of a hash function."""
    drawn = hashlib.blake2b(bytes.fromhex(key), digest_size=24, person=b"fedge word keys").digest()
    a, b, c = (int.from_bytes(drawn[at : at + 8]) for at in (0, 8, 16))
    return a, b, c


def edge_of(bucket: int, buckets: int) -> int:
    """The least 32-bit hash that falls into a bucket; they are equally wide, but for rounding."""
    return -(-bucket * _HALF // buckets)


def bucket_of(word: str, key: HashKey, buckets: int) -> int:
    """The bucket into which the hash function of `key` throws a word, from 0."""
    a, b, c = numbers_of(key)
    digest = digest_of(word)
    hashed = (a * (digest % _HALF) + b * (digest // _HALF) + c) % _DRAW // _HALF
    return hashed * buckets // _HALF


def named_bucket(true: int, epsilon: float, draw: Callable[[int], int]) -> int:
    """The bucket that a device names for the true one. `draw(n)`: evenly from 0 to n - 1."""
    if draw(_DRAW) < truth_bound(epsilon):
        return true
    other = draw(bucket_count(epsilon) - 1)
    return other + (other >= true)


def _power_of_e(epsilon: float) -> decimal.Decimal:
    # Exact on every machine: libraries differ in the last digit of their own exp.
    return _DIGITS.exp(decimal.Decimal(epsilon))
