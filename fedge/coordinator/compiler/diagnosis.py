"""What went wrong in somebody's model, in terms of that model: which module, which operator, why.

Torch says what it could not do with a graph; an engineer needs to know which layer to change and
how. Modules are followed by hooks while the model runs, operators by a dispatch mode, so that an
operator that fails later, in another form, can still be traced to the module that used it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._python_dispatch import TorchDispatchMode

from fedge.schemas.errors import FedgeError, UnsupportedModel
from fedge.schemas.onnx_wire import ALLOWED_OPERATORS, inspect_graph

NO_OPERATOR = "none"
_OUTSIDE = "outside the model: its loss, metrics or gradient"


class Located(NamedTuple):
    """Where the model is while it runs."""

    module: str
    operator: str


class ModelTracker(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's own
    """Follows a running model: which module is active, and which module used which operator.

    Use as a context manager around the run; `here` says where it is, or was when it failed.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's own
        self._paths = {
            module: f"{path or '(the model itself)'} ({type(module).__name__})"
            for path, module in model.named_modules()
        }
        self._active: list[nn.Module] = []
        self._last_operator = NO_OPERATOR
        self._first_use: dict[str, str] = {}
        self._complex: Located | None = None

    @property
    def here(self) -> Located:
        """The innermost active module and the last operator."""
        return Located(self._module(), self._last_operator)

    def name_of(self, module: nn.Module) -> str:
        """The module's path and type, as findings name it."""
        return self._paths[module]

    @property
    def complex_numbers(self) -> Located | None:
        """Where a complex number first appeared, or None."""
        return self._complex

    def user_of(self, operator: str) -> Located:
        """The module that first used `operator`, or the operator that it most looks like.

        What an exporter refuses is often a part of what the module called (`prims.erf_inv` of
        `aten.erfinv`) or its gradient, so names are compared by likeness.
        """
        if operator in self._first_use:
            return Located(self._first_use[operator], operator)
        near = {_bare(used): used for used in self._first_use}
        match = difflib.get_close_matches(_bare(operator), near, n=1, cutoff=0.6)
        if not match:
            return Located(_OUTSIDE, operator)
        return Located(self._first_use[near[match[0]]], near[match[0]])

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, followed while it runs."""

        def followed(*args: Any) -> Any:
            with self.following():
                return function(*args)

        return followed

    @contextmanager
    def following(self) -> Iterator[ModelTracker]:
        """Follows modules and operators within."""
        handles = []
        for module in self._paths:
            handles.append(module.register_forward_pre_hook(self._entered))
            handles.append(module.register_forward_hook(self._left))
        self._active.clear()
        try:
            with self:
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self._last_operator = str(func)
        if self._active:
            self._first_use.setdefault(str(func), self._module())
        result = func(*args, **(kwargs or {}))
        if self._complex is None and isinstance(result, Tensor) and result.is_complex():
            self._complex = self.here
        return result

    def _module(self) -> str:
        return self._paths[self._active[-1]] if self._active else _OUTSIDE

    def _entered(self, module: nn.Module, _: object) -> None:
        self._active.append(module)

    def _left(self, module: nn.Module, _: object, __: object) -> None:
        # Without `always_call`: after an exception the stack still says where it came from.
        if self._active and self._active[-1] is module:
            self._active.pop()


def _bare(operator: str) -> str:
    """`aten._special_i1_backward.default` → `speciali1`."""
    return operator.split(".")[1].removesuffix("_backward").replace("_", "")


def fixed_batch(size: int) -> UnsupportedModel:
    """The model computes with the number of rows of the example as if it were a constant."""
    return UnsupportedModel(
        f"the model turns the batch's size into a constant (here {size})",
        module="not known",
        operator=NO_OPERATOR,
        advice="Do not call int() or len() on the batch's size or build shapes from a fixed one: "
        "use x.shape[0] or -1 in view and reshape, and keep the batch in the first dimension",
    )


class _Rule(NamedTuple):
    pattern: re.Pattern[str]
    problem: str
    advice: str


_DYNAMIC_SHAPE = _Rule(
    re.compile(r"DynamicOutputShape|nonzero|masked_select|aten\.unique"),
    "the model makes a tensor whose shape depends on the data",
    "Keep the shape and put zeros in place of what is left out: x * mask or torch.where",
)

_RULES = (
    _Rule(
        re.compile(
            r"DataDependentOutput|GuardOnDataDependent|_local_scalar_dense|data-dependent|"
            r"is_nonzero|\.item\(\)|Could not guard|unbacked",
            re.IGNORECASE,
        ),
        "the model decides by the values of its data (an `if`, `while`, `.item()` or `int()` on a "
        "tensor), and a graph has no such branch",
        "Compute both sides and choose with torch.where(condition, a, b), or make the choice from "
        "shapes and settings, which are fixed",
    ),
    _DYNAMIC_SHAPE,
    _Rule(
        re.compile(r"\.numpy\(\)|numpy\(\) on|Tensor\.numpy|not supported for tensor subclasses"),
        "the model leaves torch (numpy or Python numbers) while it computes",
        "Write the computation in torch operations",
    ),
    _Rule(
        re.compile(r"does not require grad|element 0 of tensors"),
        "the loss has no gradient",
        "The loss must depend on the output by differentiable operations: no argmax, rounding, "
        "comparison or detach() on the way; at least one parameter needs requires_grad=True",
    ),
    _Rule(
        re.compile(r"FakeTensor|fake tensor|non-Fake Tensor", re.IGNORECASE),
        "the model mixes in a tensor that is not part of it",
        "Register constant tensors with register_buffer, and create others with torch.zeros, "
        "torch.arange … inside forward; do not keep results of forward in attributes",
    ),
)

_MISSING = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)', overload='(\w+)'\)>")


def explain(error: Exception, tracker: ModelTracker) -> UnsupportedModel:
    """The finding about the user's model behind an exception of torch's tracer or exporter."""
    text = "\n".join(f"{type(one).__name__}: {one}" for one in _chain(error))
    where = tracker.here
    if tracker.complex_numbers is not None:
        return UnsupportedModel(
            "the model computes with complex numbers, which no plan can hold",
            module=tracker.complex_numbers.module,
            operator=tracker.complex_numbers.operator,
            advice="Keep real and imaginary parts as two real tensors; a discrete Fourier "
            "transform of fixed length is a matrix product with its cosines and sines",
        )
    missing = _MISSING.search(text)
    if missing is not None:
        return _without_form(*tracker.user_of(f"{missing[1]}.{missing[2]}"))
    for rule in _RULES:
        if rule.pattern.search(text):
            return UnsupportedModel(
                rule.problem, module=where.module, operator=where.operator, advice=rule.advice
            )
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UnsupportedModel(
        f"the model cannot be traced: {first_line}",
        module=where.module,
        operator=where.operator,
        advice="Reduce the module to elementary torch operations on its input, with shapes that "
        "depend on nothing but the batch's size",
    )


def check_recorded(graph: torch.fx.Graph, tracker: ModelTracker) -> None:
    """Raises `UnsupportedModel` if a recorded operator's result has a shape that data decides."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and free_unbacked_symbols(value.shape):
            where = tracker.user_of(str(node.target))
            raise UnsupportedModel(
                _DYNAMIC_SHAPE.problem,
                module=where.module,
                operator=where.operator,
                advice=_DYNAMIC_SHAPE.advice,
            )


def check_operators(graph: bytes, tracker: ModelTracker) -> None:
    """Raises `UnsupportedModel` if the ONNX graph has an operator that no device would accept."""
    for domain, operator in sorted(inspect_graph(graph).operators):
        if domain or operator not in ALLOWED_OPERATORS:
            module, found = tracker.user_of(f"onnx.{operator.lower()}.default")
            raise _without_form(module, f"{found} (as {domain or 'ai.onnx'}::{operator})")


def _without_form(module: str, operator: str) -> UnsupportedModel:
    return UnsupportedModel(
        "an operator of the model has no form among the ai.onnx operators of a plan",
        module=module,
        operator=operator,
        advice="Write it with elementary operations (sums, products, exp, where, gather), or use "
        "a layer that is supported in its place",
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


@contextmanager
def explaining(tracker: ModelTracker) -> Iterator[None]:
    """Turns what torch raises within into `UnsupportedModel`; Fedge's own errors pass."""
    try:
        yield
    except FedgeError:
        raise
    except Exception as error:  # torch's tracer raises types of every kind
        raise explain(error, tracker) from error
