"""Words: how a typed text becomes numbers, the same on every device and on the coordinator.

A text is cut into sentences, a sentence into words, and words into windows of one length. Each word
has a number in a vocabulary that belongs to the plan; which words it holds was decided without
looking at any device's text. Numbers below `FIRST_WORD` stand for no word: padding, a word that is
not in the vocabulary, the start of a sentence. Follows Hard et al. 2018, "Federated Learning for
Mobile Keyboard Prediction", sections 3 and 4. numpy is imported when something is encoded.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from fedge.schemas.errors import PlanRefused

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

PADDING = 0
UNKNOWN = 1
START = 2
FIRST_WORD = 3

MAX_WORDS = 2**20
MAX_WORD_CHARACTERS = 40
MAX_VOCABULARY_BYTES = 16 * 1024 * 1024

_TOKEN = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
"""Letters and digits, joined by apostrophes or hyphens: don't, l'eau, well-known, 24."""
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
# Each run of signs is tried once, from its first: tried from each, a long run takes its square.
_SENTENCE_END = re.compile(r"(?<![.!?])[.!?]+(?=\s|$)|[\u3002\n]+")
_MARKS_IN_A_ROW = 30
"""As in Unicode's stream-safe format (UAX 15, section 13): no language has more on one letter, and
putting a heap of them in order takes its square."""
_APOSTROPHES = str.maketrans({"\u2019": "'", "\u2018": "'", "\u02bc": "'", "\u2010": "-"})


def normalised(text: str) -> str:
    """The text as it is compared: NFKC, lower case, one kind of apostrophe, no control characters.

    Whitespace becomes single spaces, but for line ends, which end a sentence. Of marks on one
    letter the first 30 are read.
    """
    plain = "".join(c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    if not plain.isascii():
        plain = _without_heaps(plain)
    folded = unicodedata.normalize("NFKC", plain).translate(_APOSTROPHES).casefold()
    # Folding can take a letter apart again.
    lines = unicodedata.normalize("NFKC", folded).splitlines()
    return "\n".join(line for line in (" ".join(line.split()) for line in lines) if line)


def _without_heaps(text: str) -> str:
    kept, marks = [], 0
    for c in text:
        # The two voicing marks of half width are letters by category, and become marks.
        marks = marks + 1 if unicodedata.category(c)[0] == "M" or c in "\uff9e\uff9f" else 0
        if marks <= _MARKS_IN_A_ROW:
            kept.append(c)
    return "".join(kept)


def sentences(text: str) -> Iterator[list[str]]:
    """The words of each sentence of a text, normalised; sentences without a word are left out.

    What holds a digit is a word that no vocabulary has; punctuation and pictures are none.
    """
    for sentence in _SENTENCE_END.split(normalised(text)):
        found = _TOKEN.findall(sentence)
        if found:
            yield found


def is_word(text: str) -> bool:
    """Whether a vocabulary may hold it: normalised letters, with ' and - between them."""
    return (
        len(text) <= MAX_WORD_CHARACTERS
        and _WORD.fullmatch(text) is not None
        and normalised(text) == text
    )


class Vocabulary:
    """Words and their numbers: the first is `FIRST_WORD`, the most frequent first by custom.

    Raises `ValueError` for a word that is none, or that is there twice.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.words = tuple(words)
        self._numbers = {word: number for number, word in enumerate(self.words, FIRST_WORD)}
        if len(self._numbers) != len(self.words):
            raise ValueError("a word is in the vocabulary twice")
        for word in self.words:
            if not is_word(word):
                raise ValueError(f"{word!r} is not a word in normal form")

    def __len__(self) -> int:
        """How many numbers there are, those that stand for no word included."""
        return FIRST_WORD + len(self.words)

    def number(self, word: str) -> int:
        """The number of a normalised word, `UNKNOWN` if it is not there."""
        return self._numbers.get(word, UNKNOWN)

    def word(self, number: int) -> str | None:
        """The word of a number, None for those that stand for none."""
        at = number - FIRST_WORD
        return self.words[at] if 0 <= at < len(self.words) else None

    def numbered(self) -> Iterator[tuple[int, str]]:
        """Each word with its number."""
        return enumerate(self.words, FIRST_WORD)

    def encode(self) -> bytes:
        """The words, one a line, in UTF-8: a blob of the plan."""
        return "".join(f"{word}\n" for word in self.words).encode()

    @classmethod
    def decode(cls, data: bytes) -> Vocabulary:
        """What `encode` wrote. Raises `PlanRefused` for anything else."""
        if len(data) > MAX_VOCABULARY_BYTES:
            raise PlanRefused(f"a vocabulary of {len(data)} bytes, at most {MAX_VOCABULARY_BYTES}")
        try:
            lines = data.decode().split("\n")
            if lines.pop() != "" or len(lines) > MAX_WORDS:
                raise PlanRefused(f"the plan's vocabulary: no lines, or more than {MAX_WORDS}")
            return cls(lines)
        except ValueError as error:
            raise PlanRefused(f"the plan's vocabulary: {error}") from error


class WordEncoder:
    """Texts → windows of `window` words, with a vocabulary."""

    def __init__(self, vocabulary: Vocabulary, window: int) -> None:
        self.vocabulary = vocabulary
        self.window = window

    def prefix(self, text: str) -> npt.NDArray[np.int64]:
        """What was typed so far → int64 `[1, window]`: the last sentence, or the end of it.

        Every word is taken as complete. `PADDING` is on the right.
        """
        import numpy as np  # noqa: PLC0415 -- see the top of the file

        typed = normalised(text)
        last = _SENTENCE_END.split(typed)[-1]
        numbers = [START, *(self.vocabulary.number(word) for word in _TOKEN.findall(last))]
        row = np.zeros((1, self.window), np.int64)
        kept = numbers[-self.window :]
        row[0, : len(kept)] = kept
        return row

    def windows(self, texts: Iterable[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Texts → (inputs, targets), both int64 `[n, window]`; `PADDING` is on the right.

        `inputs[i, t]` is the word before `targets[i, t]`, `START` before the first of a sentence. A
        sentence of more than `window` words goes on in the next window, after the same word.
        """
        import numpy as np  # noqa: PLC0415 -- see the top of the file

        rows: list[list[int]] = []
        for text in texts:
            for words in sentences(text):
                numbers = [START, *map(self.vocabulary.number, words)]
                # One more than fits: each but the last is an input, each but the first a target.
                rows += [
                    numbers[start : start + self.window + 1]
                    for start in range(0, len(words), self.window)
                ]
        inputs = np.zeros((len(rows), self.window), np.int64)
        targets = np.zeros((len(rows), self.window), np.int64)
        for at, row in enumerate(rows):
            inputs[at, : len(row) - 1] = row[:-1]
            targets[at, : len(row) - 1] = row[1:]
        return inputs, targets


def count_windows(texts: Iterable[str], window: int) -> int:
    """How many windows `WordEncoder.windows` makes of them, whatever the vocabulary."""
    return sum(-(-len(words) // window) for text in texts for words in sentences(text))
