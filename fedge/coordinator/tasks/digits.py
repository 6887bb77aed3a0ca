"""Two tasks on scikit-learn's 8x8 digits: 1,797 images, on disk wherever scikit-learn is.

Small enough that a demonstration with real training ends within seconds on one core. The data
set: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI repository.
"""

from __future__ import annotations

from torch import nn

from fedge.coordinator.task import SGD, SimulationDefaults, Task, accuracy, cross_entropy
from fedge.schemas.features import ClassTarget, ImageFeatures
from fedge.schemas.plan import TrainingDefaults


def _digits_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, 10),
    )


def digits() -> Task:
    """Label-skewed digits on four devices: 6,090 parameters."""
    return Task(
        name="digits",
        model=_digits_net,
        loss=cross_entropy,
        features=ImageFeatures(height=8, width=8, raw_max=16.0, mean=(0.3053,), std=(0.3760,)),
        target=ClassTarget(classes=10),
        metrics={"accuracy": accuracy},
        optimizer=SGD(momentum=0.9),
        defaults=TrainingDefaults(batch_size=16, learning_rate=0.02, local_epochs=2),
        simulation=SimulationDefaults(
            data="sklearn-digits", devices=4, rounds=10, split="dirichlet:0.5"
        ),
    )


def hospitals() -> Task:
    """Three sites with unequal amounts of data, weighted by their examples: 6,090 parameters."""
    return Task(
        name="hospitals",
        model=_digits_net,
        loss=cross_entropy,
        features=ImageFeatures(height=8, width=8, raw_max=16.0, mean=(0.3053,), std=(0.3760,)),
        target=ClassTarget(classes=10),
        metrics={"accuracy": accuracy},
        optimizer=SGD(),
        defaults=TrainingDefaults(batch_size=16, learning_rate=0.1, local_epochs=2),
        simulation=SimulationDefaults(
            data="sklearn-digits", devices=3, rounds=10, split="weighted:0.6,0.3,0.1"
        ),
    )
