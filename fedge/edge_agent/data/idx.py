"""IDX files: MNIST's format for arrays (LeCun, "The MNIST database", section "File formats").

Two zero bytes, one for the element type, one for the number of dimensions; each dimension as a
big-endian 32-bit number; then the elements, big-endian, last dimension fastest. A plain file is
mapped, not read: a device that uses a part of it loads that part. A gzipped one is unpacked into
memory.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fedge.schemas.errors import StoreError

_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP_MAGIC = b"\x1f\x8b"
_DIMENSIONS_MAX = 8


def is_idx(start: bytes) -> bool:
    """Whether a file that begins with these four bytes may be IDX, gzipped or not."""
    plain = len(start) >= 4 and start[:2] == b"\0\0" and start[2] in _DTYPES
    return plain or start[:2] == _GZIP_MAGIC


def read_idx(path: Path) -> npt.NDArray[Any]:
    """The array in the file, read-only; for a plain file, a map of it.

    Raises `StoreError` if it cannot be read, is no IDX file, or is shorter or longer than its
    header says.
    """
    try:
        with path.open("rb") as file:
            if file.read(2) == _GZIP_MAGIC:
                file.seek(0)
                return _unpack(file, path)
            file.seek(0)
            dtype, shape = _read_header(file, path)
            _check_size(path.stat().st_size - file.tell(), dtype, shape, path)
            if 0 in shape:
                return np.empty(shape, dtype)
            return np.memmap(path, dtype, mode="r", offset=file.tell(), shape=shape)
    except (OSError, EOFError, zlib.error) as error:
        raise StoreError(f"{path}: cannot be read ({error})") from error


def _unpack(file: BinaryIO, path: Path) -> npt.NDArray[Any]:
    with gzip.open(file) as plain:
        dtype, shape = _read_header(plain, path)
        data = plain.read()
    _check_size(len(data), dtype, shape, path)
    return np.frombuffer(data, dtype).reshape(shape)


def _read_header(file: Any, path: Path) -> tuple[np.dtype[Any], tuple[int, ...]]:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _DTYPES:
        raise StoreError(
            f"{path}: not an IDX file (it begins with {magic.hex(' ') or 'nothing'}); "
            "set `format` if it is something else"
        )
    if not 1 <= magic[3] <= _DIMENSIONS_MAX:
        raise StoreError(f"{path}: {magic[3]} dimensions, expected 1 to {_DIMENSIONS_MAX}")
    lengths = file.read(4 * magic[3])
    if len(lengths) < 4 * magic[3]:
        raise StoreError(f"{path}: ends within its header; copy the file again")
    return np.dtype(_DTYPES[magic[2]]), struct.unpack(f">{magic[3]}I", lengths)


def _check_size(actual: int, dtype: np.dtype[Any], shape: tuple[int, ...], path: Path) -> None:
    expected = math.prod(shape) * dtype.itemsize
    if actual != expected:
        raise StoreError(
            f"{path}: {actual} bytes of data, its header says {expected} ({list(shape)}); "
            "copy the file again"
        )
