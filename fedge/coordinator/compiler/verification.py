"""The graphs against eager torch, before anybody else sees them.

The reference is written the way a torch user would: the model itself, `torch.optim`, `backward()`.
It shares with the traced step nothing but the model, the loss and the random bits. It runs in
float64 and in float32: a graph may differ from the float64 run by a tenth of a thousandth of how
far the weights moved, and by ten times what torch's own float32 run differs. The second term is
there because twenty steps of training amplify rounding, by how much only the model knows: Adam
divides by gradients that are nothing but rounding where the true gradient is zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from fedge.coordinator.compiler.examples import random_batch
from fedge.coordinator.compiler.randomness import CounterRandomness
from fedge.coordinator.compiler.step import PureFunction
from fedge.coordinator.task import SGD, Task
from fedge.schemas.errors import ParityFailed, PlanError
from fedge.schemas.onnx_wire import check_graph
from fedge.schemas.plan import Padding, PlanManifest
from fedge.schemas.tensors import Array

STEPS = 20
_ROWS = 8
_PARTIAL_ROWS = 5
_PARTIAL_EVERY = 5
"""Each fifth batch is a partial one, as the last of an epoch is."""

_OF_MOVE = 1e-4
_OF_DRIFT = 10.0
_OF_SCALE = 8 * float(np.finfo(np.float32).eps)
_PROXIMAL_MU = 0.1
_OUTPUT_TOLERANCE = 1e-4


class _Batch(NamedTuple):
    inputs: Tensor
    targets: Tensor
    rows: int
    """How many of them count."""
    mu: float


class _Reference(NamedTuple):
    weights: dict[str, Tensor]
    losses: list[float]
    metrics: list[list[float]]


def session(graph: bytes) -> Any:
    """A single-threaded onnxruntime session. Raises `PlanError` if the runtime refuses the graph."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        raise PlanError(f"onnxruntime refuses the compiled graph: {error}") from error


def verify_structure(
    graph: bytes, function: PureFunction, *, complete: bytes | None = None
) -> None:
    """The graph is valid ONNX of allowed operators with the function's interface.

    `complete`: for an open graph, the same one with weights. Raises `PlanRefused` or `PlanError`.
    """
    weights = [name for name in function.inputs if name not in ("input",)]
    if complete is None:
        check_graph(graph, inputs=function.inputs, outputs=function.outputs)
    else:
        check_graph(graph, inputs=["input"], outputs=function.outputs, open_names=weights)
        check_graph(complete, inputs=["input"], outputs=function.outputs)
    try:
        onnx.checker.check_model(complete or graph, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise PlanError(f"the compiled graph is not valid ONNX: {error}") from error


def verify_training(task: Task, manifest: PlanManifest, graph: bytes) -> None:
    """Twenty steps of the train graph against eager torch. Raises `ParityFailed`."""
    batches = _batches(task, manifest.padding)
    start = _reference(task, [], torch.float32)
    single = _reference(task, batches, torch.float32)
    try:
        double = _reference(task, batches, torch.float64)
    except RuntimeError:
        # A model that makes float32 tensors itself does not run in float64.
        double = single
    actual = _run_graph(task, manifest, graph, batches)
    _compare_losses("train loss", actual.losses, single.losses, double.losses)
    for index, name in enumerate(manifest.metrics):
        # A metric may count (accuracy): one example on the edge may fall to either side.
        have = np.array([step[index] for step in actual.metrics])
        want = np.array([step[index] for step in single.metrics])
        if np.mean(np.abs(have - want) <= 1e-3 * (1 + np.abs(want))) < 0.8:
            raise ParityFailed(f"train metric {name}", float(np.abs(have - want).max()), 1e-3)
    for weight in manifest.weights:
        if weight.role == "frozen":
            continue
        name = weight.tensor.name
        have, want = actual.weights[name].double(), double.weights[name].double()
        drift = _largest(single.weights[name].double() - want)
        moved = _largest(want - start.weights[name].double())
        allowed = _OF_MOVE * moved + _OF_DRIFT * drift + _OF_SCALE * _largest(want)
        difference = _largest(have - want)
        # Written so that NaN fails, too.
        if not difference <= allowed:
            raise ParityFailed(f"{weight.graph_name} after {STEPS} steps", difference, allowed)


def verify_evaluation(
    task: Task, model: nn.Module, manifest: PlanManifest, graph: bytes, infer: bytes
) -> None:
    """Sums of `eval` and outputs of the complete `infer` against eager torch.

    Raises `ParityFailed`.
    """
    model.eval()
    weights = {name: tensor.detach().numpy() for name, tensor in _named(model).items()}
    feeds = {spec.graph_name: weights[spec.tensor.name] for spec in manifest.weights}
    evaluate, predict = session(graph), session(infer)
    for rows, count in ((_ROWS, _PARTIAL_ROWS), (_PARTIAL_ROWS, _PARTIAL_ROWS), (1, 1)):
        inputs, targets = random_batch(task, rows, seed=rows)
        mask = (torch.arange(rows) < count).to(torch.float32)
        with torch.no_grad():
            output = model(inputs)
            measures = [task.loss, *task.metrics.values()]
            expected = [measure(output, targets)[:count].sum().item() for measure in measures]
        batch = {"input": inputs.numpy(), "target": targets.numpy(), "mask": mask.numpy()}
        sums = evaluate.run(None, feeds | batch)
        for name, have, want in zip(("loss", *manifest.metrics), sums, expected, strict=True):
            _compare(f"eval {name}", np.asarray(have), np.asarray(want))
        (predicted,) = predict.run(None, {"input": inputs.numpy()})
        _compare("infer output", predicted, output.numpy())


def _batches(task: Task, padding: Padding) -> list[_Batch]:
    batches = []
    for step in range(STEPS):
        rows = _PARTIAL_ROWS if step % _PARTIAL_EVERY == _PARTIAL_EVERY - 1 else _ROWS
        padded = _ROWS if padding is Padding.MASK else rows
        inputs, targets = random_batch(task, padded, seed=100 + step)
        batches.append(_Batch(inputs, targets, rows, _PROXIMAL_MU if step >= STEPS // 2 else 0.0))
    return batches


def _reference(task: Task, batches: Sequence[_Batch], dtype: torch.dtype) -> _Reference:
    """Training as a user of torch writes it. FedProx: its gradient, mu (w - w_global), is added."""
    model = task.new_model().to(dtype).train()
    origin = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _torch_optimizer(task, trained)
    losses, metrics = [], []
    for step, batch in enumerate(batches):
        inputs = batch.inputs.to(dtype)
        targets = batch.targets.to(dtype) if batch.targets.is_floating_point() else batch.targets
        optimizer.zero_grad()
        with CounterRandomness(torch.tensor(step)):
            output = model(inputs)
            values = task.loss(output, targets)[: batch.rows]
            loss = values.sum() if task.loss_reduction == "sum" else values.mean()
            loss.backward()  # type: ignore[no-untyped-call] # torch's own
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and batch.mu:
                parameter.grad += batch.mu * (parameter.detach() - origin[name])
        optimizer.step()
        losses.append(loss.item())
        metrics.append(
            [
                metric(output.detach(), targets)[: batch.rows].sum().item()
                for metric in task.metrics.values()
            ]
        )
    weights = {name: tensor.detach().clone() for name, tensor in _named(model).items()}
    return _Reference(weights, losses, metrics)


def _torch_optimizer(task: Task, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    rate, rule = task.defaults.learning_rate, task.optimizer
    if isinstance(rule, SGD):
        return torch.optim.SGD(
            parameters,
            lr=rate,
            momentum=rule.momentum,
            weight_decay=rule.weight_decay,
            nesterov=rule.nesterov,
        )
    return torch.optim.Adam(
        parameters, lr=rate, betas=rule.betas, eps=rule.eps, weight_decay=rule.weight_decay
    )


def _run_graph(
    task: Task, manifest: PlanManifest, graph: bytes, batches: Sequence[_Batch]
) -> _Reference:
    """The same steps as a device runs them: outputs of a step are inputs of the next."""
    runtime = session(graph)
    model = task.new_model()
    weights = {name: tensor.detach().numpy() for name, tensor in _named(model).items()}
    feeds: dict[str, Array] = {
        spec.graph_name: weights[spec.tensor.name] for spec in manifest.weights
    }
    for spec in manifest.weights:
        if spec.role == "parameter":
            feeds[f"global.{spec.tensor.name}"] = weights[spec.tensor.name]
    for state in manifest.state:
        shape = state.tensor.shape
        feeds[f"state.{state.tensor.name}"] = np.full(shape, state.fill, np.float32)
    names = [output.name for output in runtime.get_outputs()]
    losses, metrics = [], []
    for step, batch in enumerate(batches):
        mask = (np.arange(len(batch.inputs)) < batch.rows).astype(np.float32)
        feeds |= {
            "input": batch.inputs.numpy(),
            "target": batch.targets.numpy(),
            "mask": mask,
            "lr": np.array(task.defaults.learning_rate, np.float32),
            "mu": np.array(batch.mu, np.float32),
            "seed": np.array(step, np.int64),
        }
        results: Mapping[str, Array] = dict(zip(names, runtime.run(None, feeds), strict=True))
        losses.append(float(results["loss"]))  # type: ignore[arg-type] # a scalar array
        metrics.append([float(results[f"metric.{name}"]) for name in manifest.metrics])  # type: ignore[arg-type] # likewise
        for name, value in results.items():
            if name.startswith("next."):
                feeds[name.removeprefix("next.")] = value
    final = {
        spec.tensor.name: torch.from_numpy(np.array(feeds[spec.graph_name]))
        for spec in manifest.weights
    }
    return _Reference(final, losses, metrics)


def _named(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _compare_losses(
    what: str, actual: Sequence[float], single: Sequence[float], double: Sequence[float]
) -> None:
    for step, (have, float32, want) in enumerate(zip(actual, single, double, strict=True)):
        allowed = _OF_MOVE * (1 + abs(want)) + _OF_DRIFT * abs(float32 - want)
        if not abs(have - want) <= allowed:
            raise ParityFailed(f"{what} at step {step + 1}", abs(have - want), allowed)


def _compare(what: str, actual: Array, expected: Array) -> None:
    have, want = actual.astype(np.float64), expected.astype(np.float64)
    if have.shape != want.shape:
        raise PlanError(f"{what} has shape {have.shape}, in torch {want.shape}")
    allowed = _OUTPUT_TOLERANCE * (1.0 + float(np.abs(want).max(initial=0.0)))
    difference = float(np.abs(have - want).max(initial=0.0))
    if not difference <= allowed:
        raise ParityFailed(what, difference, allowed)
