"""Words: texts to numbers, the same everywhere, whatever is typed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.schemas.errors import PlanRefused
from fedge.schemas.words import (
    FIRST_WORD,
    PADDING,
    START,
    UNKNOWN,
    Vocabulary,
    WordEncoder,
    count_windows,
    is_word,
    normalised,
    sentences,
)

VOCABULARY = Vocabulary(["the", "a", "don't", "cat", "sat"])
THE, A, DONT, CAT, SAT = range(FIRST_WORD, FIRST_WORD + 5)


def test_a_text_is_cut_into_sentences_of_words():
    text = "The CAT sat.  Don\u2019t!\nwhat's up, doc? 3.50 :-) 👍 e.g. x_y"
    assert list(sentences(text)) == [
        ["the", "cat", "sat"],
        ["don't"],
        ["what's", "up", "doc"],
        ["3", "50", "e", "g"],
        ["x", "y"],
    ]


def test_words_become_the_inputs_before_and_the_targets_after():
    inputs, targets = WordEncoder(VOCABULARY, 4).windows(["the dog sat"])
    assert inputs.tolist() == [[START, THE, UNKNOWN, PADDING]]
    assert targets.tolist() == [[THE, UNKNOWN, SAT, PADDING]]


def test_a_long_sentence_goes_on_in_the_next_window():
    inputs, targets = WordEncoder(VOCABULARY, 2).windows(["the cat sat a cat"])
    assert inputs.tolist() == [[START, THE], [CAT, SAT], [A, PADDING]]
    assert targets.tolist() == [[THE, CAT], [SAT, A], [CAT, PADDING]]


def test_what_was_typed_last_is_the_prefix():
    encoder = WordEncoder(VOCABULARY, 3)
    assert encoder.prefix("").tolist() == [[START, 0, 0]]
    assert encoder.prefix("Sat. The").tolist() == [[START, THE, 0]]
    assert encoder.prefix("the cat sat a cat").tolist() == [[SAT, A, CAT]]
    # A sentence that has just ended: the next word begins one.
    assert encoder.prefix("the cat. ").tolist() == [[START, 0, 0]]


@given(st.lists(st.text(max_size=80), max_size=5), st.integers(1, 7))
def test_every_word_is_a_target_exactly_once(texts, window):
    inputs, targets = WordEncoder(VOCABULARY, window).windows(texts)
    words = [word for text in texts for each in sentences(text) for word in each]
    assert targets[targets != PADDING].tolist() == [VOCABULARY.number(word) for word in words]
    assert ((inputs != PADDING) == (targets != PADDING)).all()
    assert len(inputs) == count_windows(texts, window)
    # Padding is on the right and nowhere else.
    assert (np.diff((targets != PADDING).astype(int), axis=1) <= 0).all()


@given(st.text(max_size=200))
def test_what_is_normal_stays_as_it_is(text):
    once = normalised(text)
    assert normalised(once) == once


@given(st.text(max_size=40))
def test_every_token_without_digits_could_be_in_a_vocabulary_or_is_refused(text):
    for words in sentences(text):
        for word in words:
            if is_word(word):
                assert list(sentences(word)) == [[word]]


def test_a_vocabulary_is_a_blob_of_lines():
    assert VOCABULARY.encode() == b"the\na\ndon't\ncat\nsat\n"
    again = Vocabulary.decode(VOCABULARY.encode())
    assert again.words == VOCABULARY.words
    assert len(again) == FIRST_WORD + 5
    assert again.word(CAT) == "cat"
    assert again.word(START) is None
    assert again.word(10**6) is None


@pytest.mark.parametrize(
    "data", [b"the", b"the\nthe\n", b"The\n", b"a b\n", b"\xff\n", b"\n", b"x" * 50 + b"\n"]
)
def test_what_is_no_vocabulary_is_refused(data):
    with pytest.raises(PlanRefused, match="vocabulary"):
        Vocabulary.decode(data)


# ---------------------------------------------------------------- hostile texts


def work(done: Callable[[], object]) -> float:
    """What it takes of a core, the least of some tries; for ratios alone."""
    taken = []
    for _ in range(5):
        begun = time.thread_time()
        done()
        taken.append(time.thread_time() - begun)
    return min(taken)


@pytest.mark.parametrize(
    "hostile",
    [
        lambda n: "." * (n - 1) + "a",
        lambda n: "?!" * (n // 2) + "a",
        lambda n: "a" + "\u0301" * (n // 2) + "\u0316" * (n // 2),
        lambda n: "a" + "\u0344\u0316" * (n // 2),
        lambda n: "a" + "\u0301\uff9e" * (n // 2),
        lambda n: "a-" * (n // 2),
        lambda n: "a" * n,
        lambda n: "\ufdfa" * n,
    ],
    ids=["stops", "signs", "heap", "pairs", "half width", "hyphens", "word", "ligature"],
)
def test_no_text_takes_more_than_its_length(hostile):
    few, many = hostile(2_500), hostile(20_000)
    # Eight times as long: about 8 times the work, or 64 times if it takes its square.
    assert work(lambda: list(sentences(many))) < 24 * work(lambda: list(sentences(few)))


@given(st.text("a.!?\u3002\n \t", max_size=12))
def test_a_run_of_signs_ends_a_sentence_before_a_space_or_at_the_end(text):
    ends = re.compile(r"[.!?]+(?=\s|$)|[\u3002\n]+")
    found = [re.findall("a+", one) for one in ends.split(normalised(text))]
    assert list(sentences(text)) == [one for one in found if one]


def test_of_a_heap_of_marks_the_first_thirty_are_read():
    assert normalised("x" + "\u0316" * 30) == "x" + "\u0316" * 30
    assert normalised("x" + "\u0316" * 40 + "y") == "x" + "\u0316" * 30 + "y"
    assert normalised("e\u0301") == "\u00e9"
