"""Texts in a file: one a line, or JSON lines that may say whose each is.

What was typed stays text until a plan's words make windows of it, so one file serves every plan.
A file with the texts of many users is read whole once, to learn where each user's lines begin;
after that a user's texts cost no more than that user's lines. The virtual devices of a fleet share
such a file, and each reads its own user's texts for every training.
"""

from __future__ import annotations

import contextlib
import json
from array import array
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedge.schemas.errors import ConfigError, StoreError

MAX_TEXT_CHARACTERS = 20_000
JSON_LINES = ".jsonl"

_State = tuple[int, int, int, int]


class TextLine(BaseModel):
    """One line of a `.jsonl` file. Other keys are allowed and not read."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    text: Annotated[str, Field(max_length=MAX_TEXT_CHARACTERS)]
    user: Annotated[str, Field(max_length=200)] | None = None


def read_texts(path: Path, *, user: str | None = None) -> Iterator[str]:
    """The texts of a file in order; of a `.jsonl` file those of one user, if one is named.

    Raises `ConfigError` naming the line that is none, or if nothing is this user's; `StoreError` if
    the file cannot be read.
    """
    if user is not None:
        yield from _texts_of(path, user)
    elif _is_json(path):
        for _, one in _json_lines(path):
            yield one.text
    else:
        with _reading(path), path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                yield line.rstrip("\n")


def read_lines(path: Path) -> Iterator[TextLine]:
    """The lines of a `.jsonl` file that are not blank, in order. Raises as `read_texts`."""
    return (one for _, one in _json_lines(path))


def texts_by_user(path: Path) -> dict[str, int]:
    """How many texts each user of a `.jsonl` file has, in order of their first text.

    Texts without a user are nobody's; no other file has users. Raises as `read_texts`.
    """
    if not _is_json(path):
        return {}
    begins = _begins_by_user(path, _state_of(path))
    return {user: len(own) for user, own in begins.items() if user}


def _texts_of(path: Path, user: str) -> Iterator[str]:
    begins = _begins_by_user(path, _state_of(path)) if _is_json(path) else {}
    if user not in begins:
        raise ConfigError(f"{path}: no text of user {user!r}")
    with _reading(path), path.open("rb") as file:
        for begin in begins[user]:
            file.seek(begin)
            one = _parsed(f"{path}, byte {begin}", file.readline())
            if one is None or one.user != user:
                # Another user's text would be trained on as this one's.
                raise StoreError(f"{path}: it was changed while it was read")
            yield one.text


# Of one file: the devices of a fleet share theirs, and any other device has but one.
@lru_cache(maxsize=1)
def _begins_by_user(path: Path, state: _State) -> Mapping[str, array[int]]:
    """At which byte each user's lines begin, as long as the file is in this `state`."""
    begins: dict[str, array[int]] = {}
    for begin, one in _json_lines(path):
        if one.user is not None:
            begins.setdefault(one.user, array("q")).append(begin)
    return begins


def _state_of(path: Path) -> _State:
    with _reading(path):
        found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _json_lines(path: Path) -> Iterator[tuple[int, TextLine]]:
    """Each line that is not blank, with the byte at which it begins."""
    with _reading(path), path.open("rb") as file:
        begin = 0
        for number, line in enumerate(file, 1):
            one = _parsed(f"{path}:{number}", line)
            if one is not None:
                yield begin, one
            begin += len(line)


def _parsed(where: str, line: bytes) -> TextLine | None:
    text = line.decode("utf-8", errors="replace")
    if not text.strip():
        return None
    try:
        return TextLine.model_validate(json.loads(text))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}: {field}: {first['msg']}") from error
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error


def _is_json(path: Path) -> bool:
    return path.suffix.lower() == JSON_LINES


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error})") from error
