"""Tensors and their bytes: equal in, equal out; each way to be wrong has a reason of its own."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import struct
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedge.schemas.errors import PeerError, RejectReason, StoreError, StoreUnavailable
from fedge.schemas.ids import sha256
from fedge.schemas.tensors import (
    BATCH,
    TensorSpec,
    check_finite,
    check_tensors,
    encode_tensors,
    encoded_limit_bytes,
    read_tensors,
)

W = TensorSpec(name="w", dtype="float32", shape=(2, 3))
B = TensorSpec(name="b", dtype="float32", shape=(3,))
SPECS = (W, B)


def good() -> dict[str, np.ndarray]:
    return {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array([0.5, -1.0, 2.0], np.float32),
    }


def refusal(data: bytes, specs: Iterable[TensorSpec] | None = SPECS, **options) -> RejectReason:
    """Why these bytes are refused; fails if they are taken or anything else is raised."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tensors"
        path.write_bytes(data)
        with pytest.raises(PeerError) as caught:
            read_tensors(path, specs, **options)
        return caught.value.reason


def by_hand(header: dict, data: bytes) -> bytes:
    """A safetensors file from its definition: length, JSON header, data."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_the_bytes_are_those_of_the_safetensors_layout():
    data = encode_tensors(good())
    (header_bytes,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + header_bytes])
    assert header == {
        "b": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
        "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [12, 36]},
    }
    assert data[8 + header_bytes :] == struct.pack("<9f", 0.5, -1, 2, 0, 1, 2, 3, 4, 5)
    golden = "11ef5f52fef5d88ed112a89d40e0b61b485cce1388fdf20c487841c64c398ad7"
    assert sha256(data) == golden


def test_the_order_of_names_and_the_memory_layout_change_nothing():
    tensors = good()
    turned = {name: np.asfortranarray(tensors[name]) for name in ("b", "w")}
    assert encode_tensors(turned) == encode_tensors(tensors)


dtypes = st.sampled_from(["float32", "float64", "float16", "int64", "int32", "uint8", "bool"])
arrays = dtypes.flatmap(
    lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=0, min_side=0, max_side=4))
)


@given(st.dictionaries(st.text("abc.", min_size=1, max_size=5), arrays, max_size=4))
def test_what_is_encoded_is_read_back_bit_for_bit(tensors):
    specs = [
        TensorSpec(name=name, dtype=str(each.dtype), shape=each.shape)
        for name, each in tensors.items()
    ]
    data = encode_tensors(tensors)
    assert len(data) <= encoded_limit_bytes(specs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tensors"
        path.write_bytes(data)
        found = read_tensors(path, specs, finite=False)
    assert set(found) == set(tensors)
    for name, each in tensors.items():
        assert found[name].dtype == each.dtype
        assert found[name].shape == each.shape
        assert found[name].tobytes() == each.tobytes()


def test_a_file_cut_anywhere_is_truncated():
    data = encode_tensors(good())
    for size in range(len(data)):
        assert refusal(data[:size]) is RejectReason.TRUNCATED, size


def test_a_file_that_is_longer_than_its_tensors_could_be_is_oversized_and_not_read():
    data = encode_tensors(good())
    padding = bytes(encoded_limit_bytes(SPECS) + 1 - len(data))
    assert refusal(data + padding) is RejectReason.OVERSIZED


def test_bytes_after_the_tensors_are_malformed():
    assert refusal(encode_tensors(good()) + b"\0") is RejectReason.MALFORMED


def test_a_missing_and_a_foreign_name_are_wrong_tensors():
    tensors = good()
    del tensors["b"]
    assert refusal(encode_tensors(tensors)) is RejectReason.WRONG_TENSORS
    assert refusal(encode_tensors(good() | {"x": np.zeros(1)})) is RejectReason.WRONG_TENSORS


@pytest.mark.parametrize("shape", [(3, 2), (6,), (2, 3, 1), (2, 2), ()])
def test_another_shape_is_a_wrong_shape(shape):
    tensors = good() | {"w": np.zeros(shape, np.float32)}
    assert refusal(encode_tensors(tensors)) is RejectReason.WRONG_SHAPE


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "uint8"])
def test_another_dtype_is_a_wrong_dtype(dtype):
    tensors = good() | {"w": np.zeros((2, 3), dtype)}
    assert refusal(encode_tensors(tensors)) is RejectReason.WRONG_DTYPE


def test_a_dtype_that_numpy_does_not_have_is_a_wrong_dtype():
    header = {
        "b": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
        "w": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [12, 24]},
    }
    assert refusal(by_hand(header, bytes(24))) is RejectReason.WRONG_DTYPE


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 5])
def test_nan_and_infinity_are_not_finite_wherever_they_stand(value, position):
    tensors = good()
    tensors["w"].flat[position] = value
    assert refusal(encode_tensors(tensors)) is RejectReason.NOT_FINITE
    with pytest.raises(PeerError, match="'w' holds NaN or infinity"):
        check_finite(tensors)


def test_integers_and_subnormals_are_finite():
    check_finite({"i": np.array([2**62]), "f": np.array([1e-310, -0.0])})


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 12]}},
        {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [12, 36]}},
        {"w": {"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]}},
        {"w": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 24]}},
        {"w": {"dtype": "O", "shape": [2, 3], "data_offsets": [0, 24]}},
        {"w": "pickle"},
    ],
)
def test_a_header_that_contradicts_the_data_is_malformed(header):
    reason = refusal(by_hand(header, bytes(24)), (W,))
    assert reason in (RejectReason.MALFORMED, RejectReason.TRUNCATED)


def test_overlapping_tensors_are_malformed():
    header = {
        "b": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
        "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    }
    assert refusal(by_hand(header, bytes(24))) is RejectReason.MALFORMED


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_and_nothing_else_is_raised(noise):
    assert refusal(noise) in (
        RejectReason.MALFORMED,
        RejectReason.TRUNCATED,
        RejectReason.WRONG_TENSORS,
    )


@given(st.data())
def test_a_mutated_file_is_read_within_its_specification_or_refused(data):
    content = bytearray(encode_tensors(good()))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tensors"
        path.write_bytes(content)
        try:
            found = read_tensors(path, SPECS)
        except PeerError:
            return
    check_tensors(found, SPECS)
    check_finite(found)


def test_a_file_that_is_not_there_is_ours_not_the_peers(tmp_path):
    for specs in (None, SPECS):
        with pytest.raises(StoreError):
            read_tensors(tmp_path / "missing", specs)


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    """A process that has as many files open as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = [os.open(os.devnull, os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (held[0] + 8, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("specs", [None, SPECS])
def test_too_many_open_files_are_a_state_that_passes(tmp_path, specs):
    path = tmp_path / "tensors"
    path.write_bytes(encode_tensors(good()))
    with no_descriptor_left(), pytest.raises(StoreUnavailable, match="Too many open files"):
        read_tensors(path, specs)
    assert set(read_tensors(path, specs)) == {"w", "b"}


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_disk_that_refuses_for_now_is_a_state_that_passes(tmp_path, monkeypatch, code):
    path = tmp_path / "tensors"
    path.write_bytes(encode_tensors(good()))

    def refuse(*_arguments, **_options):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", refuse)
        with pytest.raises(StoreUnavailable, match=os.strerror(code)):
            read_tensors(path, SPECS)
    # While it is found out in which way a file is malformed, too.
    path.write_bytes(b"not tensors at all")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(StoreUnavailable, match=os.strerror(code)):
            read_tensors(path)


def test_what_is_no_file_is_not_a_state_that_passes(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(StoreError) as refused:
            read_tensors(path)
        assert not isinstance(refused.value, StoreUnavailable)


def test_a_free_dimension_admits_any_size_and_only_that():
    spec = TensorSpec(name="input", dtype="float32", shape=(BATCH, 4))
    for batch in (0, 1, 7):
        check_tensors({"input": np.zeros((batch, 4), np.float32)}, [spec])
    for shape in ((4,), (3, 5), (1, 3, 4)):
        with pytest.raises(PeerError) as caught:
            check_tensors({"input": np.zeros(shape, np.float32)}, [spec])
        assert caught.value.reason is RejectReason.WRONG_SHAPE


def test_sizes_are_counted_by_hand():
    assert (W.element_count, W.byte_count) == (6, 24)
    scalar = TensorSpec(name="s", dtype="float64", shape=())
    assert (scalar.element_count, scalar.byte_count) == (1, 8)
