"""The plan compiler: an engineer's torch code → graphs that a device runs without it.

The ways of torch end here: what comes out is a manifest, ONNX files and numpy arrays.
"""

from fedge.coordinator.compiler.plan import CompiledPlan, compile_task

__all__ = ["CompiledPlan", "compile_task"]
