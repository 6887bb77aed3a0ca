"""Files that are either the old ones or the new ones, whatever the moment of a power cut."""

from __future__ import annotations

import os
from pathlib import Path

from fedge.schemas.errors import StoreError


def partial_of(path: Path) -> Path:
    """Where `replace_file` writes before it renames: what a killed process may leave behind."""
    return path.with_name(f".{path.name}.part")


def replace_file(path: Path, data: bytes) -> None:
    """Makes `path` hold `data`: written beside it, synced, renamed, the folder synced.

    One process at a time may write a path. Raises `StoreError`; `path` is as it was
    then, and nothing is left beside it.
    """
    partial = partial_of(path)
    try:
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error}") from error
