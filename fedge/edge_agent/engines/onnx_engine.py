"""The engine of every device: a plan's graphs in the stock inference onnxruntime, on the CPU.

A training step is an ordinary graph run whose outputs are the next step's inputs. Two sets of
buffers take turns: a step reads one and writes the other through `IOBinding`, so that weights are
never copied between steps. onnxruntime's own training library is frozen since its release 1.19 and
is not used.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnxruntime

from fedge.edge_agent.engines.interface import measure_names
from fedge.edge_agent.engines.onnx_evaluator import OnnxEvaluator
from fedge.edge_agent.engines.onnx_session import RUNTIME_ERRORS, dtype_of, open_session
from fedge.edge_agent.engines.protocol import Evaluation, Mask, StepResult
from fedge.schemas.errors import PlanRefused, TrainingFailed
from fedge.schemas.plan import PlanManifest
from fedge.schemas.tensor_spec import TensorSpec
from fedge.schemas.tensors import Array, Tensors, check_tensors


class OnnxEngine:
    """An `Engine` on onnxruntime. Holds the weights two times, and the optimizer state two times.

    The graphs passed `fedge.edge_agent.engines.interface` before. Raises `PlanRefused` if
    onnxruntime cannot load one.
    """

    def __init__(
        self,
        manifest: PlanManifest,
        train_graph: bytes,
        eval_graph: bytes | None,
        *,
        threads: int = 1,
    ) -> None:
        self._manifest = manifest
        self._session = open_session(train_graph, threads=threads)
        self._evaluator = (
            OnnxEvaluator(manifest, eval_graph, threads=threads) if eval_graph else None
        )
        moving = _moving_specs(manifest)
        outputs = {argument.name: argument for argument in self._session.get_outputs()}
        self._lr = np.zeros((), np.float32)
        self._mu = np.zeros((), np.float32)
        self._seed = np.zeros((), np.int64)
        self._measures = {name: _one_element(outputs[name]) for name in measure_names(manifest)}
        self._sides = tuple(
            {name: np.empty(spec.shape, spec.dtype) for name, spec in moving.items()}
            for _ in range(2)
        )
        self._bindings = tuple(self._bind(read, 1 - read) for read in range(2))
        self._read = 0
        self._fixed: dict[str, Array] = {}

    def _bind(self, read: int, write: int) -> onnxruntime.IOBinding:
        binding = self._session.io_binding()
        for name, array in self._sides[read].items():
            binding.bind_ortvalue_input(name, _wrap(array))
        for name, scalar in (("lr", self._lr), ("mu", self._mu), ("seed", self._seed)):
            binding.bind_ortvalue_input(name, _wrap(scalar))
        for name, array in self._sides[write].items():
            binding.bind_ortvalue_output(f"next.{name}", _wrap(array))
        for name, array in self._measures.items():
            binding.bind_ortvalue_output(name, _wrap(array))
        return binding

    def load(self, weights: Tensors) -> None:
        """See `Engine.load`."""
        check_tensors(weights, self._manifest.weight_specs)
        self._read = 0
        side = self._sides[self._read]
        for state in self._manifest.state:
            side[f"state.{state.tensor.name}"][...] = state.fill
        self._fixed = {}
        for weight in self._manifest.weights:
            given = np.ascontiguousarray(weights[weight.tensor.name])
            given = given.reshape(weight.tensor.shape)
            if weight.role == "frozen":
                self._fixed[weight.graph_name] = given
            else:
                side[weight.graph_name][...] = given
            if weight.role == "parameter":
                self._fixed[f"global.{weight.tensor.name}"] = given
        for binding in self._bindings:
            for name, array in self._fixed.items():
                binding.bind_ortvalue_input(name, _wrap(array))

    def step(
        self, inputs: Array, target: Array, mask: Mask, *, lr: float, mu: float, seed: int
    ) -> StepResult:
        """See `Engine.step`."""
        self._lr[...], self._mu[...], self._seed[...] = lr, mu, seed
        binding = self._bindings[self._read]
        try:
            for name, array in (("input", inputs), ("target", target), ("mask", mask)):
                binding.bind_ortvalue_input(name, _wrap(array))
            self._session.run_with_iobinding(binding)
        except RUNTIME_ERRORS as error:
            raise TrainingFailed(f"onnxruntime could not run a step: {error}") from error
        self._read = 1 - self._read
        metrics = {name: self._measures[f"metric.{name}"].item() for name in self._manifest.metrics}
        return StepResult(self._measures["loss"].item(), metrics)

    def weights(self) -> dict[str, Array]:
        """See `Engine.weights`."""
        return {
            weight.tensor.name: array.copy()
            for weight, array in zip(self._manifest.weights, self._present(), strict=True)
        }

    def evaluate(self, inputs: Array, target: Array, mask: Mask) -> Evaluation:
        """See `Engine.evaluate`."""
        if self._evaluator is None:
            raise TrainingFailed("this engine was opened without the plan's eval graph")
        names = (weight.graph_name for weight in self._manifest.weights)
        weights = dict(zip(names, self._present(), strict=True))
        return self._evaluator.run({**weights, "input": inputs, "target": target, "mask": mask})

    def _present(self) -> list[Array]:
        side = self._sides[self._read]
        return [
            self._fixed[w.graph_name] if w.role == "frozen" else side[w.graph_name]
            for w in self._manifest.weights
        ]


def _moving_specs(manifest: PlanManifest) -> dict[str, TensorSpec]:
    moving = {w.graph_name: w.tensor for w in manifest.weights if w.role != "frozen"}
    return moving | {f"state.{s.tensor.name}": s.tensor for s in manifest.state}


def _one_element(argument: onnxruntime.NodeArg) -> npt.NDArray[np.generic]:
    if any(dimension != 1 for dimension in argument.shape):
        raise PlanRefused(f"{argument.name} has the shape {argument.shape}, expected one element")
    return np.zeros(argument.shape, dtype_of(argument))


def _wrap(array: Array) -> onnxruntime.OrtValue:
    """`array` as onnxruntime sees it: the same memory, kept alive by the value."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
