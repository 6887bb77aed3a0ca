"""The tasks that come with Fedge: name → where it is defined.

A table of references only, so that listing the names loads neither torch nor a model;
`fedge.coordinator.task.load_task` imports the one that is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

BUILT_IN_TASKS: Mapping[str, str] = MappingProxyType(
    {
        "digits": "fedge.coordinator.tasks.digits:digits",
        "hospitals": "fedge.coordinator.tasks.digits:hospitals",
        "mnist-2nn": "fedge.coordinator.tasks.mnist:mnist_2nn",
        "mnist-cnn": "fedge.coordinator.tasks.mnist:mnist_cnn",
        "mnist-fedavg-cnn": "fedge.coordinator.tasks.mnist:mnist_fedavg_cnn",
        "mnist-mlp": "fedge.coordinator.tasks.mnist:mnist_mlp",
        "next-word": "fedge.coordinator.tasks.next_word:next_word",
        "toy-linear": "fedge.coordinator.tasks.toy:toy_linear",
    }
)
