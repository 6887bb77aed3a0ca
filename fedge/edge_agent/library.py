"""The versions on this device: blobs, the plan they belong to, and the one that is in use.

    <state>/blobs/…            verified blobs by digest: manifest, graphs, weights, golden
    <state>/models/…           a version's `model.onnx`, made and checked here
    <state>/active.json        which of them answers now: replaced in one step, never edited

An app opens the file that `active.json` names; a prediction needs no network and no agent.
"""

from __future__ import annotations

import contextlib
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedge.edge_agent.cache import sizes_of, superfluous
from fedge.edge_agent.durable import disk, is_partial, replace_file
from fedge.edge_agent.trainer.jobs import ActivateJob
from fedge.schemas.blob_files import BlobDirectory
from fedge.schemas.blobs import BlobRef
from fedge.schemas.errors import StoreError, StoreUnavailable
from fedge.schemas.ids import Digest, VersionNumber
from fedge.schemas.messages import VersionAnnouncement
from fedge.schemas.plan import PlanManifest
from fedge.schemas.words import Vocabulary

ACTIVE_FILE = "active.json"
PART = ".part"
"""How `BlobDirectory` names what is still arriving."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
# A plan serves many versions, and in a fleet on one host many devices.
_decoded = functools.lru_cache(maxsize=4)(PlanManifest.decode)
_MODEL = re.compile(r"model-([0-9]{1,16})\.onnx")


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
    """What lies in a device's state folder.

    `cache_limit_bytes`: of all blobs together, whole and arriving; None: no limit.
    Every method raises `StoreUnavailable` for a disk that cannot be used now.
    """

    def __init__(self, state_dir: Path, cache_limit_bytes: int | None = None) -> None:
        self.blobs = BlobDirectory(state_dir / "blobs")
        self._cache_limit_bytes = cache_limit_bytes
        self._state_dir = state_dir
        self._models = state_dir / "models"
        self._active_file = state_dir / ACTIVE_FILE
        with disk(f"make {self._models}"):
            self._models.mkdir(parents=True, exist_ok=True)

    def manifest(self, plan: BlobRef) -> PlanManifest:
        """The manifest of a plan that is here. Raises `PlanRefused` or `StoreError`.

        A damaged one is removed, so that it is fetched again.
        """
        try:
            data = self.blobs.read(plan.sha256)
        except StoreUnavailable:
            raise
        except StoreError:
            self.blobs.delete(plan.sha256)
            raise
        return _decoded(data)

    def vocabulary(self, manifest: PlanManifest) -> Vocabulary | None:
        """The words of a plan, None if it has none. Raises `StoreError` if they are not here."""
        if manifest.vocabulary is None:
            return None
        return Vocabulary.decode(self.blobs.read(manifest.vocabulary.sha256))

    def refs_of(self, version: VersionAnnouncement) -> tuple[BlobRef, ...]:
        """Every blob of a version that can be named now: its plan's only once the manifest is here.

        Raises as `manifest` does.
        """
        if not self.blobs.has(version.plan.sha256):
            return (version.plan, version.weights, version.golden)
        return (version.plan, *self.needed(version, self.manifest(version.plan)))

    def make_room(self, version: VersionAnnouncement, in_hand: VersionAnnouncement | None) -> None:
        """Deletes every blob that neither `version`, the version in hand nor the one in use needs.

        Raises `CacheTooSmall` if they are above the limit together; nothing is deleted then.
        """
        needed = sizes_of(self.refs_of(version))
        if in_hand is not None:
            needed |= sizes_of(self.refs_of(in_hand))
        present = self._present()
        for digest in self._active_needs():
            if digest in present:
                needed.setdefault(digest, present[digest])
        what = f"version {version.number} and the version in hand"
        for digest in superfluous(present, needed, self._cache_limit_bytes, what):
            self.blobs.delete(digest)

    def sweep(self) -> None:
        """Removes what a crash left half-written, and models that are not in use any more.

        For the start, before anybody writes. The model before the one in use stays: an app may have
        it open.
        """
        self.blobs.sweep()
        with disk(f"sweep {self._state_dir}"):
            for folder in (self._state_dir, self._models):
                for path in folder.iterdir():
                    if is_partial(path):
                        path.unlink(missing_ok=True)
        try:
            active = self.active()
        except StoreError:
            # Until the version in hand is in use anew, nobody knows which model is the good one.
            return
        if active is not None:
            older = [n for n in self._model_numbers() if n < active.version]
            self._keep_models({active.version, *sorted(older)[-1:]})

    def needed(self, version: VersionAnnouncement, manifest: PlanManifest) -> tuple[BlobRef, ...]:
        """Every blob that training and predicting with a version take, its plan's first."""
        graphs = manifest.graphs
        words = () if manifest.vocabulary is None else (manifest.vocabulary,)
        return (
            *(graphs.train, graphs.infer, manifest.golden, *words),
            *(version.weights, version.golden),
        )

    def holds(self, version: VersionAnnouncement) -> bool:
        """Whether every blob of the version is here. One that was cut short is removed.

        Raises as `manifest` does.
        """
        if not self._has(version.plan):
            return False
        absent = [r for r in self.needed(version, self.manifest(version.plan)) if not self._has(r)]
        return not absent

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
            output=self._models / _model_name(version.number),
        )

    def activate(self, version: VersionAnnouncement) -> None:
        """Puts a model that passed its checks into use; older ones but the last go."""
        try:
            before = self.active()
        except StoreError:
            before = None
        active = ActiveModel(
            version=version.number,
            plan_sha256=version.plan.sha256,
            model=_model_name(version.number),
            model_sha256=version.model_sha256,
        )
        replace_file(self._active_file, active.model_dump_json().encode())
        self._keep_models({version.number} | ({before.version} if before is not None else set()))

    def active(self) -> Active | None:
        """The version in use, None before the first.

        Raises `StoreError` for a record that is damaged or names a model that is gone.
        """
        try:
            record = ActiveModel.model_validate_json(self._active_file.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise StoreError(f"{self._active_file} cannot be read: {error}") from error
        model = self._models / record.model
        if not model.is_file():
            raise StoreError(f"{self._active_file} names {model}, which is gone")
        return Active(
            version=record.version, model=model, manifest=self.blobs.path(record.plan_sha256)
        )

    def _active_needs(self) -> tuple[Digest, ...]:
        """What answering with the version in use takes, beside its model."""
        try:
            active = self.active()
            if active is None:
                return ()
            words = _decoded(self.blobs.read(active.manifest.name)).vocabulary
        except StoreUnavailable:
            raise
        except StoreError:
            # Damaged: the version in hand is put into use anew.
            return ()
        plan = active.manifest.name
        return (plan,) if words is None else (plan, words.sha256)

    def _has(self, ref: BlobRef) -> bool:
        path = self.blobs.path(ref.sha256)
        with disk(f"look at {path}"):
            size_bytes = path.stat().st_size if path.is_file() else None
        if size_bytes not in (None, ref.size_bytes):
            self.blobs.delete(ref.sha256)
        return size_bytes == ref.size_bytes

    def _present(self) -> dict[Digest, int]:
        with disk(f"look into {self.blobs.folder}"):
            return {
                path.name.removesuffix(PART): path.stat().st_size
                for path in self.blobs.folder.iterdir()
                if _DIGEST.fullmatch(path.name.removesuffix(PART))
            }

    def _model_numbers(self) -> list[int]:
        found = (_MODEL.fullmatch(path.name) for path in self._models.glob("model-*.onnx"))
        return [int(match[1]) for match in found if match is not None]

    def _keep_models(self, kept: set[int]) -> None:
        for number in self._model_numbers():
            if number not in kept:
                # What cannot be deleted now is at the next start.
                with contextlib.suppress(OSError):
                    (self._models / _model_name(number)).unlink(missing_ok=True)


def _model_name(version: int) -> str:
    return f"model-{version}.onnx"
