"""What the fleet learns: `tests/tiny_task.py` with a wider layer.

Its weights take several chunks of the smallest size, so that a transfer can be cut in the middle.
"""

from torch import nn

from fedge.coordinator.task import Task, accuracy, cross_entropy
from fedge.schemas.features import ClassTarget, TabularFeatures
from fedge.schemas.plan import TrainingDefaults


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 128), nn.Tanh(), nn.Linear(128, 3))


task = Task(
    name="chaos",
    model=Net,
    loss=cross_entropy,
    features=TabularFeatures(columns=4),
    target=ClassTarget(classes=3),
    metrics={"accuracy": accuracy},
    defaults=TrainingDefaults(batch_size=8, learning_rate=0.05, local_epochs=4),
)
