"""Plans compiled once for all tests of the session: compiling takes seconds, using takes none."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from compiler_models import ZOO

from fedge.coordinator.compiler import CompiledPlan, compile_task


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def plan_of() -> Callable[[str], CompiledPlan]:
    """Name in the zoo → its verified plan."""

    @cache
    def compiled(name: str) -> CompiledPlan:
        return compile_task(ZOO[name]())

    return compiled
