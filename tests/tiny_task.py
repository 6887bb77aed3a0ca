"""A task that compiles in a moment, as a user would write it."""

from torch import nn

from fedge.coordinator.task import Task, accuracy, cross_entropy
from fedge.schemas.features import ClassTarget, TabularFeatures
from fedge.schemas.plan import TrainingDefaults


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


task = Task(
    name="tiny",
    model=Net,
    loss=cross_entropy,
    features=TabularFeatures(columns=4),
    target=ClassTarget(classes=3),
    metrics={"accuracy": accuracy},
    defaults=TrainingDefaults(batch_size=8, learning_rate=0.1, local_epochs=2),
)
