"""The graphs against eager torch, before anybody else sees them.

The reference is written the way a torch user would: the model itself, `torch.optim`, `backward()`.
It shares with the traced step nothing but the model, the loss and the random bits. It runs in
float64 and in float32: a graph may differ from the float64 run by 1e-4 of how far the
weights moved, and by ten times what torch's own float32 run differs. The second term is
there because twenty steps of training amplify rounding, by how much only the model knows: Adam
divides by gradients that are nothing but rounding where the true gradient is zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from fedge.coordinator.compiler.examples import random_batch
from fedge.coordinator.compiler.randomness import CounterRandomness
from fedge.coordinator.compiler.step import PureFunction
from fedge.coordinator.task import SGD, Task
from fedge.schemas.errors import ParityFailed, PlanError
from fedge.schemas.onnx_wire import INFER_OPERATORS, check_graph
from fedge.schemas.plan import Padding, PlanManifest
from fedge.schemas.tensors import Array

Numbers = npt.NDArray[np.float64]

STEPS = 20
_SETS_OF_EXAMPLES = 4
_ROWS = 8
_PARTIAL_ROWS = 5
_PARTIAL_EVERY = 5
"""Each fifth batch is a partial one, as the last of an epoch is."""

_OF_MOVE = 1e-4
_OF_DRIFT = 10.0
_OF_SCALE = 8 * float(np.finfo(np.float32).eps)
_PROXIMAL_MU = 0.1
_OUTPUT_TOLERANCE = 1e-4
_CLOSE_CALLS = 1
"""Steps of the twenty in which a metric may differ."""


class _Batch(NamedTuple):
    inputs: Tensor
    targets: Tensor
    rows: int
    """How many of them count."""
    mu: float


def session(graph: bytes) -> Any:
    """A session of one thread. Raises `PlanError` if the runtime refuses the graph."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        raise PlanError(f"onnxruntime refuses the compiled graph: {error}") from error


def verify_structure(graph: bytes, function: PureFunction) -> None:
    """The graph is valid ONNX of allowed operators with the function's interface.

    Raises `PlanRefused` or `PlanError`.
    """
    check_graph(graph, inputs=function.inputs, outputs=function.outputs)
    _check_onnx(graph)


def verify_inference(graph: bytes, complete: bytes, open_names: Sequence[str]) -> None:
    """The same of an `infer` graph. `complete`: the graph with weights. Raises as above."""
    for data, names in ((graph, open_names), (complete, ())):
        check_graph(
            data,
            inputs=["input"],
            outputs=["output"],
            open_names=names,
            operators=INFER_OPERATORS,
        )
    _check_onnx(complete)


def _check_onnx(graph: bytes) -> None:
    try:
        onnx.checker.check_model(graph, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise PlanError(f"the compiled graph is not valid ONNX: {error}") from error


def verify_training(task: Task, manifest: PlanManifest, graph: bytes) -> None:
    """Twenty steps of the train graph against eager torch. Raises `ParityFailed`.

    Each step's loss and metrics are compared with torch at the graph's own weights, so that no
    drift has to be allowed there; where the weights went is compared at the end.

    A value within a rounding error of a kink (the larger of two in a max pool, a ReLU at zero) may
    go either way, and its gradient with it: on few sets of examples a right graph differs by that.
    A wrong graph differs on all of them, so it is refused when it differs on several.
    """
    for examples in range(_SETS_OF_EXAMPLES):
        batches = _batches(task, manifest.padding, examples)
        try:
            _verify_training(task, manifest, graph, batches)
        except ParityFailed:
            if examples == _SETS_OF_EXAMPLES - 1:
                raise
        else:
            return


def _verify_training(
    task: Task, manifest: PlanManifest, graph: bytes, batches: Sequence[_Batch]
) -> None:
    start = _weights_of(task.new_model())
    single = _trained(task, batches, torch.float32)
    try:
        double = _trained(task, batches, torch.float64)
    except RuntimeError:
        # A model that makes float32 tensors itself does not run in float64.
        double = single
    weights = start
    close_calls = 0
    for step, measured, after in _run_graph(task, manifest, graph, batches):
        expected = _measured(task, weights, batches[step], step)
        _compare(f"train loss at step {step + 1}", measured[0], expected[0])
        # A metric may count (accuracy): an example on the edge may fall to either side.
        differences = np.abs(measured[1:] - expected[1:])
        close_calls += bool((differences > _OUTPUT_TOLERANCE * (1 + np.abs(expected[1:]))).any())
        if close_calls > _CLOSE_CALLS:
            what = f"train metrics at step {step + 1}"
            raise ParityFailed(what, float(differences.max()), _OUTPUT_TOLERANCE)
        weights = after
    for weight in manifest.weights:
        if weight.role == "frozen":
            continue
        name = weight.tensor.name
        drift = _largest(single[name] - double[name])
        moved = _largest(double[name] - start[name])
        allowed = _OF_MOVE * moved + _OF_DRIFT * drift + _OF_SCALE * _largest(double[name])
        difference = _largest(weights[name] - double[name])
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
            output, answer = model(inputs), task.infer(model, inputs)
            measures = [task.loss, *task.metrics.values()]
            expected = [measure(output, targets)[:count].sum().item() for measure in measures]
        batch = {"input": inputs.numpy(), "target": targets.numpy(), "mask": mask.numpy()}
        sums = evaluate.run(None, feeds | batch)
        for name, have, want in zip(("loss", *manifest.metrics), sums, expected, strict=True):
            _compare(f"eval {name}", np.asarray(have), np.asarray(want))
        (predicted,) = predict.run(None, {"input": inputs.numpy()})
        _compare("infer output", predicted, answer.numpy())


def _batches(task: Task, padding: Padding, examples: int) -> list[_Batch]:
    batches = []
    for step in range(STEPS):
        rows = _PARTIAL_ROWS if step % _PARTIAL_EVERY == _PARTIAL_EVERY - 1 else _ROWS
        padded = _ROWS if padding is Padding.MASK else rows
        inputs, targets = random_batch(task, padded, seed=100 + step + 1000 * examples)
        batches.append(_Batch(inputs, targets, rows, _PROXIMAL_MU if step >= STEPS // 2 else 0.0))
    return batches


def _trained(task: Task, batches: Sequence[_Batch], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights in float64 after training as a user of torch writes it.

    FedProx by its gradient, mu (w - w_global).
    """
    model = task.new_model().to(dtype).train()
    origin = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _torch_optimizer(task, trained)
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        with CounterRandomness(torch.tensor(step)):
            loss, _ = _objective(task, model, batch, dtype)
            loss.backward()  # type: ignore[no-untyped-call] # torch's own
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and batch.mu:
                parameter.grad += batch.mu * (parameter.detach() - origin[name])
        optimizer.step()
    return _weights_of(model)


def _objective(
    task: Task, model: nn.Module, batch: _Batch, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """(loss, sums of the metrics) over the rows that count."""
    targets = batch.targets.to(dtype) if batch.targets.is_floating_point() else batch.targets
    inputs = batch.inputs.to(dtype) if batch.inputs.is_floating_point() else batch.inputs
    output = model(inputs)
    losses = task.loss(output, targets)[: batch.rows]
    loss = losses.sum() if task.loss_reduction == "sum" else losses.mean()
    with torch.no_grad():
        metrics = [
            metric(output.detach(), targets)[: batch.rows].sum() for metric in task.metrics.values()
        ]
    return loss, metrics


def _measured(task: Task, weights: Mapping[str, Tensor], batch: _Batch, step: int) -> Numbers:
    """`[loss, metric sums…]` of one training batch in torch, with these weights."""
    model = task.new_model().train()
    with torch.no_grad(), CounterRandomness(torch.tensor(step)):
        for name, tensor in _named(model).items():
            tensor.copy_(weights[name])
        loss, metrics = _objective(task, model, batch, torch.float32)
    return np.array([loss.item(), *(metric.item() for metric in metrics)])


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
) -> Iterator[tuple[int, Numbers, dict[str, Tensor]]]:
    """(step, `[loss, metric sums…]`, weights after it) as a device trains.

    Outputs of a step are inputs of the next.
    """
    runtime = session(graph)
    weights = {name: tensor.detach().numpy() for name, tensor in _named(task.new_model()).items()}
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
    for step, batch in enumerate(batches):
        feeds |= {
            "input": batch.inputs.numpy(),
            "target": batch.targets.numpy(),
            "mask": (np.arange(len(batch.inputs)) < batch.rows).astype(np.float32),
            "lr": np.array(task.defaults.learning_rate, np.float32),
            "mu": np.array(batch.mu, np.float32),
            "seed": np.array(step, np.int64),
        }
        results: Mapping[str, Array] = dict(zip(names, runtime.run(None, feeds), strict=True))
        for name, value in results.items():
            if name.startswith("next."):
                feeds[name.removeprefix("next.")] = value
        measured = [results["loss"], *(results[f"metric.{name}"] for name in manifest.metrics)]
        after = {
            spec.tensor.name: torch.from_numpy(np.array(feeds[spec.graph_name])).double()
            for spec in manifest.weights
        }
        yield step, np.array(measured, np.float64), after


def _named(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def _weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().double() for name, tensor in _named(model).items()}


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _compare(what: str, actual: Array, expected: Array) -> None:
    have, want = actual.astype(np.float64), expected.astype(np.float64)
    if have.shape != want.shape:
        raise PlanError(f"{what} has shape {have.shape}, in torch {want.shape}")
    allowed = _OUTPUT_TOLERANCE * (1.0 + float(np.abs(want).max(initial=0.0)))
    difference = float(np.abs(have - want).max(initial=0.0))
    if not difference <= allowed:
        raise ParityFailed(what, difference, allowed)
