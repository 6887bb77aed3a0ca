from __future__ import annotations

import gzip
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from torchvision.datasets import MNIST

from fedge.coordinator.datasets import Examples, load_dataset
from fedge.coordinator.testset import load_test_set
from fedge.schemas.errors import ConfigError
from fedge.schemas.words import Vocabulary, WordEncoder


def idx_images(images):
    return struct.pack(">IIII", 0x00000803, *images.shape) + images.tobytes()


def idx_labels(labels):
    return struct.pack(">II", 0x00000801, len(labels)) + labels.tobytes()


IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
LABELS = np.array([7, 1], np.uint8)


def test_the_digits_are_split_by_class_and_the_same_each_time():
    train, test = load_dataset("sklearn-digits", Path())
    assert (len(train), len(test)) == (1437, 360)
    assert train.x.dtype == np.uint8
    assert train.x.shape[1:] == (8, 8)
    assert (train.x.min(), train.x.max()) == (0, 16)
    in_test, in_train = Counter(test.y.tolist()), Counter(train.y.tolist())
    # A fifth of each class, to within one image.
    assert all(abs(in_test[c] - (in_test[c] + in_train[c]) / 5) <= 1 for c in range(10))
    again, _ = load_dataset("sklearn-digits", Path())
    assert np.array_equal(again.x, train.x)
    assert np.array_equal(again.y, train.y)


def test_the_digits_keep_their_labels():
    """Image by image against the source, since a shuffle of one array alone would go unseen."""
    images, labels = load_digits(return_X_y=True)
    keys = [image.astype(np.uint8).tobytes() for image in images]
    by_image = dict(zip(keys, labels, strict=True))
    for part in load_dataset("sklearn-digits", Path()):
        assert all(by_image[x.tobytes()] == y for x, y in zip(part.x, part.y, strict=True))


def test_inline_examples_are_their_own_test():
    train, test = load_dataset("inline", Path(), (((1.0, 2.0), (3.0,)), ((4.0, 5.0), (6.0,))))
    assert train is test
    assert train.x.tolist() == [[1.0, 2.0], [4.0, 5.0]]
    assert train.y.tolist() == [[3.0], [6.0]]
    with pytest.raises(ConfigError, match="has none"):
        load_dataset("inline", Path())


@pytest.mark.data
def test_mnist_is_read_from_its_folder(data_dir):
    train, test = load_dataset("mnist", data_dir)
    assert train.x.shape == (60_000, 28, 28)
    assert test.x.shape == (10_000, 28, 28)
    assert train.x.dtype == np.uint8
    # The first labels of both files, as http://yann.lecun.com/exdb/mnist shows them.
    assert (train.y[:5].tolist(), test.y[:5].tolist()) == ([5, 0, 4, 1, 9], [7, 2, 1, 0, 4])
    assert np.array_equal(load_test_set(data_dir).x, test.x)


def test_mnist_that_cannot_be_had_says_where_it_belongs(tmp_path, monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(ConfigError, match=r"MNIST/raw .*cannot be fetched"):
        load_dataset("mnist", tmp_path)


def test_the_first_examples_are_taken_in_order():
    examples = Examples(np.arange(5), np.arange(5) * 10)
    assert examples.first(2).y.tolist() == [0, 10]
    assert examples.first(None) is examples
    assert len(examples.first(99)) == 5


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (np.zeros((3, 2)), np.zeros(2)),
        (np.zeros((0, 2)), np.zeros(0)),
        (np.zeros(()), np.zeros(())),
    ],
)
def test_examples_need_one_target_each(x, y):
    with pytest.raises(ConfigError, match="the same in both"):
        Examples(x, y)


# ---------------------------------------------------------------- test sets in files


def test_an_npz_file_is_read(tmp_path):
    np.savez(tmp_path / "test.npz", x=IMAGES, y=LABELS)
    found = load_test_set(tmp_path / "test.npz")
    assert np.array_equal(found.x, IMAGES)
    assert np.array_equal(found.y, LABELS)


def test_a_pair_of_idx_files_is_read(tmp_path):
    (tmp_path / "mine-images-idx3-ubyte").write_bytes(idx_images(IMAGES))
    (tmp_path / "mine-labels-idx1-ubyte").write_bytes(idx_labels(LABELS))
    found = load_test_set(tmp_path / "mine-images-idx3-ubyte")
    assert np.array_equal(found.x, IMAGES)
    assert found.y.tolist() == [7, 1]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gone.npz", None, "does not exist"),
        ("test.npz", b"not a zip", "cannot be read"),
        ("test.csv", b"1,2", "neither"),
        ("a-images-idx3-ubyte", idx_images(IMAGES), "labels .* do not exist"),
    ],
)
def test_a_test_set_that_cannot_be_read_says_why(name, content, said, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        load_test_set(tmp_path / name)


def test_an_npz_file_without_x_and_y_says_what_it_holds(tmp_path):
    np.savez(tmp_path / "test.npz", images=IMAGES, labels=LABELS)
    with pytest.raises(ConfigError, match=r"\['images', 'labels'\]"):
        load_test_set(tmp_path / "test.npz")


def test_a_pickle_in_an_npz_file_is_not_opened(tmp_path):
    opened = tmp_path / "opened"

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (opened,))

    np.savez(tmp_path / "test.npz", x=np.array([Bomb()], object), y=LABELS[:1], allow_pickle=True)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_test_set(tmp_path / "test.npz")
    assert not opened.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-5],
        lambda data: data[:3],
        lambda data: b"",
        lambda data: b"\xff" * len(data),
        gzip.compress,
    ],
)
def test_a_damaged_idx_file_is_refused(damage, tmp_path):
    (tmp_path / "a-images-idx3-ubyte").write_bytes(damage(idx_images(IMAGES)))
    (tmp_path / "a-labels-idx1-ubyte").write_bytes(idx_labels(LABELS))
    with pytest.raises(ConfigError, match="not a pair of IDX files"):
        load_test_set(tmp_path / "a-images-idx3-ubyte")


def test_a_folder_without_mnist_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no MNIST"):
        load_test_set(tmp_path)


def test_a_test_set_of_texts_is_windows_of_the_plans_words(tmp_path):
    words = WordEncoder(Vocabulary(["see", "you", "soon"]), 4)
    (tmp_path / "test.jsonl").write_text(
        '{"text": "See you soon"}\n{"user": "b", "text": "you see"}\n'
    )
    found = load_test_set(tmp_path / "test.jsonl", words)
    inputs, targets = words.windows(["See you soon", "you see"])
    assert np.array_equal(found.x, inputs)
    assert np.array_equal(found.y, targets)
    (tmp_path / "test.txt").write_text("See you soon\nyou see\n")
    assert np.array_equal(load_test_set(tmp_path / "test.txt", words).y, targets)


def test_texts_are_no_test_set_of_a_task_without_words(tmp_path):
    (tmp_path / "test.txt").write_text("See you soon\n")
    with pytest.raises(ConfigError, match="not about words"):
        load_test_set(tmp_path / "test.txt")


def test_texts_without_a_word_are_no_test_set(tmp_path):
    (tmp_path / "test.txt").write_text("!\n\n")
    with pytest.raises(ConfigError, match="holds no"):
        load_test_set(tmp_path / "test.txt", WordEncoder(Vocabulary(["see", "you"]), 4))
