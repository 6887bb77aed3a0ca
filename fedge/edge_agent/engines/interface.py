"""The door for a plan's graphs: no runtime sees one that did not pass here.

A plan comes from the network, so its graphs are untrusted input even when they are signed. What a
graph must take and return follows from the manifest by the naming rules of `fedge.schemas.plan`;
which operators it may use is `fedge.schemas.onnx_wire`'s to say.
"""

from __future__ import annotations

from fedge.schemas.blobs import BlobRef
from fedge.schemas.errors import PlanRefused
from fedge.schemas.ids import sha256
from fedge.schemas.onnx_wire import INFER_OPERATORS, check_graph
from fedge.schemas.plan import PlanManifest
from fedge.schemas.tensor_spec import BATCH


def check_train_graph(manifest: PlanManifest, graph: bytes) -> None:
    """Raises `PlanRefused` unless `graph` is the manifest's `train`, by digest and by the rules."""
    _check_digest("train", manifest.graphs.train, graph)
    for spec in (*manifest.weight_specs, *(state.tensor for state in manifest.state)):
        if BATCH in spec.shape:
            raise PlanRefused(f"the tensor {spec.name!r} has a free dimension: {list(spec.shape)}")
    parameters = [w.tensor.name for w in manifest.weights if w.role == "parameter"]
    state = [f"state.{spec.tensor.name}" for spec in manifest.state]
    moving = [w.graph_name for w in manifest.weights if w.role != "frozen"] + state
    check_graph(
        graph,
        inputs=[
            *(weight.graph_name for weight in manifest.weights),
            *state,
            *(f"global.{name}" for name in parameters),
            *("input", "target", "mask", "lr", "mu", "seed"),
        ],
        outputs=[*(f"next.{name}" for name in moving), *measure_names(manifest)],
    )


def check_eval_graph(manifest: PlanManifest, graph: bytes) -> None:
    """Raises `PlanRefused` unless `graph` is the manifest's `eval`, by digest and by the rules."""
    _check_digest("eval", manifest.graphs.eval, graph)
    weights = [weight.graph_name for weight in manifest.weights]
    check_graph(
        graph, inputs=[*weights, "input", "target", "mask"], outputs=measure_names(manifest)
    )


def check_infer_graph(manifest: PlanManifest, graph: bytes) -> None:
    """Raises `PlanRefused` unless `graph` is the manifest's `infer`, by digest and by the rules."""
    _check_digest("infer", manifest.graphs.infer, graph)
    check_graph(
        graph,
        inputs=["input"],
        outputs=["output"],
        open_names=manifest.infer_names,
        operators=INFER_OPERATORS,
    )


def measure_names(manifest: PlanManifest) -> tuple[str, ...]:
    """The outputs of `train` and `eval` that measure a batch, the loss first."""
    return ("loss", *(f"metric.{name}" for name in manifest.metrics))


def _check_digest(what: str, ref: BlobRef, graph: bytes) -> None:
    if (actual := sha256(graph)) != ref.sha256:
        raise PlanRefused(
            f"the {what} graph has the digest {actual[:12]}, the manifest names {ref.sha256[:12]}"
        )
