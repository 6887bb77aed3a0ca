"""Names, numbers and digests: what may stand in a topic, a message or a file name.

A name from a peer never becomes part of a path or topic unless it has one of these types.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Annotated

from pydantic import Field, StringConstraints

_NAME = r"^[a-z0-9][a-z0-9_-]{0,62}$"

PopulationName = Annotated[str, StringConstraints(pattern=_NAME)]
"""Lower-case letters, digits, `_` and `-`; 63 characters at most: valid in topics and on disks."""

DeviceName = Annotated[str, StringConstraints(pattern=_NAME)]

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256 in lower-case hexadecimal."""

MessageId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16,32}$")]

RoundNumber = Annotated[int, Field(ge=1, le=2**53 - 1)]
VersionNumber = Annotated[int, Field(ge=0, le=2**53 - 1)]
"""Version 0 holds the initial weights. Numbers only rise."""

EvaluationNumber = Annotated[int, Field(ge=1, le=2**53 - 1)]

RolloutNumber = Annotated[int, Field(ge=0, le=2**53 - 1)]
"""0 stands for none."""

Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]


def sha256(data: bytes | memoryview) -> str:
    """The `Digest` of `data`."""
    return hashlib.sha256(data).hexdigest()


def new_message_id() -> str:
    """A fresh random `MessageId` of 64 bits."""
    return secrets.token_hex(8)
