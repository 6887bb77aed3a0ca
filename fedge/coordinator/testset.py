"""The coordinator's own test set: examples that no device trains on, in the usual file formats.

Nothing here is unpickled, and nothing is fetched: a test set is what its operator put there.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from fedge.coordinator.datasets import IDX_ERRORS, Examples, mnist_split
from fedge.schemas.errors import ConfigError

IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"


def load_test_set(path: Path) -> Examples:
    """The examples at `path`, raw as a device would have them.

    An `.npz` file with arrays `x` and `y`; an IDX file of images (`…images-idx3-ubyte`) with its
    labels (`…labels-idx1-ubyte`) beside it; or a folder that holds `MNIST/raw`, whose test half
    is taken. Raises `ConfigError` saying what is missing or wrong.
    """
    if path.is_dir():
        if not (path / "MNIST" / "raw").is_dir():
            raise ConfigError(f"the folder {path} holds no MNIST/raw; name an .npz or IDX file")
        return mnist_split(path, train=False)
    if not path.is_file():
        raise ConfigError(f"the test set {path} does not exist")
    if path.suffix == ".npz":
        return _load_npz(path)
    if path.name.endswith(IMAGES):
        return _load_idx(path, path.with_name(path.name.removesuffix(IMAGES) + LABELS))
    raise ConfigError(f"the test set {path} is neither .npz, nor …{IMAGES}, nor a folder")


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
