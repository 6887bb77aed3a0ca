"""Partitions: nothing is lost, nothing is given twice, and the seed decides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.edge_agent.data.partition import partition
from fedge.schemas.errors import ConfigError
from fedge.schemas.split_schemes import parse_scheme


@st.composite
def cases(draw):
    parts = draw(st.integers(1, 9))
    count = draw(st.integers(2 * parts, 200))
    classes = draw(st.integers(1, 12))
    targets = np.random.default_rng(draw(st.integers(0, 99))).integers(0, classes, count)
    weights = draw(st.lists(st.floats(1e-3, 1e3), min_size=parts, max_size=parts))
    alpha = draw(st.sampled_from([1e-300, 1e-3, 0.1, 1.0, 100.0, 1e300]))
    scheme = draw(
        st.sampled_from(
            [
                "iid",
                "ordered",
                "shards",
                f"dirichlet:{alpha}",
                "weighted:" + ",".join(map(str, weights)),
            ]
        )
    )
    return targets, scheme, parts, draw(st.integers(0, 2**63 - 1))


@given(cases())
def test_parts_are_disjoint_and_together_hold_every_example(case):
    targets, scheme, parts, seed = case
    chosen = partition(targets, scheme, parts, seed)
    assert len(chosen) == parts
    assert min(len(part) for part in chosen) >= 1
    assert sorted(np.concatenate(chosen).tolist()) == list(range(len(targets)))


@given(cases())
def test_the_same_seed_gives_the_same_parts(case):
    first, second = partition(*case), partition(*case)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_another_seed_gives_other_parts():
    targets = np.arange(100) % 10
    for scheme in ("iid", "shards", "dirichlet:0.3", "weighted:1,2,3,4"):
        one, other = partition(targets, scheme, 4, 1), partition(targets, scheme, 4, 2)
        assert any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True)), scheme


@given(st.integers(1, 20), st.integers(20, 300))
def test_iid_and_dirichlet_parts_differ_by_at_most_one_example(parts, count):
    targets = np.arange(count) % 7
    for scheme in ("iid", "dirichlet:0.1"):
        sizes = [len(part) for part in partition(targets, scheme, parts, 3)]
        assert max(sizes) - min(sizes) <= 1


def test_weighted_sizes_follow_the_weights():
    chosen = partition(np.zeros(10, np.int64), "weighted:0.6,0.3,0.1", 3, 0)
    assert [len(part) for part in chosen] == [6, 3, 1]


def test_ordered_parts_are_runs_in_the_order_of_the_data():
    chosen = partition(np.zeros(5, np.int64), "ordered", 2, 0)
    assert [part.tolist() for part in chosen] == [[0, 1, 2], [3, 4]]


def test_a_tiny_weight_still_gets_one_example():
    chosen = partition(np.zeros(10, np.int64), "weighted:1,1,0.0001", 3, 0)
    assert [len(part) for part in chosen] == [5, 4, 1] or [len(p) for p in chosen] == [4, 5, 1]


def test_two_shards_a_part_hold_at_most_two_classes_of_an_even_data_set():
    targets = np.repeat(np.arange(10), 20)
    chosen = partition(targets, "shards", 10, 0)
    assert max(len(np.unique(targets[part])) for part in chosen) <= 2


def test_a_smaller_alpha_concentrates_the_classes():
    targets = np.random.default_rng(0).integers(0, 10, 2000)

    def mean_largest_share(alpha: float) -> float:
        parts = partition(targets, f"dirichlet:{alpha}", 10, 0)
        return float(np.mean([np.bincount(targets[p]).max() / len(p) for p in parts]))

    assert mean_largest_share(100) < 0.2 < mean_largest_share(1) < mean_largest_share(0.05)


def test_a_large_alpha_gives_every_part_the_whole_s_mixture():
    targets = np.repeat([0, 1], [300, 100])
    for part in partition(targets, "dirichlet:1000000", 4, 0):
        # A part's count of class 0 is binomial(100, 3/4): 30 away would be 7 standard deviations.
        assert abs(int(np.sum(targets[part] == 0)) - 75) < 30


@pytest.mark.parametrize("scheme", ["shards", "dirichlet:0.3"])
def test_schemes_by_class_refuse_regression_targets(scheme):
    with pytest.raises(ConfigError, match="use iid or weighted"):
        partition(np.linspace(0, 1, 50), scheme, 5, 0)


@pytest.mark.parametrize(
    "scheme", ["iid:1", "shards:", "dirichlet", "dirichlet:x", "dirichlet:-1", "weighted:1,nan", ""]
)
def test_an_unknown_scheme_is_refused_with_its_text(scheme):
    with pytest.raises(ConfigError, match="partition scheme"):
        parse_scheme(scheme)


@pytest.mark.parametrize(
    "text", ["iid", "ordered", "shards", "dirichlet:0.3", "weighted:0.6,0.3,0.1"]
)
def test_a_scheme_prints_as_it_is_written(text):
    assert str(parse_scheme(text)) == text


def test_more_parts_than_examples_are_refused():
    with pytest.raises(ConfigError, match="4 examples cannot be split into 5 parts"):
        partition(np.arange(4), "iid", 5, 0)


def test_the_wrong_number_of_weights_is_refused():
    with pytest.raises(ConfigError, match="3 weights for 2 parts"):
        partition(np.arange(4), "weighted:1,2,3", 2, 0)
