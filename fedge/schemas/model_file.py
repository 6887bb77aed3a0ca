"""A version's ONNX file: the plan's `infer` graph with the version's weights in it.

The coordinator announces its digest, each device makes it, the operator exports it: all three by
this function, so that it is one file, byte for byte.
"""

from __future__ import annotations

from fedge.schemas.onnx_wire import embed_weights
from fedge.schemas.plan import PlanManifest
from fedge.schemas.tensors import Tensors


def complete_model(manifest: PlanManifest, infer_graph: bytes, weights: Tensors) -> bytes:
    """The file's bytes, the same for the same tensors. `weights`: named as in the manifest.

    Raises `PlanRefused` if the graph does not take these weights.
    """
    named = {spec.graph_name: weights[spec.tensor.name] for spec in manifest.weights}
    return embed_weights(infer_graph, named)
