from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from fedge.coordinator.server_optimizer import (
    AdagradConfig,
    AdamConfig,
    ServerOptimizerConfig,
    SgdConfig,
    server_optimizer,
)
from fedge.schemas.errors import ConfigError
from fedge.schemas.plan import WeightSpec
from fedge.schemas.tensor_spec import TensorSpec
from fedge.schemas.tensors import encode_tensors, read_tensors


def spec(name, dtype="float32", shape=(1,), role="parameter"):
    return WeightSpec(tensor=TensorSpec(name=name, dtype=dtype, shape=shape), role=role)


def one(value):
    return {"w": np.array([value], np.float32)}


ONE = (spec("w"),)
ALL = [
    SgdConfig(),
    SgdConfig(learning_rate=0.5, momentum=0.9),
    AdamConfig(name="adam", learning_rate=0.02),
    AdamConfig(name="yogi", learning_rate=0.02),
    AdagradConfig(name="adagrad", learning_rate=0.02, beta1=0.5),
]


def test_federated_averaging_adds_the_mean_difference():
    fedavg = server_optimizer(SgdConfig(), ONE)
    weights, state = fedavg.apply(one(1.5), one(-0.25), fedavg.init())
    assert weights["w"].tolist() == [1.25]
    assert state == {} == fedavg.init()


def test_momentum_carries_half_of_the_last_step():
    fedavgm = server_optimizer(SgdConfig(momentum=0.5), ONE)
    weights, state = fedavgm.apply(one(0.0), one(1.0), fedavgm.init())
    weights, state = fedavgm.apply(weights, one(1.0), state)
    weights, state = fedavgm.apply(weights, one(0.0), state)
    # Steps of 1, 1.5 and 0.75.
    assert weights["w"].tolist() == [3.25]
    assert state["velocity.w"].tolist() == [0.75]


def test_one_step_of_adam_worked_by_hand():
    adam = server_optimizer(
        AdamConfig(name="adam", learning_rate=0.1, beta1=0.5, beta2=0.75, tau=0.5), ONE
    )
    weights, state = adam.apply(one(1.0), one(1.0), adam.init())
    # m = 0.5; v = 0.75*0.25 + 0.25*1 = 0.4375; step = 0.1*0.5 / (sqrt(0.4375) + 0.5)
    assert state["first.w"].tolist() == [0.5]
    assert state["second.w"].tolist() == [0.4375]
    assert weights["w"][0] == pytest.approx(1 + 0.05 / (math.sqrt(0.4375) + 0.5), rel=1e-7)


def test_yogi_moves_its_second_moment_by_the_square_and_adam_by_the_distance():
    kwargs = {"learning_rate": 0.1, "beta2": 0.75, "tau": 1.0}
    moments = {}
    for name in ("adam", "yogi"):
        optimizer = server_optimizer(AdamConfig(name=name, **kwargs), ONE)
        _, state = optimizer.apply(one(0.0), one(0.5), optimizer.init())
        moments[name] = state["second.w"].tolist()
    # Δ² = 0.25 below v = 1: Adam falls by a quarter of 0.75, Yogi by a quarter of 0.25.
    assert moments == {"adam": [0.8125], "yogi": [0.9375]}


def reference(config, start, deltas):
    """Algorithm 2 of Reddi et al. 2021, one number at a time, with lists and math."""
    weights = list(start)
    first = [0.0] * len(start)
    second = [getattr(config, "tau", 0.0) ** 2] * len(start)
    for delta in deltas:
        for i, d in enumerate(delta):
            if config.name == "sgd":
                first[i] = config.momentum * first[i] + d
                weights[i] += config.learning_rate * first[i]
                continue
            first[i] = config.beta1 * first[i] + (1 - config.beta1) * d
            if config.name == "adagrad":
                second[i] += d * d
            elif config.name == "adam":
                second[i] = config.beta2 * second[i] + (1 - config.beta2) * d * d
            elif second[i] > d * d:
                second[i] -= (1 - config.beta2) * d * d
            elif second[i] < d * d:
                second[i] += (1 - config.beta2) * d * d
            weights[i] += config.learning_rate * first[i] / (math.sqrt(second[i]) + config.tau)
    return weights


@pytest.mark.parametrize("config", ALL, ids=lambda config: config.name)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rounds=st.integers(1, 12))
def test_every_optimizer_follows_the_paper(config, seed, rounds):
    rng = np.random.default_rng(seed)
    start = rng.normal(size=6).astype(np.float32)
    deltas = rng.normal(scale=0.05, size=(rounds, 6)).astype(np.float32)
    optimizer = server_optimizer(config, (spec("w", shape=(2, 3)),))
    weights, state = {"w": start.reshape(2, 3)}, optimizer.init()
    for delta in deltas:
        weights, state = optimizer.apply(weights, {"w": delta.reshape(2, 3)}, state)
    expected = reference(config, start.tolist(), deltas.tolist())
    np.testing.assert_allclose(weights["w"].ravel(), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("config", "make"),
    [
        (
            SgdConfig(learning_rate=0.5, momentum=0.9),
            lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
        ),
        (
            AdagradConfig(name="adagrad", learning_rate=0.1, tau=1e-2),
            lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=1e-4, eps=1e-2),
        ),
    ],
    ids=["sgd", "adagrad"],
)
def test_where_torch_has_the_same_optimizer_it_agrees(config, make):
    rng = np.random.default_rng(11)
    start = rng.normal(size=50).astype(np.float32)
    parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
    theirs = make([parameter])
    ours = server_optimizer(config, (spec("w", shape=(50,)),))
    weights, state = {"w": start}, ours.init()
    for _ in range(20):
        delta = rng.normal(scale=0.1, size=50).astype(np.float32)
        parameter.grad = torch.from_numpy(-delta)
        theirs.step()
        weights, state = ours.apply(weights, {"w": delta}, state)
    np.testing.assert_allclose(weights["w"], parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", ALL, ids=lambda config: config.name)
def test_a_restart_between_rounds_changes_nothing(config, tmp_path):
    specs = (spec("w", shape=(4,)), spec("scale", shape=()))
    optimizer = server_optimizer(config, specs)
    rng = np.random.default_rng(5)
    start = {s.tensor.name: np.ones(s.tensor.shape, np.float32) for s in specs}
    deltas = [
        {s.tensor.name: rng.normal(size=s.tensor.shape).astype(np.float32) for s in specs}
        for _ in range(4)
    ]

    def run(restart):
        weights, state = start, optimizer.init()
        for delta in deltas:
            weights, state = optimizer.apply(weights, delta, state)
            if restart:
                for name, tensors in (("weights", weights), ("state", state)):
                    (tmp_path / name).write_bytes(encode_tensors(tensors))
                weights = read_tensors(tmp_path / "weights", [s.tensor for s in specs])
                state = read_tensors(tmp_path / "state", optimizer.state_specs)
        return encode_tensors(weights), encode_tensors(state)

    assert run(restart=True) == run(restart=False)


@pytest.mark.parametrize("config", ALL, ids=lambda config: config.name)
def test_buffers_are_averaged_and_counters_and_frozen_tensors_stay(config):
    specs = (
        spec("w"),
        spec("running_mean", role="buffer"),
        spec("batches", dtype="int64", shape=(), role="buffer"),
        spec("embedding", role="frozen"),
    )
    optimizer = server_optimizer(config, specs)
    weights = one(1.0) | {
        "running_mean": np.array([2.0], np.float32),
        "batches": np.array(7, np.int64),
        "embedding": np.array([3.0], np.float32),
    }
    delta = one(0.5) | {"running_mean": np.array([0.25], np.float32)}
    new, state = optimizer.apply(weights, delta, optimizer.init())
    assert new["running_mean"].tolist() == [2.25]
    assert new["batches"] == 7
    assert new["batches"].dtype == np.int64
    assert new["embedding"].tolist() == [3.0]
    assert list(new) == ["w", "running_mean", "batches", "embedding"]
    assert all(name.endswith(".w") for name in state)


@pytest.mark.parametrize("config", ALL, ids=lambda config: config.name)
def test_apply_leaves_its_arguments_alone(config):
    optimizer = server_optimizer(config, ONE)
    weights, delta, state = one(1.0), one(0.5), optimizer.init()
    before = [encode_tensors(tensors) for tensors in (weights, delta, state)]
    optimizer.apply(weights, delta, state)
    assert [encode_tensors(tensors) for tensors in (weights, delta, state)] == before


def test_the_state_of_another_optimizer_is_refused():
    adam = server_optimizer(AdamConfig(name="adam"), ONE)
    fedavg = server_optimizer(SgdConfig(), ONE)
    with pytest.raises(ConfigError, match="not this server optimizer's"):
        fedavg.apply(one(1.0), one(0.5), adam.init())
    with pytest.raises(ConfigError, match="missing"):
        adam.apply(one(1.0), one(0.5), fedavg.init())


def test_a_setting_that_the_named_optimizer_does_not_have_is_refused():
    parse = TypeAdapter(ServerOptimizerConfig).validate_python
    assert parse({"name": "yogi", "tau": 0.01}) == AdamConfig(name="yogi", tau=0.01)
    assert parse({"name": "sgd"}) == SgdConfig(learning_rate=1.0, momentum=0.0)
    for wrong in (
        {"name": "sgd", "beta1": 0.9},
        {"name": "adam", "momentum": 0.9},
        {"name": "lion"},
        {"name": "sgd", "learning_rate": 0.0},
        {"name": "sgd", "momentum": 1.0},
    ):
        with pytest.raises(ValidationError):
            parse(wrong)
