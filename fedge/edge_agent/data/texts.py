"""Texts in a file: one a line, or JSON lines that may say whose each is.

What was typed stays text until a plan's words make windows of it, so one file serves every plan.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedge.schemas.errors import ConfigError, StoreError

MAX_TEXT_CHARACTERS = 20_000
JSON_LINES = ".jsonl"


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
    found = False
    for one in _lines(path):
        if user is None or one.user == user:
            found = True
            yield one.text
    if user is not None and not found:
        raise ConfigError(f"{path}: no text of user {user!r}")


def users_of(path: Path) -> list[str]:
    """Who is named in a `.jsonl` file, in order of their first text. Raises as `read_texts`."""
    return list(dict.fromkeys(one.user for one in _lines(path) if one.user is not None))


def _lines(path: Path) -> Iterator[TextLine]:
    is_json = path.suffix.lower() == JSON_LINES
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if not is_json:
                    yield TextLine.model_construct(text=line.rstrip("\n"))
                elif (one := _parsed(path, number, line)) is not None:
                    yield one
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error})") from error


def _parsed(path: Path, number: int, line: str) -> TextLine | None:
    if not line.strip():
        return None
    try:
        return TextLine.model_validate(json.loads(line))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}:{number}: {where}: {first['msg']}") from error
    except ValueError as error:
        raise ConfigError(f"{path}:{number}: not JSON: {error}") from error
