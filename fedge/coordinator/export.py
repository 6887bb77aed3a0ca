"""Versions for other programs and for second thoughts: the ONNX file, and going back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedge.coordinator.store import Store, VersionRecord
from fedge.schemas.errors import ConfigError, StoreError
from fedge.schemas.ids import Digest, sha256
from fedge.schemas.model_file import complete_model
from fedge.schemas.plan import PlanManifest
from fedge.schemas.tensors import read_tensors

if TYPE_CHECKING:
    from fedge.coordinator.release import Release  # imports torch


def export_model(store: Store, version: VersionRecord) -> bytes:
    """The version's `model.onnx`, byte for byte what its devices run.

    Raises `ConfigError` if the version's files were deleted, `StoreError` if the state does not
    give the file that was published.
    """
    _check_files(version)
    manifest = PlanManifest.decode(store.blobs.read(version.plan_sha256))
    weights = read_tensors(store.blobs.path(version.weights.sha256), manifest.weight_specs)
    model = complete_model(manifest, store.blobs.read(manifest.graphs.infer.sha256), weights)
    if sha256(model) != version.model_sha256:
        raise StoreError(f"version {version.number}: the state gives another file than published")
    return model


def rolled_back(newest: VersionRecord, target: VersionRecord, now: float) -> VersionRecord:
    """A new version with the weights of an old one: numbers never go back.

    The server optimizer starts anew: what it remembered led away from here. Raises `StoreError` if
    the two belong to different plans, `ConfigError` if the old one's files were deleted.
    """
    _check_files(target)
    if newest.plan_sha256 != target.plan_sha256:
        raise StoreError(
            f"version {target.number} belongs to another plan than version {newest.number}; if "
            "[export] quantization was changed since, change it back first"
        )
    return VersionRecord(
        number=newest.number + 1,
        plan_sha256=target.plan_sha256,
        weights=target.weights,
        golden=target.golden,
        model_sha256=target.model_sha256,
        model_bytes=target.model_bytes,
        created_at=now,
        base=newest.number,
        metrics=target.metrics,
        note=f"rollback of {newest.number} to {target.number}",
    )


def requantized(
    newest: VersionRecord, plan_sha256: Digest, release: Release, now: float, note: str
) -> VersionRecord:
    """A new version with the weights of the newest, whose file is another plan's `release` of them.

    The server optimizer goes on: what it remembers is of the same weights. Raises `ConfigError` if
    the newest version's files were deleted.
    """
    _check_files(newest)
    return VersionRecord(
        number=newest.number + 1,
        plan_sha256=plan_sha256,
        weights=newest.weights,
        golden=release.golden_ref,
        model_sha256=release.model_sha256,
        model_bytes=release.model_bytes,
        created_at=now,
        base=newest.number,
        server_state=newest.server_state,
        note=note,
    )


def _check_files(version: VersionRecord) -> None:
    if not version.files_kept:
        raise ConfigError(
            f"version {version.number} is known, but its files were deleted, as [retention] "
            "versions says; `fedge version list` shows which are kept"
        )
