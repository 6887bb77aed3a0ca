"""Making a version's `model.onnx` on the device, and the checks before anyone may use it.

The version's weights go into the plan's open `infer` graph, which must give byte for byte the file
whose digest the coordinator announced; then this device's own runtime must give the coordinator's
outputs for the golden inputs. A file that failed a check is never at the path that is served.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedge.edge_agent.durable import replace_file
from fedge.edge_agent.engines.interface import check_infer_graph
from fedge.edge_agent.engines.onnx_session import RUNTIME_ERRORS, open_session
from fedge.schemas.errors import PeerError, PlanRefused, RejectReason
from fedge.schemas.ids import Digest, sha256
from fedge.schemas.model_file import complete_model
from fedge.schemas.parity import check_parity
from fedge.schemas.plan import PlanManifest
from fedge.schemas.tensors import Tensors, check_tensors

_LATENCY_RUNS = 5
_RUNS_IN_TURNS = 15
"""Where two models are compared, a few runs more."""


@dataclass(frozen=True, slots=True)
class Activation:
    """What the checks found. `latency_ms`: one example, median of a few runs.

    `largest_difference`: over the golden outputs, of |ours - theirs| / max(1, |theirs|).
    `beside_ms`: the latency of the model beside it, if there is one, timed in turns with it.
    """

    latency_ms: float
    largest_difference: float
    beside_ms: float | None = None


def build_model(
    manifest: PlanManifest, infer_graph: bytes, weights: Tensors, expected: Digest
) -> bytes:
    """The version's `model.onnx`.

    Raises `PlanRefused` for a graph that breaks the rules, `PeerError` (digest_mismatch) if the
    file is not the announced one.
    """
    check_infer_graph(manifest, infer_graph)
    model = complete_model(manifest, infer_graph, weights)
    if (actual := sha256(model)) != expected:
        raise PeerError(
            RejectReason.DIGEST_MISMATCH,
            f"the model has the digest {actual[:12]}, the version announces {expected[:12]}",
        )
    return model


def activate(
    manifest: PlanManifest,
    model: bytes,
    golden_inputs: Tensors,
    golden_outputs: Tensors,
    output: Path,
    *,
    beside: Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Activation:
    """Runs the golden inputs through `model`, compares, and puts it at `output`.

    `golden_inputs`: `input`, `golden_outputs`: `output`, as the manifest's specifications say.
    `beside`: a model that is in use, which takes the same inputs.

    Raises `ParityFailed` if an output differs by more than `parity_tolerance` relative to
    max(1, |x|), `PeerError` for golden tensors that break the manifest, `PlanRefused` if the model
    does not run, `StoreError` if it cannot be written. `output` is as it was then.
    """
    check_tensors(golden_inputs, [manifest.features.tensor.of("input")])
    check_tensors(golden_outputs, [manifest.output.of("output")])
    inputs, theirs = golden_inputs["input"], golden_outputs["output"]
    session = open_session(model)
    try:
        ours = session.run(["output"], {"input": inputs})[0]
        other = None if beside is None else open_session(str(beside))
        times_s: list[float] = []
        beside_s: list[float] = []
        # In turns: what else the device does meanwhile slows both.
        for _ in range(_LATENCY_RUNS if other is None else _RUNS_IN_TURNS):
            for one, taken_s in ((session, times_s), (other, beside_s)):
                if one is not None:
                    started = clock()
                    one.run(["output"], {"input": inputs[:1]})
                    taken_s.append(clock() - started)
    except RUNTIME_ERRORS as error:
        raise PlanRefused(f"the version's model does not run here: {error}") from error
    largest = check_parity("golden outputs on this device", ours, theirs, manifest.parity_tolerance)
    replace_file(output, model)
    return Activation(
        statistics.median(times_s) * 1000,
        largest,
        statistics.median(beside_s) * 1000 if beside_s else None,
    )
