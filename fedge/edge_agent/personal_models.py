"""The personal model of this device: a version fine-tuned here, for here.

    <state>/personal.json                        what the last personal training came to
    <state>/models/personal-N-DIGEST.onnx        answers in place of version N, if it is better
    <state>/models/personal-N-DIGEST.safetensors its weights, to be measured with; never sent

The record is replaced in one step and names the files by the digest of the weights, so at any
moment it names files that belong together, or none that are there: then the version itself answers.
Files that no record names are rubbish of a crash, and go at the next start.

How they are forgotten is the business of `fedge.edge_agent.personal_files`. Knows no example and no
runtime.
"""

from __future__ import annotations

import contextlib
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedge.edge_agent.durable import disk, partial_of, replace_file
from fedge.edge_agent.personal_files import (
    MODELS,
    RECORD_FILE,
    forget_personal,
    remove_personal,
    sync_folder,
)
from fedge.schemas.ids import Digest, VersionNumber
from fedge.schemas.logs import EventLog

log = EventLog(__name__)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HeldOutSums(_Frozen):
    """What some weights are worth on the examples held out. See `evaluation.MeasuredSums`."""

    examples: int
    rows: int
    loss_sum: float
    metrics: dict[str, float]


class PersonalRecord(_Frozen):
    """What the personal training for a version came to.

    `settings_sha256`: of the `[personalisation]` that it was made with. `training`, `hold_out`: the
    examples there were; `generation`: of the example store, None for other data. `at`: seconds
    since the epoch. `reason`: why it failed. `common`, `personal`: both on the same examples held
    out; None if it failed. `weights_sha256`: of the personal weights, if they were kept.
    """

    v: Literal[1] = 1
    version: VersionNumber
    plan_sha256: Digest
    settings_sha256: Digest
    training: Annotated[int, Field(ge=0)]
    hold_out: Annotated[int, Field(ge=0)]
    generation: int | None = None
    at: float
    outcome: Literal["better", "not better", "failed"]
    reason: str = ""
    steps: int = 0
    training_s: float = 0.0
    common: HeldOutSums | None = None
    personal: HeldOutSums | None = None
    weights_sha256: Digest | None = None


@dataclass(frozen=True, slots=True)
class PersonalParts:
    """Where the training process writes: beside the place, under names that a start clears."""

    model: Path
    weights: Path


class PersonalModels:
    """Those in `state_dir`: one at the most.

    Every method raises `StoreUnavailable` for a disk that cannot be used now.
    """

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._models = state_dir / MODELS
        self._record = state_dir / RECORD_FILE

    def record(self) -> PersonalRecord | None:
        """What the last training came to; None if there was none, or it cannot be read."""
        with disk(f"read {self._record}"):
            try:
                data = self._record.read_bytes()
            except FileNotFoundError:
                return None
        try:
            return PersonalRecord.model_validate_json(data)
        except ValidationError as error:
            # Of another release, or damaged: the model is made again.
            log.warning("personal_record_unreadable", reason=str(error)[:300])
            return None

    def model_of(self, version: int, plan_sha256: Digest) -> Path | None:
        """The ONNX file that answers in place of exactly this version, if there is one."""
        return self._file_of(version, plan_sha256, "onnx")

    def weights_of(self, version: int) -> Path | None:
        """The weights of the personal model of exactly this version, a safetensors file."""
        return self._file_of(version, None, "safetensors")

    def parts(self, version: int) -> PersonalParts:
        """Where one training for this version leaves what it made; another has other names."""
        name = f"personal-{version}-{secrets.token_hex(4)}"
        return PersonalParts(
            model=partial_of(self._models / f"{name}.onnx"),
            weights=partial_of(self._models / f"{name}.safetensors"),
        )

    def keep(self, record: PersonalRecord, parts: PersonalParts) -> None:
        """Makes `record` the present one; with `weights_sha256`, the parts become its files.

        What was there before goes.
        """
        if record.weights_sha256 is not None:
            with disk(f"write into {self._models}"):
                for part, ending in ((parts.model, "onnx"), (parts.weights, "safetensors")):
                    part.replace(self._models / _name(record, ending))
            # Before the record that names them.
            sync_folder(self._models)
        replace_file(self._record, record.model_dump_json(exclude_none=True).encode())
        self.sweep(record.version)

    def sweep(self, version: int | None = None) -> None:
        """Removes every file that the record does not name, or that is not of `version`."""
        record = self.record()
        kept: set[str] = set()
        if record is not None and version in (None, record.version):
            kept = {_name(record, ending) for ending in ("onnx", "safetensors")}
        remove_personal(self._models, lambda name: name not in kept)

    def drop(self, parts: PersonalParts) -> None:
        """Removes what a training left that is not kept."""
        for part in (parts.model, parts.weights):
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    def forget(self) -> None:
        """Removes the personal model and all that was on its way to one, see `forget_personal`."""
        forget_personal(self._state_dir)

    def _file_of(self, version: int, plan_sha256: Digest | None, ending: str) -> Path | None:
        record = self.record()
        if record is None or record.version != version or record.weights_sha256 is None:
            return None
        if plan_sha256 not in (None, record.plan_sha256):
            return None
        path = self._models / _name(record, ending)
        return path if path.is_file() else None


def _name(record: PersonalRecord, ending: str) -> str:
    return f"personal-{record.version}-{(record.weights_sha256 or '')[:12]}.{ending}"
