"""TOML configuration files, read the same way by both programs, with errors that help."""

from __future__ import annotations

import difflib
import tomllib
import types
import typing
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from fedge.schemas.errors import ConfigError

S = TypeVar("S", bound=BaseModel)


def read_toml(path: Path, kind: type[S]) -> S:
    """The settings of type `kind` in the TOML file at `path`.

    Raises `ConfigError` naming the file, the key, the problem and, for an unknown key, the nearest
    known one.
    """
    try:
        return kind.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    except ValidationError as error:
        raise ConfigError(_explain(error, kind, path)) from error


def _explain(error: ValidationError, kind: type[BaseModel], path: Path) -> str:
    lines = []
    for problem in error.errors(include_url=False, include_context=False):
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _keys_at(kind, problem["loc"][:-1])
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
            lines.append(f"unknown key {where!r}; {hint}")
        else:
            lines.append(f"{where or 'the file'}: {problem['msg']}")
    return f"{path}: " + "; ".join(lines)


def _keys_at(kind: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        field = kind.model_fields.get(str(part))
        inner = None if field is None else _model_in(field.annotation)
        if inner is None:
            break
        kind = inner
    return sorted(kind.model_fields)


def _model_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for choice in typing.get_args(annotation):
            found = _model_in(choice)
            if found is not None:
                return found
    return None
