"""Which examples are never trained on: a place once held out stays so, and the sides never mix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.data.examples import ExampleCounts, count_examples, open_examples
from fedge.edge_agent.data.hold_out import held_out
from fedge.edge_agent.example_text import Split

shares = st.floats(0, 0.9)


@given(st.integers(0, 2000), st.integers(0, 500), shares)
def test_rows_that_are_added_move_none_to_the_other_side(rows, more, share):
    assert (held_out(rows + more, share)[:rows] == held_out(rows, share)).all()


@given(st.integers(1, 3000), st.floats(0.01, 0.9))
def test_the_share_is_kept_over_any_number_of_rows(rows, share):
    # The three-distance theorem: places are never further apart than a few steps.
    assert abs(held_out(rows, share).sum() - share * rows) <= 4


def test_nothing_is_held_out_without_a_share():
    assert not held_out(1000, 0.0).any()


def test_a_file_that_is_sorted_by_label_gives_some_of_each():
    labels = np.repeat(np.arange(10), 30)
    assert set(labels[held_out(300, 0.2)]) == set(range(10))


def test_each_example_is_on_exactly_one_side(tmp_path):
    inputs = np.arange(40, dtype=np.float32)[:, np.newaxis]
    np.savez(tmp_path / "data.npz", x=inputs, y=np.arange(40))
    config = DataConfig(path=tmp_path / "data.npz", hold_out=0.25)
    training = open_examples(config)
    kept_out = open_examples(config, side=Split.HOLD_OUT)
    assert sorted([*training.raw_targets, *kept_out.raw_targets]) == list(range(40))
    assert (training.raw_inputs[:, 0] == training.raw_targets).all()
    assert count_examples(config) == ExampleCounts(len(training), len(kept_out))
    assert len(kept_out) == 11


def test_a_share_of_a_partition_is_held_out_of_each_part(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.zeros((40, 1), np.float32), y=np.arange(40))
    seen: list[int] = []
    for index in range(2):
        partition = {"scheme": "iid", "index": index, "of": 2}
        config = DataConfig(path=tmp_path / "data.npz", hold_out=0.25, partition=partition)
        for side in Split:
            seen.extend(open_examples(config, side=side).raw_targets)
        assert count_examples(config) == ExampleCounts(15, 5)
    assert sorted(seen) == list(range(40))


def test_texts_are_held_out_as_rows_are(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"text {n}\n" for n in range(20)))
    assert count_examples(DataConfig(path=path, hold_out=0.3)) == ExampleCounts(14, 6)


def test_an_example_store_has_a_share_of_its_own(tmp_path):
    with pytest.raises(ValidationError, match=r"\[examples\]"):
        DataConfig(path=tmp_path / "examples.sqlite", hold_out=0.1)
