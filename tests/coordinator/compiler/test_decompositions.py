"""Each gradient written out in ATen against what autograd computes, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fedge.coordinator.compiler.decompositions import TABLE
from fedge.coordinator.compiler.tracing import portable_operators

OWN = {
    str(operator)
    for operator, function in TABLE.items()
    if function.__module__.startswith("fedge.")
}


def uneven(shape: torch.Size) -> Tensor:
    """Weights for an output: a gradient of ones would hide wrong orders."""
    return torch.linspace(-1, 2, shape.numel(), dtype=torch.float64).view(shape)


def gradients(module: nn.Module, x: Tensor) -> Callable[..., list[Tensor]]:
    parameters = [x, *module.parameters()]
    weights = uneven(module(x).shape)

    def compute(*_: Tensor) -> list[Tensor]:
        loss = (module(x) * weights).sum()
        return list(torch.autograd.grad(loss, parameters, allow_unused=True))

    return compute


def check(module: nn.Module, x: Tensor, operator: str) -> None:
    """The traced, decomposed gradients equal autograd's, and `operator` is gone from the trace."""
    module = module.double()
    x = x.double().requires_grad_() if x.is_floating_point() else x
    compute = gradients(module, x)
    expected = compute()
    with portable_operators():
        whole = make_fx(compute)(x)
        traced = make_fx(compute, decomposition_table=TABLE)(x)
    names = {str(node.target) for node in whole.graph.nodes}
    assert operator in names, f"{operator} is not what this case traces to: {sorted(names)}"
    assert operator in OWN
    assert not OWN & {str(node.target) for node in traced.graph.nodes}
    for want, have in zip(expected, traced(x), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10)


CONVOLUTIONS = {
    "plain": (nn.Conv2d(3, 4, 3), (2, 3, 7, 7)),
    "same padding": (nn.Conv2d(3, 4, 5, padding="same"), (2, 3, 7, 6)),
    "stride that leaves a rest": (nn.Conv2d(2, 3, 3, stride=2), (2, 2, 8, 9)),
    "stride, dilation, padding": (
        nn.Conv2d(2, 3, 3, stride=2, dilation=2, padding=(1, 3)),
        (3, 2, 11, 9),
    ),
    "pointwise": (nn.Conv2d(5, 4, 1), (2, 5, 3, 3)),
    "pointwise with stride": (nn.Conv2d(5, 4, 1, stride=2), (2, 5, 5, 4)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 6, 6)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=1), (2, 4, 6, 5)),
    "depthwise, multiplier, stride, dilation": (
        nn.Conv2d(3, 6, 3, groups=3, stride=2, dilation=2, padding=2),
        (2, 3, 9, 8),
    ),
    "no bias": (nn.Conv2d(2, 3, 3, bias=False), (2, 2, 5, 5)),
    "one dimension": (nn.Conv1d(2, 3, 4, stride=3, padding=2), (2, 2, 10)),
    "three dimensions": (nn.Conv3d(2, 3, 2, stride=2), (2, 2, 5, 4, 4)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3), (2, 3, 5, 5)),
    "transposed with everything": (
        nn.ConvTranspose2d(4, 6, 3, stride=3, padding=1, output_padding=2, dilation=2, groups=2),
        (2, 4, 4, 5),
    ),
    "transposed depthwise": (nn.ConvTranspose2d(3, 3, 3, stride=2, groups=3), (2, 3, 4, 4)),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution_gradients(case: str) -> None:
    module, shape = CONVOLUTIONS[case]
    check(module, torch.randn(shape), "aten.convolution_backward.default")


MAX_POOLS = {
    "apart": nn.MaxPool2d(2),
    "rest": nn.MaxPool2d(3),
    "overlapping": nn.MaxPool2d(3, stride=2, padding=1),
    "dilated": nn.MaxPool2d(2, stride=2, dilation=2),
    "ceil": nn.MaxPool2d(2, ceil_mode=True),
}


@pytest.mark.parametrize("case", MAX_POOLS)
def test_max_pool_gradients(case: str) -> None:
    x = torch.randn(2, 3, 7, 8)
    check(MAX_POOLS[case], x, "aten.max_pool2d_with_indices_backward.default")


def test_max_pool_sends_the_gradient_of_a_tie_where_torch_does() -> None:
    x = torch.zeros(1, 1, 4, 4)
    check(nn.MaxPool2d(2), x, "aten.max_pool2d_with_indices_backward.default")


AVG_POOLS = {
    "apart": nn.AvgPool2d(2),
    "overlapping": nn.AvgPool2d(3, stride=2, padding=1),
    "without padding counted": nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
    "ceil": nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True),
    "divisor": nn.AvgPool2d(2, divisor_override=3),
}


@pytest.mark.parametrize("case", AVG_POOLS)
def test_average_pool_gradients(case: str) -> None:
    check(AVG_POOLS[case], torch.randn(2, 3, 7, 8), "aten.avg_pool2d_backward.default")


@pytest.mark.parametrize("size", [(3, 2), (5, 5), (7, 8), 4])
def test_adaptive_average_pool_gradients(size: int | tuple[int, int]) -> None:
    module = nn.AdaptiveAvgPool2d(size)
    check(module, torch.randn(2, 3, 7, 8), "aten._adaptive_avg_pool2d_backward.default")


NORMS = {
    "batch": (nn.BatchNorm2d(3), "aten.native_batch_norm_backward.default"),
    "batch, evaluation": (nn.BatchNorm2d(3).eval(), "aten.native_batch_norm_backward.default"),
    "batch, plain": (
        nn.BatchNorm2d(3, affine=False),
        "aten.native_batch_norm_backward.default",
    ),
    "batch, no statistics": (
        nn.BatchNorm2d(3, track_running_stats=False),
        "aten.native_batch_norm_backward.default",
    ),
    "layer": (nn.LayerNorm((4, 5)), "aten.native_layer_norm_backward.default"),
    "layer, plain": (
        nn.LayerNorm(5, elementwise_affine=False),
        "aten.native_layer_norm_backward.default",
    ),
}


@pytest.mark.parametrize("case", NORMS)
def test_norm_gradients(case: str) -> None:
    module, operator = NORMS[case]
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    check(module, torch.randn(6, 3, 4, 5), operator)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm_gradients(groups: int) -> None:
    module = nn.GroupNorm(groups, 6)
    nn.init.normal_(module.weight)
    check(module, torch.randn(3, 6, 4, 5), "aten.native_group_norm_backward.default")


@pytest.mark.parametrize(
    ("module", "operator"),
    [
        (nn.SiLU(), "aten.silu_backward.default"),
        (nn.Mish(), "aten.mish_backward.default"),
    ],
)
def test_activation_gradients(module: nn.Module, operator: str) -> None:
    check(module, torch.linspace(-6, 6, 40), operator)


@pytest.mark.parametrize(
    "module",
    [
        nn.Embedding(6, 4),
        nn.Embedding(6, 4, padding_idx=2),
        nn.Embedding(6, 4, scale_grad_by_freq=True),
    ],
)
def test_embedding_gradients_add_up_where_a_row_is_used_again(module: nn.Embedding) -> None:
    tokens = torch.tensor([[1, 2, 2], [5, 1, 1]])
    module = module.double()
    weight, weights = module.weight, uneven(torch.Size([2, 3, 4]))

    def compute(_: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((module(tokens) * weights).sum(), [weight]))

    expected = compute(tokens)
    traced = make_fx(compute, decomposition_table=TABLE)(tokens)
    assert not OWN & {str(node.target) for node in traced.graph.nodes}
    torch.testing.assert_close(traced(tokens), expected)


def test_one_row_leaves_the_running_variance_finite() -> None:
    """Torch refuses such a batch; a device's last batch may be one."""
    statistics = TABLE[torch.ops.aten._native_batch_norm_legit.default]
    mean, variance = torch.zeros(3), torch.ones(3)
    row = torch.tensor([[1.0, 2.0, 3.0]])
    statistics(row, None, None, mean, variance, True, 0.1, 1e-5)
    torch.testing.assert_close(mean, row[0] * 0.1)
    torch.testing.assert_close(variance, torch.full((3,), 0.9))
