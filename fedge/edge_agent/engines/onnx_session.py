"""Opening onnxruntime sessions the way a small device wants them.

One thread unless told otherwise, no spinning while a thread waits, and the smaller of onnxruntime's
ways to hold memory: an arena without planned patterns. Without the arena every step returns large
blocks to the system and gets them again page by page, and the heap in between falls to pieces; with
patterns, the plan of a whole step stays allocated. On training steps of two convolutional nets
the arena alone took 10 to 25% less memory than either, and no more time; the levels of graph
optimisation made no difference there. Only the CPU provider: it is the one that is everywhere.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import (
    EPFail,
    Fail,
    InvalidArgument,
    InvalidGraph,
    InvalidProtobuf,
    NoSuchFile,
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
    NoSuchFile,
    NotImplemented,
    RuntimeException,
    RuntimeError,
    ValueError,
    MemoryError,
)
"""What onnxruntime raises: it has no common base class, and plain errors where it binds arrays."""

_FATAL_ONLY = 4

_DTYPES: dict[str, npt.DTypeLike] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


def open_session(
    graph: bytes | str, *, threads: int = 1, keep_repacked: bool = True
) -> onnxruntime.InferenceSession:
    """A session for `graph`: a serialised model, or the path of one.

    `keep_repacked`: whether weights are kept in the order of the kernels, beside their own where
    both are needed. Without it a keyboard's model of 1.41 million parameters took 4.5 MB less, and
    0.08 ms more for an answer of 0.5.

    Raises `PlanRefused` if onnxruntime cannot load it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.enable_cpu_mem_arena = True
    options.enable_mem_pattern = False
    options.log_severity_level = _FATAL_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not keep_repacked:
        options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except RUNTIME_ERRORS as error:
        raise PlanRefused(f"onnxruntime cannot load the graph: {error}") from error


def dtype_of(argument: onnxruntime.NodeArg) -> np.dtype[np.generic]:
    """The numpy type of a graph input or output. Raises `PlanRefused` for one that plans lack."""
    try:
        return np.dtype(_DTYPES[argument.type])
    except KeyError as error:
        raise PlanRefused(
            f"{argument.name} is a {argument.type}; plans have tensors only"
        ) from error
