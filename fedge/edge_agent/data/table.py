"""CSV tables of numbers: some columns are inputs, some are targets.

Every cell must be a finite number, because a hole that becomes zero in silence is learned. The
error says which line and column.
"""

from __future__ import annotations

import csv
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedge.schemas.errors import ConfigError, StoreError


@dataclass(frozen=True, slots=True)
class Layout:
    """Which columns mean what: names, or positions of which negative ones count from the end."""

    target_columns: tuple[int | str, ...]
    ignore_columns: tuple[int | str, ...]
    header: bool | Literal["auto"]
    delimiter: str


def count_rows(path: Path, layout: Layout) -> int:
    """The number of examples, without parsing numbers. Raises `StoreError`, as `read_table`."""
    rows = _rows(path, layout.delimiter)
    first = next(rows, None)
    if first is None:
        return 0
    return sum(1 for _ in rows) + (0 if _is_header(first[1], layout.header) else 1)


def read_table(
    path: Path, layout: Layout, limit: int | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[Any]]:
    """The first `limit` rows: inputs `[n, columns]`, targets `[n]` or `[n, target columns]`.

    Targets are int64 if all are whole numbers, otherwise float64. Blank lines are skipped.
    Raises `ConfigError` if a named column is not there, `StoreError` for a line that is broken.
    """
    rows = _rows(path, layout.delimiter)
    first = next(rows, None)
    if first is None:
        return np.empty((0, 0)), np.empty(0, np.int64)
    width = len(first[1])
    names = first[1] if _is_header(first[1], layout.header) else None
    target_at = _positions(layout.target_columns, width, names, path)
    ignored = _positions(layout.ignore_columns, width, names, path)
    input_at = [at for at in range(width) if at not in target_at and at not in ignored]
    if not input_at:
        raise ConfigError(f"{path}: no column is left for the inputs; check target_columns")
    if names is None:
        rows = _chain(first, rows)
    inputs, targets = array("d"), array("d")
    for done, (line, cells) in enumerate(rows):
        if done == limit:
            break
        if len(cells) != width:
            raise StoreError(
                f"{path}, line {line}: {len(cells)} columns, the first line has {width}"
            )
        for at in input_at:
            inputs.append(_number(cells[at], path, line, at))
        for at in target_at:
            targets.append(_number(cells[at], path, line, at))
    x = np.frombuffer(inputs, np.float64) if inputs else np.empty(0)
    y = np.frombuffer(targets, np.float64) if targets else np.empty(0)
    shaped = y.reshape(-1, len(target_at)) if len(target_at) > 1 else y
    return x.reshape(-1, len(input_at)), whole_if_possible(shaped)


def whole_if_possible(values: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    """int64 if every value is a whole number that float64 holds exactly, otherwise unchanged."""
    if np.all((np.floor(values) == values) & (np.abs(values) < 2**53)):
        return values.astype(np.int64)
    return values


def read_labels(path: Path) -> tuple[list[str], npt.NDArray[Any]]:
    """File names and labels of a CSV file whose header names the columns `file` and `label`.

    Raises `ConfigError` if it is not there or has no such columns, `StoreError` for broken lines.
    """
    if not path.is_file():
        raise ConfigError(
            f"no file of labels at {path}: write a CSV file with the columns file and label, "
            "or set `labels`"
        )
    rows = _rows(path, ",")
    header = [name.strip() for name in next(rows, (0, []))[1]]
    if "file" not in header or "label" not in header:
        raise ConfigError(f"{path}: the first line must name the columns file and label")
    file_at, label_at = header.index("file"), header.index("label")
    names: list[str] = []
    labels = array("d")
    for line, cells in rows:
        if len(cells) != len(header):
            raise StoreError(f"{path}, line {line}: {len(cells)} columns, expected {len(header)}")
        if not cells[file_at].strip():
            raise StoreError(f"{path}, line {line}: no file name")
        names.append(cells[file_at].strip())
        labels.append(_number(cells[label_at], path, line, label_at))
    return names, whole_if_possible(np.array(labels, np.float64))


def _rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each line that is not blank."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    yield reader.line_num, cells
    except UnicodeDecodeError as error:
        raise StoreError(f"{path}: not UTF-8 text; save it as UTF-8") from error
    except csv.Error as error:
        raise StoreError(f"{path}, line {reader.line_num}: {error}") from error
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error})") from error


def _chain(
    first: tuple[int, list[str]], rest: Iterator[tuple[int, list[str]]]
) -> Iterator[tuple[int, list[str]]]:
    yield first
    yield from rest


def _is_header(cells: Sequence[str], header: bool | Literal["auto"]) -> bool:
    if header != "auto":
        return header
    return not all(_is_number(cell) for cell in cells)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _number(cell: str, path: Path, line: int, column: int) -> float:
    try:
        value = float(cell)
    except ValueError as error:
        raise StoreError(
            f"{path}, line {line}, column {column + 1}: {cell[:40]!r} is not a number; "
            "write classes as numbers from 0, and fill or remove empty cells"
        ) from error
    if not math.isfinite(value):
        raise StoreError(f"{path}, line {line}, column {column + 1}: {cell[:40]!r} is not finite")
    return value


def _positions(
    columns: Sequence[int | str], width: int, names: Sequence[str] | None, path: Path
) -> list[int]:
    found = []
    stripped = None if names is None else [name.strip() for name in names]
    for column in columns:
        if isinstance(column, str):
            if stripped is None or column not in stripped:
                known = "has no header" if stripped is None else f"has {stripped[:12]}"
                raise ConfigError(f"{path} {known}, no column {column!r}: name one of its columns")
            found.append(stripped.index(column))
        elif -width <= column < width:
            found.append(column % width)
        else:
            raise ConfigError(f"{path} has {width} columns, no column {column}")
    return found
