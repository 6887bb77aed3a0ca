"""The versions on this device: blobs, the plan they belong to, and the one that is in use.

    <state>/blobs/…            verified blobs by digest: manifest, graphs, weights, golden
    <state>/models/…           a version's `model.onnx`, made and checked here
    <state>/active.json        which of them answers now: replaced in one step, never edited

An app opens the file that `active.json` names; a prediction needs no network and no agent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedge.edge_agent.durable import replace_file
from fedge.edge_agent.trainer.jobs import ActivateJob
from fedge.schemas.blob_files import BlobDirectory
from fedge.schemas.blobs import BlobRef
from fedge.schemas.errors import StoreError
from fedge.schemas.ids import Digest, VersionNumber
from fedge.schemas.messages import VersionAnnouncement
from fedge.schemas.plan import PlanManifest

ACTIVE_FILE = "active.json"


class ActiveModel(BaseModel):
    """What `active.json` says. `model`: a file name in `models/`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: VersionNumber
    plan_sha256: Digest
    model: Annotated[str, Field(pattern=r"^model-[0-9]{1,16}\.onnx$")]
    model_sha256: Digest


@dataclass(frozen=True, slots=True)
class Active:
    """The version in use: its number, its ONNX file and its plan's manifest, as paths."""

    version: int
    model: Path
    manifest: Path


class Library:
    """What lies in a device's state folder."""

    def __init__(self, state_dir: Path) -> None:
        self.blobs = BlobDirectory(state_dir / "blobs")
        self._models = state_dir / "models"
        self._active_file = state_dir / ACTIVE_FILE
        self._models.mkdir(parents=True, exist_ok=True)

    def manifest(self, plan: BlobRef) -> PlanManifest:
        """The manifest of a plan that is here. Raises `PlanRefused` or `StoreError`."""
        return PlanManifest.decode(self.blobs.read(plan.sha256))

    def needed(self, version: VersionAnnouncement, manifest: PlanManifest) -> tuple[BlobRef, ...]:
        """Every blob that training and predicting with a version take, its plan's first."""
        graphs = manifest.graphs
        return (graphs.train, graphs.infer, manifest.golden, version.weights, version.golden)

    def holds(self, version: VersionAnnouncement) -> bool:
        """Whether every blob of the version is here."""
        if not self.blobs.has(version.plan.sha256):
            return False
        needed = self.needed(version, self.manifest(version.plan))
        return all(self.blobs.has(ref.sha256) for ref in needed)

    def activation_of(self, version: VersionAnnouncement) -> ActivateJob:
        """The job that makes and checks the version's model."""
        manifest = self.manifest(version.plan)
        path = self.blobs.path
        return ActivateJob(
            manifest=path(version.plan.sha256),
            infer_graph=path(manifest.graphs.infer.sha256),
            weights=path(version.weights.sha256),
            golden_inputs=path(manifest.golden.sha256),
            golden_outputs=path(version.golden.sha256),
            model_sha256=version.model_sha256,
            output=self._models / f"model-{version.number}.onnx",
        )

    def activate(self, version: VersionAnnouncement) -> None:
        """Puts a model that passed its checks into use; older ones but the last go."""
        before = self.active()
        name = f"model-{version.number}.onnx"
        active = ActiveModel(
            version=version.number,
            plan_sha256=version.plan.sha256,
            model=name,
            model_sha256=version.model_sha256,
        )
        replace_file(self._active_file, active.model_dump_json().encode())
        kept = {name} | ({before.model.name} if before is not None else set())
        for path in self._models.glob("model-*.onnx"):
            if path.name not in kept:
                path.unlink(missing_ok=True)

    def active(self) -> Active | None:
        """The version in use, None before the first. Raises `StoreError` for a damaged record."""
        try:
            record = ActiveModel.model_validate_json(self._active_file.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise StoreError(f"{self._active_file} cannot be read: {error}") from error
        return Active(
            version=record.version,
            model=self._models / record.model,
            manifest=self.blobs.path(record.plan_sha256),
        )

    def forget_all_but(self, versions: Iterable[VersionAnnouncement]) -> None:
        """Deletes every blob that none of these versions, nor the one in use, needs."""
        kept: set[str] = set()
        for version in versions:
            kept.add(version.plan.sha256)
            kept |= {r.sha256 for r in self.needed(version, self.manifest(version.plan))}
        active = self.active()
        if active is not None:
            kept.add(active.manifest.name)
        for digest in list(self.blobs.digests()):
            if digest not in kept:
                self.blobs.delete(digest)
