"""Examples from files: what is read is what was written, and damage is named, not learned."""

from __future__ import annotations

import contextlib
import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from fedge.edge_agent.data.config import DataConfig, PartitionConfig
from fedge.edge_agent.data.examples import count_examples, open_examples, split_to_files
from fedge.edge_agent.data.idx import read_idx
from fedge.schemas.errors import ConfigError, StoreError

IDX_CODES = {"u1": 0x08, "i1": 0x09, ">i2": 0x0B, ">i4": 0x0C, ">f4": 0x0D, ">f8": 0x0E}


def idx_bytes(array: np.ndarray, code: str = "u1") -> bytes:
    header = bytes([0, 0, IDX_CODES[code], array.ndim]) + struct.pack(
        f">{array.ndim}I", *array.shape
    )
    return header + array.astype(code).tobytes()


def write_idx_pair(folder: Path, count: int = 12) -> tuple[Path, np.ndarray, np.ndarray]:
    images = np.arange(count * 6, dtype=np.uint8).reshape(count, 2, 3)
    labels = (np.arange(count) % 3).astype(np.uint8)
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(idx_bytes(images))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return path, images, labels


@pytest.mark.parametrize("code", list(IDX_CODES))
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_gives_back_what_was_written(tmp_path, code, pack):
    array = np.arange(24).reshape(4, 2, 3)
    path = tmp_path / "a"
    path.write_bytes(pack(idx_bytes(array, code)))
    np.testing.assert_array_equal(read_idx(path), array)


def test_idx_labels_are_found_beside_the_images(tmp_path):
    path, images, labels = write_idx_pair(tmp_path)
    examples = open_examples(DataConfig(path=path))
    np.testing.assert_array_equal(examples.raw_inputs, images)
    np.testing.assert_array_equal(examples.raw_targets, labels)
    assert len(examples) == count_examples(DataConfig(path=path)).training == 12


def test_a_plain_idx_file_is_mapped_and_a_part_of_it_is_copied(tmp_path):
    path, _, _ = write_idx_pair(tmp_path)
    assert isinstance(open_examples(DataConfig(path=path)).raw_inputs, np.memmap)
    share = PartitionConfig(index=0, of=4)
    part = open_examples(DataConfig(path=path, partition=share)).raw_inputs
    assert part.shape == (3, 2, 3)
    assert part.base is None or not isinstance(part.base, np.memmap)


def test_virtual_devices_share_a_data_set_without_overlap(tmp_path):
    path, images, _ = write_idx_pair(tmp_path)
    seen = []
    for index in range(3):
        share = PartitionConfig(scheme="dirichlet:0.3", index=index, of=3, seed=5)
        config = DataConfig(path=path, partition=share)
        examples = open_examples(config)
        assert len(examples) == count_examples(config).training
        seen += examples.raw_inputs[:, 0, 0].tolist()
    assert sorted(seen) == images[:, 0, 0].tolist()


def test_the_limit_counts_before_the_partition(tmp_path):
    path, images, _ = write_idx_pair(tmp_path)
    seen = []
    for index in range(2):
        config = DataConfig(path=path, limit=6, partition=PartitionConfig(index=index, of=2))
        assert count_examples(config).training == 3
        seen += open_examples(config).raw_inputs[:, 0, 0].tolist()
    assert sorted(seen) == images[:6, 0, 0].tolist()


def test_an_idx_file_cut_short_is_named(tmp_path):
    path, _, _ = write_idx_pair(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"train-images-idx3-ubyte: 71 bytes of data.* says 72"):
        open_examples(DataConfig(path=path))


def test_unequal_lengths_are_refused(tmp_path):
    path, _, labels = write_idx_pair(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(labels[:-1]))
    with pytest.raises(ConfigError, match="do not belong together"):
        open_examples(DataConfig(path=path))


def test_missing_examples_say_which_setting_to_change(tmp_path):
    with pytest.raises(ConfigError, match="set `path`"):
        open_examples(DataConfig(path=tmp_path / "nothing"))


@pytest.mark.parametrize("keys", [("x", "y"), ("inputs", "targets")])
def test_npz_is_read_under_the_usual_names(tmp_path, keys):
    path = tmp_path / "train.npz"
    x, y = np.arange(10.0).reshape(5, 2), np.arange(5)
    np.savez_compressed(path, **{keys[0]: x, keys[1]: y})
    config = DataConfig(path=path, limit=4)
    examples = open_examples(config)
    np.testing.assert_array_equal(examples.raw_inputs, x[:4])
    np.testing.assert_array_equal(examples.raw_targets, y[:4])
    assert count_examples(config).training == 4


def test_npz_with_other_names_asks_for_the_keys(tmp_path):
    path = tmp_path / "train.npz"
    np.savez(path, images=np.zeros((3, 2)), digits=np.zeros(3))
    with pytest.raises(ConfigError, match=r"\['digits', 'images'\].*set inputs_key"):
        open_examples(DataConfig(path=path))
    config = DataConfig(path=path, inputs_key="images", targets_key="digits")
    assert len(open_examples(config)) == 3


class Bomb:
    """Unpickling one would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_an_npz_with_python_objects_is_refused_and_not_unpickled(tmp_path):
    path, marker = tmp_path / "train.npz", tmp_path / "executed"
    objects = np.array([Bomb(marker)], dtype=object)
    np.savez(path, x=objects, y=np.zeros(1))
    with pytest.raises(StoreError, match="expected numbers"):
        open_examples(DataConfig(path=path))
    assert not marker.exists()


def test_csv_takes_its_targets_by_name_or_position(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("id,a,b,label\n7,1.5,2,0\n\n8,3,4,1\n")
    for target in ("label", -1, 3):
        config = DataConfig(path=path, target_columns=(target,), ignore_columns=("id",))
        examples = open_examples(config)
        assert examples.raw_inputs.tolist() == [[1.5, 2], [3, 4]]
        assert examples.raw_targets.tolist() == [0, 1]
        assert examples.raw_targets.dtype == np.int64
        assert count_examples(config).training == 2


def test_csv_without_a_header_loses_no_line(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("1;2;0.5\n3;4;1.5\n")
    config = DataConfig(path=path, delimiter=";")
    assert open_examples(config).raw_inputs.tolist() == [[1, 2], [3, 4]]
    assert open_examples(config).raw_targets.tolist() == [0.5, 1.5]
    assert count_examples(config).training == 2


def test_csv_with_several_targets_gives_one_row_an_example(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("1,2,3\n4,5,6\n")
    examples = open_examples(DataConfig(path=path, target_columns=(0, 1)))
    assert examples.raw_targets.tolist() == [[1, 2], [4, 5]]
    assert examples.raw_inputs.tolist() == [[3], [6]]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [("1,2", "2 columns"), ("1,,3", "column 2: ''"), ("1,cat,3", "'cat'"), ("1,nan,3", "finite")],
)
def test_a_broken_csv_line_is_named_by_its_number(tmp_path, line, complaint):
    path = tmp_path / "t.csv"
    path.write_text(f"a,b,c\n1,2,3\n{line}\n")
    with pytest.raises(StoreError, match="line 3") as caught:
        open_examples(DataConfig(path=path))
    assert complaint in str(caught.value)


def test_an_unknown_csv_column_lists_the_known_ones(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"has \['a', 'b'\], no column 'c'"):
        open_examples(DataConfig(path=path, target_columns=("c",)))


def write_images(folder: Path, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
    lines = ["file,label"]
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{number % 2}")
    (folder / "labels.csv").write_text("\n".join(lines))
    return pixels


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3)])
def test_images_come_as_their_pixels(tmp_path, shape):
    pixels = write_images(tmp_path, [shape] * 3)
    examples = open_examples(DataConfig(path=tmp_path))
    assert examples.raw_inputs.dtype == np.uint8
    np.testing.assert_array_equal(examples.raw_inputs, np.stack(pixels))
    assert examples.raw_targets.tolist() == [0, 1, 0]
    assert count_examples(DataConfig(path=tmp_path, limit=2)).training == 2


def test_an_image_of_another_size_is_named(tmp_path):
    write_images(tmp_path, [(4, 5), (4, 6)])
    with pytest.raises(ConfigError, match=r"1\.png is 6x4 grey, .*0\.png is 5x4 grey"):
        open_examples(DataConfig(path=tmp_path))


def test_only_the_own_part_s_images_are_decoded(tmp_path):
    write_images(tmp_path, [(4, 5)] * 4)
    shares = [PartitionConfig(index=index, of=2) for index in range(2)]
    configs = [DataConfig(path=tmp_path, partition=share) for share in shares]
    (tmp_path / "0.png").write_bytes(b"damaged")
    outcomes = []
    for config in configs:
        try:
            outcomes.append(len(open_examples(config)))
        except StoreError as error:
            assert "0.png" in str(error)  # noqa: PT017 -- which of the two fails is the seed's choice
            outcomes.append(0)
    assert sorted(outcomes) == [0, 2]


def test_an_image_folder_without_labels_says_what_to_write(tmp_path):
    with pytest.raises(ConfigError, match="columns file and label"):
        open_examples(DataConfig(path=tmp_path))


def test_a_split_writes_files_that_together_are_the_source(tmp_path):
    path, images, labels = write_idx_pair(tmp_path)
    written = split_to_files(DataConfig(path=path), "shards", 3, 1, tmp_path / "parts")
    assert [part.name for part in written] == ["part-0.npz", "part-1.npz", "part-2.npz"]
    parts = [open_examples(DataConfig(path=part)) for part in written]
    inputs = np.concatenate([part.raw_inputs for part in parts])
    targets = np.concatenate([part.raw_targets for part in parts])
    order = np.argsort(inputs[:, 0, 0])
    np.testing.assert_array_equal(inputs[order], images)
    np.testing.assert_array_equal(targets[order], labels)
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == [p.name for p in written]


def test_relative_paths_are_taken_from_the_configuration_s_folder():
    config = DataConfig(path=Path("train"), targets=Path("labels")).relative_to(Path("/data"))
    assert (config.path, config.targets) == (Path("/data/train"), Path("/data/labels"))


def outcome_of(path: Path, data: bytes, **settings_: object) -> None:
    """Opens damaged bytes: only this project's errors may come out."""
    path.write_bytes(data)
    config = DataConfig(path=path, **settings_)
    for call in (open_examples, count_examples):
        with contextlib.suppress(ConfigError, StoreError):
            call(config)


@settings(deadline=None)
@given(st.data())
def test_damaged_idx_files_raise_only_our_errors(tmp_path_factory, data):
    whole = idx_bytes(np.arange(12).reshape(2, 6))
    packed = data.draw(st.sampled_from([whole, gzip.compress(whole)]))
    damaged = data.draw(damage(packed))
    folder = tmp_path_factory.mktemp("idx")
    (folder / "labels").write_bytes(idx_bytes(np.arange(2)))
    outcome_of(folder / "inputs", damaged, format="idx", targets=folder / "labels")


@settings(deadline=None)
@given(st.data())
def test_damaged_npz_files_raise_only_our_errors(tmp_path_factory, data):
    buffer = io.BytesIO()
    save = data.draw(st.sampled_from([np.savez, np.savez_compressed]))
    save(buffer, x=np.arange(6.0).reshape(3, 2), y=np.arange(3))
    outcome_of(tmp_path_factory.mktemp("npz") / "a.npz", data.draw(damage(buffer.getvalue())))


@settings(deadline=None)
@given(st.one_of(st.binary(max_size=200), st.text("0123456789,.;-e\"'\n\r abc\0", max_size=200)))
def test_any_bytes_as_csv_raise_only_our_errors(tmp_path_factory, content):
    data = content if isinstance(content, bytes) else content.encode()
    outcome_of(tmp_path_factory.mktemp("csv") / "a.csv", data)


@settings(deadline=None)
@given(
    hnp.arrays(
        np.float64,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
        elements=st.floats(allow_nan=False, allow_infinity=False),
    ),
)
def test_csv_gives_back_the_numbers_that_were_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    table = np.column_stack([rows, np.arange(len(rows))])
    path.write_text("\n".join(",".join(map(repr, row)) for row in table.tolist()))
    np.testing.assert_array_equal(open_examples(DataConfig(path=path)).raw_inputs, rows)


@st.composite
def damage(draw, whole: bytes) -> bytes:
    """`whole` with some bytes replaced, removed or added."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["replace", "cut", "insert"]))
        if kind == "replace" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 20))]
        else:
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
    return bytes(data)
