"""Image files → one uint8 array. Pillow decodes, and is imported only when images are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedge.schemas.errors import ConfigError, StoreError

_GREY_MODES = ("1", "L", "LA", "La")
_COLOUR_MODES = ("RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV")


def read_images(paths: Sequence[Path]) -> npt.NDArray[np.uint8]:
    """uint8 `[n, height, width]` if the images are grey, `[n, height, width, 3]` if coloured.

    Transparency is dropped and palettes are looked up. Raises `StoreError` for a file that cannot
    be decoded, `ConfigError` for one whose size or kind differs from the first one's.
    """
    images: npt.NDArray[np.uint8] | None = None
    for row, path in enumerate(paths):
        pixels = _decode(path)
        if images is None:
            images = np.empty((len(paths), *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            raise ConfigError(
                f"{path} is {_describe(pixels.shape)}, {paths[0]} is "
                f"{_describe(images.shape[1:])}: make all images of one size and kind"
            )
        images[row] = pixels
    return np.empty((0, 0, 0), np.uint8) if images is None else images


def _decode(path: Path) -> npt.NDArray[np.uint8]:
    from PIL import Image  # noqa: PLC0415 -- an agent without images does without Pillow's memory

    try:
        with Image.open(path) as image:
            if image.mode in _GREY_MODES:
                return np.asarray(image.convert("L"))
            if image.mode in _COLOUR_MODES:
                return np.asarray(image.convert("RGB"))
            mode = image.mode
    # Pillow's decoders raise each of these for damaged files.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise StoreError(f"{path}: cannot be decoded as an image ({error})") from error
    raise ConfigError(f"{path}: pixels of the kind {mode}; save it with 8 bits a channel")


def _describe(shape: tuple[int, ...]) -> str:
    kind = "grey" if len(shape) == 2 else "coloured"
    return f"{shape[1]}x{shape[0]} {kind}"
