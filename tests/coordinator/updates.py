"""Plans and update files for the tests of aggregation, optimizers and the store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedge.schemas.blobs import BlobRef, describe
from fedge.schemas.features import TabularFeatures, ValueTarget
from fedge.schemas.plan import Graphs, Padding, PlanManifest, TrainingDefaults, WeightSpec
from fedge.schemas.tensor_spec import TensorSpec
from fedge.schemas.tensors import Tensors, encode_tensors

LINEAR = (
    WeightSpec(tensor=TensorSpec(name="weight", dtype="float32", shape=(1, 2)), role="parameter"),
    WeightSpec(tensor=TensorSpec(name="bias", dtype="float32", shape=(1,)), role="parameter"),
)


def blob(text: str) -> BlobRef:
    """The reference of a blob that differs with its text."""
    return describe(text.encode())


def manifest_of(weights: Sequence[WeightSpec]) -> PlanManifest:
    """A manifest with these weights; its graphs are names only."""
    return PlanManifest(
        task="test",
        weights=tuple(weights),
        features=TabularFeatures(columns=2),
        target=ValueTarget(),
        output=TensorSpec(name="output", dtype="float32", shape=(-1, 1)),
        padding=Padding.MASK,
        defaults=TrainingDefaults(),
        graphs=Graphs(train=blob("train"), eval=blob("eval"), infer=blob("infer")),
        golden=blob("golden"),
    )


def write_update(folder: Path, device: str, tensors: Tensors) -> Path:
    """The file that a device's update would lie in."""
    path = folder / f"{device}.safetensors"
    path.write_bytes(encode_tensors(tensors))
    return path
