"""int8 weights, against exact arithmetic with fractions, and what a plan says about them."""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedge.schemas.blobs import describe
from fedge.schemas.errors import PeerError, PlanRefused
from fedge.schemas.features import TabularFeatures, ValueTarget
from fedge.schemas.plan import (
    Graphs,
    Padding,
    PlanManifest,
    Quantization,
    TrainingDefaults,
    WeightSpec,
)
from fedge.schemas.quantization import as_stored, dequantized, quantized
from fedge.schemas.tensor_spec import TensorSpec

TINY = float(np.finfo(np.float32).tiny)
HUGE = float(np.finfo(np.float32).max)

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
ordinary = st.floats(-4.0, 4.0, width=32)
weights = arrays(
    np.float32, st.tuples(st.integers(1, 5), st.integers(1, 6)), elements=finite | ordinary
)


def nearest_float32(value: float) -> float:
    """By the C library's conversion, not by numpy's."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def by_hand(row: list[float]) -> tuple[list[int], float]:
    """One row, slowly: fractions where numbers are rounded."""
    largest = max(abs(number) for number in row)
    scale = nearest_float32(largest / 127)
    while Fraction(scale) * 127 > Fraction(HUGE):
        scale = float(np.nextafter(np.float32(scale), np.float32(0)))
    if scale < TINY:
        return [0] * len(row), 1.0
    # Python rounds a fraction that lies between two whole numbers to the even one.
    return [round(Fraction(number) / Fraction(scale)) for number in row], scale


@settings(max_examples=300, deadline=None)
@given(weights)
@example(np.zeros((2, 3), np.float32))
@example(np.array([[-3.0]], np.float32))
@example(np.array([[1e-45, -1e-45], [TINY, 2 * TINY], [127 * TINY, TINY / 2]], np.float32))
@example(np.array([[HUGE, -HUGE, 1.0]], np.float32))
@example(np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]], np.float32))
def test_each_row_is_what_exact_arithmetic_makes_of_it(weight: np.ndarray) -> None:
    values, scales = quantized(weight)
    assert (values.dtype, scales.dtype) == (np.int8, np.float32)
    for row, value, scale in zip(weight.tolist(), values.tolist(), scales.tolist(), strict=True):
        assert (value, scale) == by_hand(row)


@settings(max_examples=200, deadline=None)
@given(weights)
def test_no_weight_moves_by_more_than_half_a_step(weight: np.ndarray) -> None:
    values, scales = quantized(weight)
    again = dequantized(values, scales)
    assert np.isfinite(again).all()
    for row, scale, back in zip(weight.tolist(), scales.tolist(), again.tolist(), strict=True):
        # Half a step, and the rounding of the product.
        step = 0.0 if set(back) == {0.0} else scale
        lost = max(127 * TINY, step * (0.5 + 2**-16))
        assert all(abs(a - b) <= lost for a, b in zip(row, back, strict=True))


@settings(max_examples=100, deadline=None)
@given(weights)
def test_what_was_quantised_once_does_not_change_again(weight: np.ndarray) -> None:
    values, scales = quantized(weight)
    again, _ = quantized(dequantized(values, scales))
    np.testing.assert_array_equal(again, values)


def test_the_largest_of_a_row_is_127_and_halves_go_to_the_even_number() -> None:
    values, scales = quantized(np.array([[254.0, 1.0, 3.0, 5.0, -1.0, -3.0]], np.float32))
    assert scales.tolist() == [2.0]
    assert values.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_a_row_of_zeros_stays_zeros() -> None:
    values, scales = quantized(np.zeros((3, 4), np.float32))
    assert scales.tolist() == [1.0, 1.0, 1.0]
    assert not values.any()


def test_a_row_too_small_for_a_normal_scale_becomes_zeros() -> None:
    """Some processors take denormal numbers for zero; the file must not depend on which."""
    values, scales = quantized(np.array([[100 * TINY, -TINY], [254 * TINY, 2.0]], np.float32))
    assert values.tolist() == [[0, 0], [0, 127]]
    assert scales[0] == 1.0


def test_the_largest_float_is_still_one_afterwards() -> None:
    values, scales = quantized(np.array([[HUGE, -HUGE]], np.float32))
    assert values.tolist() == [[127, -127]]
    assert np.isfinite(dequantized(values, scales)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    weight = np.ones((4, 4), np.float32)
    weight[2, 1] = bad
    with pytest.raises(PeerError, match="not_finite"):
        quantized(weight)


@pytest.mark.parametrize("shape", [(3, 70_000), (5_000, 40), (1, 1), (40, 3, 5, 5), (7,)])
def test_large_weights_and_those_of_any_rank_are_done_row_by_row(shape: tuple[int, ...]) -> None:
    weight = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    values, scales = quantized(weight)
    assert values.shape == weight.shape
    assert scales.shape == shape[:1]
    for row in (0, shape[0] // 2, shape[0] - 1):
        alone, scale = quantized(weight[row : row + 1])
        np.testing.assert_array_equal(alone[0], values[row])
        assert scale[0] == scales[row]


def test_how_a_weight_lies_in_memory_does_not_matter() -> None:
    weight = np.random.default_rng(2).normal(size=(30, 20)).astype(np.float32)
    expected = quantized(weight)
    for same in (np.asfortranarray(weight), np.repeat(weight, 2, axis=1)[:, ::2]):
        for found, wanted in zip(quantized(same), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_an_empty_weight_is_nothing() -> None:
    values, scales = quantized(np.zeros((0, 4), np.float32))
    assert (values.shape, scales.shape) == ((0, 4), (0,))
    values, scales = quantized(np.zeros((2, 0), np.float32))
    assert (values.shape, scales.tolist()) == ((2, 0), [1.0, 1.0])


# ---------------------------------------------------------------- in a plan


def manifest(quantization: Quantization | None = None) -> PlanManifest:
    specs = {"w": ("float32", (4, 3)), "b": ("float32", ()), "count": ("int64", (2,))}
    return PlanManifest(
        task="by-hand",
        weights=tuple(
            WeightSpec(tensor=TensorSpec(name=n, dtype=d, shape=s), role="parameter")
            for n, (d, s) in specs.items()
        ),
        features=TabularFeatures(columns=3),
        target=ValueTarget(width=4),
        output=TensorSpec(name="output", dtype="float32", shape=(-1, 4)),
        padding=Padding.MASK,
        defaults=TrainingDefaults(),
        graphs=Graphs(train=describe(b"t"), eval=describe(b"e"), infer=describe(b"i")),
        golden=describe(b"g"),
        quantization=quantization,
    )


def test_a_plan_without_quantization_keeps_the_bytes_that_it_had_before_there_was_any() -> None:
    """Otherwise each population's plan would change its name with an upgrade."""
    plain = manifest()
    assert b"quantization" not in plain.encode()
    assert plain.digest == ("6a6de6d3d6eb0b0b9c95ddb6182ae603549df33c3728318428be5d68eaa4b80a")
    assert PlanManifest.decode(plain.encode()) == plain


def test_a_quantised_plan_is_read_back_and_names_what_its_graph_reads() -> None:
    plan = manifest(Quantization(int8=("w",)))
    assert PlanManifest.decode(plan.encode()) == plan
    assert plan.digest != manifest().digest
    assert plan.infer_names == ("int8.param.w", "scale.param.w", "param.b", "param.count")
    assert manifest().infer_names == ("param.w", "param.b", "param.count")


@pytest.mark.parametrize("names", [("w", "w"), ("other",), ("b",), ("count",)])
def test_a_plan_that_quantises_what_cannot_be_is_refused(names: tuple[str, ...]) -> None:
    told = manifest().encode()[:-1] + b',"quantization":' + _json(names) + b"}"
    with pytest.raises(PlanRefused, match="int8"):
        PlanManifest.decode(told)


def test_an_older_release_refuses_a_quantised_plan_and_names_the_field() -> None:
    """What an agent does with a field that it does not know: this is such a field to it."""
    told = manifest().encode()[:-1] + b',"quantization_of_tomorrow":{}}'
    with pytest.raises(PlanRefused, match="the plan's quantization_of_tomorrow: Extra inputs"):
        PlanManifest.decode(told)


def _json(names: tuple[str, ...]) -> bytes:
    # Not checked: as a hostile coordinator would send it.
    return Quantization.model_construct(int8=names).model_dump_json().encode()


def test_the_tensors_of_the_file_are_rounded_where_the_plan_says_so() -> None:
    tensors = {
        "w": np.random.default_rng(3).normal(size=(4, 3)).astype(np.float32),
        "b": np.array(0.1, np.float32),
        "count": np.array([1, 2]),
    }
    assert as_stored(manifest(), tensors) is tensors
    stored = as_stored(manifest(Quantization(int8=("w",))), tensors)
    np.testing.assert_array_equal(stored["w"], dequantized(*quantized(tensors["w"])))
    assert (stored["w"] != tensors["w"]).any()
    assert stored["b"] is tensors["b"]
