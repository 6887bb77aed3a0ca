"""Vocabularies, made without looking at any device's text."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedge.coordinator.vocabularies import (
    documentation_words,
    most_frequent,
    public_words,
    read_words,
)
from fedge.schemas.errors import ConfigError
from fedge.schemas.words import Vocabulary, is_word


def test_the_most_frequent_words_come_first_and_equals_by_the_alphabet() -> None:
    texts = ["The cat. The dog!", "a cat, 3 cats; 99 99 99 99"]
    assert most_frequent(texts, 3) == ["cat", "the", "a"]


def test_words_of_pythons_documentation_are_a_vocabulary() -> None:
    words = documentation_words(1000)
    assert len(words) == 1000
    assert "the" in words[:5]
    assert Vocabulary(words).number("function") >= 3
    assert words == documentation_words(1000)


def test_a_public_list_is_a_vocabulary_of_the_size_that_is_asked_for() -> None:
    words = public_words("en", 10_000)
    assert len(words) == len(set(words)) == 10_000
    assert all(is_word(word) for word in words)
    with pytest.raises(ConfigError, match="language"):
        public_words("klingon", 10)


def test_a_file_of_the_operators_is_one_word_a_line(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("the\ncat\n")
    assert read_words(path).words == ("the", "cat")
    path.write_text("the\nThe Cat\n")
    with pytest.raises(ConfigError, match=r"words.txt:2: 'The Cat' is not one lower-case word"):
        read_words(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_words(tmp_path / "none.txt")
