"""What is suggested while somebody types."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.edge_agent.suggestions import (
    MAX_TYPED_CHARACTERS,
    accepted,
    read_typed,
    suggested,
)
from fedge.schemas.words import START, Vocabulary, WordEncoder, is_word, normalised
from tests.schemas.test_words import work

ENCODER = WordEncoder(Vocabulary(["see", "you", "your", "soon", "at"]), 4)
NUMBER = ENCODER.vocabulary.number


@pytest.mark.parametrize(
    ("typed", "words", "begun"),
    [
        ("", [], ""),
        ("See ", ["see"], ""),
        ("See yo", ["see"], "yo"),
        ("See you. ", [], ""),
        ("Ok. See YO", ["see"], "yo"),
        ("at 5 ", ["at", "5"], ""),
        ("you'", ["you"], ""),
        ("don't", [], "don't"),
        ("I don\u2019t", ["i"], "don't"),
    ],
)
def test_finished_words_are_read_and_the_unfinished_one_is_kept(typed, words, begun):
    found = read_typed(typed, ENCODER)
    numbers = [START, *(NUMBER(word) for word in words)]
    assert found.inputs.tolist() == [numbers + [0] * (4 - len(numbers))]
    assert found.begun == begun


def test_only_the_end_of_a_long_text_is_read():
    found = read_typed("word " * 1_000_000 + "see ", ENCODER)
    assert found.inputs[0, -1] == NUMBER("see")


def scores(**probabilities: float) -> np.ndarray:
    output = np.full(len(ENCODER.vocabulary), -20.0, np.float32)
    for word, probability in probabilities.items():
        output[NUMBER(word)] = np.log(probability)
    return output


def test_the_likeliest_words_come_first_with_their_probabilities():
    found = suggested(scores(you=0.5, soon=0.3, at=0.2), "", ENCODER, top=2)
    assert [one.word for one in found.words] == ["you", "soon"]
    assert found.words[0].probability == pytest.approx(0.5, abs=1e-4)
    assert found.as_dict()["words"][0]["word"] == "you"


def test_a_word_that_is_begun_goes_on_as_it_began():
    found = suggested(scores(you=0.1, your=0.2, soon=0.7), "yo", ENCODER, top=5)
    assert [one.word for one in found.words] == ["your", "you"]
    nothing = suggested(scores(you=1.0), "xy", ENCODER, top=5)
    assert nothing.words == ()
    assert nothing.sentence() == "nothing"


@given(
    words=st.lists(st.text("abé'z", min_size=1, max_size=4), unique=True, max_size=30),
    begun=st.text("abé'z", min_size=1, max_size=3),
)
def test_every_word_with_the_beginning_is_found_and_no_other(words: list[str], begun: str) -> None:
    known = [word for word in words if is_word(word)]
    encoder = WordEncoder(Vocabulary(known), 4)
    found = suggested(np.zeros(len(encoder.vocabulary)), begun, encoder, top=100)
    assert {one.word for one in found.words} == {w for w in known if w.startswith(begun)}


@pytest.mark.parametrize(
    ("typed", "word", "after"),
    [
        ("", "see", "see "),
        ("See ", "you", "See you "),
        ("See yo", "your", "See your "),
        ("SEE YO", "your", "SEE YOur "),
        ("See you.", "soon", "See you. soon "),
        ("don", "don't", "don't "),
        ("don\u2019t", "don't", "don't "),
        ("see", "see", "see "),
        ("a\n", "at", "a\nat "),
    ],
)
def test_a_suggestion_that_is_taken_completes_what_was_typed(typed, word, after):
    assert accepted(typed, word) == after


@given(st.text("aB7_'-\u2019\u02bc\u2010 .\u0301é", max_size=12))
def test_the_unfinished_word_is_the_longest_that_the_text_ends_in(text: str) -> None:
    joined = r"[^\W_](?:[^\W_]|['\u2019\u2018\u2010-](?=[^\W_]))*\Z"
    found = re.search(joined, text)
    begun = "" if found is None else found.group()
    assert read_typed(text, ENCODER).begun == normalised(begun)


@pytest.mark.parametrize(
    "hostile",
    [
        lambda n: "a" * (n - 1) + " ",
        lambda n: "a" * n,
        lambda n: "a-" * (n // 2) + " ",
        lambda n: "." * (n - 1) + "a",
        lambda n: "a" + "\u0301" * (n // 2) + "\u0316" * (n // 2),
    ],
    ids=["letters", "word", "hyphens", "stops", "marks"],
)
def test_no_text_takes_more_than_its_length(hostile):
    few, many = MAX_TYPED_CHARACTERS // 8, MAX_TYPED_CHARACTERS
    # Eight times as long: about 8 times the work, or 64 times if each place begins a new search.
    assert work(lambda: read_typed(hostile(many), ENCODER)) < 24 * work(
        lambda: read_typed(hostile(few), ENCODER)
    )
