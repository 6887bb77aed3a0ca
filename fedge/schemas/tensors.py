"""Named tensors ↔ bytes, in the safetensors layout, checked against a specification.

The layout is a length, a JSON header and raw little-endian data: no code can hide in it, and any
language reads it. Names are sorted, so equal tensors give equal bytes and equal digests. What
comes from a peer is trusted only after `decode_tensors` compared it with `TensorSpec`s.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedge.schemas.blob_files import disk
from fedge.schemas.errors import PeerError, RejectReason, StoreUnavailable
from fedge.schemas.tensor_spec import BATCH, TensorSpec

Array = npt.NDArray[np.generic]
Tensors = Mapping[str, Array]

_SAFETENSORS_DTYPES = {
    "F32": "float32",
    "F64": "float64",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
    "BOOL": "bool",
}
_HEADER_ALLOWANCE_BYTES = 1024
_HEADER_BYTES_PER_TENSOR = 512
_MAX_HEADER_BYTES = 100_000_000
"""What the safetensors format allows a header."""


def encode_tensors(tensors: Tensors) -> bytes:
    """The safetensors file of `tensors`, the same bytes for the same tensors in any order."""
    # `ascontiguousarray` would turn a scalar into a vector of one.
    return save({name: np.asarray(tensors[name], order="C") for name in sorted(tensors)})


def encoded_limit_bytes(specs: Iterable[TensorSpec]) -> int:
    """An upper bound for the encoding of tensors that obey `specs`; what is larger is refused."""
    specs = list(specs)
    data_bytes = sum(spec.byte_count for spec in specs)
    return data_bytes + _HEADER_ALLOWANCE_BYTES + _HEADER_BYTES_PER_TENSOR * len(specs)


def stream_tensors(
    path: Path, specs: Iterable[TensorSpec] | None = None
) -> Iterator[tuple[str, Array]]:
    """The tensors of the safetensors file at `path` in name order, one in memory at a time.

    Names, dtypes and shapes of all are compared with `specs`, if given, before the first comes.
    Finiteness is not looked at. Raises as `read_tensors` does.
    """
    wanted = None if specs is None else {spec.name: spec for spec in specs}
    with disk(f"read the tensors in {path}"):
        if wanted is not None:
            _check_size(path.stat().st_size, wanted)
        try:
            with _opened(path) as file:
                names = set(file.keys())
                if wanted is not None:
                    _check_names(names, set(wanted))
                    for name, spec in wanted.items():
                        _check_header(name, file.get_slice(name), spec)
                for name in sorted(names):
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise _refusal_of(path, error) from error


def read_tensors(
    path: Path, specs: Iterable[TensorSpec] | None = None, *, finite: bool = True
) -> dict[str, Array]:
    """The tensors of the safetensors file at `path`, which must obey `specs` if given.

    Raises `PeerError` (truncated, malformed, wrong_tensors, wrong_dtype, wrong_shape, not_finite,
    oversized), `StoreUnavailable` if the file cannot be read now, `StoreError` if it is not there.
    """
    tensors = dict(stream_tensors(path, specs))
    if finite:
        check_finite(tensors)
    return tensors


def check_finite(tensors: Tensors) -> None:
    """Raises `PeerError` (not_finite), naming the tensor, if one holds NaN or infinity."""
    for name, tensor in tensors.items():
        if np.issubdtype(tensor.dtype, np.floating) and not np.isfinite(tensor).all():
            raise PeerError(RejectReason.NOT_FINITE, f"tensor {name!r} holds NaN or infinity")


def check_tensors(tensors: Tensors, specs: Iterable[TensorSpec]) -> None:
    """Raises `PeerError` (wrong_tensors, wrong_dtype, wrong_shape) unless `tensors` obey `specs`.

    A free dimension of a spec admits any size.
    """
    wanted = {spec.name: spec for spec in specs}
    _check_names(set(tensors), set(wanted))
    for name, spec in wanted.items():
        _compare(name, str(tensors[name].dtype), tensors[name].shape, spec)


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="np")
    except OSError as error:
        # The library says "no such file" whatever the system said; asked again, it says it itself.
        with path.open("rb"):
            raise StoreUnavailable(f"could not read the tensors in {path}: {error}") from error


def _check_size(actual_bytes: int, wanted: Mapping[str, TensorSpec]) -> None:
    if any(BATCH in spec.shape for spec in wanted.values()):
        # A free dimension sets no limit; what may be so large is limited where it comes from.
        return
    limit_bytes = encoded_limit_bytes(wanted.values())
    if actual_bytes > limit_bytes:
        raise PeerError(
            RejectReason.OVERSIZED, f"{actual_bytes} bytes of tensors, at most {limit_bytes}"
        )


def _check_names(actual: set[str], expected: set[str]) -> None:
    if actual != expected:
        missing, foreign = sorted(expected - actual)[:3], sorted(actual - expected)[:3]
        raise PeerError(RejectReason.WRONG_TENSORS, f"missing {missing}, foreign {foreign}")


def _check_header(name: str, view: object, spec: TensorSpec) -> None:
    # safetensors' slices have no type information; these two calls are its documented interface.
    dtype, shape = view.get_dtype(), view.get_shape()  # type: ignore[attr-defined]
    _compare(name, _SAFETENSORS_DTYPES.get(dtype, dtype), tuple(shape), spec)


def _compare(name: str, dtype: str, shape: tuple[int, ...], spec: TensorSpec) -> None:
    if dtype != spec.dtype:
        raise PeerError(
            RejectReason.WRONG_DTYPE, f"tensor {name!r} is {dtype}, expected {spec.dtype}"
        )
    same_rank = len(shape) == len(spec.shape)
    if not same_rank or any(
        want not in (BATCH, have) for have, want in zip(shape, spec.shape, strict=True)
    ):
        raise PeerError(
            RejectReason.WRONG_SHAPE,
            f"tensor {name!r} is {list(shape)}, expected {list(spec.shape)}",
        )


def _refusal_of(path: Path, error: SafetensorError) -> PeerError:
    # The library has one exception type and its texts change, so the file itself is asked.
    cut = _is_cut(path)
    reason = RejectReason.TRUNCATED if cut else RejectReason.MALFORMED
    return PeerError(reason, f"not a safetensors file: {error}"[:300])


def _is_cut(path: Path) -> bool:
    """Whether the file at `path` ends before its own header says that it does."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8:
            return True
        if header_bytes > _MAX_HEADER_BYTES:
            return False
        header = file.read(header_bytes)
    if len(header) < header_bytes:
        return True
    try:
        ends = [
            entry["data_offsets"][1]
            for name, entry in json.loads(header).items()
            if name != "__metadata__"
        ]
        return bool(max(ends) > size - 8 - header_bytes)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return False
