"""The order of examples: what anyone must get who repeats a device's training from its seed."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedge.edge_agent.batching import batches, epoch_order, step_count, step_seed
from fedge.schemas.plan import Padding

counts = st.integers(1, 60)


def made(n, **options):
    options = {"batch_size": 4, "local_epochs": 2, "seed": 7, "padding": Padding.MASK} | options
    return list(batches(n, **options))


@given(counts, st.integers(1, 9), st.integers(1, 4), st.sampled_from(Padding))
def test_each_epoch_visits_every_example_once(n, batch_size, epochs, padding):
    found = made(n, batch_size=batch_size, local_epochs=epochs, padding=padding)
    for epoch in range(epochs):
        rows = [b.rows[: b.count] for b in found if b.epoch == epoch]
        assert sorted(np.concatenate(rows)) == list(range(n))


@given(counts, st.integers(1, 9), st.integers(0, 4), st.none() | st.integers(0, 50))
def test_steps_are_those_of_the_epochs_and_no_more_than_local_steps(n, size, epochs, cap):
    options = {"batch_size": size, "local_epochs": epochs, "local_steps": cap}
    found = made(n, **options)
    whole = sum(1 for _ in range(epochs) for _ in range(0, n, size))
    assert len(found) == (whole if cap is None else min(whole, cap))
    assert len(found) == step_count(n, **options)
    assert [batch.step for batch in found] == list(range(len(found)))


@given(counts, st.integers(1, 9))
def test_a_masked_batch_is_full_and_an_exact_one_holds_examples_only(n, size):
    for batch in made(n, batch_size=size, padding=Padding.MASK):
        assert len(batch.rows) == len(batch.mask) == size
        assert batch.mask.tolist() == [1.0] * batch.count + [0.0] * (size - batch.count)
        assert set(batch.rows[batch.count :]) <= {batch.rows[0]}
    for batch in made(n, batch_size=size, padding=Padding.EXACT):
        assert len(batch.rows) == batch.count
        assert batch.mask.tolist() == [1.0] * batch.count


def test_the_order_is_numpys_permutation_of_seed_and_epoch():
    expected = np.random.default_rng([7, 1]).permutation(10)
    second = [b.rows[: b.count] for b in made(10) if b.epoch == 1]
    assert np.concatenate(second).tolist() == expected.tolist()


def test_the_order_of_a_seed_never_changes():
    # Golden: another order in a later release would make old rounds unrepeatable.
    assert epoch_order(8, seed=42, epoch=0).tolist() == [3, 4, 2, 7, 6, 1, 5, 0]
    assert [step_seed(42, step) for step in range(3)] == [3444837047, 3329053876, 955475868]


def test_epochs_and_seeds_have_different_orders():
    orders = {tuple(epoch_order(20, seed=s, epoch=e)) for s in range(3) for e in range(3)}
    assert len(orders) == 9


def test_step_seeds_do_not_repeat():
    seeds = {step_seed(seed, step) for seed in range(30) for step in range(100)}
    assert len(seeds) == 3000
    assert all(0 <= seed < 2**32 for seed in seeds)
