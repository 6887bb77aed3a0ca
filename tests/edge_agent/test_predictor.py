"""Predictions through a real model file, from files, arrays and rows."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper
from PIL import Image

from fedge.edge_agent.predictor import (
    ClassPrediction,
    Predictor,
    ValuePrediction,
    encode_example,
    interpret,
    read_example,
)
from fedge.schemas.errors import ConfigError, PlanRefused, StoreError
from fedge.schemas.features import ClassTarget, ImageFeatures
from fedge.schemas.tensor_spec import TensorSpec
from tests.edge_agent.plans import NumpyReference, initial_weights, linear_plan

PLAN = linear_plan()


def image_manifest(*, channels=1, labels=None, **features):
    """A task on images of 2 x 3 whose model gives the sums of the first three pixels and so on."""
    return PLAN.manifest.model_copy(
        update={
            "features": ImageFeatures(
                height=2, width=3, channels=channels, flat=True,
                mean=(0.0,) * channels, std=(1.0,) * channels, **features,
            ),
            "target": ClassTarget(classes=2, labels=labels),
            "output": TensorSpec(name="output", dtype="float32", shape=(-1, 2)),
        }
    )  # fmt: skip


@pytest.fixture
def half_sums(tmp_path):
    """A model of two classes: the sums of the upper and of the lower row of a 2 x 3 image."""
    weights = np.repeat(np.eye(2, dtype=np.float32), 3, axis=0)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input", "w"], ["output"])],
        "half_sums",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 6])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor("w", TensorProto.FLOAT, [6, 2], weights.flatten())],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def png(pixels) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(out, "PNG")
    return out.getvalue()


def sixteen_bits() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.zeros((2, 3), np.uint16)).save(out, "PNG")
    return out.getvalue()


UPPER = [[255, 255, 255], [0, 0, 0]]


def test_a_row_gives_the_models_number(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(PLAN.model(initial_weights()))
    reference = NumpyReference(initial_weights())
    row = [0.5, -1.0, 2.0]
    expected = (np.array(row) * reference.scale) @ reference.w[:, 0] + reference.b[0]
    found = Predictor(path, PLAN.manifest).predict(row)
    assert found == ValuePrediction((pytest.approx(expected, rel=1e-5),))


def test_an_image_gives_classes_by_falling_probability(half_sums):
    predictor = Predictor(half_sums, image_manifest(labels=("sky", "ground")))
    found = predictor.predict(png(UPPER))
    odds = np.exp(3.0)  # the outputs are 3 and 0
    assert (found.label, found.index) == ("sky", 0)
    assert [one.probability for one in found.probabilities] == pytest.approx(
        [odds / (odds + 1), 1 / (odds + 1)]
    )
    assert [one.label for one in found.probabilities] == ["sky", "ground"]


def test_log_probabilities_and_logits_give_the_same_probabilities(half_sums):
    logits = np.array([2.0, -1.0])
    shifted = logits - np.log(np.exp(logits).sum())
    found = [interpret(x, image_manifest(), top=2) for x in (logits, shifted)]
    for one, other in zip(found[0].probabilities, found[1].probabilities, strict=True):
        assert one.probability == pytest.approx(other.probability)
    assert isinstance(found[0], ClassPrediction)


def test_classes_without_labels_are_named_by_their_number(half_sums):
    found = Predictor(half_sums, image_manifest()).predict(png(UPPER[::-1]), top=1)
    assert [(one.label, one.index) for one in found.probabilities] == [("1", 1)]


def test_an_image_file_and_its_pixels_give_the_same(half_sums, tmp_path):
    (tmp_path / "image.png").write_bytes(png(UPPER))
    predictor = Predictor(half_sums, image_manifest())
    assert predictor.predict(tmp_path / "image.png") == predictor.predict(np.array(UPPER))


def test_an_image_is_scaled_to_the_range_of_the_tasks_raw_examples():
    found = encode_example(png(UPPER), image_manifest(raw_max=16.0))
    assert found.tolist() == [[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]]


def test_an_image_of_another_size_is_resized():
    large = np.kron(np.array(UPPER), np.ones((10, 10)))
    found = encode_example(png(large), image_manifest())
    assert found.shape == (1, 6)
    assert found[0, :3].min() > found[0, 3:].max()


def test_colours_become_grey_or_stay_channels_as_the_task_says():
    red = np.zeros((2, 3, 3))
    red[..., 0] = 255
    grey = encode_example(png(red), image_manifest())
    assert grey.shape == (1, 6)
    assert grey[0, 0] == pytest.approx(0.299, abs=0.01)  # ITU-R 601: the weight of red
    channels = encode_example(png(red), image_manifest(channels=3))
    assert channels.tolist() == [[1.0] * 6 + [0.0] * 12]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"GIF of nothing", "not an image"),
        (sixteen_bits(), "more than 8 bits"),
        (np.zeros((4, 4)), "do not fit the task's 2x3x1"),
        ("no-such-file.png", "cannot be read"),
    ],
    ids=["garbage", "depth", "size", "absent"],
)
def test_what_is_not_the_tasks_image_is_named(half_sums, raw, words, tmp_path):
    raw = tmp_path / raw if isinstance(raw, str) else raw
    with pytest.raises(ConfigError, match=words):
        Predictor(half_sums, image_manifest()).predict(raw)


@pytest.mark.parametrize(
    ("raw", "words"),
    [([1.0, 2.0], "2 columns, the task has 3"), (["a", "b", "c"], "numbers"), (b"x", "not a file")],
    ids=["short", "words", "file"],
)
def test_what_is_not_the_tasks_row_is_named(raw, words):
    with pytest.raises(ConfigError, match=words):
        encode_example(raw, PLAN.manifest)


def test_without_an_active_version_the_error_says_so(tmp_path):
    with pytest.raises(StoreError, match="no version is active"):
        Predictor(tmp_path / "model.onnx", PLAN.manifest)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(PlanRefused, match="cannot load"):
        Predictor(tmp_path / "model.onnx", PLAN.manifest)


def test_what_a_person_typed_is_a_path_or_numbers_as_the_task_takes():
    assert read_example("1, -2.5,3e-1", PLAN.manifest) == [1.0, -2.5, 0.3]
    assert read_example("a/b.png", image_manifest()) == Path("a/b.png")
    with pytest.raises(ConfigError, match="3 numbers with commas"):
        read_example("1,two,3", PLAN.manifest)


def test_predictions_can_be_said_and_sent(half_sums):
    found = Predictor(half_sums, image_manifest(labels=("sky", "ground"))).predict(png(UPPER))
    assert found.sentence() == "sky 95.3%, ground 4.7%"
    sent = json.loads(json.dumps(found.as_dict()))
    assert (sent["label"], sent["index"]) == ("sky", 0)
    assert [one["label"] for one in sent["probabilities"]] == ["sky", "ground"]
    assert ValuePrediction((1.5, -2.0)).sentence() == "1.5, -2"
    assert ValuePrediction((1.5,)).as_dict() == {"values": (1.5,)}
