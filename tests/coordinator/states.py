"""A coordinator's state with real files: a plan, versions, rounds, accepted updates."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from fedge.coordinator.store import PlanRecord, RoundRecord, Store, VersionRecord
from fedge.schemas.blob_files import BlobDirectory
from fedge.schemas.blobs import BlobRef, describe
from tests.coordinator.test_store import a_round, contribution
from tests.coordinator.updates import LINEAR, manifest_of

PARTS = ("train", "eval", "infer", "golden")
"""The texts that the blobs of `manifest_of` are described from."""


def put(store: Store, data: bytes) -> BlobRef:
    store.blobs.put(data)
    return describe(data)


def put_plan(store: Store) -> PlanRecord:
    for part in PARTS:
        put(store, part.encode())
    ref = put(store, manifest_of(LINEAR).encode())
    plan = PlanRecord(ref, task="test", task_fingerprint="f00d", created_at=1.0)
    store.record_plan(plan)
    return plan


def put_version(store: Store, plan: PlanRecord, number: int, **facts: object) -> VersionRecord:
    """Version `number` with files of its own, 1,000 bytes of weights; recorded."""
    state = put(store, f"server state {number}".encode())
    record = VersionRecord(
        number=number,
        plan_sha256=plan.ref.sha256,
        weights=put(store, f"weights {number}".encode().ljust(1000)),
        golden=put(store, f"golden {number}".encode()),
        model_sha256="a" * 64,
        model_bytes=1234,
        created_at=100.0 + number,
        base=None if number == 0 else number - 1,
        server_state=state.sha256,
    )
    record = dataclasses.replace(record, **facts)
    store.record_version(record)
    return record


def closed_round(store: Store, plan: PlanRecord, number: int) -> RoundRecord:
    """A round that asked three devices, accepted two and made the version of its number."""
    record = a_round(number, base=number - 1)
    store.open_round(record)
    store.record_assignment(number, ["pi-1", "pi-2", "pi-3"], train_until=640.0, at=40.0)
    for device in ("pi-1", "pi-2"):
        store.record_accepted(number, device, contribution(f"{number} {device}"), at=50.0)
    put_version(store, plan, number, round=number)
    return record


def accepted_file(state_dir: Path, store: Store, number: int, device: str, data: bytes) -> Path:
    """An update that was accepted in an open round, with its file, as the upload desk keeps it."""
    folder = BlobDirectory(state_dir / "uploads" / str(number) / device)
    folder.put(data)
    update = dataclasses.replace(contribution(), update=describe(data))
    store.record_accepted(number, device, update, at=50.0)
    return folder.path(describe(data).sha256)


def make_old(store: Store, age_s: float = 7200.0) -> None:
    """All files look as if they had been written so long ago."""
    for path in store.blobs.folder.iterdir():
        then = path.stat().st_mtime - age_s
        os.utime(path, (then, then))
