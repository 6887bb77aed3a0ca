"""TOML configuration files, read the same way by both programs, with errors that help.

What pydantic finds is said in the words of the file: the key as it is written there, what it is
now, and what it may be. Values of a check of our own are not repeated: they may hold a password.
"""

from __future__ import annotations

import difflib
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fedge.schemas.errors import ConfigError
from fedge.schemas.ids import DeviceName

S = TypeVar("S", bound=BaseModel)

SHOWN_CHARACTERS = 60
"""Of a value that is longer, only the beginning is repeated."""

_NAME_PATTERN = typing.get_args(DeviceName)[1].pattern
_NAMES = (
    "names have up to 63 lower-case letters, digits, '_' and '-', and begin with a letter or a "
    "digit"
)


def read_toml(path: Path, kind: type[S]) -> S:
    """The settings of type `kind` in the TOML file at `path`.

    Raises `ConfigError` naming the file, the key, the problem and, for an unknown key, the nearest
    known one.
    """
    try:
        written = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    try:
        return kind.model_validate(written)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error, kind, written)}") from error


def _explain(error: ValidationError, kind: type[BaseModel], written: Mapping[str, Any]) -> str:
    # One key may break the rules of every type that it may have.
    problems: dict[str, None] = {}
    for problem in error.errors(include_url=False):
        key = _as_written(problem, written)
        if problem["type"] == "extra_forbidden":
            problems[_of_an_unknown_key(problem, key, kind)] = None
        else:
            problems[_of_a_value(problem, key)] = None
    return "; ".join(problems)


def _as_written(problem: ErrorDetails, written: Mapping[str, Any]) -> str:
    """The key's path without pydantic's names of the types that a value may have."""
    path: list[str] = []
    here: Any = written
    last = len(problem["loc"]) - 1
    for position, part in enumerate(problem["loc"]):
        is_key = isinstance(here, Mapping) and part in here
        if is_key or (isinstance(here, list) and isinstance(part, int)):
            here = here[part]
        elif problem["type"] != "missing" or position != last:
            continue
        path.append(str(part))
    return ".".join(path)


def _of_an_unknown_key(problem: ErrorDetails, key: str, kind: type[BaseModel]) -> str:
    known = _keys_at(kind, problem["loc"][:-1])
    near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
    return f"unknown key {key!r}; {hint}"


def _of_a_value(problem: ErrorDetails, key: str) -> str:
    facts, where = problem.get("ctx", {}), key or "the file"
    match problem["type"]:
        case "missing":
            said = " is not set, and has no default"
        case "value_error":
            said = f": {problem['msg'].removeprefix('Value error, ')}"
        case "model_type" | "model_attributes_type":
            said = f": write a table, [{where}]"
        case "union_tag_not_found":
            said = f".{_bare(facts['discriminator'])} is not set: the other keys follow it"
        case "union_tag_invalid":
            said = (
                f".{_bare(facts['discriminator'])} is {_shown(facts['tag'])}; it should be one of "
                f"{facts['expected_tags']}"
            )
        case "string_pattern_mismatch" if facts["pattern"] == _NAME_PATTERN:
            said = f" is {_shown(problem['input'])}; {_NAMES}"
        case _:
            _, _, rule = problem["msg"].partition(" should ")
            rule = f"it should {rule}" if rule else problem["msg"]
            said = f" is {_shown(problem['input'])}; {rule}"
    return where + said


def _bare(name: object) -> str:
    return str(name).strip("'")


def _shown(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case Mapping():
            return "a table"
        case _:
            text = repr(value)
            return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def _keys_at(kind: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    tagged: Mapping[str, type[BaseModel]] = {}
    for part in location:
        if str(part) in tagged:
            kind, tagged = tagged[str(part)], {}
            continue
        field = kind.model_fields.get(str(part))
        models = () if field is None else tuple(_models_in(field.annotation))
        if field is None or not models:
            break
        kind = models[0]
        if isinstance(field.discriminator, str):
            tagged = {
                tag: model
                for model in models
                for tag in typing.get_args(model.model_fields[field.discriminator].annotation)
            }
    return sorted(kind.model_fields)


def _models_in(annotation: object) -> typing.Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for choice in typing.get_args(annotation):
            yield from _models_in(choice)
