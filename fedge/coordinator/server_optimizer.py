"""Server optimizers: how a mean client update changes the weights.

Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2: the mean difference Δ takes the
place of a negative gradient. SGD with learning rate 1 is FedAvg (McMahan et al. 2017); with
momentum it is FedAvgM (Hsu et al. 2019). Each optimizer is a frozen pair, init and apply (after
fedjax), and its state is plain tensors, so that it is stored beside a version and survives a
restart.

Only parameters are optimized. Float buffers (running means of batch norm) are statistics, not
directions: they always become the plain mean. Integer buffers and frozen tensors stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from fedge.schemas.errors import ConfigError, PeerError
from fedge.schemas.plan import WeightSpec
from fedge.schemas.tensor_spec import TensorSpec
from fedge.schemas.tensors import Array, Tensors, check_tensors

Float64 = npt.NDArray[np.float64]
Moments = Mapping[str, Float64]

_Rate = Annotated[float, Field(gt=0, le=1e3, allow_inf_nan=False)]
_Decay = Annotated[float, Field(ge=0, lt=1)]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SgdConfig(_Config):
    """FedAvg as it stands; FedAvgM with a momentum."""

    name: Literal["sgd"] = "sgd"
    learning_rate: _Rate = 1.0
    momentum: _Decay = 0.0


class AdamConfig(_Config):
    """FedAdam or FedYogi. `tau`: the degree of adaptivity, in units of a weight's change.

    The defaults are those of Reddi et al. 2021, section 5; the learning rate is theirs to tune.
    """

    name: Literal["adam", "yogi"]
    learning_rate: _Rate = 0.1
    beta1: _Decay = 0.9
    beta2: _Decay = 0.99
    tau: Annotated[float, Field(gt=0, le=1)] = 1e-3


class AdagradConfig(_Config):
    """FedAdagrad, which never forgets a squared difference."""

    name: Literal["adagrad"]
    learning_rate: _Rate = 0.1
    beta1: _Decay = 0.0
    tau: Annotated[float, Field(gt=0, le=1)] = 1e-3


ServerOptimizerConfig = Annotated[
    SgdConfig | AdamConfig | AdagradConfig, Field(discriminator="name")
]
"""What an operator may write: a name, and the numbers that this optimizer has."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One optimizer for one tensor, elementwise.

    `moments`: what it remembers, by name, with the value before the first round.
    `step(delta, moments)`: what to add to the weights, and the moments after.
    """

    moments: Mapping[str, float]
    step: Callable[[Float64, Moments], tuple[Float64, Moments]]


@dataclass(frozen=True, slots=True)
class ServerOptimizer:
    """A rule applied to the tensors of a plan. `specs`: as in the plan's manifest."""

    specs: tuple[WeightSpec, ...]
    rule: Rule

    @property
    def state_specs(self) -> tuple[TensorSpec, ...]:
        """The tensors of the state: float32, `moment.tensor`; none for plain FedAvg."""
        return tuple(
            TensorSpec(
                name=f"{moment}.{spec.tensor.name}", dtype="float32", shape=spec.tensor.shape
            )
            for moment in self.rule.moments
            for spec in self.specs
            if spec.role == "parameter" and spec.is_updated
        )

    def init(self) -> dict[str, Array]:
        """The state before the first round."""
        return {
            spec.name: np.full(
                spec.shape, self.rule.moments[spec.name.partition(".")[0]], "float32"
            )
            for spec in self.state_specs
        }

    def check(self, state: Tensors) -> None:
        """Raises `ConfigError` unless `state` was made by this optimizer for this plan."""
        try:
            check_tensors(state, self.state_specs)
        except PeerError as error:
            raise ConfigError(
                f"the stored state is not this server optimizer's ({error.detail}); keep the "
                "optimizer that made it, or begin with a new state_dir"
            ) from error

    def apply(
        self, weights: Tensors, mean_delta: Tensors, state: Tensors
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """The weights and the state of the next version; the arguments are not changed.

        `mean_delta`: of every tensor that is updated. Computed in float64, rounded once to each
        tensor's dtype. Raises `ConfigError` if `state` belongs to another optimizer or plan.
        """
        self.check(state)
        new_weights: dict[str, Array] = {}
        new_state: dict[str, Array] = {}
        for spec in self.specs:
            name = spec.tensor.name
            weight = weights[name]
            if not spec.is_updated:
                new_weights[name] = weight
                continue
            step = mean_delta[name].astype(np.float64)
            if spec.role == "parameter":
                step, moments = self.rule.step(step, self._moments_of(name, state))
                for moment, value in moments.items():
                    new_state[f"{moment}.{name}"] = np.asarray(value, np.float32)
            new_weights[name] = np.asarray(weight.astype(np.float64) + step, weight.dtype)
        return new_weights, new_state

    def _moments_of(self, name: str, state: Tensors) -> Moments:
        return {
            moment: state[f"{moment}.{name}"].astype(np.float64) for moment in self.rule.moments
        }


def sgd(learning_rate: float = 1.0, momentum: float = 0.0) -> Rule:
    """m ← βm + Δ; w ← w + ηm. With η = 1 and β = 0: FedAvg."""

    def step(delta: Float64, moments: Moments) -> tuple[Float64, Moments]:
        if not moments:
            return learning_rate * delta, {}
        velocity = momentum * moments["velocity"] + delta
        return learning_rate * velocity, {"velocity": velocity}

    return Rule({"velocity": 0.0} if momentum else {}, step)


def adam(learning_rate: float, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> Rule:
    """v ← β₂v + (1-β₂)Δ², in Algorithm 2: no bias correction, v starts at τ²."""

    def second(v: Float64, square: Float64) -> Float64:
        return beta2 * v + (1 - beta2) * square

    return _adaptive(learning_rate, beta1, tau, second)


def yogi(learning_rate: float, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> Rule:
    """v ← v - (1-β₂)Δ² sign(v - Δ²): v falls no faster than Δ² allows (Zaheer et al. 2018)."""

    def second(v: Float64, square: Float64) -> Float64:
        return v - (1 - beta2) * square * np.sign(v - square)

    return _adaptive(learning_rate, beta1, tau, second)


def adagrad(learning_rate: float, beta1: float = 0.0, tau: float = 1e-3) -> Rule:
    """v ← v + Δ²."""

    def second(v: Float64, square: Float64) -> Float64:
        return v + square

    return _adaptive(learning_rate, beta1, tau, second)


def _adaptive(
    learning_rate: float,
    beta1: float,
    tau: float,
    second: Callable[[Float64, Float64], Float64],
) -> Rule:
    """m ← β₁m + (1-β₁)Δ; v ← `second`(v, Δ²); w ← w + ηm / (√v + τ)."""

    def step(delta: Float64, moments: Moments) -> tuple[Float64, Moments]:
        m = beta1 * moments["first"] + (1 - beta1) * delta
        v = second(moments["second"], np.square(delta))
        return learning_rate * m / (np.sqrt(v) + tau), {"first": m, "second": v}

    return Rule({"first": 0.0, "second": tau**2}, step)


def server_optimizer(
    config: SgdConfig | AdamConfig | AdagradConfig, specs: Sequence[WeightSpec]
) -> ServerOptimizer:
    """The optimizer that `config` names, for weights of `specs`."""
    match config:
        case SgdConfig():
            rule = sgd(config.learning_rate, config.momentum)
        case AdamConfig(name="adam"):
            rule = adam(config.learning_rate, config.beta1, config.beta2, config.tau)
        case AdamConfig():
            rule = yogi(config.learning_rate, config.beta1, config.beta2, config.tau)
        case AdagradConfig():
            rule = adagrad(config.learning_rate, config.beta1, config.tau)
    return ServerOptimizer(tuple(specs), rule)
