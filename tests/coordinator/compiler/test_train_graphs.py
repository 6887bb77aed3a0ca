"""The train graph in onnxruntime, step by step: padding, FedProx, batch norm, frozen, tied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from compiler_models import ZOO, Frozen, Tied, normalized_mlp, token_numbers
from torch.nn import functional

from fedge.coordinator.compiler import CompiledPlan
from fedge.coordinator.compiler.verification import session
from fedge.schemas.plan import Padding

PlanOf = Callable[[str], CompiledPlan]
Arrays = dict[str, np.ndarray]


def start(plan: CompiledPlan, **given: Any) -> Arrays:
    """The inputs of a first step; scalars and arrays of `given` replace the defaults."""
    weights, manifest = plan.initial_weights, plan.manifest
    feeds = {spec.graph_name: weights[spec.tensor.name] for spec in manifest.weights}
    for spec in manifest.weights:
        if spec.role == "parameter":
            feeds[f"global.{spec.tensor.name}"] = weights[spec.tensor.name]
    for state in manifest.state:
        feeds[f"state.{state.tensor.name}"] = np.zeros(state.tensor.shape, np.float32)
    feeds |= {
        "lr": np.array(0.1, np.float32),
        "mu": np.array(0.0, np.float32),
        "seed": np.array(0),
    }
    return feeds | {name: np.asarray(value) for name, value in given.items()}


def rows(count: int, *, seed: int = 0) -> Arrays:
    generator = np.random.default_rng(seed)
    return {
        "input": generator.standard_normal((count, 24)).astype(np.float32),
        "target": generator.integers(0, 3, count),
        "mask": np.ones(count, np.float32),
    }


def step(plan: CompiledPlan, feeds: Mapping[str, np.ndarray]) -> Arrays:
    runtime = session(plan.blobs[plan.manifest.graphs.train.sha256])
    names = [output.name for output in runtime.get_outputs()]
    return dict(zip(names, runtime.run(None, dict(feeds)), strict=True))


@pytest.mark.parametrize("name", ["mlp", "adam", "dropout", "lstm", "transformer", "layer-norm"])
@pytest.mark.parametrize("padding", ["zeros", "other examples"])
def test_a_padded_batch_steps_like_the_bare_one(plan_of: PlanOf, name: str, padding: str) -> None:
    plan = plan_of(name)
    assert plan.manifest.padding is Padding.MASK
    bare, more = rows(5), rows(3, seed=1)
    filler = more if padding == "other examples" else {k: v * 0 for k, v in more.items()}
    padded = {key: np.concatenate([bare[key], filler[key]]) for key in bare}
    padded["mask"][5:] = 0
    expected, actual = step(plan, start(plan, **bare)), step(plan, start(plan, **padded))
    for key, want in expected.items():
        np.testing.assert_allclose(actual[key], want, rtol=1e-4, atol=1e-6, err_msg=key)


def test_a_batch_of_padding_alone_changes_nothing(plan_of: PlanOf) -> None:
    plan = plan_of("mlp")
    empty = rows(4) | {"mask": np.zeros(4, np.float32)}
    after = step(plan, start(plan, **empty))
    assert after["loss"] == 0
    for name, before in plan.initial_weights.items():
        np.testing.assert_array_equal(after[f"next.param.{name}"], before)


def test_the_loss_is_the_mean_and_the_metric_the_sum_of_what_counts(plan_of: PlanOf) -> None:
    plan = plan_of("mlp")
    batch = rows(6) | {"mask": np.array([1, 1, 0, 1, 0, 0], np.float32)}
    after = step(plan, start(plan, **batch))
    model = ZOO["mlp"]().new_model()
    valid = batch["mask"] == 1
    output = model(torch.from_numpy(batch["input"][valid]))
    target = torch.from_numpy(batch["target"][valid])
    assert after["loss"] == pytest.approx(functional.cross_entropy(output, target).item(), rel=1e-5)
    assert after["metric.accuracy"] == (output.argmax(1) == target).sum().item()


def test_the_proximal_term_pulls_by_mu_times_the_distance(plan_of: PlanOf) -> None:
    """By hand: with and without mu, two steps differ by lr · mu · (w - w_global) alone."""
    plan = plan_of("mlp")
    away = {
        f"global.{name}": array + np.float32(0.25) for name, array in plan.initial_weights.items()
    }
    without = step(plan, start(plan, **rows(4), **away))
    with_mu = step(plan, start(plan, **rows(4), **away, mu=np.float32(0.4)))
    assert with_mu["loss"] == without["loss"]
    for name in plan.initial_weights:
        pull = with_mu[f"next.param.{name}"] - without[f"next.param.{name}"]
        np.testing.assert_allclose(pull, 0.1 * 0.4 * 0.25, rtol=1e-4, atol=1e-7)


def test_batch_norm_s_buffers_follow_torch(plan_of: PlanOf) -> None:
    plan = plan_of("batch-norm")
    assert plan.manifest.padding is Padding.EXACT
    roles = {spec.tensor.name: spec.role for spec in plan.manifest.weights}
    assert roles["1.running_mean"] == roles["1.running_var"] == "buffer"
    assert roles["1.num_batches_tracked"] == "buffer"
    updated = {spec.name for spec in plan.manifest.update_specs}
    assert "1.running_mean" in updated
    assert "1.num_batches_tracked" not in updated

    feeds = start(plan)
    task = ZOO["batch-norm"]()
    model = task.new_model().train()
    for seed in range(3):
        batch = rows(5, seed=seed)
        after = step(plan, feeds | batch | {"lr": np.array(1e-9, np.float32)})
        feeds |= {
            key.removeprefix("next."): value
            for key, value in after.items()
            if key.startswith("next.")
        }
        model(torch.from_numpy(batch["input"]))
    for name, buffer in model.named_buffers():
        np.testing.assert_allclose(feeds[f"buffer.{name}"], buffer.numpy(), rtol=1e-5, atol=1e-7)
    assert feeds["buffer.1.num_batches_tracked"] == 3


def test_batch_norm_takes_a_last_batch_of_one_row(plan_of: PlanOf) -> None:
    plan = plan_of("batch-norm")
    after = step(plan, start(plan, **rows(1)))
    for name, value in after.items():
        assert np.isfinite(value).all(), name


def test_frozen_and_unused_tensors_are_inputs_and_stay_as_they_are(plan_of: PlanOf) -> None:
    plan = plan_of("frozen")
    roles = {spec.tensor.name: spec.role for spec in plan.manifest.weights}
    assert roles == {
        "backbone.weight": "frozen",
        "backbone.bias": "frozen",
        "offset": "frozen",
        "unused.weight": "parameter",
        "unused.bias": "parameter",
        "head.weight": "parameter",
        "head.bias": "parameter",
    }
    assert {spec.name for spec in plan.manifest.update_specs} == {
        name for name, role in roles.items() if role == "parameter"
    }
    after = step(plan, start(plan, **rows(4)))
    assert "next.param.backbone.weight" not in after
    # Weight decay touches no parameter that the loss does not depend on: as in torch.
    for name in ("unused.weight", "unused.bias"):
        np.testing.assert_array_equal(after[f"next.param.{name}"], plan.initial_weights[name])
    assert np.abs(after["next.param.head.weight"] - plan.initial_weights["head.weight"]).max() > 0
    assert isinstance(ZOO["frozen"]().new_model(), Frozen)


def test_a_tied_weight_is_one_tensor_with_both_gradients(plan_of: PlanOf) -> None:
    plan = plan_of("tied")
    assert [spec.tensor.name for spec in plan.manifest.weights] == ["embedding.weight"]
    tokens = token_numbers(np.random.default_rng(0), 4).astype(np.float32)
    target = np.array([1, 5, 11, 0])
    after = step(plan, start(plan, input=tokens, target=target, mask=np.ones(4, np.float32)))
    model = ZOO["tied"]().new_model()
    assert isinstance(model, Tied)
    loss = functional.cross_entropy(model(torch.from_numpy(tokens)), torch.from_numpy(target))
    loss.backward()
    weight = model.embedding.weight
    assert weight.grad is not None
    np.testing.assert_allclose(
        after["next.param.embedding.weight"],
        (weight - 0.1 * weight.grad).detach().numpy(),
        rtol=1e-5,
        atol=1e-7,
    )


def test_a_batch_may_have_any_size(plan_of: PlanOf) -> None:
    for count in (1, 2, 7, 33):
        after = step(plan_of("mlp"), start(plan_of("mlp"), **rows(count)))
        assert np.isfinite(after["loss"])


def test_the_task_s_own_model_is_not_changed_by_compiling(plan_of: PlanOf) -> None:
    plan = plan_of("batch-norm")
    model = ZOO["batch-norm"]().new_model()
    assert type(model) is type(normalized_mlp())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        np.testing.assert_array_equal(plan.initial_weights[name], tensor.detach().numpy())
