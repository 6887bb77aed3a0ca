"""A pure function of tensors → an exported program of plain ATen operators.

The function runs once on tensors without data, and what it does is recorded: forward, backward and
update in one. Only the batch's size stays open. What cannot be recorded is reported as
`UnsupportedModel` by `fedge.coordinator.compiler.diagnosis`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedge.coordinator.compiler.decompositions import TABLE
from fedge.coordinator.compiler.diagnosis import ModelTracker, check_recorded, fixed_batch
from fedge.coordinator.compiler.step import PureFunction

TRACE_BATCH = 7
"""Rows of the example. A model that computes with this very number is caught by it."""


def trace(
    function: PureFunction, example: Mapping[str, Tensor], tracker: ModelTracker
) -> ExportedProgram:
    """The program of `function`, its inputs and outputs in the function's order.

    `example`: a tensor for each input, with `TRACE_BATCH` rows where the batch is.
    Raises `UnsupportedModel` if the batch's size would be fixed or a shape would depend on data,
    and whatever torch raises.
    """
    tensors = [example[name] for name in function.inputs]
    batched = [name in function.batched for name in function.inputs]
    with portable_operators():
        recorded = _record(replace(function, call=tracker.wrap(function.call)), tensors, batched)
        check_recorded(recorded.graph, tracker)
        shapes = tuple({0: Dim.DYNAMIC} if is_batched else None for is_batched in batched)
        return torch.export.export(recorded, tuple(tensors), dynamic_shapes=shapes, strict=False)


@contextmanager
def portable_operators() -> Iterator[None]:
    """Attention, convolutions and recurrent layers as their definitions, not as fused kernels."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # Reading the oneDNN flags warns about GPUs that are not there.
        warnings.filterwarnings("ignore", message="TF32 acceleration", category=UserWarning)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
        torch.backends.mha.set_fastpath_enabled(False)
        yield


def _record(
    function: PureFunction, tensors: Sequence[Tensor], batched: Sequence[bool]
) -> GraphModule:
    fake_mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = []
    for tensor, is_batched in zip(tensors, batched, strict=True):
        sizes = [DimDynamic.STATIC] * tensor.dim()
        if is_batched:
            # Equal sizes share a symbol: input, target and mask have the same batch.
            sizes[0] = DimDynamic.DUCK
        context: StatelessSymbolicContext[..., object] = StatelessSymbolicContext(
            dynamic_sizes=sizes
        )
        fakes.append(fake_mode.from_tensor(tensor, symbolic_context=context))
    with fake_mode, enable_python_dispatcher():
        recorded = make_fx(function.call, decomposition_table=TABLE)(*fakes)
    for fake, is_batched in zip(fakes, batched, strict=True):
        if is_batched and isinstance(fake.shape[0], torch.SymInt):
            size = fake.shape[0].node.maybe_as_int()
            if size is not None:
                raise fixed_batch(size)
    return recorded
