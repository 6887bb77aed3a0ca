from __future__ import annotations

import math
import random
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from fedge.coordinator.aggregation import (
    BLOCK_ELEMENTS,
    AcceptedUpdate,
    WeightedMean,
    Weighting,
    aggregate,
    validate_update,
)
from fedge.schemas.errors import PeerError, RejectReason, StoreError
from fedge.schemas.plan import WeightSpec
from fedge.schemas.tensor_spec import TensorSpec
from fedge.schemas.tensors import encode_tensors
from tests.coordinator.updates import LINEAR, manifest_of, write_update

SPECS = tuple(weight.tensor for weight in LINEAR)


def linear(first, second, bias):
    return {
        "weight": np.array([[first, second]], np.float32),
        "bias": np.array([bias], np.float32),
    }


def test_three_examples_weigh_three_times_as_much_as_one(tmp_path):
    updates = [
        AcceptedUpdate(write_update(tmp_path, "a", linear(4.0, -8.0, 1.0)), 3),
        AcceptedUpdate(write_update(tmp_path, "b", linear(0.0, 8.0, -3.0)), 1),
    ]
    mean = aggregate(updates, SPECS)
    # Each is (3 times the first + the second) / 4.
    assert mean["weight"].tolist() == [[3.0, -4.0]]
    assert mean["bias"].tolist() == [0.0]
    assert mean["weight"].dtype == mean["bias"].dtype == np.float32


def test_uniform_weighting_forgets_the_examples(tmp_path):
    updates = [
        AcceptedUpdate(write_update(tmp_path, "a", linear(4.0, -8.0, 1.0)), 3),
        AcceptedUpdate(write_update(tmp_path, "b", linear(0.0, 8.0, -3.0)), 1),
    ]
    mean = aggregate(updates, SPECS, weighting=Weighting.UNIFORM)
    assert mean["weight"].tolist() == [[2.0, 0.0]]
    assert Weighting.EXAMPLES.weight(3) == 3.0


def test_one_update_alone_is_its_own_mean_to_the_last_bit(tmp_path):
    update = linear(0.1, -1e-38, 3.0e38)
    mean = aggregate([AcceptedUpdate(write_update(tmp_path, "a", update), 7)], SPECS)
    assert encode_tensors(mean) == encode_tensors(update)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.floats(-1e6, 1e6, width=32), st.integers(1, 10_000)), min_size=1, max_size=12
    )
)
def test_the_mean_is_the_exact_mean_rounded_once(rows):
    spec = TensorSpec(name="w", dtype="float32", shape=())
    mean = WeightedMean((spec,))
    state = mean.init()
    for value, weight in rows:
        state = mean.accumulate(state, [("w", np.array(value, np.float32))], float(weight))
    actual = float(mean.finish(state)["w"])
    exact = sum(Fraction(v) * w for v, w in rows) / sum(w for _, w in rows)
    scale = max(abs(v) for v, _ in rows)
    assert abs(actual - exact) <= abs(exact) * Fraction(2**-24) + Fraction(scale) * Fraction(2**-48)


def test_the_order_of_arrival_does_not_change_a_bit(tmp_path):
    rng = np.random.default_rng(3)
    spec = TensorSpec(name="w", dtype="float32", shape=(1000,))
    names = [f"pi-{index:03}" for index in range(40)]
    weights = {name: int(rng.integers(1, 500)) for name in names}
    results = set()
    for shuffle in range(3):
        arrived = random.Random(shuffle).sample(names, len(names))
        paths = {}
        for name in arrived:
            values = np.random.default_rng(names.index(name)).normal(size=1000)
            paths[name] = write_update(tmp_path, name, {"w": values.astype(np.float32)})
        ordered = [AcceptedUpdate(paths[name], weights[name]) for name in sorted(paths)]
        results.add(encode_tensors(aggregate(ordered, (spec,))))
    assert len(results) == 1


def test_ten_thousand_small_updates_are_not_lost_beside_a_large_one():
    spec = TensorSpec(name="w", dtype="float32", shape=(1,))
    mean = WeightedMean((spec,))
    state = mean.accumulate(mean.init(), [("w", np.array([2.0**24], np.float32))], 1.0)
    for _ in range(10_000):
        state = mean.accumulate(state, [("w", np.array([0.5], np.float32))], 1.0)
    # A float32 sum would stay at 2^24, since 2^24 + 0.5 rounds back to it.
    assert mean.finish(state)["w"][0] == np.float32((2.0**24 + 5000) / 10_001)


@pytest.mark.parametrize("size", [BLOCK_ELEMENTS - 1, BLOCK_ELEMENTS, 2 * BLOCK_ELEMENTS + 1])
def test_tensors_of_any_size_are_summed_to_their_last_element(size):
    values = np.arange(size, dtype=np.float32)
    mean = WeightedMean((TensorSpec(name="w", dtype="float32", shape=(size,)),))
    state = mean.accumulate(mean.init(), [("w", values)], 1.0)
    state = mean.accumulate(state, [("w", 3 * values)], 1.0)
    assert np.array_equal(mean.finish(state)["w"], 2 * values)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_must_be_positive_and_finite(weight):
    mean = WeightedMean(SPECS)
    with pytest.raises(ValueError, match="weight"):
        mean.accumulate(mean.init(), linear(1, 2, 3).items(), weight)
    with pytest.raises(ValueError, match="scale"):
        mean.accumulate(mean.init(), linear(1, 2, 3).items(), 1.0, scale=weight)


def test_a_stale_update_moves_the_mean_towards_zero_and_not_towards_the_others(tmp_path):
    fresh = AcceptedUpdate(write_update(tmp_path, "a", linear(4.0, 0.0, 2.0)), 3)
    stale = AcceptedUpdate(write_update(tmp_path, "b", linear(8.0, 4.0, 0.0)), 1, scale=0.5)
    mean = aggregate([fresh, stale], SPECS)
    # Three times the fresh one and once half of the stale one, over the whole weight of four.
    assert mean["weight"].tolist() == [[4.0, 0.5]]
    assert mean["bias"].tolist() == [1.5]


def test_the_mean_of_no_updates_is_refused():
    with pytest.raises(ValueError, match="no updates"):
        aggregate([], SPECS)


@pytest.mark.parametrize("shapes", [((1_000_000,),), ((400, 500), (500, 500), (1000, 550), (7,))])
def test_peak_memory_is_three_models_however_large_the_cohort(shapes, tmp_path):
    specs = [
        TensorSpec(name=f"layer{index}", dtype="float32", shape=shape)
        for index, shape in enumerate(shapes)
    ]
    update = {spec.name: np.ones(spec.shape, np.float32) for spec in specs}
    model_bytes = sum(spec.byte_count for spec in specs)
    paths = [write_update(tmp_path, f"pi-{index}", update) for index in range(12)]

    def peak_in_models(count):
        tracemalloc.start()
        aggregate([AcceptedUpdate(path, 1) for path in paths[:count]], specs)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak / model_bytes

    small, large = peak_in_models(2), peak_in_models(12)
    print(f"peak memory in models: {small:.2f} for 2 updates, {large:.2f} for 12")
    assert large < 3.5
    assert large < small + 0.05


def test_a_good_update_is_valid(tmp_path):
    validate_update(write_update(tmp_path, "a", linear(1, 2, 3)), manifest_of(LINEAR))


@pytest.mark.parametrize(
    ("tensors", "reason", "named"),
    [
        ({"weight": np.zeros((1, 2), np.float32)}, RejectReason.WRONG_TENSORS, "bias"),
        (linear(0, 0, 0) | {"x": np.zeros(1, np.float32)}, RejectReason.WRONG_TENSORS, "'x'"),
        (
            linear(0, 0, 0) | {"bias": np.zeros(2, np.float32)},
            RejectReason.WRONG_SHAPE,
            r"'bias' is \[2\], expected \[1\]",
        ),
        (linear(0, 0, 0) | {"bias": np.zeros(1, np.float16)}, RejectReason.WRONG_DTYPE, "float16"),
        (linear(0, math.nan, 0), RejectReason.NOT_FINITE, "'weight'"),
        (linear(0, 0, -math.inf), RejectReason.NOT_FINITE, "'bias'"),
    ],
)
def test_a_bad_update_is_refused_with_its_reason(tensors, reason, named, tmp_path):
    path = write_update(tmp_path, "a", tensors)
    with pytest.raises(PeerError, match=named) as refused:
        validate_update(path, manifest_of(LINEAR))
    assert refused.value.reason is reason


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-1], RejectReason.TRUNCATED),
        (lambda data: data[:5], RejectReason.TRUNCATED),
        (lambda data: data[:20], RejectReason.TRUNCATED),
        (lambda data: b"", RejectReason.TRUNCATED),
        (lambda data: b"not a tensor file at all, by any means", RejectReason.MALFORMED),
        (lambda data: data + b"12", RejectReason.MALFORMED),
        (lambda data: data[:8] + b"{" * (len(data) - 8), RejectReason.MALFORMED),
        (lambda data: data + bytes(10_000), RejectReason.OVERSIZED),
    ],
)
def test_a_damaged_file_is_refused_with_its_reason(damage, reason, tmp_path):
    path = write_update(tmp_path, "a", linear(1, 2, 3))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(PeerError) as refused:
        validate_update(path, manifest_of(LINEAR))
    assert refused.value.reason is reason


def test_a_missing_file_is_our_fault_and_not_the_peers(tmp_path):
    with pytest.raises(StoreError, match="cannot read"):
        validate_update(tmp_path / "gone", manifest_of(LINEAR))


def test_an_update_carries_neither_frozen_tensors_nor_counters(tmp_path):
    weights = (
        *LINEAR,
        WeightSpec(tensor=TensorSpec(name="body", dtype="float32", shape=(9,)), role="frozen"),
        WeightSpec(tensor=TensorSpec(name="mean", dtype="float32", shape=(2,)), role="buffer"),
        WeightSpec(tensor=TensorSpec(name="seen", dtype="int64", shape=()), role="buffer"),
    )
    update = linear(1, 2, 3) | {"mean": np.ones(2, np.float32)}
    validate_update(write_update(tmp_path, "a", update), manifest_of(weights))
    with_counter = update | {"seen": np.array(3, np.int64)}
    with pytest.raises(PeerError, match="foreign"):
        validate_update(write_update(tmp_path, "b", with_counter), manifest_of(weights))


def test_validation_holds_one_tensor_in_memory(tmp_path):
    specs = [
        WeightSpec(
            tensor=TensorSpec(name=f"layer{index}", dtype="float32", shape=(250_000,)),
            role="parameter",
        )
        for index in range(8)
    ]
    update = {spec.tensor.name: np.ones(250_000, np.float32) for spec in specs}
    path = tmp_path / "update"
    save_file(update, path)
    tracemalloc.start()
    validate_update(path, manifest_of(specs))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # One million bytes a tensor, its quarter for the finiteness mask, and the one before it.
    assert peak < 2.6 * 1_000_000
