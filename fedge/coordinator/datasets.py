"""Examples that are on the disk of an ordinary computer, for demonstrations and measurements.

A real fleet's examples stay on its devices; these stand in for them. Everything comes back raw, as
a device would store it: the plan's features make tensors of it. Downloading happens only for
MNIST, and only if its files are not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fedge.schemas.errors import ConfigError
from fedge.schemas.tensors import Array

Source = Literal["sklearn-digits", "mnist", "inline"]

IDX_ERRORS = (AssertionError, IndexError, KeyError, OSError, RuntimeError, TypeError, ValueError)
"""What torchvision raises for IDX files that are damaged or cannot be read or fetched."""

SPLIT_SEED = 0
"""Which fifth of the digits is the test set: the same on every computer."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Raw inputs `x` `[n, …]` and targets `y` `[n]` or `[n, width]`.

    Raises `ConfigError` if there are none, or not one target for each input.
    """

    x: Array
    y: Array

    def __post_init__(self) -> None:
        if not (self.x.ndim and self.y.ndim and len(self.x) == len(self.y) > 0):
            raise ConfigError(
                f"inputs of shape {self.x.shape} and targets of shape {self.y.shape}: the first "
                "dimension must be the number of examples, the same in both and above 0"
            )

    def __len__(self) -> int:
        return len(self.x)

    def first(self, count: int | None) -> Examples:
        """The first `count` examples; all of them for None."""
        return self if count is None else Examples(self.x[:count], self.y[:count])


def load_dataset(
    source: Source,
    data_dir: Path,
    inline: Sequence[tuple[Sequence[float], Sequence[float]]] = (),
) -> tuple[Examples, Examples]:
    """The training and the test examples of a source.

    `sklearn-digits`: 1,437 and 360 images, uint8 `[n, 8, 8]` from 0 to 16, split by class with a
    fixed seed. `mnist`: 60,000 and 10,000 images, uint8 `[n, 28, 28]`, from `data_dir/MNIST`,
    fetched there if missing. `inline`: the (input, target) pairs given, which are their own test.
    Raises `ConfigError` if the examples cannot be had, saying what to do.
    """
    match source:
        case "sklearn-digits":
            return _digits()
        case "mnist":
            return mnist_split(data_dir, train=True), mnist_split(data_dir, train=False)
        case "inline":
            if not inline:
                raise ConfigError("the task names inline examples and has none")
            rows, targets = zip(*inline, strict=True)
            examples = Examples(np.array(rows, np.float32), np.array(targets, np.float32))
            return examples, examples


def mnist_split(data_dir: Path, *, train: bool) -> Examples:
    """One half of MNIST (LeCun et al. 1998) from `data_dir/MNIST`, fetched there if missing.

    Raises `ConfigError` if it is neither there nor to be had.
    """
    # Takes a second to import, which the digits need not wait for.
    from torchvision.datasets import MNIST  # noqa: PLC0415

    try:
        found = MNIST(str(data_dir), train=train, download=True)
    except IDX_ERRORS as error:
        raise ConfigError(
            f"MNIST is not complete in {data_dir / 'MNIST' / 'raw'} and cannot be fetched: "
            f"{error!r}. Put its four idx-ubyte files there, or name another data folder"
        ) from error
    return Examples(found.data.numpy(), found.targets.numpy())


def _digits() -> tuple[Examples, Examples]:
    from sklearn.datasets import load_digits  # noqa: PLC0415 -- as above
    from sklearn.model_selection import train_test_split  # noqa: PLC0415 -- as above

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype(np.uint8)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels.astype(np.int64), test_size=0.2, stratify=labels, random_state=SPLIT_SEED
    )
    return Examples(train_x, train_y), Examples(test_x, test_y)
