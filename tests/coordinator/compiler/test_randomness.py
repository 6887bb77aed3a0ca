"""The counter-based random numbers: repeatable, well spread, equal in both runtimes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from compiler_models import ZOO
from torch import Tensor, nn
from torch.nn import functional

from fedge.coordinator.compiler import CompiledPlan
from fedge.coordinator.compiler.randomness import CounterRandomness, random_bits
from fedge.coordinator.compiler.verification import session
from fedge.schemas.errors import UnsupportedModel

SIZE = 40_000


def draw(seed: int, call: int = 0, size: int = SIZE) -> np.ndarray:
    return random_bits(torch.tensor(seed), call, [size]).numpy()


def python_bits(seed: int, call: int, position: int) -> int:
    """The same hash in Python's unbounded integers: an overflow in int64 would show."""

    def mix(x: int) -> int:
        for shift, multiplier in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
            x ^= x >> shift
            x = x * multiplier % 2**32
        return x ^ x >> 15

    key = mix((seed % 2**32) ^ (call * 0x1E3779B9 % 2**32))
    return mix(mix((position + key) % 2**32) ^ mix(key ^ 0x5BD1E995)) >> 8


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**63 - 1])
@pytest.mark.parametrize("call", [0, 7])
def test_bits_equal_exact_integer_arithmetic(seed: int, call: int) -> None:
    expected = [python_bits(seed, call, position) for position in range(500)]
    assert draw(seed, call, 500).tolist() == expected


@pytest.mark.parametrize("seed", [0, 1, 2, 12345])
def test_numbers_are_uniform_by_a_chi_squared_test(seed: int) -> None:
    counts = np.bincount(draw(seed) >> 16, minlength=256)
    expected = SIZE / 256
    statistic = float(((counts - expected) ** 2 / expected).sum())
    # 255 degrees of freedom: mean 255, standard deviation sqrt(510); six of them are one in 10^8.
    assert abs(statistic - 255) < 6 * math.sqrt(510)


@pytest.mark.parametrize("other", [(0, 1), (1, 0), (2, 0), (2**31, 0)])
def test_streams_of_neighbouring_seeds_and_calls_are_uncorrelated(other: tuple[int, int]) -> None:
    first, second = draw(0, 0) / 2**24 - 0.5, draw(*other) / 2**24 - 0.5
    limit = 5 / math.sqrt(SIZE)
    assert abs(np.corrcoef(first, second)[0, 1]) < limit
    for lag in (1, 2, 3, 8, 64):
        assert abs(np.corrcoef(first[:-lag], first[lag:])[0, 1]) < limit


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_drops_at_its_rate_and_scales_the_rest(rate: float) -> None:
    with CounterRandomness(torch.tensor(5)):
        dropped = functional.dropout(torch.ones(SIZE), rate, training=True)
    share = float((dropped == 0).float().mean())
    assert abs(share - rate) < 5 * math.sqrt(rate * (1 - rate) / SIZE)
    torch.testing.assert_close(dropped[dropped != 0].unique(), torch.tensor([1 / (1 - rate)]))


def test_masks_differ_by_seed_and_by_call_and_repeat_by_both() -> None:
    def two_masks(seed: int) -> tuple[Tensor, Tensor]:
        with CounterRandomness(torch.tensor(seed)):
            return (
                functional.dropout(torch.ones(1000), 0.5),
                functional.dropout(torch.ones(1000), 0.5),
            )

    first, second = two_masks(1)
    assert not torch.equal(first, second)
    assert torch.equal(first, two_masks(1)[0])
    assert torch.equal(second, two_masks(1)[1])
    assert not torch.equal(first, two_masks(2)[0])


def test_normal_numbers_have_the_moments_of_a_normal_distribution() -> None:
    with CounterRandomness(torch.tensor(9)):
        values = torch.randn(SIZE).double()
    limit = 5 / math.sqrt(SIZE)
    assert abs(values.mean()) < limit
    assert abs(values.var() - 1) < limit * math.sqrt(2)
    assert abs((values**4).mean() - 3) < limit * math.sqrt(96)


@pytest.mark.parametrize(
    "drawn",
    [
        lambda: torch.rand(SIZE),
        lambda: torch.rand_like(torch.zeros(SIZE)),
        lambda: torch.empty(SIZE).uniform_(),
        lambda: torch.bernoulli(torch.full((SIZE,), 0.5)),
        lambda: torch.empty(SIZE).bernoulli_(0.5),
        lambda: functional.alpha_dropout(torch.ones(SIZE), 0.5, training=True) * 0 + 0.5,
    ],
)
def test_every_random_operator_draws_from_the_seed(drawn: Callable[[], Tensor]) -> None:
    with CounterRandomness(torch.tensor(3)):
        first = drawn()
    torch.manual_seed(99)
    with CounterRandomness(torch.tensor(3)):
        assert torch.equal(first, drawn())
    assert abs(float(first.mean()) - 0.5) < 0.02


def test_a_random_operator_without_a_replacement_is_refused() -> None:
    with CounterRandomness(torch.tensor(3)), pytest.raises(UnsupportedModel, match="multinomial"):
        torch.multinomial(torch.ones(4), 2)


def test_the_train_graph_drops_the_very_units_that_torch_drops(
    plan_of: Callable[[str], CompiledPlan],
) -> None:
    """Hidden units that were dropped get no gradient: the head's changes tell which they were."""
    plan = plan_of("dropout")
    manifest = plan.manifest
    graph = session(plan.blobs[manifest.graphs.train.sha256])
    weights = plan.initial_weights
    row = np.random.default_rng(0).standard_normal((1, 24)).astype(np.float32)
    seen = set()
    for seed in range(12):
        feeds = {spec.graph_name: weights[spec.tensor.name] for spec in manifest.weights}
        feeds |= {f"global.{name}": array for name, array in weights.items()}
        feeds |= {
            "input": row,
            "target": np.array([1]),
            "mask": np.ones(1, np.float32),
            "lr": np.array(1.0, np.float32),
            "mu": np.array(0.0, np.float32),
            "seed": np.array(seed),
        }
        (after,) = graph.run(["next.param.3.weight"], feeds)
        kept_in_graph = (np.abs(after - weights["3.weight"]).max(axis=0) > 0).tolist()
        model = ZOO["dropout"]().new_model()
        assert isinstance(model, nn.Sequential)
        with CounterRandomness(torch.tensor(seed)), torch.no_grad():
            kept_in_torch = (model[2](torch.ones(1, 8))[0] != 0).tolist()
        assert kept_in_graph == kept_in_torch
        seen.add(tuple(kept_in_graph))
    assert len(seen) > 6
