"""What people typed, for demonstrations: one person, one device; the last part of each to test on.

A real keyboard's texts stay on their device. These stand in for them: topics of the English
documentation inside Python, one a device, or a file of `{"user", "text"}` lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedge.coordinator.datasets import Examples
from fedge.schemas.errors import ConfigError
from fedge.schemas.words import WordEncoder

_HELD_OUT = 0.2


@dataclass(frozen=True, slots=True)
class Typist:
    """One device's texts, in the order in which they were typed, cut by time."""

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]


def typists(data: Path | None, count: int) -> list[Typist]:
    """The first so many people of a file; without one, so many topics of Python's documentation.

    Raises `ConfigError` if there are fewer, or a line is none.
    """
    found = _topics(count) if data is None else _people(data)
    if len(found) < count:
        raise ConfigError(f"{data}: texts of {len(found)} users; --devices {count} needs as many")
    return [_cut(name, texts) for name, texts in list(found.items())[:count]]


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


def _topics(count: int) -> dict[str, list[str]]:
    # Not every Python installation has it: Debian puts it into a package of its own.
    try:
        from pydoc_data.topics import topics  # noqa: PLC0415 -- half a megabyte, for few
    except ImportError as error:
        raise ConfigError(
            "this Python came without its documentation topics: give --data FILE.jsonl with "
            '{"user": …, "text": …} lines'
        ) from error
    largest = sorted(topics, key=lambda name: (-len(topics[name]), name))
    if count > len(largest):
        raise ConfigError(f"Python's documentation has {len(largest)} topics: at most so many")
    return {
        name: [part for part in topics[name].split("\n\n") if part.strip()]
        for name in largest[:count]
    }


def _people(path: Path) -> dict[str, list[str]]:
    people: dict[str, list[str]] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    one = json.loads(line)
                    user, text = str(one["user"]), str(one["text"])
                except (ValueError, KeyError, TypeError) as error:
                    raise ConfigError(
                        f'{path}:{number}: not of the form {{"user": …, "text": …}}: {error!r}'
                    ) from error
                people.setdefault(user, []).append(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return {user: texts for user, texts in people.items() if len(texts) > 1}
