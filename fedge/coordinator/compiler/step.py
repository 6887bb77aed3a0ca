"""The three functions of a plan, as pure functions of flat tensors, in torch.

`train` is one whole optimizer step: forward, loss, gradient, proximal term, update. `evaluate`
gives sums over a batch, `infer` the model's output. Each has the names of its inputs and outputs in
the order of its tensors: those of `fedge.schemas.plan`. They run in eager torch as they are, and
traced they become the plan's graphs.

The objective: the masked mean (or sum) of the losses, as in McMahan et al. 2017, Algorithm 1, plus
the proximal term of FedProx (Li et al. 2020, section 3.2), mu/2 ‖w - w_global‖², by its gradient
mu (w - w_global). The loss that is reported is without it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedge.coordinator.compiler.optimizers import apply_gradients, initial_state
from fedge.coordinator.compiler.randomness import CounterRandomness
from fedge.coordinator.task import forward

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fedge.coordinator.task import Infer, Task
    from fedge.schemas.plan import StateSpec

Role = Literal["parameter", "frozen", "buffer"]
_PREFIX: Mapping[Role, str] = {"parameter": "param", "frozen": "frozen", "buffer": "buffer"}


@dataclass(frozen=True, slots=True)
class Layout:
    """Which tensor of the model is what: name → role, in the order of a version's tensors."""

    roles: Mapping[str, Role]

    def names(self, role: Role) -> tuple[str, ...]:
        """The tensors of one role, in order."""
        return tuple(name for name, found in self.roles.items() if found == role)

    def entries(self) -> list[tuple[str, str, Role]]:
        """(graph prefix, name, role) in the order of a version: parameters, frozen, buffers."""
        return [
            (prefix, name, role) for role, prefix in _PREFIX.items() for name in self.names(role)
        ]

    def graph_names(self) -> list[str]:
        """The graph inputs of a version's tensors, in order."""
        return [f"{prefix}.{name}" for prefix, name, _ in self.entries()]


@dataclass(frozen=True, slots=True)
class PureFunction:
    """A function of tensors, with the names of its arguments and results in order.

    `batched`: the arguments whose first dimension is the batch.
    """

    call: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    batched: frozenset[str]


@contextmanager
def mode_of(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The model in training or evaluation mode, module by module as before afterwards."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before.items():
            module.training = was_training


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and buffers by name, tied ones once, detached."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


def layout_of(model: nn.Module, mutated_buffers: frozenset[str]) -> Layout:
    """Roles: trained parameters; frozen parameters and constant buffers; buffers that change."""
    roles: dict[str, Role] = {
        name: "parameter" if parameter.requires_grad else "frozen"
        for name, parameter in model.named_parameters()
    }
    for name, _ in model.named_buffers():
        roles[name] = "buffer" if name in mutated_buffers else "frozen"
    return Layout(roles)


def train_function(task: Task, model: nn.Module, layout: Layout) -> PureFunction:
    """One optimizer step on one batch: the plan's `train`."""
    trained, buffers = layout.names("parameter"), layout.names("buffer")
    state_names = [spec.tensor.name for spec in state_of(task, model, layout)]
    metrics = tuple(task.metrics)

    def train(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(inputs, tensors, strict=True))
        parameters = {name: given[f"param.{name}"].detach().requires_grad_() for name in trained}
        weights: dict[str, Tensor] = {
            **parameters,
            **{name: given[f"frozen.{name}"] for name in layout.names("frozen")},
            # Batch norm writes into its buffers; the inputs must stay what they are.
            **{name: given[f"buffer.{name}"].clone() for name in buffers},
        }
        mask = given["mask"]
        with torch.enable_grad(), CounterRandomness(given["seed"]), mode_of(model, training=True):
            output = functional_call(model, weights, (given["input"],), tie_weights=True)
            loss = _reduced(task, task.loss(output, given["target"]) * mask, mask)
            raw: Sequence[Tensor | None] = torch.autograd.grad(
                loss, list(parameters.values()), allow_unused=True
            )
        with torch.no_grad():
            gradients = {
                name: gradient + given["mu"] * (parameters[name] - given[f"global.{name}"])
                for name, gradient in zip(trained, raw, strict=True)
                if gradient is not None  # the loss does not depend on it
            }
            new_parameters, new_state = apply_gradients(
                task.optimizer,
                {name: parameter.detach() for name, parameter in parameters.items()},
                gradients,
                {name: given[f"state.{name}"] for name in state_names},
                given["lr"],
            )
            sums = [
                (metric(output.detach(), given["target"]) * mask).sum()
                for metric in task.metrics.values()
            ]
        return (
            *(new_parameters[name] for name in trained),
            *(weights[name].detach() for name in buffers),
            *(new_state[name] for name in state_names),
            loss.detach(),
            *sums,
        )

    inputs = (
        *layout.graph_names(),
        *(f"state.{name}" for name in state_names),
        *(f"global.{name}" for name in trained),
        *("input", "target", "mask", "lr", "mu", "seed"),
    )
    outputs = (
        *(f"next.param.{name}" for name in trained),
        *(f"next.buffer.{name}" for name in buffers),
        *(f"next.state.{name}" for name in state_names),
        "loss",
        *(f"metric.{name}" for name in metrics),
    )
    return PureFunction(train, inputs, outputs, frozenset({"input", "target", "mask"}))


def evaluate_function(task: Task, model: nn.Module, layout: Layout) -> PureFunction:
    """Sums of the loss and the metrics over one batch, in evaluation mode: the plan's `eval`."""

    def evaluate(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(inputs, tensors, strict=True))
        output = _output(model, layout, given, forward)
        mask = given["mask"]
        measures = (task.loss, *task.metrics.values())
        return tuple((measure(output, given["target"]) * mask).sum() for measure in measures)

    inputs = (*layout.graph_names(), "input", "target", "mask")
    outputs = ("loss", *(f"metric.{name}" for name in task.metrics))
    return PureFunction(evaluate, inputs, outputs, frozenset({"input", "target", "mask"}))


def infer_function(task: Task, model: nn.Module, layout: Layout) -> PureFunction:
    """What the model answers in evaluation mode: the plan's `infer`."""

    def infer(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(inputs, tensors, strict=True))
        return (_output(model, layout, given, task.infer),)

    inputs = (*layout.graph_names(), "input")
    return PureFunction(infer, inputs, ("output",), frozenset({"input"}))


def together(parts: Mapping[str, PureFunction]) -> PureFunction:
    """All parts as one function, each result being named `part:name`.

    Its inputs are those of the first part, which has all that the others need.
    """
    inputs = next(iter(parts.values())).inputs

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(inputs, tensors, strict=True))
        results = [part.call(*(given[name] for name in part.inputs)) for part in parts.values()]
        return tuple(itertools.chain.from_iterable(results))

    outputs = tuple(f"{name}:{output}" for name, part in parts.items() for output in part.outputs)
    batched = frozenset().union(*(part.batched for part in parts.values()))
    return PureFunction(call, inputs, outputs, batched)


def state_of(task: Task, model: nn.Module, layout: Layout) -> list[StateSpec]:
    """The optimizer's tensors for this model."""
    weights = weights_of(model)
    return initial_state(
        task.optimizer, {name: weights[name] for name in layout.names("parameter")}
    )


def _output(model: nn.Module, layout: Layout, given: Mapping[str, Tensor], call: Infer) -> Tensor:
    weights = {f"model.{name}": given[f"{prefix}.{name}"] for prefix, name, _ in layout.entries()}
    caller = _Caller(model, call)
    with torch.no_grad(), mode_of(model, training=False):
        output: Tensor = functional_call(caller, weights, (given["input"],), tie_weights=True)
    return output


class _Caller(nn.Module):
    """A module whose `forward` is another function of a model."""

    def __init__(self, model: nn.Module, call: Infer) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, inputs: Tensor) -> Tensor:
        return self.call(self.model, inputs)


def _reduced(task: Task, losses: Tensor, mask: Tensor) -> Tensor:
    if task.loss_reduction == "sum":
        return losses.sum()
    # A batch of padding alone has nothing to learn from: 0 / 1, not 0 / 0.
    return losses.sum() / mask.sum().clamp(min=1.0)
