"""Readings that the operator supplies, for hosts whose sensors nothing here knows, such as phones.

A file or a command's output holds one JSON object, any of these:

    {"charging": true, "battery": 0.8, "idle_for_s": 600, "metered": false,
     "celsius": 41.5, "free_memory_bytes": 900000000}

What it holds takes the place of what the host says. What cannot be read or does not fit makes every
reading unknown: the operator said to believe it and not the host, so there is nothing to fall back
on. Write such a file beside its place and rename it, so that no half of one is read.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedge.edge_agent.eligibility import Reading, Sensor
from fedge.edge_agent.host.program import MAX_OUTPUT_BYTES, NotRead, answer_of


class SuppliedReadings(BaseModel):
    """The JSON object. A key that is left out is read from the host."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    charging: bool | None = None
    battery: Annotated[float, Field(ge=0, le=1)] | None = None
    idle_for_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    metered: bool | None = None
    celsius: Annotated[float, Field(ge=-100, le=200)] | None = None
    free_memory_bytes: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


def file_readings(path: Path, max_age_s: float | None, now_s: float) -> dict[Sensor, Reading]:
    """What the file at `path` supplies. `now_s`: seconds since the epoch, for its age.

    Raises `NotRead`.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            # Opening a pipe would wait for its writer.
            raise NotRead(f"the readings file {path} is no file")
        with path.open("rb") as file:
            data = file.read(MAX_OUTPUT_BYTES + 1)
        age_s = now_s - found.st_mtime
    except OSError as error:
        raise NotRead(f"the readings file {path}: {error.strerror or error}") from error
    if len(data) > MAX_OUTPUT_BYTES:
        raise NotRead(f"the readings file {path} has more than {MAX_OUTPUT_BYTES} bytes")
    if max_age_s is not None and age_s > max_age_s:
        raise NotRead(f"the readings file {path} is older than {max_age_s:g} s")
    return _parsed(data, f"the readings file {path}")


async def command_readings(command: tuple[str, ...]) -> dict[Sensor, Reading]:
    """What `command` supplies on its stdout. Raises `NotRead`."""
    return _parsed(await answer_of(command), f"the output of {command[0]}")


def _parsed(data: bytes, what: str) -> dict[Sensor, Reading]:
    try:
        supplied = SuppliedReadings.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise NotRead(f"{what}: {where + ': ' if where else ''}{first['msg']}"[:300]) from error
    values = supplied.model_dump(exclude_none=True)
    return {Sensor(name): Reading(value, "supplied") for name, value in values.items()}
