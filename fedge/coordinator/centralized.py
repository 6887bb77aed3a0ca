"""The same model trained in one place on all the data: what federation is compared with.

Ordinary torch: a shuffled loader, `backward()`, `torch.optim`. It shares nothing with plans, so it
is also an independent witness that a federated run learned what it should.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedge.coordinator.datasets import Examples
from fedge.coordinator.evaluation import Evaluation
from fedge.coordinator.task import SGD, Adam, Task
from fedge.schemas.errors import ConfigError
from fedge.schemas.measures import measured

_TEST_BATCH = 256


def train_centrally(
    task: Task,
    train: Examples,
    test: Examples,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    on_epoch: Callable[[Evaluation], None] = lambda evaluation: None,
) -> list[Evaluation]:
    """The evaluation on `test` after each epoch over `train`, `epochs` of them.

    From the task's initial weights, with the task's loss and optimizer. `seed` fixes the order of
    examples and the model's own randomness. `on_epoch` is given each evaluation as it is made.
    Raises `ConfigError` for settings that cannot work, `TrainingFailed` if the examples do not fit
    the task's features.
    """
    if epochs < 1 or batch_size < 1 or not learning_rate > 0:
        raise ConfigError(
            f"{epochs=}, {batch_size=}, {learning_rate=}: all of them must be above 0"
        )
    model = task.new_model()
    optimizer = _optimizer(task, model, learning_rate)
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(_dataset(task, train), batch_size, shuffle=True, generator=order)
    test_set = _dataset(task, test)
    evaluations = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(epochs):
            model.train()
            for inputs, targets in loader:
                losses = task.loss(model(inputs), targets)
                loss = losses.sum() if task.loss_reduction == "sum" else losses.mean()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call] # torch has it untyped
                optimizer.step()
            evaluations.append(_evaluate(task, model, test_set))
            on_epoch(evaluations[-1])
    return evaluations


def _dataset(task: Task, examples: Examples) -> TensorDataset:
    return TensorDataset(
        torch.from_numpy(task.features.encode(examples.x)),
        torch.from_numpy(task.target.encode(examples.y)),
    )


def _optimizer(task: Task, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    match task.optimizer:
        case SGD(momentum=momentum, weight_decay=weight_decay, nesterov=nesterov):
            return torch.optim.SGD(
                trained,
                lr=learning_rate,
                momentum=momentum,
                weight_decay=weight_decay,
                nesterov=nesterov,
            )
        case Adam(betas=betas, eps=eps, weight_decay=weight_decay):
            return torch.optim.Adam(
                trained, lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay
            )


def _evaluate(task: Task, model: nn.Module, test_set: TensorDataset) -> Evaluation:
    model.eval()
    measures = (task.loss, *task.metrics.values())
    sums = torch.zeros(len(measures), dtype=torch.float64)
    with torch.inference_mode():
        for inputs, targets in DataLoader(test_set, _TEST_BATCH):
            output = model(inputs)
            sums += torch.stack([measure(output, targets).sum().double() for measure in measures])
    examples = len(test_set)
    loss, *totals = (float(total) for total in sums)
    metrics = measured(
        dict(zip(task.metrics, totals, strict=True)), examples, tuple(task.metrics), task.ratios
    )
    return Evaluation(examples, loss / examples, metrics)
