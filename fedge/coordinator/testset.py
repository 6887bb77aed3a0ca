"""The coordinator's own test set: examples that no device trains on, in the usual file formats.

Nothing here is unpickled, and nothing is fetched: a test set is what its operator put there.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from fedge.coordinator.datasets import IDX_ERRORS, Examples, mnist_split
from fedge.schemas.errors import ConfigError, StoreError
from fedge.schemas.text_file import read_texts
from fedge.schemas.words import WordEncoder

IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
TEXTS = (".jsonl", ".txt")


def check_test_set(path: Path) -> None:
    """Raises `ConfigError` if there is nothing at `path`, or nothing that a test set can be.

    Costs nothing: for the start, before a plan is compiled.
    """
    if path.is_dir():
        if not (path / "MNIST" / "raw").is_dir():
            raise ConfigError(f"the folder {path} holds no MNIST/raw; name a file")
    elif not path.is_file():
        raise ConfigError(f"the test set {path} does not exist")
    elif path.suffix not in (".npz", *TEXTS) and not path.name.endswith(IMAGES):
        raise ConfigError(
            f"the test set {path} is neither .npz, nor .jsonl or .txt, nor …{IMAGES}, nor a folder"
        )


def load_test_set(path: Path, words: WordEncoder | None = None) -> Examples:
    """The examples at `path`, raw as a device would have them.

    An `.npz` file with arrays `x` and `y`; an IDX file of images (`…images-idx3-ubyte`) with its
    labels (`…labels-idx1-ubyte`) beside it; a folder that holds `MNIST/raw`, whose test half is
    taken; or texts (`.jsonl`, `.txt`), of which `words` makes windows where the plan is about
    words. Raises `ConfigError` saying what is missing or wrong.
    """
    check_test_set(path)
    if path.is_dir():
        return mnist_split(path, train=False)
    if path.suffix == ".npz":
        return _load_npz(path)
    if path.suffix in TEXTS:
        return _load_texts(path, words)
    return _load_idx(path, path.with_name(path.name.removesuffix(IMAGES) + LABELS))


def _load_texts(path: Path, words: WordEncoder | None) -> Examples:
    if words is None:
        raise ConfigError(f"the test set {path} holds texts, and the task is not about words")
    try:
        inputs, targets = words.windows(read_texts(path))
    except StoreError as error:
        raise ConfigError(f"the test set {error}") from error
    if len(targets) == 0:
        raise ConfigError(f"the test set {path} holds no two words after one another")
    return Examples(inputs, targets)


def _load_npz(path: Path) -> Examples:
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = {"x", "y"} - set(file.files)
            if missing:
                raise ConfigError(
                    f"the test set {path} holds {sorted(file.files)}; it must hold x and y"
                )
            return Examples(file["x"], file["y"])
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"the test set {path} cannot be read: {error}") from error


def _load_idx(images: Path, labels: Path) -> Examples:
    # Takes a second to import, which the other formats need not wait for.
    from torchvision.datasets.mnist import read_image_file, read_label_file  # noqa: PLC0415

    if not labels.is_file():
        raise ConfigError(f"the labels {labels} of the test set do not exist")
    try:
        return Examples(read_image_file(str(images)).numpy(), read_label_file(str(labels)).numpy())
    except IDX_ERRORS as error:
        raise ConfigError(f"the test set {images} is not a pair of IDX files: {error!r}") from error
