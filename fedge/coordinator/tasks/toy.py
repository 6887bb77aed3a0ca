"""The smallest task there is, worked by hand in a minute: one linear layer, four points.

Two devices hold two points each, and the model visits one after the other: the classic first
example of federated learning libraries. The sum of squares falls from about 1 to about 0.002.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from fedge.coordinator.task import SimulationDefaults, Task, squared_error
from fedge.schemas.features import TabularFeatures, ValueTarget
from fedge.schemas.plan import TrainingDefaults


def toy_linear() -> Task:
    """`y = x₂` learned from the corners of the unit square: 3 parameters."""
    return Task(
        name="toy-linear",
        model=partial(nn.Linear, 2, 1),
        loss=squared_error,
        features=TabularFeatures(columns=2),
        target=ValueTarget(width=1),
        seed=16,
        defaults=TrainingDefaults(batch_size=2, learning_rate=0.1),
        loss_reduction="sum",
        simulation=SimulationDefaults(
            data="inline",
            devices=2,
            rounds=40,
            split="ordered",
            strategy="cyclic",
            examples=(
                ((1.0, 1.0), (1.0,)),
                ((0.0, 1.0), (1.0,)),
                ((1.0, 0.0), (0.0,)),
                ((0.0, 0.0), (0.0,)),
            ),
        ),
    )
