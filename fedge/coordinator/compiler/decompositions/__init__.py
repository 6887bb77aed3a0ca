"""What torch itself cannot take apart: ATen operators of backward passes, written in plain ATen.

`TABLE` is the default decomposition table of `torch.export` plus these. Each entry goes from ATen
to ATen, so that a decomposed program still runs in torch, where tests hold it to autograd.
"""

from fedge.coordinator.compiler.decompositions.table import TABLE

__all__ = ["TABLE"]
