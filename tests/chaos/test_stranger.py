"""The stranger's lies are lies, and each is one that a coordinator must tell from an update."""

from __future__ import annotations

import random

import numpy as np
import pytest
import safetensors.numpy

from tests.chaos.stranger import LIES

HONEST = safetensors.numpy.save({"a": np.ones((3, 4), np.float32), "b": np.zeros(5, np.float32)})


def told(lie: str) -> bytes:
    return LIES[lie](HONEST, random.Random(1))


@pytest.mark.parametrize(
    ("lie", "is_bad"),
    [("nan", np.isnan), ("infinity", np.isinf), ("absurd", lambda tensor: tensor > 1e20)],
)
def test_one_number_is_bad(lie: str, is_bad):
    tensors = safetensors.numpy.load(told(lie))
    assert sum(int(is_bad(tensor).sum()) for tensor in tensors.values()) == 1
    assert {name: each.shape for name, each in tensors.items()} == {"a": (3, 4), "b": (5,)}


def test_a_tensor_has_another_name():
    assert "stranger" in safetensors.numpy.load(told("renamed"))


def test_garbage_is_as_long_as_an_update_and_none():
    assert len(told("garbage")) == len(HONEST)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.numpy.load(told("garbage"))


def test_a_truncated_update_is_a_part_of_one():
    assert HONEST.startswith(told("truncated"))
    assert len(told("truncated")) < len(HONEST)


@pytest.mark.parametrize("lie", ["stolen", "wrong_chunks"])
def test_what_is_stolen_is_as_it_was(lie: str):
    assert told(lie) == HONEST


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("lie", LIES)
def test_every_lie_can_be_told_of_every_update(lie: str, seed: int):
    assert LIES[lie](HONEST, random.Random(seed))
