"""The engine of hosts with a GPU: the plan's own graphs, run by torch.

It executes the same `train` and `eval` graphs as the onnxruntime engine, operator by operator, so
that one artifact serves both and each engine checks the other. The graph holds its gradients: there
is no autograd, and neither `.pt2` files nor pickles are ever read (both can run code when loaded).
Weights stay on the device between steps. Without CUDA it runs on the CPU with the same results.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import numpy as np
import torch
from torch.utils import deterministic

from fedge.edge_agent.engines.interface import measure_names
from fedge.edge_agent.engines.protocol import Evaluation, Mask, StepResult
from fedge.edge_agent.engines.torch_capture import CapturedStep
from fedge.edge_agent.engines.torch_kernels import Tensor
from fedge.edge_agent.engines.torch_program import FAILURES, Program, Specialised, specialise
from fedge.schemas.errors import ConfigError, PlanRefused, TrainingFailed
from fedge.schemas.plan import Padding, PlanManifest
from fedge.schemas.tensors import Array, Tensors, check_tensors

_log = logging.getLogger(__name__)

_Shapes = tuple[torch.Size, ...]

_SPECIALISATIONS_MAX = 8
"""Sizes of batches kept ready: a full one and the last one of an epoch, for a few rounds."""


class TorchEngine:
    """An `Engine` on torch.

    The graphs passed `fedge.edge_agent.engines.interface` before. `device`: a torch device such as
    `cuda:1`; None takes CUDA if there is one. `threads` and, on CUDA, exact float32 (no TF32) and
    deterministic algorithms are settings of the whole process: an engine has a process of its own.

    Raises `PlanRefused` for a graph that this engine cannot run, `ConfigError` for a device that
    is not there.
    """

    def __init__(
        self,
        manifest: PlanManifest,
        train_graph: bytes,
        eval_graph: bytes | None,
        *,
        threads: int = 1,
        device: str | None = None,
    ) -> None:
        self._manifest = manifest
        self._device = _open_device(device)
        torch.set_num_threads(threads)
        self._train = _Runner(train_graph, self._device)
        self._eval = _Runner(eval_graph, self._device) if eval_graph is not None else None
        self._measure_names = measure_names(manifest)
        self._moving: dict[str, Tensor] = {}
        self._fixed: dict[str, Tensor] = {}
        self._captured: CapturedStep | None = None
        self._may_capture = self._device.type == "cuda" and manifest.padding is Padding.MASK

    @property
    def device(self) -> str:
        """The torch device that it runs on."""
        return str(self._device)

    @property
    def records_steps(self) -> bool:
        """Whether steps are replayed as a CUDA graph by now."""
        return self._captured is not None

    def load(self, weights: Tensors) -> None:
        """See `Engine.load`."""
        check_tensors(weights, self._manifest.weight_specs)
        self._captured = None  # its memory holds the old weights
        with torch.inference_mode():
            self._moving = {
                f"state.{state.tensor.name}": torch.full(
                    state.tensor.shape,
                    state.fill,
                    dtype=getattr(torch, state.tensor.dtype),
                    device=self._device,
                )
                for state in self._manifest.state
            }
            self._fixed = {}
            for weight in self._manifest.weights:
                tensor = self._upload(weights[weight.tensor.name])
                place = self._fixed if weight.role == "frozen" else self._moving
                place[weight.graph_name] = tensor
                if weight.role == "parameter":  # a step replaces tensors and writes none
                    self._fixed[f"global.{weight.tensor.name}"] = tensor

    def step(
        self, inputs: Array, target: Array, mask: Mask, *, lr: float, mu: float, seed: int
    ) -> StepResult:
        """See `Engine.step`."""
        arrays = {
            "input": inputs,
            "target": target,
            "mask": mask,
            "lr": np.array(lr, np.float32),
            "mu": np.array(mu, np.float32),
            "seed": np.array(seed, np.int64),
        }
        with torch.inference_mode():
            batch = self._upload_all(arrays)
            loss, metrics = self._read(self._advance(batch))
        return StepResult(loss, metrics)

    def weights(self) -> dict[str, Array]:
        """See `Engine.weights`."""
        values = self._loaded()
        return {
            weight.tensor.name: np.array(values[weight.graph_name].cpu().numpy(), order="C")
            for weight in self._manifest.weights
        }

    def evaluate(self, inputs: Array, target: Array, mask: Mask) -> Evaluation:
        """See `Engine.evaluate`."""
        if self._eval is None:
            raise TrainingFailed("this engine was opened without the plan's eval graph")
        with torch.inference_mode():
            batch = self._upload_all({"input": inputs, "target": target, "mask": mask})
            outputs, _ = self._eval.run({**self._loaded(), **batch})
            loss, metrics = self._read(self._measure(outputs))
        return Evaluation(loss, metrics)

    def _advance(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Takes the step, recorded if possible; what it measured, still on the device."""
        if self._captured is not None and not self._captured.fits(batch):
            self._captured = None
        if self._captured is None and self._may_capture:
            self._captured = self._capture(batch)
        if self._captured is not None:
            try:
                return self._captured.replay(batch)
            except RuntimeError as error:
                raise TrainingFailed(f"the recorded step failed on CUDA: {error}") from error
        outputs, is_new = self._train.run({**self._loaded(), **batch})
        moved = {name: outputs[f"next.{name}"] for name in self._moving}
        measures = self._measure(outputs)
        if is_new:
            self._check_moved(moved)
        self._moving = moved
        return measures

    def _capture(self, batch: Mapping[str, Tensor]) -> CapturedStep | None:
        """The step recorded for shapes like `batch`, once such a step was taken."""
        values = self._loaded()
        specialised = self._train.known({**values, **batch})
        if specialised is None:
            return None
        try:
            captured = CapturedStep(specialised, self._moving, self._fixed, batch, self._measure)
        except (RuntimeError, TrainingFailed) as error:
            _log.warning("cuda_capture_failed task=%s error=%s", self._manifest.task, error)
            self._may_capture = False
            return None
        self._moving = captured.moving
        return captured

    def _check_moved(self, moved: Mapping[str, Tensor]) -> None:
        for name, new in moved.items():
            old = self._moving[name]
            if new.shape != old.shape or new.dtype != old.dtype:
                raise PlanRefused(
                    f"the graph turns {name!r} from {old.dtype} {list(old.shape)} into "
                    f"{new.dtype} {list(new.shape)}"
                )

    def _loaded(self) -> dict[str, Tensor]:
        if not self._fixed and not self._moving:
            raise TrainingFailed("no weights are loaded: call load first")
        return self._fixed | self._moving

    def _upload(self, array: Array) -> Tensor:
        return torch.tensor(array, device=self._device)

    def _upload_all(self, arrays: Mapping[str, Array]) -> dict[str, Tensor]:
        try:
            return {name: self._upload(array) for name, array in arrays.items()}
        except FAILURES as error:
            raise TrainingFailed(f"the batch does not fit the device: {error}") from error

    def _measure(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Loss and metrics in one tensor, so that the host waits for the device once."""
        found = [outputs[name] for name in self._measure_names]
        for name, tensor in zip(self._measure_names, found, strict=True):
            if tensor.numel() != 1:
                raise PlanRefused(f"{name} has the shape {list(tensor.shape)}, not one element")
        return torch.stack([tensor.reshape(()).to(torch.float64) for tensor in found])

    def _read(self, measures: Tensor) -> tuple[float, dict[str, float]]:
        try:
            loss, *metrics = measures.tolist()
        except RuntimeError as error:  # CUDA reports here what failed since the last wait
            raise TrainingFailed(f"the device failed: {error}") from error
        return loss, dict(zip(self._manifest.metrics, metrics, strict=True))


class _Runner:
    """A graph and its specialisations: one for each size of a batch, the latest few of them."""

    def __init__(self, graph: bytes, device: torch.device) -> None:
        self._program = Program(graph)
        self._device = device
        self._known: dict[_Shapes, Specialised] = {}

    def known(self, inputs: Mapping[str, Tensor]) -> Specialised | None:
        """The specialisation for these shapes, if a run has made it."""
        return self._known.get(self._shapes(inputs))

    def run(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
        """The outputs, and whether these shapes are new. Raises as `specialise` and `run` do."""
        specialised = self.known(inputs)
        if specialised is not None:
            return specialised.run(inputs), False
        specialised, outputs = specialise(self._program, inputs, self._device)
        if len(self._known) == _SPECIALISATIONS_MAX:
            del self._known[next(iter(self._known))]  # the oldest
        self._known[self._shapes(inputs)] = specialised
        return outputs, True

    def _shapes(self, inputs: Mapping[str, Tensor]) -> _Shapes:
        return tuple(inputs[name].shape for name in self._program.inputs)


def _open_device(wanted: str | None) -> torch.device:
    try:
        device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"device {wanted!r} is not a torch device: use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {wanted!r}: the torch engine runs on cpu or cuda")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ConfigError(f"device {wanted!r}: this host has {count} CUDA devices for torch")
        _make_cuda_exact()
    return device


def _make_cuda_exact() -> None:
    """float32 products in float32, and the same bits for the same step. For the whole process."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS: deterministic streams
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    # An operator without a deterministic kernel warns: a slightly different sum beats no training.
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Deterministic mode would also fill new memory, which kernels overwrite anyway.
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property
