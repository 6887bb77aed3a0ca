"""The versions on this device: blobs, the plan they belong to, and the one that is in use.

    <state>/blobs/…            verified blobs by digest: manifest, graphs, weights, golden
    <state>/models/…           a version's `model.onnx`, made and checked here
    <state>/active.json        which of them is in use: replaced in one step, never edited
    <state>/standby.json       the last good version before it, while rollouts say what is in use
    <state>/personal.json      which model of this device's own answers in its place, if one does

An app opens the file that `serving` names; a prediction needs no network and no agent.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedge.edge_agent.cache import sizes_of, superfluous
from fedge.edge_agent.durable import disk, is_partial, replace_file
from fedge.edge_agent.personal_models import PersonalModels
from fedge.edge_agent.trainer.jobs import ActivateJob
from fedge.schemas.blob_files import BlobDirectory
from fedge.schemas.blobs import BlobRef
from fedge.schemas.errors import StoreError, StoreUnavailable
from fedge.schemas.ids import Digest, VersionNumber, sha256
from fedge.schemas.messages import PublishedVersion
from fedge.schemas.plan import PlanManifest
from fedge.schemas.words import Vocabulary

ACTIVE_FILE = "active.json"
STANDBY_FILE = "standby.json"
PART = ".part"
"""How `BlobDirectory` names what is still arriving."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
# A plan serves many versions, and in a fleet on one host many devices.
_decoded = functools.lru_cache(maxsize=4)(PlanManifest.decode)
_MODEL = re.compile(r"model-([0-9]{1,16})\.onnx")


class ActiveModel(BaseModel):
    """What `active.json` says. `model`: a file name in `models/`.

    `weights_sha256`: what it was made from; None if a release that did not say so has made it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: VersionNumber
    plan_sha256: Digest
    model: Annotated[str, Field(pattern=r"^model-[0-9]{1,16}\.onnx$")]
    model_sha256: Digest
    weights_sha256: Digest | None = None


@dataclass(frozen=True, slots=True)
class Active:
    """The version in use: its number, its ONNX file and its plan's manifest, as paths.

    `personal`: whether the file is this device's own, made from that version.
    """

    version: int
    model: Path
    manifest: Path
    personal: bool = False


class Library:
    """What lies in a device's state folder.

    `cache_limit_bytes`: of all blobs together, whole and arriving; None: no limit.
    Every method raises `StoreUnavailable` for a disk that cannot be used now.
    """

    def __init__(self, state_dir: Path, cache_limit_bytes: int | None = None) -> None:
        self.blobs = BlobDirectory(state_dir / "blobs")
        self.personal = PersonalModels(state_dir)
        self._cache_limit_bytes = cache_limit_bytes
        self._measured: dict[Digest, int] = {}
        self._state_dir = state_dir
        self._models = state_dir / "models"
        self._active_file = state_dir / ACTIVE_FILE
        self._standby_file = state_dir / STANDBY_FILE
        self._pinned: dict[str, dict[Digest, int]] = {}
        self.is_staged = False
        """Whether rollouts say what is in use: then its weights stay, to measure others against."""
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

    def refs_of(self, version: PublishedVersion) -> tuple[BlobRef, ...]:
        """Every blob of a version that can be named now: its plan's only once the manifest is here.

        Raises as `manifest` does.
        """
        if not self.blobs.has(version.plan.sha256):
            return (version.plan, version.weights, version.golden)
        return (version.plan, *self.needed(version, self.manifest(version.plan)))

    def pin(self, purpose: str, refs: Iterable[BlobRef]) -> None:
        """These stay whatever is fetched, instead of those that were pinned for that purpose."""
        self._pinned[purpose] = sizes_of(refs)

    def make_room(
        self,
        version: PublishedVersion,
        in_hand: PublishedVersion | None,
        *,
        gives_way: str | None = None,
    ) -> None:
        """Deletes every blob that neither `version`, the version in hand nor the one in use needs.

        What versions are measured with stays where it fits, and so does what is pinned for the
        purpose `gives_way`. Raises `CacheTooSmall` if they are above the limit together; nothing is
        deleted then.
        """
        present = self._present()
        needed = sizes_of(self.refs_of(version)) | self._works_here(
            in_hand, present, but_not=gives_way
        )
        limit_bytes = self._cache_limit_bytes
        graphs = {*self._measures(version), *self._measures(in_hand)} & present.keys()
        spared = {digest: present[digest] for digest in graphs} | self._measured
        if gives_way is not None:
            spared |= self._pinned.get(gives_way, {})
        for digest, size_bytes in spared.items():
            if limit_bytes is None or sum(needed.values()) + size_bytes <= limit_bytes:
                needed.setdefault(digest, size_bytes)
        what = f"version {version.number} and the version in hand"
        for digest in superfluous(present, needed, self._cache_limit_bytes, what):
            self.blobs.delete(digest)

    def make_room_to_measure(
        self, refs: Sequence[BlobRef], in_hand: PublishedVersion | None
    ) -> None:
        """Keeps room for `refs`, which a version is measured with, beside what works here.

        Only where the limit wants it are other blobs deleted. Raises `CacheTooSmall` if these, the
        version in hand and the one in use are above it together; nothing is deleted then.
        """
        self._measured = sizes_of(refs)
        present = self._present()
        needed = self._measured | self._works_here(in_hand, present)
        what = "a version to be measured and the version in hand"
        doomed = superfluous(present, needed, self._cache_limit_bytes, what)
        limit_bytes = self._cache_limit_bytes
        if limit_bytes is not None and sum((present | needed).values()) > limit_bytes:
            for digest in doomed:
                self.blobs.delete(digest)

    def stop_measuring(self, in_hand: PublishedVersion | None) -> None:
        """Deletes what was here to measure a version, but for what the version in hand has too."""
        measured, self._measured = self._measured, {}
        kept = {*self._works_here(in_hand, self._present()), *self._measures(in_hand)}
        for digest in measured.keys() - kept:
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
        self.personal.sweep()
        try:
            active = self.active()
        except StoreError:
            # Until the version in hand is in use anew, nobody knows which model is the good one.
            return
        if active is not None:
            older = [n for n in self._model_numbers() if n < active.version]
            self._keep_models({active.version, *sorted(older)[-1:], *self._standby_numbers()})

    def needed(self, version: PublishedVersion, manifest: PlanManifest) -> tuple[BlobRef, ...]:
        """Every blob that training and predicting with a version take, its plan's first."""
        graphs = manifest.graphs
        words = () if manifest.vocabulary is None else (manifest.vocabulary,)
        return (
            *(graphs.train, graphs.infer, manifest.golden, *words),
            *(version.weights, version.golden),
        )

    def holds(self, version: PublishedVersion) -> bool:
        """Whether every blob of the version is here. One that was cut short is removed.

        Raises as `manifest` does.
        """
        if not self._has(version.plan):
            return False
        absent = [r for r in self.needed(version, self.manifest(version.plan)) if not self._has(r)]
        return not absent

    def activation_of(self, version: PublishedVersion) -> ActivateJob:
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

    def activate(self, version: PublishedVersion, *, stand_by: bool = False) -> None:
        """Puts a model that passed its checks into use; older ones but the last go.

        `stand_by`: the one that was in use is the last good one, for `put_back`.
        """
        try:
            before = self.active()
        except StoreError:
            before = None
        if stand_by and before is not None and before.version != version.number:
            with disk(f"read {self._active_file}"):
                record = self._active_file.read_bytes()
            # Before the other file: at any moment both name a good model.
            replace_file(self._standby_file, record)
        active = ActiveModel(
            version=version.number,
            plan_sha256=version.plan.sha256,
            model=_model_name(version.number),
            model_sha256=version.model_sha256,
            weights_sha256=version.weights.sha256,
        )
        replace_file(self._active_file, active.model_dump_json().encode())
        kept = {version.number, *self._standby_numbers()}
        self._keep_models(kept | ({before.version} if before is not None else set()))

    def has_model(self, version: PublishedVersion) -> bool:
        """Whether the model that `activation_of` makes is here, whole: it has passed its checks."""
        path = self._models / _model_name(version.number)
        if not (path.is_file() and self.blobs.has(version.plan.sha256)):
            return False
        with disk(f"read {path}"):
            return sha256(path.read_bytes()) == version.model_sha256

    def standby(self) -> int | None:
        """The version that `put_back` would put into use; None if there is none, or it is gone."""
        try:
            record = _record_in(self._standby_file)
        except StoreError:
            return None
        if record is None or not (self._models / record.model).is_file():
            return None
        return record.version

    def put_back(self) -> int:
        """Puts the last good version into use again, without a network, and returns its number.

        Raises `StoreError` if it is not here, or not what it was.
        """
        record = _record_in(self._standby_file)
        if record is None:
            raise StoreError("there is no version to go back to")
        path = self._models / record.model
        with disk(f"read {path}"):
            actual = sha256(path.read_bytes())
        if actual != record.model_sha256:
            raise StoreError(f"{path} is damaged")
        replace_file(self._active_file, record.model_dump_json().encode())
        return record.version

    def forget_standby(self) -> None:
        """There is no last good version any more."""
        with disk(f"remove {self._standby_file}"):
            self._standby_file.unlink(missing_ok=True)

    def weights_in_use(self) -> Digest | None:
        """The weights that the version in use was made from; None if that is not known."""
        try:
            record = _record_in(self._active_file)
        except StoreError:
            return None
        return None if record is None else record.weights_sha256

    def active(self) -> Active | None:
        """The version in use, None before the first.

        Raises `StoreError` for a record that is damaged or names a model that is gone.
        """
        record = _record_in(self._active_file)
        if record is None:
            return None
        model = self._models / record.model
        if not model.is_file():
            raise StoreError(f"{self._active_file} names {model}, which is gone")
        return Active(
            version=record.version, model=model, manifest=self.blobs.path(record.plan_sha256)
        )

    def serving(self) -> Active | None:
        """What answers now: the personal model of the version in use, else the version itself.

        Raises as `active` does.
        """
        active = self.active()
        if active is None:
            return None
        model = self.personal.model_of(active.version, active.manifest.name)
        return active if model is None else replace(active, model=model, personal=True)

    def _works_here(
        self,
        in_hand: PublishedVersion | None,
        present: Mapping[Digest, int],
        but_not: str | None = None,
    ) -> dict[Digest, int]:
        works = {} if in_hand is None else sizes_of(self.refs_of(in_hand))
        for purpose, pinned in self._pinned.items():
            if purpose != but_not:
                works |= pinned
        for digest in self._active_needs():
            if digest in present:
                works.setdefault(digest, present[digest])
        return works

    def _active_needs(self) -> tuple[Digest, ...]:
        """What answering with the version in use takes, beside its model, and with the one before.

        With rollouts also what others are measured against.
        """
        needs: list[Digest] = []
        for path in (self._active_file, self._standby_file):
            try:
                record = _record_in(path)
                if record is None:
                    continue
                manifest = _decoded(self.blobs.read(record.plan_sha256))
            except StoreUnavailable:
                raise
            except StoreError:
                # Damaged: the version in hand is put into use anew.
                continue
            needs.append(record.plan_sha256)
            if manifest.vocabulary is not None:
                needs.append(manifest.vocabulary.sha256)
            if self.is_staged and path == self._active_file and record.weights_sha256 is not None:
                needs += [record.weights_sha256, manifest.graphs.eval.sha256]
        return tuple(needs)

    def _measures(self, version: PublishedVersion | None) -> tuple[Digest, ...]:
        """What only a device that measures fetches, and keeps while the plan is the same."""
        if version is None or not self.blobs.has(version.plan.sha256):
            return ()
        return (self.manifest(version.plan).graphs.eval.sha256,)

    def _standby_numbers(self) -> set[int]:
        number = self.standby()
        return set() if number is None else {number}

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


def _record_in(path: Path) -> ActiveModel | None:
    """What `active.json` or `standby.json` says; None without the file. Raises `StoreError`."""
    try:
        return ActiveModel.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error


def _model_name(version: int) -> str:
    return f"model-{version}.onnx"
