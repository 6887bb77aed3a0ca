"""What an agent's `[data]` table says: where the examples lie and how to read them.

It knows names and numbers only; files are opened by `sources`, and whether their content fits is
found there.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fedge.edge_agent.example_store import FILE_NAME
from fedge.schemas.errors import ConfigError
from fedge.schemas.split_schemes import parse_scheme


class DataFormat(StrEnum):
    """How examples are stored."""

    AUTO = "auto"
    """A folder holds images; a file is known by its ending or by its first bytes."""
    IMAGES = "images"
    """A folder of image files and a CSV file with the columns `file` and `label`."""
    IDX = "idx"
    """Two IDX files (MNIST's format), plain or gzipped: inputs at `path`, labels at `targets`."""
    NPZ = "npz"
    """One numpy archive with two arrays of equal length."""
    CSV = "csv"
    """One table of numbers, one example a line."""
    TEXT = "text"
    """One text a line (`.txt`), or JSON lines `{"text": …, "user": …}` (`.jsonl`)."""
    STORE = "store"
    """The training side of the example store, `examples.sqlite` in the state folder."""


Column = Annotated[int | str, Field(union_mode="left_to_right")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PartitionConfig(_Frozen):
    """This device's share of a data set that several virtual devices use.

    `scheme`: `iid`, `ordered`, `shards`, `dirichlet:ALPHA` or `weighted:W0,W1,…` (`partition`).

    All of them name the same `scheme`, `of` and `seed`; each has its own `index`, 0 to `of` - 1.
    """

    scheme: str = "iid"
    index: Annotated[int, Field(ge=0)]
    of: Annotated[int, Field(ge=1, le=65536)]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @field_validator("scheme")
    @classmethod
    def _known_scheme(cls, text: str) -> str:
        try:
            parse_scheme(text)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return text

    @model_validator(mode="after")
    def _index_is_a_part(self) -> Self:
        if self.index >= self.of:
            raise ValueError(f"index {self.index} of {self.of} parts: use 0 to {self.of - 1}")
        return self


class DataConfig(_Frozen):
    """The `[data]` table.

    `path`: the folder of images or the file of inputs. `limit`: only the first `limit` examples
    of the data set, counted before `partition`.

    Images: `labels` is the CSV file, within the folder unless absolute. IDX: `targets` is the file
    of labels; without it, the file beside `path` with `labels-idx1` for `images-idx3`.
    npz: `inputs_key` and `targets_key`; without them `x` and `y`, or `inputs` and `targets`.
    CSV: `target_columns` by name or by position (negative counts from the end),
    `ignore_columns` likewise; `header` is true, false, or "auto": a first line with a cell that is
    no number is one.
    Text: of a `.jsonl` file, `user` takes that user's lines only.

    `hold_out`: this share of the device's own examples is never trained on, only measured on; see
    `fedge.edge_agent.data.hold_out`. An example store has its own, in `[examples]`.
    """

    path: Path
    format: DataFormat = DataFormat.AUTO
    labels: Path = Path("labels.csv")
    targets: Path | None = None
    inputs_key: str | None = None
    targets_key: str | None = None
    target_columns: Annotated[tuple[Column, ...], Field(min_length=1)] = (-1,)
    ignore_columns: tuple[Column, ...] = ()
    header: bool | Literal["auto"] = "auto"
    delimiter: Annotated[str, Field(pattern=r"\A[^\"\r\n]\z")] = ","
    user: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    partition: PartitionConfig | None = None
    hold_out: Annotated[float, Field(ge=0, le=0.9)] = 0.0

    @model_validator(mode="after")
    def _both_keys_or_none(self) -> Self:
        if (self.inputs_key is None) != (self.targets_key is None):
            raise ValueError("set both inputs_key and targets_key, or neither")
        return self

    @model_validator(mode="after")
    def _a_store_has_its_own_hold_out(self) -> Self:
        if self.is_store and self.hold_out:
            raise ValueError("an example store has its own: set hold_out in the table [examples]")
        return self

    @property
    def is_store(self) -> bool:
        """Whether the examples are those of an example store, which need not be there yet."""
        return self.format is DataFormat.STORE or self.path.name == FILE_NAME

    def relative_to(self, folder: Path) -> DataConfig:
        """The same configuration with relative `path` and `targets` taken from `folder`."""
        targets = None if self.targets is None else folder / self.targets
        return self.model_copy(update={"path": folder / self.path, "targets": targets})
