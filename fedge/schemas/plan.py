"""The plan manifest: what a device must know to train, measure and predict without model code.

A plan is three plain ONNX graphs and this manifest. The manifest's own bytes are a blob; its digest
is the plan's name. Parameters, buffers and optimizer state are graph *inputs*, so a plan travels
once and a round moves weights only. The names of graph inputs and outputs follow from the tensor
names by the prefixes below, and nothing else is allowed in a graph's interface.

    train: param.* frozen.* buffer.* state.* global.*  input target mask lr mu seed
           → next.param.* next.buffer.* next.state.*  loss  metric.*
    eval:  param.* frozen.* buffer.*  input target mask  → loss  metric.*   (sums over the batch)
    infer: input → output, with param.* frozen.* buffer.* left open: a version's weights fill them;
           in a quantised plan, int8.param.x and scale.param.x in place of a param.x
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedge.schemas.blobs import BlobRef
from fedge.schemas.errors import PlanRefused
from fedge.schemas.features import FeatureSpec, TargetSpec, WordFeatures
from fedge.schemas.ids import Digest, sha256
from fedge.schemas.measures import MetricName, RatioSpec, impossible, measure_names, measured
from fedge.schemas.tensor_spec import TensorSpec

MAX_MANIFEST_BYTES = 1024 * 1024
MAX_GRAPH_BYTES = 64 * 1024 * 1024


class Padding(StrEnum):
    """What a device does with the last, partial batch of an epoch."""

    MASK = "mask"
    """Pad it to the full size; masked rows change nothing."""
    EXACT = "exact"
    """Run it at its own size: the model mixes rows (batch norm), so padding would change it."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WeightSpec(_Frozen):
    """One tensor of a version.

    `role`: `parameter` is trained and sent back; `frozen` is delivered and never trained;
    `buffer` is changed by the model itself (batch-norm statistics): float buffers are averaged
    like parameters, integer buffers stay as the coordinator has them.
    """

    tensor: TensorSpec
    role: Literal["parameter", "frozen", "buffer"]

    @property
    def graph_name(self) -> str:
        """The name of this tensor's graph input."""
        prefix = {"parameter": "param", "frozen": "frozen", "buffer": "buffer"}[self.role]
        return f"{prefix}.{self.tensor.name}"

    @property
    def is_updated(self) -> bool:
        """Whether a client update carries a difference for this tensor."""
        return self.role != "frozen" and self.tensor.dtype.startswith("float")


class StateSpec(_Frozen):
    """One tensor of the device's optimizer, `fill` at the start of each round's training."""

    tensor: TensorSpec
    fill: float = 0.0


class TrainingDefaults(_Frozen):
    """What an assignment says unless the operator set it: the task author's choice."""

    batch_size: Annotated[int, Field(ge=1, le=65536)] = 32
    learning_rate: Annotated[float, Field(gt=0, le=1e3)] = 0.01
    local_epochs: Annotated[int, Field(ge=1, le=1000)] = 1
    proximal_mu: Annotated[float, Field(ge=0, le=1e3)] = 0.0


class Graphs(_Frozen):
    """The three graphs, each a blob of `ai.onnx` operators only."""

    train: BlobRef
    eval: BlobRef
    infer: BlobRef


class Quantization(_Frozen):
    """What the inference file holds as int8 instead of float32. `int8`: tensor names, maybe none.

    See `fedge.schemas.quantization`. Training, and what travels, is float32 in any case.
    """

    int8: Annotated[tuple[str, ...], Field(max_length=4096)]


class PlanManifest(_Frozen):
    """Everything about a task that a device needs, immutable, named by its digest.

    `weights`: the tensors of a version in order. `state`: the optimizer's tensors; names are free.
    `target`: what the loss compares with. `output`: what `infer` returns.
    `golden`: safetensors with `input`: the examples of the parity check. `metrics`: sums of them
    are what the graphs give; `ratios`: what is told of those that a ratio names. `vocabulary`: the
    words of word features, see `fedge.schemas.words`. `quantization`: of the inference file; None
    for one of float32, and then it is not in the manifest's bytes, which are those of releases that
    did not know it.
    """

    v: Literal[1] = 1
    task: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")]
    weights: Annotated[tuple[WeightSpec, ...], Field(min_length=1, max_length=4096)]
    state: Annotated[tuple[StateSpec, ...], Field(max_length=8192)] = ()
    features: FeatureSpec
    target: TargetSpec
    output: TensorSpec
    metrics: Annotated[tuple[MetricName, ...], Field(max_length=16)] = ()
    ratios: Annotated[tuple[RatioSpec, ...], Field(max_length=16)] = ()
    loss_reduction: Literal["mean", "sum"] = "mean"
    padding: Padding
    defaults: TrainingDefaults
    graphs: Graphs
    golden: BlobRef
    vocabulary: BlobRef | None = None
    parity_tolerance: Annotated[float, Field(gt=0, le=1e-2)] = 1e-4
    opset: Annotated[int, Field(ge=18, le=30)] = 18
    quantization: Quantization | None = None

    @model_validator(mode="after")
    def _ratios_are_of_metrics(self) -> PlanManifest:
        for ratio in self.ratios:
            if ratio.name in self.metrics or not {ratio.numerator, ratio.denominator} <= {
                *self.metrics
            }:
                raise ValueError(f"the ratio {ratio.name!r} is not of two of the metrics")
        return self

    @model_validator(mode="after")
    def _words_need_a_vocabulary(self) -> PlanManifest:
        if isinstance(self.features, WordFeatures) != (self.vocabulary is not None):
            raise ValueError("a vocabulary, and word features: both or neither")
        return self

    @model_validator(mode="after")
    def _quantized_weights_have_rows(self) -> PlanManifest:
        if self.quantization is None:
            return self
        able = {w.tensor.name for w in self.weights if w.tensor.dtype == "float32"}
        able -= {w.tensor.name for w in self.weights if not w.tensor.shape}
        names = self.quantization.int8
        if len(set(names)) != len(names) or not able.issuperset(names):
            raise ValueError("int8 names a weight twice, or one that is not a float32 tensor")
        return self

    @property
    def infer_names(self) -> tuple[str, ...]:
        """What the `infer` graph may leave open: each weight, or its int8 form and its scales."""
        int8 = () if self.quantization is None else self.quantization.int8
        names: list[str] = []
        for weight in self.weights:
            names += (
                quantized_names(weight.graph_name)
                if weight.tensor.name in int8
                else (weight.graph_name,)
            )
        return tuple(names)

    @property
    def blobs(self) -> tuple[BlobRef, ...]:
        """Everything that the manifest names and a device fetches with it."""
        graphs = (self.graphs.train, self.graphs.eval, self.graphs.infer, self.golden)
        return graphs if self.vocabulary is None else (*graphs, self.vocabulary)

    @property
    def measures(self) -> tuple[str, ...]:
        """The names under which something is told of an evaluation or a training."""
        return measure_names(self.metrics, self.ratios)

    def measured(self, sums: Mapping[str, float], examples: int) -> dict[str, float]:
        """Sums of the metrics over so many examples → the measures of `fedge.schemas.measures`."""
        return measured(sums, examples, self.metrics, self.ratios)

    def impossible(self, sums: Mapping[str, float], examples: int) -> str | None:
        """See `measures.impossible`."""
        return impossible(sums, examples, self.metrics, self.ratios)

    @property
    def update_specs(self) -> tuple[TensorSpec, ...]:
        """The tensors of a client update: float32 differences."""
        return tuple(w.tensor for w in self.weights if w.is_updated)

    @property
    def weight_specs(self) -> tuple[TensorSpec, ...]:
        """The tensors of a version."""
        return tuple(w.tensor for w in self.weights)

    def encode(self) -> bytes:
        """The manifest's bytes, the same for equal manifests."""
        unused = {"quantization"} if self.quantization is None else None
        return self.model_dump_json(exclude=unused).encode()

    @property
    def digest(self) -> Digest:
        """The plan's name."""
        return sha256(self.encode())

    @classmethod
    def decode(cls, data: bytes) -> PlanManifest:
        """Parses a manifest. Raises `PlanRefused` with the first thing that is wrong."""
        if len(data) > MAX_MANIFEST_BYTES:
            raise PlanRefused(f"a manifest of {len(data)} bytes, at most {MAX_MANIFEST_BYTES}")
        try:
            manifest = cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise PlanRefused(f"the plan's {where or 'manifest'}: {first['msg']}") from error
        for graph in (manifest.graphs.train, manifest.graphs.eval, manifest.graphs.infer):
            if graph.size_bytes > MAX_GRAPH_BYTES:
                raise PlanRefused(f"a graph of {graph.size_bytes} bytes, at most {MAX_GRAPH_BYTES}")
        return manifest


def quantized_names(graph_name: str) -> tuple[str, str]:
    """What a graph reads in place of the weight `graph_name`: its int8 form, and its scales."""
    return f"int8.{graph_name}", f"scale.{graph_name}"
