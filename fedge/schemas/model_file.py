"""A version's ONNX file: the plan's `infer` graph with the version's weights in it.

The coordinator announces its digest, each device makes it, the operator exports it: all three by
this function, so that it is one file, byte for byte. Where the plan quantises, this is where the
float32 weights that travelled become int8.
"""

from __future__ import annotations

from fedge.schemas.onnx_wire import embed_weights
from fedge.schemas.plan import PlanManifest, quantized_names
from fedge.schemas.quantization import quantized
from fedge.schemas.tensors import Array, Tensors


def complete_model(manifest: PlanManifest, infer_graph: bytes, weights: Tensors) -> bytes:
    """The file's bytes, the same for the same tensors. `weights`: named as in the manifest.

    Raises `PlanRefused` if the graph does not take these weights, `PeerError` (not_finite) if one
    that is to be quantised holds NaN or infinity.
    """
    int8 = () if manifest.quantization is None else manifest.quantization.int8
    named: dict[str, Array] = {}
    for spec in manifest.weights:
        weight = weights[spec.tensor.name]
        if spec.tensor.name in int8:
            named.update(zip(quantized_names(spec.graph_name), quantized(weight), strict=True))
        else:
            named[spec.graph_name] = weight
    return embed_weights(infer_graph, named)
