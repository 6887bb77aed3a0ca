"""Training some layers only: which they are, and that the others might as well be frozen.

The reference is torch's own optimizer over the parameters that are trained, in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedge.edge_agent.engines.interface import check_train_graph
from fedge.edge_agent.engines.onnx_engine import OnnxEngine
from fedge.edge_agent.engines.onnx_partly_fixed import PartlyFixedEngine
from fedge.edge_agent.layers import fixed_weights, layers_of
from fedge.edge_agent.trainer.resumable import open_resumable
from fedge.schemas.errors import ConfigError
from fedge.schemas.plan import PlanManifest, WeightSpec
from fedge.schemas.tensor_spec import TensorSpec
from fedge.schemas.tensors import Array
from tests.coordinator.compiler.compiler_models import ZOO
from tests.edge_agent.compiled_plans import compiled, graphs_of, random_batch
from tests.edge_agent.plans import examples, initial_weights, linear_plan

STEPS = 25
RATE = 0.05

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "zoo:mlp": lambda own: torch.optim.SGD(own, RATE),
    "zoo:momentum": lambda own: torch.optim.SGD(own, RATE, momentum=0.9, weight_decay=0.01),
    "zoo:adam-decay": lambda own: torch.optim.Adam(own, RATE, betas=(0.8, 0.99), weight_decay=0.1),
}


def stepped(engine: OnnxEngine, manifest: PlanManifest, *, mu: float = 0.0) -> None:
    for step in range(STEPS):
        inputs, target = random_batch(manifest, 8, step)
        engine.step(inputs, target, np.ones(8, np.float32), lr=RATE, mu=mu, seed=step)


def in_torch(name: str, fixed: frozenset[str]) -> dict[str, Array]:
    """The weights after the same steps of a model whose `fixed` parameters want no gradient."""
    plan = compiled(name)
    model = ZOO[name.partition(":")[2]]().new_model().double()
    start = {key: torch.from_numpy(np.array(a)).double() for key, a in plan.initial_weights.items()}
    model.load_state_dict(start)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key not in fixed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[name](trained)
    for step in range(STEPS):
        inputs, target = random_batch(plan.manifest, 8, step)
        optimizer.zero_grad()
        output = model(torch.from_numpy(inputs).double())
        functional.cross_entropy(output, torch.from_numpy(target)).backward()
        optimizer.step()
    return {key: tensor.numpy() for key, tensor in model.state_dict().items()}


# Compiling a plan takes seconds; momentum and Adam keep something of each step.
PLANS = [
    pytest.param(name, marks=pytest.mark.e2e) if name == "zoo:mlp" else name for name in OPTIMIZERS
]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("layers", [1, ("0.*",), ("*.bias",)], ids=str)
def test_training_some_layers_is_torch_s_training_with_the_others_frozen(name, layers):
    manifest, train_graph, _ = graphs_of(compiled(name))
    start = compiled(name).initial_weights
    fixed = fixed_weights(manifest, layers)
    assert 0 < len(fixed) < 4
    engine = PartlyFixedEngine(manifest, train_graph, fixed)
    engine.load(start)
    stepped(engine, manifest)
    found, expected = engine.weights(), in_torch(name, fixed)
    for key, tensor in found.items():
        if key in fixed:
            assert tensor.tobytes() == np.asarray(start[key]).tobytes()
        else:
            assert np.abs(tensor - start[key]).max() > 1e-3
            np.testing.assert_allclose(tensor, expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*PLANS, "zoo:batch-norm"])
def test_it_is_putting_the_fixed_layers_back_after_each_step_bit_for_bit(name):
    manifest, train_graph, _ = graphs_of(compiled(name))
    start = compiled(name).initial_weights
    fixed = fixed_weights(manifest, 1)
    engine = PartlyFixedEngine(manifest, train_graph, fixed)
    again = open_resumable(manifest, train_graph, threads=1)
    graph_names = {w.graph_name: w.tensor.name for w in manifest.weights}
    for one in (engine, again):
        one.load(start)
    for step in range(STEPS):
        inputs, target = random_batch(manifest, 8, step)
        for one in (engine, again):
            one.step(inputs, target, np.ones(8, np.float32), lr=RATE, mu=0.1, seed=step)
        position = again.position()
        for key in position:
            if graph_names.get(key) in fixed:
                position[key] = np.asarray(start[graph_names[key]])
        again.put_back(position)
    expected = again.weights()
    for key, tensor in engine.weights().items():
        assert tensor.tobytes() == expected[key].tobytes(), key


def test_an_engine_that_fixes_nothing_is_the_engine_of_a_round():
    manifest, train_graph, _ = graphs_of(compiled("zoo:momentum"))
    start = compiled("zoo:momentum").initial_weights
    both = [PartlyFixedEngine(manifest, train_graph, ()), OnnxEngine(manifest, train_graph, None)]
    for engine in both:
        engine.load(start)
        stepped(engine, manifest, mu=0.1)
    personal, rounds = (engine.weights() for engine in both)
    assert all(personal[key].tobytes() == rounds[key].tobytes() for key in rounds)


def test_another_load_begins_anew_with_the_same_layers_fixed():
    plan = linear_plan()
    check_train_graph(plan.manifest, plan.train)
    engine = PartlyFixedEngine(plan.manifest, plan.train, {"w", "input_sum"})
    x, y = examples(8)
    for seed in range(2):
        weights = initial_weights(seed)
        engine.load(weights)
        for step in range(3):
            engine.step(x, y, np.ones(8, np.float32), lr=0.1, mu=0.0, seed=step)
        found = engine.weights()
        assert found["w"].tobytes() == weights["w"].tobytes()
        assert found["input_sum"].tobytes() == weights["input_sum"].tobytes()
        assert found["b"].tobytes() != weights["b"].tobytes()


# ---------------------------------------------------------------- which layers


def specs(*names: str, **roles: str) -> tuple[WeightSpec, ...]:
    return tuple(
        WeightSpec(
            tensor=TensorSpec(name=name, dtype="float32", shape=(2,)),
            role=roles.get(name.replace(".", "_"), "parameter"),
        )
        for name in names
    )


def with_weights(*names: str, **roles: str) -> PlanManifest:
    return linear_plan().manifest.model_copy(update={"weights": specs(*names, **roles)})


MANIFEST = with_weights(
    *("stem.weight", "stem.bias", "norm.weight", "backbone.weight", "head.weight", "head.bias"),
    *("norm.running_mean", "statistics.seen"),
    backbone_weight="frozen",
    norm_running_mean="buffer",
    statistics_seen="buffer",
)


def test_a_layer_is_what_one_module_holds_in_the_order_of_the_parameters():
    found = {layer.name: [w.tensor.name for w in layer.weights] for layer in layers_of(MANIFEST)}
    assert found == {
        "stem": ["stem.weight", "stem.bias"],
        "norm": ["norm.weight", "norm.running_mean"],
        "head": ["head.weight", "head.bias"],
    }
    assert [layer.parameter_count for layer in layers_of(MANIFEST)] == [4, 2, 4]


@pytest.mark.parametrize(
    ("layers", "trained"),
    [
        ("all", {"stem.weight", "stem.bias", "norm.weight", "norm.running_mean", "head.weight",
                 "head.bias", "statistics.seen"}),
        (1, {"head.weight", "head.bias"}),
        (2, {"norm.weight", "norm.running_mean", "head.weight", "head.bias"}),
        (("*.bias",), {"stem.bias", "head.bias"}),
        (("head.*", "norm.*"), {"head.weight", "head.bias", "norm.weight", "norm.running_mean"}),
    ],
)  # fmt: skip
def test_the_layers_that_are_trained_are_the_last_ones_or_those_named(layers, trained):
    moving = {w.tensor.name for w in MANIFEST.weights if w.role != "frozen"}
    assert moving - fixed_weights(MANIFEST, layers) == trained


def test_all_layers_by_number_are_all_of_it():
    for layers in (3, 100):
        assert fixed_weights(MANIFEST, layers) == fixed_weights(MANIFEST, "all")


@pytest.mark.parametrize("layers", [("hed.*",), ("backbone.*",), ("norm.running_mean",)])
def test_layers_without_a_parameter_are_refused_with_the_names_that_there_are(layers):
    with pytest.raises(ConfigError, match=r"matches no parameter.*stem\.weight.*head\.bias"):
        fixed_weights(MANIFEST, layers)
