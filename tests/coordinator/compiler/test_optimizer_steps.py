"""The optimizers written as tensor maths against `torch.optim`, in float64, for fifty steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedge.coordinator.compiler.optimizers import apply_gradients, initial_state
from fedge.coordinator.task import SGD, Adam
from fedge.schemas.errors import ConfigError

RULES = [
    SGD(),
    SGD(weight_decay=0.1),
    SGD(momentum=0.9),
    SGD(momentum=0.8, weight_decay=0.05, nesterov=True),
    Adam(),
    Adam(betas=(0.5, 0.9), eps=1e-3, weight_decay=0.1),
]


def zero_state(
    optimizer: SGD | Adam, parameters: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of `initial_state`, in the dtype of the parameters."""
    dtype = next(iter(parameters.values())).dtype
    return {
        spec.tensor.name: torch.full(spec.tensor.shape, spec.fill, dtype=dtype)
        for spec in initial_state(optimizer, parameters)
    }


def torch_optimizer(rule: SGD | Adam, parameters: list[Tensor]) -> torch.optim.Optimizer:
    if isinstance(rule, SGD):
        return torch.optim.SGD(
            parameters,
            lr=0.05,
            momentum=rule.momentum,
            weight_decay=rule.weight_decay,
            nesterov=rule.nesterov,
        )
    return torch.optim.Adam(
        parameters, lr=0.05, betas=rule.betas, eps=rule.eps, weight_decay=rule.weight_decay
    )


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_fifty_steps_equal_torch(rule: SGD | Adam) -> None:
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(4, 3, generator=generator).double() for name in ("used", "unused")}
    reference = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    optimizer = torch_optimizer(rule, list(reference.values()))
    parameters, state = dict(start), zero_state(rule, start)
    for _ in range(50):
        gradient = torch.randn(4, 3, generator=generator).double()
        reference["used"].grad = gradient
        optimizer.step()
        parameters, state = apply_gradients(
            rule, parameters, {"used": gradient}, state, torch.tensor(0.05).double()
        )
    torch.testing.assert_close(parameters["used"], reference["used"].detach(), rtol=1e-7, atol=1e-7)
    assert torch.equal(parameters["unused"], start["unused"])


@pytest.mark.parametrize("gradient_size", [1e-9, 1e-12])
def test_adam_s_epsilon_counts_for_tiny_gradients(gradient_size: float) -> None:
    """With a gradient far below epsilon the step is lr·g/eps, not lr: by hand, ε not deleted."""
    start = {"w": torch.zeros(1)}
    rule = Adam(eps=1e-8)
    after, _ = apply_gradients(
        rule,
        start,
        {"w": torch.tensor([gradient_size])},
        zero_state(rule, start),
        torch.tensor(1.0),
    )
    expected = -gradient_size / (gradient_size + 1e-8)
    torch.testing.assert_close(after["w"], torch.tensor([expected]), rtol=1e-3, atol=0.0)


def test_bias_correction_stays_exact_in_float32() -> None:
    """After 1,000 steps 1 - 0.999^1000, to float32's own precision."""
    rule, parameters = Adam(), {"w": torch.zeros(1)}
    state = zero_state(rule, parameters)
    for _ in range(1000):
        parameters, state = apply_gradients(
            rule, parameters, {"w": torch.zeros(1)}, state, torch.tensor(0.1)
        )
    assert abs(float(state["bias_correction2"]) - (1 - 0.999**1000)) < 1e-5


def test_the_state_is_what_the_rule_needs() -> None:
    parameters = {"w": torch.zeros(2, 3)}
    assert initial_state(SGD(), parameters) == []
    momentum = initial_state(SGD(momentum=0.9), parameters)
    assert [(one.tensor.name, one.tensor.shape) for one in momentum] == [("momentum.w", (2, 3))]
    names = [one.tensor.name for one in initial_state(Adam(), parameters)]
    assert names == ["exp_avg.w", "exp_avg_sq.w", "bias_correction1", "bias_correction2"]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: SGD(momentum=1.0),
        lambda: SGD(weight_decay=-1.0),
        lambda: SGD(nesterov=True),
        lambda: Adam(betas=(0.9, 1.0)),
        lambda: Adam(eps=0.0),
        lambda: Adam(weight_decay=-0.1),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: object) -> None:
    assert callable(wrong)
    with pytest.raises(ConfigError):
        wrong()
