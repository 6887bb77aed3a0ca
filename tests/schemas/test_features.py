"""Features, with numbers that can be worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from fedge.schemas.errors import TrainingFailed
from fedge.schemas.features import (
    ClassTarget,
    FeatureSpec,
    ImageFeatures,
    TabularFeatures,
    TargetSpec,
    ValueTarget,
)
from fedge.schemas.tensor_spec import BATCH, TensorSpec


def test_a_pixel_is_divided_by_the_range_then_shifted_then_scaled():
    spec = ImageFeatures(height=1, width=2, mean=(0.5,), std=(0.25,))
    found = spec.encode(np.array([[[0, 255]], [[51, 127.5]]]))
    assert found.dtype == np.float32
    assert found.shape == (2, 1, 1, 2)
    # (0 - 0.5) / 0.25 = -2; (1 - 0.5) / 0.25 = 2; (0.2 - 0.5) / 0.25 = -1.2; 0.
    np.testing.assert_allclose(found.ravel(), [-2, 2, -1.2, 0], atol=1e-6)


def test_channels_move_to_the_front_and_each_has_its_own_mean_and_std():
    spec = ImageFeatures(
        height=1, width=2, channels=3, raw_max=10, mean=(0, 0.1, 0.2), std=(1, 0.5, 0.1)
    )
    pixels = np.array([[[[1, 2, 3], [4, 5, 6]]]], np.uint8)
    found = spec.encode(pixels)
    assert found.shape == (1, 3, 1, 2)
    # Red: .1, .4. Green: (.2 - .1) / .5, (.5 - .1) / .5. Blue: (.3 - .2) / .1, (.6 - .2) / .1.
    np.testing.assert_allclose(found[0, :, 0], [[0.1, 0.4], [0.2, 0.8], [1, 4]], atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 4, 3), (2, 4, 3, 1), (2, 12)])
def test_images_may_be_stored_with_or_without_their_channel_or_flat(shape):
    raw = np.arange(24, dtype=np.uint8).reshape(shape)
    square, flat = ImageFeatures(height=4, width=3), ImageFeatures(height=4, width=3, flat=True)
    assert square.encode(raw).shape == (2, 1, 4, 3)
    assert flat.encode(raw).shape == (2, 12)
    np.testing.assert_array_equal(square.encode(raw).ravel(), flat.encode(raw).ravel())
    assert square.tensor == TensorSpec(name="input", dtype="float32", shape=(BATCH, 1, 4, 3))
    assert flat.tensor == TensorSpec(name="input", dtype="float32", shape=(BATCH, 12))


def test_encoding_leaves_the_raw_examples_alone():
    raw = np.full((1, 2, 2), 255.0, np.float32)
    ImageFeatures(height=2, width=2, mean=(0.5,)).encode(raw)
    assert (raw == 255.0).all()
    rows = np.ones((1, 2), np.float32)
    TabularFeatures(columns=2, mean=(1.0, 1.0)).encode(rows)
    assert (rows == 1.0).all()


def test_images_of_another_size_are_refused():
    with pytest.raises(TrainingFailed, match=r"\(3, 3\).*4x3x1"):
        ImageFeatures(height=4, width=3).encode(np.zeros((2, 3, 3)))


def test_an_empty_batch_stays_empty():
    assert ImageFeatures(height=4, width=3).encode(np.zeros((0, 4, 3))).shape == (0, 1, 4, 3)
    assert ClassTarget(classes=3).encode(np.zeros((0,))).shape == (0,)


def test_a_column_is_shifted_then_scaled():
    spec = TabularFeatures(columns=2, mean=(1, 10), std=(2, 5))
    found = spec.encode(np.array([[3, 0], [1, 20]]))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[1, -2], [0, 2]])
    np.testing.assert_array_equal(TabularFeatures(columns=1).encode(np.array([7, 8])), [[7], [8]])


def test_rows_of_another_width_are_refused():
    with pytest.raises(TrainingFailed, match="rows of 3 columns, the task has 2"):
        TabularFeatures(columns=2).encode(np.zeros((4, 3)))


def test_classes_are_numbers_below_their_count():
    target = ClassTarget(classes=3)
    found = target.encode(np.array([[0], [2]], np.uint8))
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, [0, 2])
    for wrong in ([3], [-1]):
        with pytest.raises(TrainingFailed, match="the task has 0 to 2"):
            target.encode(np.array(wrong))


def test_values_become_rows():
    found = ValueTarget(width=2).encode(np.array([[1, 2], [3, 4]]))
    assert (found.dtype, found.shape) == (np.float32, (2, 2))
    assert ValueTarget().encode(np.array([1.0, 2.0])).shape == (2, 1)
    with pytest.raises(TrainingFailed, match="targets of width 2, the task has 1"):
        ValueTarget().encode(np.zeros((3, 2)))


@pytest.mark.parametrize(
    ("adapter", "content"),
    [
        (FeatureSpec, {"kind": "image", "height": 1, "width": 1, "channels": 3}),
        (FeatureSpec, {"kind": "image", "height": 0, "width": 1}),
        (FeatureSpec, {"kind": "image", "height": 1, "width": 1, "std": [0.0]}),
        (FeatureSpec, {"kind": "tabular", "columns": 2, "mean": [1.0]}),
        (FeatureSpec, {"kind": "python", "code": "1"}),
        (TargetSpec, {"kind": "class", "classes": 1}),
        (TargetSpec, {"kind": "class", "classes": 3, "labels": ["a"]}),
        (TargetSpec, {"kind": "value", "width": 1, "more": 1}),
    ],
)
def test_a_specification_that_cannot_work_is_refused(adapter, content):
    with pytest.raises(ValidationError):
        TypeAdapter(adapter).validate_python(content)
