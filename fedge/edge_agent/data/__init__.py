"""The device's own examples: where they lie, how they are read, how virtual devices share them.

`open_examples` returns raw arrays as the device has them; the plan's feature specification turns
them into tensors. Nothing here knows a plan, a round or a network.
"""

from fedge.edge_agent.data.config import DataConfig, DataFormat, PartitionConfig
from fedge.edge_agent.data.examples import (
    Examples,
    count_examples,
    open_examples,
    split_to_files,
)
from fedge.edge_agent.data.partition import Scheme, parse_scheme, partition

__all__ = [
    "DataConfig",
    "DataFormat",
    "Examples",
    "PartitionConfig",
    "Scheme",
    "count_examples",
    "open_examples",
    "parse_scheme",
    "partition",
    "split_to_files",
]
