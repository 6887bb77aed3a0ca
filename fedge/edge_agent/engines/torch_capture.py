"""A training step recorded as one CUDA graph: a launch instead of thousands.

Small models on a GPU spend their time launching kernels. A step whose shapes never change (padded
and masked batches) is recorded once and replayed: its inputs lie at fixed addresses, and its last
instructions copy the new weights over the old ones. (NVIDIA, "CUDA C++ Programming Guide", section
on CUDA graphs; `torch.cuda.graph`.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from fedge.edge_agent.engines.torch_kernels import Tensor
from fedge.edge_agent.engines.torch_program import Specialised

_NEXT = "next."


class CapturedStep:
    """`step` recorded on the values of `moving`, `fixed` and `batch`, nothing run yet.

    `moving`: graph inputs that outputs `next.…` replace. `fixed`: those that stay. `batch`: those
    that `replay` is given anew. `measure`: the outputs that are read, as one tensor.
    Raises `RuntimeError` if CUDA cannot record the step; no value has changed then.
    """

    def __init__(
        self,
        step: Specialised,
        moving: Mapping[str, Tensor],
        fixed: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        measure: Callable[[Mapping[str, Tensor]], Tensor],
    ) -> None:
        # Own copies: two names may share memory now, and must not once they are written in place.
        self.moving = {name: tensor.clone() for name, tensor in moving.items()}
        self._batch = {name: tensor.clone() for name, tensor in batch.items()}
        values = {**fixed, **self.moving, **self._batch}
        device = next(iter(values.values())).device
        with torch.cuda.device(device if device.type == "cuda" else None):
            self._record(step, values, measure)
        self._kept_alive = values

    def _record(
        self,
        step: Specialised,
        values: Mapping[str, Tensor],
        measure: Callable[[Mapping[str, Tensor]], Tensor],
    ) -> None:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # untyped in torch
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries take their workspaces outside the recording
            step.run(values)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            outputs = step.run(values)
            self._measures = measure(outputs)
            # An output may be a view of an input that another output is about to overwrite.
            new = {name: outputs[_NEXT + name].clone() for name in self.moving}
            for name, tensor in new.items():
                self.moving[name].copy_(tensor)

    def fits(self, batch: Mapping[str, Tensor]) -> bool:
        """Whether `batch` has the recorded shapes."""
        return all(batch[name].shape == own.shape for name, own in self._batch.items())

    def replay(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Takes one step; `moving` holds the new values. The measures, overwritten by the next."""
        for name, tensor in self._batch.items():
            tensor.copy_(batch[name])
        self._graph.replay()
        return self._measures
