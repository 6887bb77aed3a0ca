"""Four tasks on MNIST (LeCun et al. 1998), from an MLP to the net of the FedAvg paper.

`mnist-2nn` and `mnist-fedavg-cnn` are the two models of McMahan et al. 2017, section 3, with its
parameter counts. `mnist-mlp` and `mnist-cnn` are the nets that MNIST tutorials use.
"""

from __future__ import annotations

from torch import nn

from fedge.coordinator.task import (
    SimulationDefaults,
    Task,
    accuracy,
    cross_entropy,
    negative_log_likelihood,
)
from fedge.schemas.features import ClassTarget, ImageFeatures
from fedge.schemas.plan import TrainingDefaults

_MEAN, _STD = (0.1307,), (0.3081,)
"""Of the 60,000 training images, in units of the full range."""


def _images(*, flat: bool) -> ImageFeatures:
    return ImageFeatures(height=28, width=28, mean=_MEAN, std=_STD, flat=flat)


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 512),
        nn.ReLU(),
        nn.Linear(512, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
        nn.LogSoftmax(dim=1),
    )


def mnist_mlp() -> Task:
    """784-512-256-10 on two devices: 535,818 parameters."""
    return Task(
        name="mnist-mlp",
        model=_mlp,
        loss=negative_log_likelihood,
        features=_images(flat=True),
        target=ClassTarget(classes=10),
        metrics={"accuracy": accuracy},
        defaults=TrainingDefaults(batch_size=32, learning_rate=0.001),
        simulation=SimulationDefaults(data="mnist", devices=2, rounds=10),
    )


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 20, kernel_size=5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(20, 50, kernel_size=5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 4 * 50, 500),
        nn.ReLU(),
        nn.Linear(500, 10),
        nn.LogSoftmax(dim=1),
    )


def mnist_cnn() -> Task:
    """Two convolutions and two linear layers on four devices: 431,080 parameters."""
    return Task(
        name="mnist-cnn",
        model=_cnn,
        loss=negative_log_likelihood,
        features=_images(flat=False),
        target=ClassTarget(classes=10),
        metrics={"accuracy": accuracy},
        defaults=TrainingDefaults(batch_size=64, learning_rate=0.01),
        simulation=SimulationDefaults(data="mnist", devices=4, rounds=10),
    )


def _two_hidden_layers() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 200),
        nn.ReLU(),
        nn.Linear(200, 200),
        nn.ReLU(),
        nn.Linear(200, 10),
    )


def mnist_2nn() -> Task:
    """The "2NN" of McMahan et al. 2017: 199,210 parameters."""
    return Task(
        name="mnist-2nn",
        model=_two_hidden_layers,
        loss=cross_entropy,
        features=_images(flat=True),
        target=ClassTarget(classes=10),
        metrics={"accuracy": accuracy},
        defaults=TrainingDefaults(batch_size=10, learning_rate=0.1),
        simulation=SimulationDefaults(data="mnist", devices=10, rounds=10),
    )


def _fedavg_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=5, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, kernel_size=5, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(7 * 7 * 64, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )


def mnist_fedavg_cnn() -> Task:
    """The CNN of McMahan et al. 2017: 1,663,370 parameters."""
    return Task(
        name="mnist-fedavg-cnn",
        model=_fedavg_cnn,
        loss=cross_entropy,
        features=_images(flat=False),
        target=ClassTarget(classes=10),
        metrics={"accuracy": accuracy},
        defaults=TrainingDefaults(batch_size=10, learning_rate=0.1, local_epochs=5),
        simulation=SimulationDefaults(data="mnist", devices=10, rounds=10),
    )
