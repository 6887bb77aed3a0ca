"""Models and tasks that the compiler's tests share: one for each kind of layer it promises."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from fedge.coordinator.task import SGD, Adam, Task, accuracy, cross_entropy
from fedge.schemas.features import ClassTarget, ImageFeatures, TabularFeatures
from fedge.schemas.plan import TrainingDefaults


class Recurrent(nn.Module):
    """Three steps of eight numbers through a recurrent layer."""

    def __init__(self, layer: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.recurrent = layer(8, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.recurrent(x.view(-1, 3, 8))
        return self.head(outputs[:, -1])


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x.view(-1, 3, 8)).mean(dim=1))


class Tied(nn.Module):
    """The output layer uses the input layer's weights, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 5)
        self.output = nn.Linear(5, 12, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.embedding(x.long()).mean(dim=1))


class Frozen(nn.Module):
    """A backbone that is delivered and never trained, a constant table, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(24, 10).requires_grad_(False)
        self.register_buffer("offset", torch.linspace(-1.0, 1.0, 10))
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.backbone(x) + self.offset))


class Integers(nn.Module):
    """Divides whole numbers of both signs, beyond what float32 holds."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        whole = (x * 2**20).long() * 101
        floored = torch.div(whole, 7, rounding_mode="floor") + whole // -5
        cut = torch.div(whole, -13, rounding_mode="trunc")
        return self.head(((floored - cut) % 19).float() / 19)


def mobilenet_block() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.Hardswish(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 12, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2, inplace=True),
        nn.Linear(12, 3),
    )


def mixed_convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, dilation=2, padding=2),
        nn.GroupNorm(2, 6),
        nn.SiLU(),
        nn.Conv2d(6, 4, 3, groups=2, padding=1),
        nn.Mish(),
        nn.MaxPool2d(3, stride=1, padding=1),
        nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d((3, 2)),
        nn.Flatten(),
        nn.Linear(18, 3),
    )


def normalized_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(24, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
    )


def layer_norm_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(24, 8),
        nn.LayerNorm(8),
        nn.ELU(),
        nn.Linear(8, 8),
        nn.LeakyReLU(),
        nn.Linear(8, 3),
    )


def dropout_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 8), nn.Tanh(), nn.Dropout(0.25), nn.Linear(8, 3))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 8), nn.Sigmoid(), nn.Linear(8, 3))


def token_numbers(generator: np.random.Generator, count: int) -> np.ndarray:
    return generator.integers(0, 12, (count, 7))


def task_of(
    model: Callable[[], nn.Module],
    *,
    name: str = "test",
    optimizer: SGD | Adam | None = None,
    image: bool = False,
    tokens: bool = False,
    learning_rate: float = 0.05,
    **more: object,
) -> Task:
    """A task of three classes (twelve of tokens) around `model`."""
    features: ImageFeatures | TabularFeatures = TabularFeatures(columns=7 if tokens else 24)
    if image:
        features = ImageFeatures(height=12, width=12, mean=(0.5,), std=(0.3,))
    settings: dict[str, object] = {
        "loss": cross_entropy,
        "metrics": {"accuracy": accuracy},
        "defaults": TrainingDefaults(learning_rate=learning_rate),
        **more,
    }
    return Task(
        name=name,
        model=model,
        features=features,
        target=ClassTarget(classes=12 if tokens else 3),
        optimizer=optimizer or SGD(),
        sample=token_numbers if tokens else None,
        **settings,
    )


ZOO: dict[str, Callable[[], Task]] = {
    "mlp": lambda: task_of(mlp),
    "momentum": lambda: task_of(mlp, optimizer=SGD(momentum=0.9, weight_decay=0.01)),
    "nesterov": lambda: task_of(mlp, optimizer=SGD(momentum=0.9, nesterov=True)),
    "adam": lambda: task_of(mlp, optimizer=Adam(), learning_rate=0.01),
    "adam-decay": lambda: task_of(
        mlp, optimizer=Adam(betas=(0.8, 0.99), weight_decay=0.1), learning_rate=0.01
    ),
    "dropout": lambda: task_of(dropout_mlp),
    "batch-norm": lambda: task_of(normalized_mlp, optimizer=SGD(momentum=0.9)),
    "layer-norm": lambda: task_of(layer_norm_mlp, optimizer=Adam(), learning_rate=0.01),
    "lstm": lambda: task_of(lambda: Recurrent(nn.LSTM)),
    "gru": lambda: task_of(lambda: Recurrent(nn.GRU)),
    "rnn": lambda: task_of(lambda: Recurrent(nn.RNN)),
    "transformer": lambda: task_of(Transformer),
    "mobilenet": lambda: task_of(mobilenet_block, image=True),
    "convolutions": lambda: task_of(mixed_convolutions, image=True),
    "integers": lambda: task_of(Integers),
    "tied": lambda: task_of(Tied, tokens=True),
    "frozen": lambda: task_of(Frozen, optimizer=SGD(momentum=0.5, weight_decay=0.1)),
}
