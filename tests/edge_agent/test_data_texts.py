"""Texts as examples: files, users, windows, counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedge.edge_agent.data.config import DataConfig, DataFormat, PartitionConfig
from fedge.edge_agent.data.examples import count_examples, open_examples
from fedge.schemas.errors import ConfigError
from fedge.schemas.text_file import read_texts, texts_by_user
from fedge.schemas.words import Vocabulary, WordEncoder

WORDS = WordEncoder(Vocabulary(["see", "you", "soon"]), 3)


@pytest.fixture
def messages(tmp_path: Path) -> Path:
    path = tmp_path / "messages.jsonl"
    lines = [
        {"user": "a", "text": "See you! Soon."},
        {"user": "b", "text": "you"},
        {"user": "a", "text": "see you soon you see", "more": 1},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    return path


def test_the_examples_are_texts_and_the_rows_are_windows(messages: Path) -> None:
    config = DataConfig(path=messages, user="a")
    found = open_examples(config, WORDS)
    assert found.examples == count_examples(config).training == 2
    # "See you", "Soon", and a sentence of five words in windows of three.
    assert len(found) == 4
    assert found.raw_inputs.shape == found.raw_targets.shape == (4, 3)


def test_one_user_is_one_device(messages: Path) -> None:
    assert texts_by_user(messages) == {"a": 2, "b": 1}
    assert list(read_texts(messages, user="b")) == ["you"]
    assert len(list(read_texts(messages))) == 3
    with pytest.raises(ConfigError, match="no text of user 'z'"):
        count_examples(DataConfig(path=messages, user="z"))


def test_a_plain_file_has_one_text_a_line(tmp_path: Path) -> None:
    path = tmp_path / "typed.txt"
    path.write_text("see you\nsoon\n")
    assert open_examples(DataConfig(path=path), WORDS).examples == 2
    first = DataConfig(path=path, limit=1)
    assert count_examples(first).training == 1
    second = DataConfig(path=path, partition=PartitionConfig(scheme="ordered", index=1, of=2))
    assert open_examples(second, WORDS).raw_targets[0, 0] == WORDS.vocabulary.number("soon")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("no json", r"messages.jsonl:4: not JSON"),
        ('{"user": "a"}', r"messages.jsonl:4: text: Field required"),
        ('{"text": 7}', r"messages.jsonl:4: text: Input should be a valid string"),
        (json.dumps({"text": "x" * 20_001}), r"messages.jsonl:4: text: String should have at most"),
    ],
)
def test_a_line_that_is_no_text_is_named(messages: Path, line: str, words: str) -> None:
    lines = messages.read_text().splitlines()[:3]
    messages.write_text("\n".join([*lines, line]))
    with pytest.raises(ConfigError, match=words):
        count_examples(DataConfig(path=messages))


def test_an_example_store_is_not_read_without_its_limits(tmp_path: Path) -> None:
    # Reading deletes what is too old, and how old that is only its agent knows.
    config = DataConfig(path=tmp_path / "examples.sqlite")
    for read in (lambda: open_examples(config, WORDS), lambda: count_examples(config)):
        with pytest.raises(ConfigError, match="only its agent reads it"):
            read()
    assert not config.path.exists()


def test_texts_need_a_task_about_words(messages: Path) -> None:
    with pytest.raises(ConfigError, match="the task is not about words"):
        open_examples(DataConfig(path=messages, format=DataFormat.TEXT))
