"""Models that no plan can hold: the finding names the module, the operator and a way out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compiler_models import mlp, task_of
from torch import Tensor, nn
from torch.nn import functional

from fedge.coordinator.compiler import compile_task
from fedge.coordinator.task import Task
from fedge.schemas.errors import ConfigError, UnsupportedModel


class Within(nn.Module):
    """`encoder.culprit` does something to the hidden numbers."""

    def __init__(self, culprit: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Sequential()
        self.encoder.add_module("first", nn.Linear(24, 8))
        self.encoder.add_module("culprit", culprit)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Repeat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().max())):
            x = x / 2
        return x


class Fourier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x).real


class ErrorFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.erfinv(x.tanh() / 2)


class Inverse(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.linalg.inv(torch.eye(8) + x.t() @ x)


class Selected(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x[x > 0].sum()


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.ones(int(x.shape[0]), 8).cumsum(0) / len(x)


class Numpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_numpy(x.detach().numpy() * 2)


class Growing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "scale"):
            self.scale = nn.Parameter(torch.ones(8))
        return x * self.scale


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain.float()


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(x.view(-1, 3, 8).transpose(0, 1))[0]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(x), x


def within(culprit: type[nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Within(culprit())


@pytest.mark.parametrize(
    ("model", "module", "operator", "advice"),
    [
        (within(Branch), "encoder.culprit (Branch)", "aten.", "torch.where"),
        (within(Repeat), "encoder.culprit (Repeat)", "aten._local_scalar_dense", "torch.where"),
        (within(Selected), "encoder.culprit (Selected)", "aten.", "torch.where"),
        (within(Fourier), "encoder.culprit (Fourier)", "aten._fft", "real tensors"),
        (within(ErrorFunction), "encoder.culprit (ErrorFunction)", "aten.erfinv", "elementary"),
        (within(Inverse), "encoder.culprit (Inverse)", "aten.linalg_inv", "elementary"),
        (within(Numpy), "encoder.culprit (Numpy)", "", "torch operations"),
        (within(Growing), "", "", "in __init__"),
        (within(Double), "encoder.culprit (Double)", "", "float32"),
        (within(FixedBatch), "", "", "batch's size"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "0 (LazyLinear)", "", "Lazy"),
        (lambda: nn.Linear(20, 3), "(the model itself) (Linear)", "aten.", "elementary"),
        (TimeFirst, "(the model itself)", "", "batch_first=True"),
        (Pair, "(the model itself)", "", "one tensor"),
        (lambda: mlp().requires_grad_(False), "(the model itself)", "", "requires_grad=True"),
    ],
)
def test_the_finding_names_module_operator_and_advice(
    model: Callable[[], nn.Module], module: str, operator: str, advice: str
) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        compile_task(task_of(model))
    assert module in caught.value.module
    assert operator in caught.value.operator
    assert advice in caught.value.advice
    assert caught.value.module in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"loss": functional.cross_entropy}, 'reduction="none"'),
        (
            {"loss": lambda o, t: (o - functional.one_hot(t, 3)).square()},
            "flatten(1)",
        ),
        ({"loss": lambda o, t: (o.argmax(1) == t).float()}, "differentiable"),
        ({"metrics": {"mean": lambda o, t: o.mean()}}, 'reduction="none"'),
        ({"metrics": {"none": lambda o, t: 1.0}}, "first"),
    ],
)
def test_a_wrong_loss_or_metric_is_explained(changes: dict[str, object], advice: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        compile_task(task_of(mlp, **changes))
    assert advice in caught.value.advice


def test_a_model_that_is_no_model_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigError, match=r"no argument and returns an nn\.Module"):
        compile_task(task_of(lambda: 3))  # type: ignore[arg-type,return-value]


def test_a_sample_of_the_wrong_size_is_a_wrong_setting() -> None:
    task: Task = task_of(mlp)
    wrong = Task(
        name="wrong",
        model=task.model,
        loss=task.loss,
        features=task.features,
        target=task.target,
        sample=lambda generator, count: generator.standard_normal((3, 24)),
    )
    with pytest.raises(ConfigError, match="sample of task 'wrong'"):
        compile_task(wrong)
