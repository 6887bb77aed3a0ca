"""Predictions from the active `model.onnx`, for applications on the device.

An application gives what it has: an image file, an array, a row of numbers. The plan's manifest
says how that becomes the model's input, by the same specification as in training, and what the
output means. One thread, one example at a time; nothing here learns or sends. Pillow is imported
when there is an image to read.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedge.edge_agent.engines.onnx_session import RUNTIME_ERRORS, open_session
from fedge.edge_agent.suggestions import Suggestions, read_typed, suggested
from fedge.schemas.errors import ConfigError, PlanRefused, StoreError, TrainingFailed
from fedge.schemas.features import ClassTarget, ImageFeatures, TabularFeatures, WordFeatures
from fedge.schemas.plan import PlanManifest
from fedge.schemas.plan_words import word_encoder
from fedge.schemas.tensors import Array, check_tensors
from fedge.schemas.words import Vocabulary

MAX_PIXELS = 25_000_000
"""Of an image that is read: 75 MB of memory. A few bytes may claim to be far more."""
_APP_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
"""What is read when an app hands over bytes: Pillow has decoders that start other programs."""

RawExample = bytes | Path | Array | Sequence[float] | str
"""An encoded image, the path of one, pixels or columns as an array, a row of numbers, or what was
typed so far."""


@dataclass(frozen=True, slots=True)
class ClassProbability:
    """One class and its probability, 0 to 1."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True, slots=True)
class ClassPrediction:
    """The classes by falling probability, at most `top` of them, at least one.

    Probabilities are the softmax of the model's outputs, which leaves log-probabilities as they
    are and turns logits into probabilities.
    """

    probabilities: tuple[ClassProbability, ...]

    @property
    def label(self) -> str:
        """Of the likeliest class: the manifest's label, or its number."""
        return self.probabilities[0].label

    @property
    def index(self) -> int:
        """Of the likeliest class."""
        return self.probabilities[0].index

    def as_dict(self) -> dict[str, Any]:
        """For JSON: label, index, probabilities."""
        return {"label": self.label, "index": self.index, **asdict(self)}

    def sentence(self) -> str:
        """For people: the classes with their probabilities."""
        return ", ".join(f"{one.label} {one.probability:.1%}" for one in self.probabilities)


@dataclass(frozen=True, slots=True)
class ValuePrediction:
    """The model's numbers."""

    values: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: values."""
        return asdict(self)

    def sentence(self) -> str:
        """For people: the numbers."""
        return ", ".join(f"{value:.6g}" for value in self.values)


Prediction = ClassPrediction | ValuePrediction | Suggestions


class Predictor:
    """The model at `model_path`, an activated file, which `manifest`'s plan made.

    `vocabulary`: the plan's, where it has one.

    Raises `StoreError` if there is no such file, `PlanRefused` if onnxruntime cannot load it or
    its interface is not the plan's.
    """

    def __init__(
        self, model_path: Path, manifest: PlanManifest, vocabulary: Vocabulary | None = None
    ) -> None:
        self._words = word_encoder(manifest, vocabulary)
        if not model_path.is_file():
            raise StoreError(f"there is no model at {model_path}: no version is active yet")
        self._manifest = manifest
        self._output = manifest.output.of("output")
        self.vocabulary = vocabulary
        self._session = open_session(str(model_path), keep_repacked=False)
        inputs = [argument.name for argument in self._session.get_inputs()]
        outputs = [argument.name for argument in self._session.get_outputs()]
        if (inputs, outputs) != (["input"], ["output"]):
            raise PlanRefused(f"{model_path} takes {inputs} and gives {outputs}: no plan made it")

    def predict(self, raw: RawExample, *, top: int = 3) -> Prediction:
        """The prediction for one example.

        Raises `ConfigError` if `raw` is not what the task takes, saying what that is;
        `PlanRefused` if the model fails.
        """
        typed = None if self._words is None else read_typed(_text(raw), self._words)
        inputs = encode_example(raw, self._manifest) if typed is None else typed.inputs
        try:
            output: Array = self._session.run(["output"], {"input": inputs})[0]
        except RUNTIME_ERRORS as error:
            raise PlanRefused(f"the model could not be run: {error}") from error
        check_tensors({"output": output}, [self._output])
        if typed is not None and self._words is not None:
            return suggested(output[0], typed.begun, self._words, top=top)
        return interpret(output[0], self._manifest, top=top)


def read_example(text: str, manifest: PlanManifest) -> RawExample:
    """The example that a person typed: the path of an image, or numbers with commas between them.

    Raises `ConfigError` if the task is on tables and `text` is not numbers.
    """
    match manifest.features:
        case ImageFeatures():
            return Path(text)
        case WordFeatures():
            return text
        case TabularFeatures(columns=columns):
            try:
                return [float(cell) for cell in text.split(",")]
            except ValueError as error:
                raise ConfigError(
                    f"this task takes {columns} numbers with commas between them: {error}"
                ) from error


def encode_example(raw: RawExample, manifest: PlanManifest) -> Array:
    """One image or row as the model's input, `[1, …]`. Raises `ConfigError` if it does not fit."""
    features = manifest.features
    try:
        match features:
            case ImageFeatures():
                return features.encode(_pixels(raw, features)[np.newaxis])
            case TabularFeatures():
                return features.encode(_row(raw, features)[np.newaxis])
            case WordFeatures():
                return features.encode(np.asarray(raw)[np.newaxis])
    except TrainingFailed as error:  # the specification's word for "does not fit"
        raise ConfigError(f"this example is not what the task takes: {error}") from error


def interpret(output: Array, manifest: PlanManifest, *, top: int) -> Prediction:
    """What the output of one example, without the batch dimension, means."""
    numbers = output.reshape(-1).astype(np.float64)
    target = manifest.target
    if not isinstance(target, ClassTarget):
        return ValuePrediction(tuple(float(number) for number in numbers))
    if len(numbers) != target.classes:
        raise PlanRefused(f"the model gives {len(numbers)} numbers for {target.classes} classes")
    powers = np.exp(numbers - numbers.max())
    probabilities = powers / powers.sum()
    order = np.argsort(-probabilities, kind="stable")[: max(1, top)]
    labels = target.labels or tuple(str(index) for index in range(target.classes))
    return ClassPrediction(
        tuple(ClassProbability(labels[i], int(i), float(probabilities[i])) for i in order)
    )


def _text(raw: RawExample) -> str:
    if not isinstance(raw, str):
        raise ConfigError("this task takes what was typed so far, a text")
    return raw


def _pixels(raw: RawExample, features: ImageFeatures) -> Array:
    """`[height, width, channels]` from 0 to `raw_max`; an array is taken as it is."""
    if isinstance(raw, str):
        raise ConfigError("this task takes an image, not a text")
    if not isinstance(raw, bytes | Path):
        return np.asarray(raw)
    from PIL import Image, UnidentifiedImageError  # noqa: PLC0415 -- see the top of the file

    name = "the image" if isinstance(raw, bytes) else str(raw)
    source = io.BytesIO(raw) if isinstance(raw, bytes) else raw
    formats = _APP_FORMATS if isinstance(raw, bytes) else None
    try:
        with Image.open(source, formats=formats) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ConfigError(
                    f"{name} has {width} x {height} pixels, at most {MAX_PIXELS:,} are read"
                )
            if image.mode.startswith(("I", "F")):
                raise ConfigError(f"{name} has more than 8 bits a channel; save it with 8")
            converted = image.convert("L" if features.channels == 1 else "RGB")
    except UnidentifiedImageError as error:
        raise ConfigError(f"{name} is not an image in a known format (PNG, JPEG, …)") from error
    # Pillow's decoders raise each of these for damaged files.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{name} cannot be read: {error}") from error
    size = (features.width, features.height)
    if converted.size != size:
        converted = converted.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(converted, np.float32) * np.float32(features.raw_max / 255.0)


def _row(raw: RawExample, features: TabularFeatures) -> Array:
    if isinstance(raw, bytes | Path | str):
        raise ConfigError(f"this task takes a row of {features.columns} numbers, not a file")
    try:
        with np.errstate(over="ignore"):
            row = np.asarray(raw, np.float32).reshape(-1)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"a row of {features.columns} numbers, please: {error}") from error
    if not np.isfinite(row).all():
        raise ConfigError("a row of numbers that float32 can hold, please: one is beyond, or none")
    return row
