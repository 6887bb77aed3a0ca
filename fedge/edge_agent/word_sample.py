"""One word of all that was typed on this device, and the noisy bucket that is told of it.

The word is drawn by how often it was typed, of those typed often enough, which whoever asks and
whoever owns the device both have a say in: what was typed less often than either wants, a name or a
password, is not even drawn. Only words of the training side are: the hold-out is
for measuring. Knows no network; the noise is `word_reports`'.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping

from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.example_limits import ExampleLimits
from fedge.schemas.messages import WordCountAnnouncement, WordCountAnswer
from fedge.schemas.word_reports import NOTHING, bucket_count, bucket_of, named_bucket
from fedge.schemas.words import is_word, sentences

Draw = Callable[[int], int]
"""`draw(n)`: a whole number from 0 to n - 1, each as likely."""

KEY_BYTES = 24


def words_typed(data: DataConfig, limits: ExampleLimits | None) -> tuple[int | None, Counter[str]]:
    """The generation of the example store, if it is one, and how often each word was typed.

    Raises as `training_texts` does.
    """
    # Only here: it brings numpy, and an agent that waits has none.
    from fedge.edge_agent.data.examples import training_texts  # noqa: PLC0415

    generation, texts = training_texts(data, limits)
    return generation, count_words(texts)


def count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each word is in the texts; what no vocabulary may hold is not counted."""
    counts = Counter(word for text in texts for found in sentences(text) for word in found)
    return Counter({word: count for word, count in counts.items() if is_word(word)})


def drawn_word(
    counts: Mapping[str, int], least_typed: int, known: Container[str], draw: Draw
) -> str:
    """One word, by how often it was typed; `NOTHING` if none may be drawn.

    `least_typed`: words typed less often are not drawn. `known`: nor are these.
    """
    typed = [(w, n) for w, n in counts.items() if n >= least_typed and w not in known]
    total = sum(count for _, count in typed)
    at = draw(total) if total else 0
    for word, count in typed:
        if at < count:
            return word
        at -= count
    return NOTHING


def answer_to(
    asked: WordCountAnnouncement,
    counts: Mapping[str, int],
    known: Container[str],
    draw: Draw = secrets.randbelow,
    *,
    least_typed: int = 1,
) -> WordCountAnswer:
    """A fresh answer, of a word and with a noise that are drawn now; made once for a campaign.

    `least_typed`: the device's own; the larger one of both holds.
    """
    word = drawn_word(counts, max(asked.least_typed, least_typed), known, draw)
    key = draw(2 ** (8 * KEY_BYTES)).to_bytes(KEY_BYTES).hex()
    true = bucket_of(word, key, bucket_count(asked.epsilon))
    bucket = named_bucket(true, asked.epsilon, draw)
    return WordCountAnswer(campaign=asked.campaign, key=key, bucket=bucket)
