"""One step of an optimizer as plain tensor maths, so that it can be part of a graph.

Equal to `torch.optim.SGD` and `torch.optim.Adam`, which tests hold them to. The optimizer's tensors
are inputs and outputs of the step; they never leave the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never

from torch import Tensor

from fedge.coordinator.task import SGD, Adam
from fedge.schemas.plan import StateSpec
from fedge.schemas.tensor_spec import TensorSpec

Named = dict[str, Tensor]


def initial_state(optimizer: SGD | Adam, parameters: Mapping[str, Tensor]) -> list[StateSpec]:
    """What the optimizer keeps from step to step: all of it 0 at the start of a round."""
    match optimizer:
        case SGD(momentum=0):
            return []
        case SGD():
            return [_like("momentum", name, tensor) for name, tensor in parameters.items()]
        case Adam():
            return [
                *(_like("exp_avg", name, tensor) for name, tensor in parameters.items()),
                *(_like("exp_avg_sq", name, tensor) for name, tensor in parameters.items()),
                _scalar("bias_correction1"),
                _scalar("bias_correction2"),
            ]
        case _:
            assert_never(optimizer)


def apply_gradients(
    optimizer: SGD | Adam,
    parameters: Named,
    gradients: Mapping[str, Tensor],
    state: Named,
    learning_rate: Tensor,
) -> tuple[Named, Named]:
    """(new parameters, new state) after one step.

    `gradients`: for the parameters that the loss depends on; the others stay as they are, as in
    torch, weight decay included. `learning_rate`: a float32 scalar.
    """
    match optimizer:
        case SGD():
            return _sgd(optimizer, parameters, gradients, state, learning_rate)
        case Adam():
            return _adam(optimizer, parameters, gradients, state, learning_rate)
        case _:
            assert_never(optimizer)


def _sgd(
    optimizer: SGD,
    parameters: Named,
    gradients: Mapping[str, Tensor],
    state: Named,
    learning_rate: Tensor,
) -> tuple[Named, Named]:
    new_parameters, new_state = dict(parameters), dict(state)
    for name, raw in gradients.items():
        gradient = _decayed(raw, parameters[name], optimizer.weight_decay)
        if optimizer.momentum:
            key = f"momentum.{name}"
            # A buffer of 0 makes the first step equal torch's, which starts with the gradient.
            buffer = state[key] * optimizer.momentum + gradient
            new_state[key] = buffer
            gradient = gradient + optimizer.momentum * buffer if optimizer.nesterov else buffer
        new_parameters[name] = parameters[name] - learning_rate * gradient
    return new_parameters, new_state


def _adam(
    optimizer: Adam,
    parameters: Named,
    gradients: Mapping[str, Tensor],
    state: Named,
    learning_rate: Tensor,
) -> tuple[Named, Named]:
    beta1, beta2 = optimizer.betas
    new_parameters, new_state = dict(parameters), dict(state)
    # 1 - beta^t by recursion: computed from the power, it would cancel badly in float32.
    correction1 = state["bias_correction1"] * beta1 + (1 - beta1)
    correction2 = state["bias_correction2"] * beta2 + (1 - beta2)
    new_state["bias_correction1"] = correction1
    new_state["bias_correction2"] = correction2
    step_size = learning_rate / correction1
    root2 = correction2.sqrt()
    for name, raw in gradients.items():
        gradient = _decayed(raw, parameters[name], optimizer.weight_decay)
        mean = state[f"exp_avg.{name}"] * beta1 + gradient * (1 - beta1)
        square = state[f"exp_avg_sq.{name}"] * beta2 + gradient * gradient * (1 - beta2)
        new_state[f"exp_avg.{name}"] = mean
        new_state[f"exp_avg_sq.{name}"] = square
        denominator = square.sqrt() / root2 + optimizer.eps
        new_parameters[name] = parameters[name] - step_size * (mean / denominator)
    return new_parameters, new_state


def _decayed(gradient: Tensor, parameter: Tensor, weight_decay: float) -> Tensor:
    return gradient + weight_decay * parameter if weight_decay else gradient


def _like(kind: str, name: str, tensor: Tensor) -> StateSpec:
    spec = TensorSpec(name=f"{kind}.{name}", dtype="float32", shape=tuple(tensor.shape))
    return StateSpec(tensor=spec)


def _scalar(name: str) -> StateSpec:
    return StateSpec(tensor=TensorSpec(name=name, dtype="float32", shape=()))
