"""The n-gram that a recurrent net has to beat: interpolated Kneser-Ney over the same vocabulary.

Counts, smoothing and scores are nltk's (Bird et al. 2009). nltk's own Kneser-Ney counts
continuations anew for every score, which is too slow to rank words with; here they are counted
once and given to its absolute discounting, which is the same (Chen and Goodman 1999, section 2.7).

A ranking looks at the words seen after the context, and at the best ones after the context that is
one word shorter. That is exact, not a short cut: a word that was never seen after the context gets
its score from the shorter one alone, and a word that stands before it there stands before it here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from nltk.lm import NgramCounter, Vocabulary
from nltk.lm.models import AbsoluteDiscountingInterpolated

from fedge.schemas.words import Vocabulary as Words
from fedge.schemas.words import sentences

START, UNKNOWN = "<s>", "<UNK>"
SUGGESTIONS = 3


class NgramSuggestions:
    """Fitted to texts once. `order`: words looked at, the suggested one included, 2 or more.

    `discount`: taken off each count, 0 to 1.
    """

    def __init__(
        self, words: Words, texts: Iterable[str], *, order: int = 3, discount: float = 0.75
    ) -> None:
        self._words = words
        self._order = order
        known = Vocabulary(words.words, unk_cutoff=1, unk_label=UNKNOWN)
        self._model = AbsoluteDiscountingInterpolated(
            order, discount=discount, vocabulary=known, counter=self._counted(texts)
        )
        self._best: dict[tuple[str, ...], tuple[str, ...]] = {}

    def suggest(self, before: tuple[str, ...]) -> tuple[str, ...]:
        """The three best words after these, which are known words, `START` or `UNKNOWN`.

        Fewer if the texts had fewer known words.
        """
        return self._ranked(before[-(self._order - 1) :])

    def sums(self, texts: Iterable[str]) -> dict[str, float]:
        """How many words were suggested first, among three, and how many there are in all."""
        found = Counter(all_words=0, first_hits=0, three_hits=0)
        for sentence in self._sentences(texts):
            for at in range(1, len(sentence)):
                suggested = self.suggest(sentence[max(0, at - self._order + 1) : at])
                found["all_words"] += 1
                found["first_hits"] += sentence[at] in suggested[:1]
                found["three_hits"] += sentence[at] in suggested
        return {name: float(count) for name, count in found.items()}

    def score(self, word: str, before: tuple[str, ...]) -> float:
        """The probability of a word after these."""
        return float(self._model.unmasked_score(word, before))

    def _ranked(self, context: tuple[str, ...]) -> tuple[str, ...]:
        if context not in self._best:
            counts = self._model.counts[context] if context else self._model.counts.unigrams
            candidates = set(counts) | (set(self._ranked(context[1:])) if context else set())
            scored = sorted(
                (-self.score(word, context), self._words.number(word), word)
                for word in candidates - {START, UNKNOWN}
            )
            self._best[context] = tuple(word for _, _, word in scored[:SUGGESTIONS])
        return self._best[context]

    def _counted(self, texts: Iterable[str]) -> NgramCounter:
        """Of the longest n-grams how often they were seen, of shorter ones after how many words.

        Those at the start of a sentence come after none: they count as often as they were seen.
        """
        longest = Counter[tuple[str, ...]]()
        at_start = Counter[tuple[str, ...]]()
        for sentence in self._sentences(texts):
            for end in range(1, len(sentence) + 1):
                gram = sentence[max(0, end - self._order) : end]
                (longest if len(gram) == self._order else at_start)[gram] += 1
        counter = NgramCounter()
        grams = longest
        while grams:
            counter.update([_repeated(grams)])
            shorter = Counter(gram[1:] for gram in grams if len(gram) > 1)
            length = len(next(iter(grams))) - 1
            shorter.update({g: n for g, n in at_start.items() if len(g) == length})
            grams = shorter
        return counter

    def _sentences(self, texts: Iterable[str]) -> Iterator[tuple[str, ...]]:
        for text in texts:
            for words in sentences(text):
                known = (self._words.word(self._words.number(word)) or UNKNOWN for word in words)
                yield (START, *known)


def _repeated(grams: Counter[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    return grams.elements()
