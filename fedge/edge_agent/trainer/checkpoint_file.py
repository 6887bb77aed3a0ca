"""The local checkpoint: a training that was told to stop, as a file to go on from.

The digest of all that follows, a line of JSON, and the tensors in the safetensors layout. The JSON
says of which training it is (plan, version, settings, engine, examples) and how far. A checkpoint
of any other training is not used: after a forget request, for one, the examples are others, and
what was learned from them must not live on here. It is renamed into place and not synced: writing
must be quick, since a person waits for the device, and what a power cut leaves does not fit its
digest. A file that is used is removed first, so that one which harms the process does it once.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load

from fedge.edge_agent.data.examples import Examples
from fedge.edge_agent.durable import disk, partial_of
from fedge.edge_agent.engines import EngineName
from fedge.edge_agent.training import Paused
from fedge.edge_agent.training_settings import TrainingSettings
from fedge.schemas.ids import Digest
from fedge.schemas.logs import EventLog
from fedge.schemas.tensors import Array, Tensors, encode_tensors

log = EventLog(__name__)

MAX_HEADER_BYTES = 1024 * 1024
_ROWS_AT_A_TIME = 1024
_DIGEST_LINE = 65


class TrainingKey(BaseModel):
    """Which training it is: equal keys give equal updates.

    `plan_sha256`, `weights_sha256`: of what it starts from. `examples`: a digest of the data.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan_sha256: Digest
    weights_sha256: Digest
    settings: TrainingSettings
    engine: EngineName
    examples: Annotated[str, Field(max_length=200)]


class _Header(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    v: Literal[1] = 1
    key: TrainingKey
    paused: Paused


def write_checkpoint(path: Path, key: TrainingKey, paused: Paused, tensors: Tensors) -> None:
    """Puts the checkpoint at `path`, whole or not at all. Raises `StoreError`."""
    data = encode_tensors(tensors)
    header = _Header(key=key, paused=paused).model_dump_json().encode() + b"\n"
    digest = hashlib.sha256(header + data).hexdigest().encode() + b"\n"
    partial = partial_of(path)
    with disk(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                for part in (digest, header, data):
                    file.write(part)
            partial.replace(path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def take_checkpoint(path: Path, key: TrainingKey) -> tuple[Paused, dict[str, Array]] | None:
    """How far the training `key` was and its tensors, from the file at `path`, which is removed.

    None if there is none, it is of another training, or it is damaged: that is logged.
    """
    try:
        with path.open("rb") as file:
            digest, header_line = file.readline(_DIGEST_LINE), file.readline(MAX_HEADER_BYTES)
            data = file.read()
        path.unlink()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("checkpoint_not_read", reason=str(error))
        return None
    if hashlib.sha256(header_line + data).hexdigest().encode() + b"\n" != digest:
        log.warning("checkpoint_damaged", reason="it has another digest than when it was written")
        return None
    try:
        header = _Header.model_validate_json(header_line)
        if header.key != key:
            then, now = header.key.model_dump(), key.model_dump()
            changed = ", ".join(name for name in now if then[name] != now[name])
            log.warning("checkpoint_stale", changed=changed)
            return None
        return header.paused, load(data)
    except (ValidationError, SafetensorError) as error:
        log.warning("checkpoint_damaged", reason=str(error)[:300])
        return None


def digest_of_examples(examples: Examples) -> str:
    """A digest of the data itself: other examples in the same number are another training."""
    hasher = hashlib.blake2b(digest_size=32)
    for array in (examples.raw_inputs, examples.raw_targets):
        hasher.update(f"{array.dtype.str} {array.shape} ".encode())
        for start in range(0, len(array), _ROWS_AT_A_TIME):
            # The inputs may be a map of a file that is larger than the memory.
            hasher.update(array[start : start + _ROWS_AT_A_TIME].tobytes())
    return hasher.hexdigest()


def digest_of_file(path: Path) -> Digest:
    """The SHA-256 of the file. Raises `StoreError`."""
    with disk(f"read {path}"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
