"""Opening onnxruntime sessions on the coordinator: the CPU provider, on so many threads.

It is the runtime of the devices, so what is measured or compared here holds for them. Only the CPU
provider: it is the one that is everywhere.
"""

from __future__ import annotations

import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import (
    EPFail,
    Fail,
    InvalidArgument,
    InvalidGraph,
    InvalidProtobuf,
    NotImplemented,  # noqa: A004 -- onnxruntime's name for an operator without a kernel
    RuntimeException,
)

from fedge.schemas.errors import PlanRefused

RUNTIME_ERRORS = (
    EPFail,
    Fail,
    InvalidArgument,
    InvalidGraph,
    InvalidProtobuf,
    NotImplemented,
    RuntimeException,
    RuntimeError,
    ValueError,
)
"""What onnxruntime raises: it has no common base class, and plain errors where it binds arrays."""

_FATAL_ONLY = 4


def open_session(model: bytes, threads: int) -> onnxruntime.InferenceSession:
    """A session for the ONNX file `model` on `threads` cores.

    Raises `PlanRefused` if onnxruntime cannot load it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # What is raised is reported by the caller; onnxruntime's own lines on stderr say it twice.
    options.log_severity_level = _FATAL_ONLY
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except RUNTIME_ERRORS as error:
        raise PlanRefused(f"onnxruntime cannot load the graph: {error}") from error
