"""The examples of one device: a data set, its first rows, this device's part of them.

A source is one format's data set: it tells its length and its targets, and gives the inputs of
chosen rows, so that a device which has a tenth of a data set reads a tenth of its inputs where
the format allows.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedge.edge_agent.data.config import DataConfig, DataFormat
from fedge.edge_agent.data.hold_out import held_out
from fedge.edge_agent.data.idx import is_idx, read_idx
from fedge.edge_agent.data.images import read_images
from fedge.edge_agent.data.npz import choose_keys, read_array, read_length
from fedge.edge_agent.data.partition import Indices, partition
from fedge.edge_agent.data.table import Layout, count_rows, read_labels, read_table
from fedge.edge_agent.example_limits import ExampleLimits
from fedge.edge_agent.example_store import MAX_TEXTS, ExampleStore
from fedge.edge_agent.example_text import Split
from fedge.schemas.errors import ConfigError, StoreError
from fedge.schemas.features import FeatureSpec, ImageFeatures
from fedge.schemas.split_schemes import Scheme
from fedge.schemas.text_file import JSON_LINES, read_texts
from fedge.schemas.words import WordEncoder

RawArray = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Examples:
    """Inputs and targets as the device has them, first dimension: examples.

    `raw_inputs` may be a read-only map of a file. `full_scale`: what the largest value of an input
    means, where the format says so (255 in an image file); None where it is the task's business.
    `texts`: of text, how many the rows were made of; the device's examples are those. `generation`:
    of the example store that they are from, see there.
    """

    raw_inputs: RawArray
    raw_targets: RawArray
    full_scale: float | None = None
    texts: int | None = None
    generation: int | None = None

    def __len__(self) -> int:
        return len(self.raw_targets)

    @property
    def examples(self) -> int:
        """What the device says that it has: n_k of the FedAvg paper."""
        return len(self) if self.texts is None else self.texts


def in_task_scale(examples: Examples, rows: slice | Indices, features: FeatureSpec) -> RawArray:
    """The raw inputs of these rows; an image file's 0..255 as the task's 0..`raw_max`."""
    raw = examples.raw_inputs[rows]
    if examples.full_scale is None or not isinstance(features, ImageFeatures):
        return raw
    if examples.full_scale == features.raw_max:
        return raw
    return raw * np.float32(features.raw_max / examples.full_scale)


@dataclass(frozen=True, slots=True)
class _Source:
    """One opened data set of `length` examples, cut to `DataConfig.limit`."""

    length: int
    read_targets: Callable[[], RawArray]
    read_inputs: Callable[[slice | Indices], RawArray]
    full_scale: float | None = None


def open_examples(
    config: DataConfig,
    words: WordEncoder | None = None,
    limits: ExampleLimits | None = None,
    side: Split = Split.TRAINING,
) -> Examples:
    """This device's examples on one side of its hold-out.

    `words`: makes windows of text, where the plan has word features. `limits`: of an example store,
    which is not read without them: reading deletes what is too old.

    Raises `ConfigError` if the configuration does not fit what is there, `StoreError` if a file is
    damaged or unreadable; both name the file and, for text, the line.
    """
    data_format = _format_of(config)
    if data_format in (DataFormat.TEXT, DataFormat.STORE):
        if words is None:
            raise ConfigError(f"{config.path} holds texts, and the task is not about words")
        generation, texts = _texts_in(config, data_format, limits, side)
        inputs, targets = words.windows(texts)
        return Examples(inputs, targets, texts=len(texts), generation=generation)
    source = _open_source(config, data_format)
    targets = source.read_targets()
    rows = _side_of_rows(_own_rows(config, targets), config, side)
    inputs = source.read_inputs(rows)
    return Examples(_native(inputs), _native(targets[rows]), source.full_scale)


def training_texts(
    config: DataConfig, limits: ExampleLimits | None
) -> tuple[int | None, list[str]]:
    """The generation of the example store, if it is one, and the texts that are trained on.

    Raises `ConfigError` if there are no texts but other examples, and as `open_examples`.
    """
    data_format = _format_of(config)
    if data_format not in (DataFormat.TEXT, DataFormat.STORE):
        raise ConfigError(f"{config.path} holds no texts")
    return _texts_in(config, data_format, limits, Split.TRAINING)


@dataclass(frozen=True, slots=True)
class ExampleCounts:
    """How many examples a device has: to train on, and held out."""

    training: int
    hold_out: int


def count_examples(config: DataConfig) -> ExampleCounts:
    """How many examples `open_examples` would return, without reading inputs where possible.

    Not of an example store: see `TypedTexts.count`. Raises as `open_examples` does, for what it
    looks at.
    """
    data_format = _format_of(config)
    if data_format is DataFormat.STORE:
        raise _only_its_agent(config)
    length = _count_rows(config, data_format)
    hold_out = int(held_out(length, config.hold_out).sum())
    return ExampleCounts(length - hold_out, hold_out)


def _count_rows(config: DataConfig, data_format: DataFormat) -> int:
    if data_format is DataFormat.TEXT:
        return len(_own_texts(config))
    source = _open_source(config, data_format)
    if config.partition is None:
        return source.length
    rows = _own_rows(config, source.read_targets())
    return source.length if isinstance(rows, slice) else len(rows)


def split_to_files(
    config: DataConfig, scheme: str | Scheme, parts: int, seed: int, out: Path
) -> list[Path]:
    """Writes the examples of `config` as `part-0.npz`, `part-1.npz`, … into `out`; their paths.

    Each file holds `x` and `y` and is replaced whole. Raises as `open_examples` and `partition`,
    `StoreError` if a file cannot be written.
    """
    examples = open_examples(config)
    chosen = partition(examples.raw_targets, scheme, parts, seed)
    paths = [out / f"part-{number}.npz" for number in range(parts)]
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path, rows in zip(paths, chosen, strict=True):
            partial = path.with_suffix(".npz.partial")
            with partial.open("wb") as file:
                np.savez(file, x=examples.raw_inputs[rows], y=examples.raw_targets[rows])
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
    except OSError as error:
        raise StoreError(f"cannot write the parts to {out}: {error}") from error
    return paths


def _texts_in(
    config: DataConfig, data_format: DataFormat, limits: ExampleLimits | None, side: Split
) -> tuple[int | None, list[str]]:
    if data_format is DataFormat.TEXT:
        return None, _side_of_texts(_own_texts(config), config, side)
    return _stored_texts(config, limits, side)


def _stored_texts(
    config: DataConfig, limits: ExampleLimits | None, side: Split
) -> tuple[int, list[str]]:
    if limits is None:
        raise _only_its_agent(config)
    with ExampleStore(config.path, limits) as store:
        # Before the first is read: what is forgotten from now on is noticed.
        generation = store.generation()
        typed = store.read(side)
        return generation, [one.text for one in islice(typed, config.limit or MAX_TEXTS)]


def _only_its_agent(config: DataConfig) -> ConfigError:
    return ConfigError(f"{config.path} is an example store: only its agent reads it")


def _own_texts(config: DataConfig) -> list[str]:
    texts = list(islice(read_texts(config.path, user=config.user), config.limit))
    if config.partition is None:
        return texts
    # All of one label: a share of texts is a share of their order, or a random one.
    rows = np.arange(len(texts))[_own_rows(config, np.zeros(len(texts), np.int64))]
    return [texts[row] for row in rows]


def _own_rows(config: DataConfig, targets: RawArray) -> slice | Indices:
    share = config.partition
    if share is None:
        return slice(len(targets))
    return partition(targets, share.scheme, share.of, share.seed)[share.index]


def _side_of_texts(texts: list[str], config: DataConfig, side: Split) -> list[str]:
    rows = _side_of_rows(slice(len(texts)), config, side)
    return texts[rows] if isinstance(rows, slice) else [texts[row] for row in rows]


def _side_of_rows(rows: slice | Indices, config: DataConfig, side: Split) -> slice | Indices:
    if config.hold_out == 0 and side is Split.TRAINING:
        return rows
    own = np.arange(rows.stop) if isinstance(rows, slice) else rows
    is_held_out = held_out(len(own), config.hold_out)
    return own[is_held_out if side is Split.HOLD_OUT else ~is_held_out]


def _native(values: RawArray) -> RawArray:
    """The same array if it is in this machine's byte order, otherwise a copy that is."""
    return values if values.dtype.isnative else values.astype(values.dtype.newbyteorder("="))


def _format_of(config: DataConfig) -> DataFormat:
    if config.is_store:
        return DataFormat.STORE
    if config.format is DataFormat.AUTO:
        return _recognise(config.path)
    if not config.path.exists():
        raise ConfigError(f"no examples at {config.path}: set `path` in the table [data]")
    return config.format


def _open_source(config: DataConfig, data_format: DataFormat) -> _Source:
    match data_format:
        case DataFormat.IMAGES:
            return _image_source(config)
        case DataFormat.IDX:
            return _idx_source(config)
        case DataFormat.NPZ:
            return _npz_source(config)
        case DataFormat.CSV:
            return _csv_source(config)
        case _:
            raise AssertionError(data_format)


def _recognise(path: Path) -> DataFormat:
    if path.is_dir():
        return DataFormat.IMAGES
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except FileNotFoundError as error:
        raise ConfigError(f"no examples at {path}: set `path` in the table [data]") from error
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error})") from error
    if path.suffix.lower() == ".npz" or start == b"PK\3\4":
        return DataFormat.NPZ
    if path.suffix.lower() == ".csv":
        return DataFormat.CSV
    if path.suffix.lower() in (".txt", JSON_LINES):
        return DataFormat.TEXT
    if is_idx(start):
        return DataFormat.IDX
    raise ConfigError(
        f"{path}: unknown kind of file; set `format` to images, idx, npz, csv or text"
    )


def _idx_source(config: DataConfig) -> _Source:
    targets_path = config.targets or _idx_targets_beside(config.path)
    inputs, targets = read_idx(config.path), read_idx(targets_path)
    _check_lengths(config.path, len(inputs), targets_path, len(targets))
    length = _limited(config, len(inputs))
    inputs, targets = inputs[:length], targets[:length]
    return _Source(length, lambda: targets, lambda rows: inputs[rows])


def _idx_targets_beside(path: Path) -> Path:
    name = path.name.replace("images", "labels").replace("idx3", "idx1")
    beside = path.with_name(name)
    if name == path.name or not beside.is_file():
        raise ConfigError(f"{path}: set `targets` to the IDX file of its labels")
    return beside


def _npz_source(config: DataConfig) -> _Source:
    path = config.path
    x, y = choose_keys(path, config.inputs_key, config.targets_key)
    whole = read_length(path, x)
    _check_lengths(f"{path}: {x}", whole, y, read_length(path, y))
    length = _limited(config, whole)
    return _Source(
        length,
        lambda: read_array(path, y)[:length],
        lambda rows: read_array(path, x)[:length][rows],
    )


def _csv_source(config: DataConfig) -> _Source:
    layout = Layout(config.target_columns, config.ignore_columns, config.header, config.delimiter)
    length = _limited(config, count_rows(config.path, layout))
    read: list[tuple[RawArray, RawArray]] = []

    def table() -> tuple[RawArray, RawArray]:
        if not read:  # inputs and targets are in one file: parse it once, and only if needed
            read.append(read_table(config.path, layout, config.limit))
        return read[0]

    return _Source(length, lambda: table()[1], lambda rows: table()[0][rows])


def _image_source(config: DataConfig) -> _Source:
    if not config.path.is_dir():
        raise ConfigError(f"{config.path} is not a folder of images: set `path` or `format`")
    names, labels = read_labels(config.path / config.labels)
    length = _limited(config, len(names))
    paths = np.array([str(config.path / name) for name in names[:length]], object)
    return _Source(
        length,
        lambda: labels[:length],
        lambda rows: read_images([Path(path) for path in paths[rows]]),
        full_scale=255.0,
    )


def _limited(config: DataConfig, length: int) -> int:
    return length if config.limit is None else min(length, config.limit)


def _check_lengths(x: object, inputs: int, y: object, targets: int) -> None:
    if inputs != targets:
        raise ConfigError(
            f"{x} has {inputs} examples, {y} has {targets}: they do not belong together"
        )
