"""Suggestions: the words that a model of words expects next, for what was typed so far.

A text that ends in a space or a sign asks for the next word; one that ends within a word asks how
that word goes on, and only words that begin so are suggested. Knows no file and no runtime.
"""

from __future__ import annotations

import bisect
import functools
import re
import sys
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedge.schemas.tensors import Array
from fedge.schemas.words import FIRST_WORD, Vocabulary, WordEncoder, normalised

MAX_TYPED_CHARACTERS = 10_000
"""Of what was typed only the end is read; more is cut off before it costs anything."""

_UNFINISHED_BACKWARDS = re.compile(r"[^\W_]+(?:['\u2019\u2018\u2010-][^\W_]+)*")
"""With the apostrophes and hyphens that phones put in; `normalised` makes them plain. Of a text
from its end: searched for from the beginning, each letter of a long text would be a try."""


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A word and its probability, 0 to 1, of all words of the vocabulary."""

    word: str
    probability: float


@dataclass(frozen=True, slots=True)
class Suggestions:
    """Words by falling probability. `begun`: what they go on from, empty for a new word."""

    words: tuple[Suggestion, ...]
    begun: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON: words, begun."""
        return asdict(self)

    def sentence(self) -> str:
        """For people: the words with their probabilities."""
        return ", ".join(f"{one.word} {one.probability:.1%}" for one in self.words) or "nothing"


@dataclass(frozen=True, slots=True)
class Typed:
    """What was typed, for a model. `inputs`: int64 `[1, window]`; `begun`: the unfinished word."""

    inputs: npt.NDArray[np.int64]
    begun: str


def read_typed(text: str, encoder: WordEncoder) -> Typed:
    """The finished words of the last sentence, and the beginning of the next one if there is."""
    end = text[-MAX_TYPED_CHARACTERS:]
    begun = _unfinished(end)
    finished = end[: len(end) - len(begun)]
    return Typed(encoder.prefix(finished), normalised(begun))


def suggested(output: Array, begun: str, encoder: WordEncoder, *, top: int) -> Suggestions:
    """The likeliest words. `output`: logarithms of probabilities, `[words]`."""
    vocabulary = encoder.vocabulary
    scores = output.reshape(-1).astype(np.float64)
    scores = np.exp(scores - scores.max())
    probabilities = scores / scores.sum()
    probabilities[:FIRST_WORD] = 0.0
    if begun:
        candidates = _alphabetical(vocabulary).beginning(begun)
    else:
        candidates = np.arange(FIRST_WORD, len(vocabulary))
    # Only the first few are wanted in order, of ten thousand.
    count = min(max(1, top), len(candidates))
    if count == 0:
        return Suggestions((), begun)
    found = probabilities[candidates]
    first = np.argpartition(-found, count - 1)[:count]
    ordered = candidates[first[np.argsort(-found[first], kind="stable")]]
    words = vocabulary.words
    return Suggestions(
        tuple(Suggestion(words[n - FIRST_WORD], float(probabilities[n])) for n in ordered), begun
    )


def accepted(text: str, word: str) -> str:
    """What was typed, after the suggestion `word` was taken: with it, and a space to go on.

    What is begun stays as it was typed, in capitals or not, and the rest of the word follows.
    """
    begun = _unfinished(text[-MAX_TYPED_CHARACTERS:])
    if word.startswith(begun.casefold()) and begun:
        return f"{text}{word[len(begun) :]} "
    finished = text[: len(text) - len(begun)]
    apart = "" if not finished or finished[-1].isspace() else " "
    return f"{finished}{apart}{word} "


def _unfinished(text: str) -> str:
    """The word that `text` ends in, empty if it ends in none."""
    found = _UNFINISHED_BACKWARDS.match(text[::-1])
    return "" if found is None else found.group()[::-1]


class _Alphabetical:
    """The words of a vocabulary in order, to find those with one beginning."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        words = vocabulary.words
        order = sorted(range(len(words)), key=words.__getitem__)
        self._words = [words[place] for place in order]
        self._numbers = np.array(order, np.int64) + FIRST_WORD

    def beginning(self, begun: str) -> npt.NDArray[np.int64]:
        """The numbers of the words that begin so, by falling frequency as far as that is custom."""
        first = bisect.bisect_left(self._words, begun)
        # No character comes after the last one that there is.
        last = bisect.bisect_left(self._words, begun + chr(sys.maxunicode), lo=first)
        return np.sort(self._numbers[first:last])


@functools.lru_cache(maxsize=2)
def _alphabetical(vocabulary: Vocabulary) -> _Alphabetical:
    """Made once for a vocabulary: the one that answers, and the one that takes its place."""
    return _Alphabetical(vocabulary)
