"""Suggestions: the words that a model of words expects next, for what was typed so far.

A text that ends in a space or a sign asks for the next word; one that ends within a word asks how
that word goes on, and only words that begin so are suggested. Knows no file and no runtime.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedge.schemas.tensors import Array
from fedge.schemas.words import FIRST_WORD, WordEncoder, normalised

MAX_TYPED_CHARACTERS = 10_000
"""Of what was typed only the end is read; more is cut off before it costs anything."""

_UNFINISHED = re.compile(r"[^\W_](?:[^\W_]|['-](?=[^\W_]))*\Z")


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
    unfinished = _UNFINISHED.search(end)
    begun = "" if unfinished is None else unfinished.group()
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
        fits = [number for number, word in vocabulary.numbered() if word.startswith(begun)]
        candidates = np.array(fits, np.int64)
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
