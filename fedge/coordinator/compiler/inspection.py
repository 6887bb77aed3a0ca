"""What a model is, found by running it once: its tensors' roles, its output, and plain mistakes.

Most mistakes (a loss that is already reduced, an output without the batch in front, shapes that do
not fit the features) show here, in eager torch, where the message can name the layer; what is left
for the tracer are the models that no graph can express.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedge.coordinator.compiler.diagnosis import NO_OPERATOR, ModelTracker, explaining
from fedge.coordinator.compiler.examples import random_batch
from fedge.coordinator.compiler.randomness import CounterRandomness
from fedge.coordinator.compiler.step import (
    Layout,
    layout_of,
    mode_of,
    state_of,
    train_function,
    weights_of,
)
from fedge.coordinator.compiler.tracing import TRACE_BATCH
from fedge.coordinator.task import Task
from fedge.schemas.errors import UnsupportedModel
from fedge.schemas.plan import Padding
from fedge.schemas.tensor_spec import BATCH, TensorSpec
from fedge.schemas.tensors import Array

_DTYPES = {getattr(torch, name): name for name in ("float32", "int64", "int32", "uint8", "bool")}
_PADDING_ROWS = 3


@dataclass(frozen=True, slots=True)
class Inspection:
    """The facts that a plan is made of. `initial_weights`: copies, by tensor name."""

    layout: Layout
    output: TensorSpec
    initial_weights: dict[str, Array]


def inspect_model(task: Task, model: nn.Module, tracker: ModelTracker) -> Inspection:
    """The facts about `model`, which is left as it was.

    Raises `UnsupportedModel` naming the module and what to change.
    """
    _check_weights(model, tracker)
    initial = {name: tensor.clone() for name, tensor in weights_of(model).items()}
    before = {name: buffer._version for name, buffer in model.named_buffers()}
    identities = {name: id(buffer) for name, buffer in model.named_buffers()}
    inputs, targets = random_batch(task, TRACE_BATCH, seed=0)
    with (
        explaining(tracker),
        mode_of(model, training=True),
        CounterRandomness(torch.tensor(0)),
    ):
        output = tracker.wrap(model)(inputs)
        _check_output(output, tracker)
        _check_measure(task.loss(output, targets), "loss", tracker)
        for name, metric in task.metrics.items():
            _check_measure(metric(output.detach(), targets), f"metric {name!r}", tracker)
    if weights_of(model).keys() != initial.keys():
        raise UnsupportedModel(
            "the model makes parameters or buffers while it computes: "
            f"{sorted(weights_of(model).keys() ^ initial.keys())[:3]}",
            module="(the model itself)",
            operator=NO_OPERATOR,
            advice="Create them in __init__; a plan lists all tensors before the first step",
        )
    with explaining(tracker), torch.no_grad(), mode_of(model, training=False):
        answer = task.infer(model, inputs)
        _check_output(answer, tracker)
    mutated = frozenset(
        name
        for name, buffer in model.named_buffers()
        if buffer._version != before[name]
        or id(buffer) != identities[name]
        # Batch norm's kernel writes its statistics without raising the version.
        or not torch.equal(buffer, initial[name])
    )
    with torch.no_grad():
        for name, tensor in weights_of(model).items():
            tensor.copy_(initial[name])
    return Inspection(
        layout=layout_of(model, mutated),
        output=TensorSpec(
            name="output", dtype=_DTYPES[answer.dtype], shape=(BATCH, *answer.shape[1:])
        ),
        initial_weights={name: tensor.numpy() for name, tensor in initial.items()},
    )


def padding_of(task: Task, model: nn.Module, layout: Layout) -> Padding:
    """How partial batches are run: masked if padding changes nothing, else at their own size.

    Found by trying: a step on a few rows against the same rows followed by padding, both of zeros
    and of other examples. A model that mixes rows (batch norm) shows by its weights.
    """
    function = train_function(task, model, layout)
    rows = TRACE_BATCH - _PADDING_ROWS
    inputs, targets = random_batch(task, TRACE_BATCH, seed=1)
    example = train_example(task, model, layout, inputs, targets)
    exact = dict(example, input=inputs[:rows], target=targets[:rows], mask=torch.ones(rows))
    expected = function.call(*(exact[name] for name in function.inputs))
    mask = (torch.arange(TRACE_BATCH) < rows).to(torch.float32)
    for padded_inputs in (inputs, torch.cat([inputs[:rows], torch.zeros_like(inputs[rows:])])):
        padded = dict(example, input=padded_inputs, mask=mask)
        actual = function.call(*(padded[name] for name in function.inputs))
        for name, want, have in zip(function.outputs, expected, actual, strict=True):
            start = example.get(name.removeprefix("next."), torch.zeros(()))
            if not _close(want, have, start):
                return Padding.EXACT
    return Padding.MASK


def train_example(
    task: Task, model: nn.Module, layout: Layout, inputs: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """Arguments of the train function: the model's weights, a fresh optimizer, one batch."""
    weights = weights_of(model)
    names = layout.graph_names()
    trained = layout.names("parameter")
    return {
        # Copies: two inputs that are one tensor would be traced as one input.
        **{name: weights[name.partition(".")[2]].clone() for name in names},
        **{f"global.{name}": weights[name].clone() for name in trained},
        **{
            f"state.{spec.tensor.name}": torch.full(spec.tensor.shape, spec.fill)
            for spec in state_of(task, model, layout)
        },
        "input": inputs,
        "target": targets,
        "mask": torch.ones(len(inputs)),
        "lr": torch.tensor(task.defaults.learning_rate),
        "mu": torch.tensor(0.0),
        "seed": torch.tensor(0),
    }


def _close(want: Tensor, have: Tensor, start: Tensor) -> bool:
    """Equal up to rounding: 1e-4 of how far the step moved the tensor, and float32's own error."""
    want, have, start = want.double(), have.double(), start.double()
    moved = (want - start).abs().max()
    scale = torch.maximum(want.abs().max(), start.abs().max())
    allowed = 1e-4 * moved + 8 * torch.finfo(torch.float32).eps * scale
    return bool((want - have).abs().max() <= allowed)


def _check_weights(model: nn.Module, tracker: ModelTracker) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UnsupportedModel(
            "the model has no parameter to train",
            module="(the model itself)",
            operator=NO_OPERATOR,
            advice="Leave requires_grad=True on what devices should train",
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        owner = model.get_submodule(name.rpartition(".")[0])
        where = tracker.name_of(owner)
        if is_lazy(tensor):
            raise UnsupportedModel(
                f"the tensor {name!r} has no shape yet",
                module=where,
                operator=NO_OPERATOR,
                advice="Lazy modules must be run once on an example inside the model factory, or "
                "be replaced by modules of known size",
            )
        wanted = {torch.float32} if isinstance(tensor, nn.Parameter) else set(_DTYPES)
        if tensor.dtype not in wanted:
            raise UnsupportedModel(
                f"the tensor {name!r} is of {tensor.dtype}",
                module=where,
                operator=NO_OPERATOR,
                advice="Parameters must be float32 (call .float() on the model); buffers float32, "
                "int64, int32, uint8 or bool",
            )


def _check_output(output: object, tracker: ModelTracker) -> None:
    where = tracker.here
    if not isinstance(output, Tensor):
        raise UnsupportedModel(
            f"the model returns {type(output).__name__} instead of one tensor",
            module="(the model itself)",
            operator=NO_OPERATOR,
            advice="Return the one tensor that the loss and predictions need",
        )
    if tracker.complex_numbers is not None or output.is_complex():
        raise UnsupportedModel(
            "the model computes with complex numbers, which no plan can hold",
            module=(tracker.complex_numbers or where).module,
            operator=(tracker.complex_numbers or where).operator,
            advice="Keep real and imaginary parts as two real tensors; a discrete Fourier "
            "transform of fixed length is a matrix product with its cosines and sines",
        )
    if output.dim() == 0 or output.shape[0] != TRACE_BATCH:
        raise UnsupportedModel(
            f"the model's output has shape {list(output.shape)} for a batch of {TRACE_BATCH}; its "
            "first dimension is not the batch",
            module="(the model itself)",
            operator=where.operator,
            advice="Return [batch, …]: use batch_first=True in recurrent and attention layers, or "
            "transpose the output",
        )
    if output.dtype not in _DTYPES:
        raise UnsupportedModel(
            f"the model's output is of {output.dtype}",
            module="(the model itself)",
            operator=where.operator,
            advice="Return float32",
        )


def _check_measure(values: object, what: str, tracker: ModelTracker) -> None:
    if isinstance(values, Tensor) and values.shape == (TRACE_BATCH,):
        return
    shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
    if shape == []:
        advice = (
            'Do not reduce it: pass reduction="none" (functional.cross_entropy(output, target, '
            'reduction="none")); padding is masked by the plan before the mean is taken'
        )
    else:
        advice = "Sum or average over every dimension but the first: values.flatten(1).mean(dim=1)"
    raise UnsupportedModel(
        f"the {what} returns {shape} for a batch of {TRACE_BATCH} instead of [{TRACE_BATCH}], one "
        "value for each example",
        module=f"the task's {what}",
        operator=tracker.here.operator,
        advice=advice,
    )
