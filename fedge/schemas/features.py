"""How an example becomes tensors, said in the plan so that every device does the same.

An example is stored as the device has it: an image as its pixels, a row as its columns. A feature
specification in the plan turns a batch of those into the graph's input; a target specification
does the same for labels. numpy only, and imported when something is encoded: an agent that waits
knows a plan without it. A further kind is one more class in the two unions below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedge.schemas.errors import TrainingFailed
from fedge.schemas.tensor_spec import BATCH, TensorSpec
from fedge.schemas.words import FIRST_WORD, MAX_WORDS

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from fedge.schemas.tensors import Array

Positive = Annotated[int, Field(ge=1, le=65536)]
VocabularySize = Annotated[int, Field(ge=FIRST_WORD + 1, le=FIRST_WORD + MAX_WORDS)]
Window = Annotated[int, Field(ge=1, le=256)]


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ImageFeatures(_Spec):
    """Pixels → float32 `[batch, channels, height, width]`, or `[batch, pixels]` if `flat`.

    Raw examples are `[n, height, width]`, `[n, height, width, channels]` or `[n, pixels]`, with
    values from 0 to `raw_max`. A pixel becomes `(raw / raw_max - mean) / std`, `mean` and `std`
    being in units of the full range, one value for each channel.
    """

    kind: Literal["image"] = "image"
    height: Positive
    width: Positive
    channels: Literal[1, 3] = 1
    raw_max: Annotated[float, Field(gt=0)] = 255.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[Annotated[float, Field(gt=0)], ...] = (1.0,)
    flat: bool = False

    @model_validator(mode="after")
    def _one_value_a_channel(self) -> ImageFeatures:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean and std need {self.channels} values each, one a channel")
        return self

    @property
    def tensor(self) -> TensorSpec:
        """The graph's input."""
        pixels = self.channels * self.height * self.width
        shape = (BATCH, pixels) if self.flat else (BATCH, self.channels, self.height, self.width)
        return TensorSpec(name="input", dtype="float32", shape=shape)

    def encode(self, raw: Array) -> npt.NDArray[np.float32]:
        """Raw examples → the tensor above. Raises `TrainingFailed` if the sizes do not fit."""
        import numpy as np  # noqa: PLC0415 -- see the top of the file

        n = raw.shape[0]
        if raw.size != n * self.height * self.width * self.channels:
            raise TrainingFailed(
                f"images of shape {raw.shape[1:]} do not fit the task's "
                f"{self.height}x{self.width}x{self.channels}"
            )
        pixels = raw.reshape(n, self.height, self.width, self.channels).astype(np.float32)
        pixels /= np.float32(self.raw_max)
        pixels -= np.asarray(self.mean, np.float32)
        pixels /= np.asarray(self.std, np.float32)
        ordered = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        return ordered.reshape(n, -1) if self.flat else ordered


class TabularFeatures(_Spec):
    """Columns of numbers → float32 `[batch, columns]`, each `(value - mean) / std` if given."""

    kind: Literal["tabular"] = "tabular"
    columns: Positive
    mean: tuple[float, ...] | None = None
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None

    @model_validator(mode="after")
    def _one_value_a_column(self) -> TabularFeatures:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.columns:
                raise ValueError(f"{name} needs {self.columns} values, one a column")
        return self

    @property
    def tensor(self) -> TensorSpec:
        """The graph's input."""
        return TensorSpec(name="input", dtype="float32", shape=(BATCH, self.columns))

    def encode(self, raw: Array) -> npt.NDArray[np.float32]:
        """Raw rows → the tensor above. Raises `TrainingFailed` if the columns do not fit."""
        import numpy as np  # noqa: PLC0415 -- see the top of the file

        rows = raw.reshape(raw.shape[0], -1).astype(np.float32)
        if rows.shape[1] != self.columns:
            raise TrainingFailed(f"rows of {rows.shape[1]} columns, the task has {self.columns}")
        if self.mean is not None:
            rows -= np.asarray(self.mean, np.float32)
        if self.std is not None:
            rows /= np.asarray(self.std, np.float32)
        return rows


class ClassTarget(_Spec):
    """A class by its number, 0 to `classes` - 1 → int64 `[batch]`. `labels` are for people."""

    kind: Literal["class"] = "class"
    classes: Annotated[int, Field(ge=2, le=2**20)]
    labels: tuple[Annotated[str, Field(max_length=64)], ...] | None = None

    @model_validator(mode="after")
    def _one_label_a_class(self) -> ClassTarget:
        if self.labels is not None and len(self.labels) != self.classes:
            raise ValueError(f"{len(self.labels)} labels for {self.classes} classes")
        return self

    @property
    def tensor(self) -> TensorSpec:
        """The graph's target."""
        return TensorSpec(name="target", dtype="int64", shape=(BATCH,))

    def encode(self, raw: Array) -> npt.NDArray[np.int64]:
        """Raw labels → the tensor above. Raises `TrainingFailed` for a label out of range."""
        import numpy as np  # noqa: PLC0415 -- see the top of the file

        labels = raw.reshape(raw.shape[0]).astype(np.int64)
        if labels.size and not (labels.min() >= 0 and labels.max() < self.classes):
            raise TrainingFailed(
                f"labels from {labels.min()} to {labels.max()}, "
                f"the task has 0 to {self.classes - 1}"
            )
        return labels


class ValueTarget(_Spec):
    """Numbers to predict → float32 `[batch, width]`."""

    kind: Literal["value"] = "value"
    width: Positive = 1

    @property
    def tensor(self) -> TensorSpec:
        """The graph's target."""
        return TensorSpec(name="target", dtype="float32", shape=(BATCH, self.width))

    def encode(self, raw: Array) -> npt.NDArray[np.float32]:
        """Raw numbers → the tensor above. Raises `TrainingFailed` if the width does not fit."""
        import numpy as np  # noqa: PLC0415 -- see the top of the file

        values = raw.reshape(raw.shape[0], -1).astype(np.float32)
        if values.shape[1] != self.width:
            raise TrainingFailed(f"targets of width {values.shape[1]}, the task has {self.width}")
        return values


class WordFeatures(_Spec):
    """Windows of word numbers → int64 `[batch, window]`; see `fedge.schemas.words`.

    Raw examples are windows already, made with the plan's vocabulary. `words`: how many numbers
    there are, those that stand for no word included.
    """

    kind: Literal["words"] = "words"
    words: VocabularySize
    window: Window

    @property
    def tensor(self) -> TensorSpec:
        """The graph's input."""
        return TensorSpec(name="input", dtype="int64", shape=(BATCH, self.window))

    def encode(self, raw: Array) -> npt.NDArray[np.int64]:
        """Windows → the tensor above. Raises `TrainingFailed` if they are another plan's."""
        return _checked_windows(raw, self.window, self.words)


class NextWordTarget(_Spec):
    """The word after each word of a window → int64 `[batch, window]`; 0 where there is none."""

    kind: Literal["next_word"] = "next_word"
    words: VocabularySize
    window: Window

    @property
    def tensor(self) -> TensorSpec:
        """The graph's target."""
        return TensorSpec(name="target", dtype="int64", shape=(BATCH, self.window))

    def encode(self, raw: Array) -> npt.NDArray[np.int64]:
        """Windows → the tensor above. Raises `TrainingFailed` if they are another plan's."""
        return _checked_windows(raw, self.window, self.words)


def _checked_windows(raw: Array, window: int, words: int) -> npt.NDArray[np.int64]:
    import numpy as np  # noqa: PLC0415 -- see the top of the file

    windows = np.ascontiguousarray(raw, np.int64).reshape(raw.shape[0], -1)
    if windows.shape[1] != window:
        raise TrainingFailed(f"windows of {windows.shape[1]} words, the task has {window}")
    if windows.size and not (windows.min() >= 0 and windows.max() < words):
        raise TrainingFailed(
            f"word numbers from {windows.min()} to {windows.max()}, the task has 0 to {words - 1}"
        )
    return windows


FeatureSpec = Annotated[ImageFeatures | TabularFeatures | WordFeatures, Field(discriminator="kind")]
TargetSpec = Annotated[ClassTarget | ValueTarget | NextWordTarget, Field(discriminator="kind")]
