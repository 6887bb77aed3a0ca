"""Arrays of a numpy archive (`.npz`), read without pickle.

Headers are read first: an array's type and size are known before memory is taken for it, and an
array of Python objects is refused.
"""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fedge.schemas.errors import ConfigError, StoreError

_DEFAULT_KEYS = (("x", "y"), ("inputs", "targets"))
_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# What zipfile, zlib and numpy's header parser raise for damaged bytes.
_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    SyntaxError,
    OverflowError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    tokenize.TokenError,
)


def choose_keys(path: Path, inputs: str | None, targets: str | None) -> tuple[str, str]:
    """The archive's names for inputs and targets: those asked for, or the usual ones it has.

    Raises `ConfigError` if they are not in it, `StoreError` if it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
    except _DAMAGE as error:
        raise _unreadable(path, error) from error
    if inputs is not None and targets is not None:
        candidates: tuple[tuple[str, str], ...] = ((inputs, targets),)
    else:
        candidates = _DEFAULT_KEYS
    for pair in candidates:
        if names.issuperset(pair):
            return pair
    wanted = " or ".join(" and ".join(pair) for pair in candidates)
    raise ConfigError(
        f"{path} holds {sorted(names)[:8]}, not {wanted}: set inputs_key and targets_key"
    )


def read_length(path: Path, key: str) -> int:
    """The first dimension of an array, from its header alone. Raises as `read_array`."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as member:
            return _read_shape(path, key, member, archive.getinfo(f"{key}.npy"))[0]
    except _DAMAGE as error:
        raise _unreadable(path, error) from error


def read_array(path: Path, key: str) -> npt.NDArray[Any]:
    """One array of numbers or booleans with at least one dimension.

    Raises `StoreError` if the archive is damaged or the array is anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            with archive.open(f"{key}.npy") as member:
                _read_shape(path, key, member, archive.getinfo(f"{key}.npy"))
            with archive.open(f"{key}.npy") as member:
                array: npt.NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
                return array
    except _DAMAGE as error:
        raise _unreadable(path, error) from error


def _read_shape(path: Path, key: str, member: IO[bytes], info: zipfile.ZipInfo) -> tuple[int, ...]:
    version = np.lib.format.read_magic(member)
    if version not in _READERS:
        raise StoreError(f"{path}: the array {key!r} has the .npy version {version}, not 1 or 2")
    shape, _, dtype = _READERS[version](member)
    if dtype.kind not in "biuf":
        raise StoreError(
            f"{path}: the array {key!r} is {dtype}, expected numbers; save it with a numeric dtype"
        )
    if not shape:
        raise StoreError(f"{path}: the array {key!r} is a single number, expected one an example")
    expected_bytes = math.prod(shape) * dtype.itemsize
    if min(shape) < 0 or member.tell() + expected_bytes != info.file_size:
        raise StoreError(
            f"{path}: the array {key!r} of shape {list(shape)} does not fill its place in the "
            "archive; write the file again"
        )
    return tuple(shape)


def _unreadable(path: Path, error: BaseException) -> StoreError:
    return StoreError(f"{path}: cannot be read as .npz ({type(error).__name__}: {error})")
