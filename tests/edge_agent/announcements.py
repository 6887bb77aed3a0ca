"""Announcements whose blobs nobody fetches."""

from __future__ import annotations

from fedge.schemas.blobs import describe
from fedge.schemas.messages import VersionAnnouncement

BLOB = describe(b"bytes")


def version(number: int) -> VersionAnnouncement:
    return VersionAnnouncement(
        number=number,
        plan=BLOB,
        weights=BLOB,
        golden=BLOB,
        model_sha256="0" * 64,
        model_bytes=1,
    )
