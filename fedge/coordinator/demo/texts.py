"""What people typed, for demonstrations: a person a device, the last part of each to test on.

A real keyboard's texts stay on their device. These stand in for them: topics of the English
documentation inside Python, one a device, or a file of `{"user", "text"}` lines.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedge.coordinator.datasets import Examples
from fedge.schemas.errors import ConfigError, StoreError
from fedge.schemas.text_file import read_lines
from fedge.schemas.words import WordEncoder

_HELD_OUT = 0.2
_FEWEST_TEXTS = 2


@dataclass(frozen=True, slots=True)
class Typist:
    """One device's texts, in the order in which they were typed, cut by time."""

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]


def typists(data: Path | None, count: int) -> list[Typist]:
    """Who types on each of `count` devices: people of a file, or topics of Python's documentation.

    The first so many of them. Where there are fewer, whoever has most to type has several devices,
    one after the other: each holds an earlier or a later part of those texts.
    Raises `ConfigError` if a device would have no two texts, or a line is none.
    """
    people = list(people_in(data).items())
    owners = _owners([len(texts) for _, texts in people], count)
    shares = Counter(owners)
    given: Counter[int] = Counter()
    found = []
    for owner in owners:
        name, texts = people[owner]
        share, of = given[owner], shares[owner]
        given[owner] += 1
        part = texts[len(texts) * share // of : len(texts) * (share + 1) // of]
        found.append(_cut(name, part))
    return found


def _owners(lengths: Sequence[int], count: int) -> list[int]:
    """Whose each device is: one each, every further one's who would have most texts on it."""
    owners = list(range(min(count, len(lengths))))
    by_need = [(-length / 2, owner, 2) for owner, length in enumerate(lengths)]
    heapq.heapify(by_need)
    while len(owners) < count:
        if not by_need or -by_need[0][0] < _FEWEST_TEXTS:
            raise ConfigError(
                f"{len(lengths)} users or topics have {sum(lengths)} texts, and each device needs "
                f"{_FEWEST_TEXTS} of one of them: give fewer --devices than {count}"
            )
        _, owner, devices = by_need[0]
        owners.append(owner)
        heapq.heapreplace(by_need, (-lengths[owner] / (devices + 1), owner, devices + 1))
    return owners


def people_in(data: Path | None) -> dict[str, list[str]]:
    """Everybody's texts, in the order in which they were typed; without a file, topics of Python.

    Those with one text, which cannot be cut in two, are left out. Raises `ConfigError`.
    """
    found = _topics() if data is None else _people(data)
    return {name: texts for name, texts in found.items() if len(texts) >= _FEWEST_TEXTS}


def windows_of(encoder: WordEncoder, texts: Iterable[str]) -> Examples:
    """The examples in texts. Raises `ConfigError` if there is no word in them."""
    inputs, targets = encoder.windows(texts)
    return Examples(inputs, targets)


def write_texts(texts: Sequence[str], path: Path) -> None:
    """Writes a device's texts as JSON lines. Raises `ConfigError` if the disk refuses."""
    try:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def _cut(name: str, texts: Sequence[str]) -> Typist:
    tested = max(1, round(len(texts) * _HELD_OUT))
    return Typist(name, tuple(texts[:-tested]), tuple(texts[-tested:]))


def _topics() -> dict[str, list[str]]:
    # Not every Python installation has it: Debian puts it into a package of its own.
    try:
        from pydoc_data.topics import topics  # noqa: PLC0415 -- half a megabyte, for few
    except ImportError as error:
        raise ConfigError(
            "this Python came without its documentation topics: give --data FILE.jsonl with "
            '{"user": …, "text": …} lines'
        ) from error
    largest = sorted(topics, key=lambda name: (-len(topics[name]), name))
    return {name: [part for part in topics[name].split("\n\n") if part.strip()] for name in largest}


def _people(path: Path) -> dict[str, list[str]]:
    people: dict[str, list[str]] = {}
    try:
        for line in read_lines(path):
            if line.user is None:
                raise ConfigError(f'{path}: a line is not of the form {{"user": …, "text": …}}')

            people.setdefault(line.user, []).append(line.text)
    except StoreError as error:
        raise ConfigError(str(error)) from error
    return people
