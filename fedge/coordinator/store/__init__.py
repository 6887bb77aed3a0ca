"""The coordinator's truth: what was promised, received, decided and published.

The broker forgets; this does not. A method that writes has written when it returns: the row is
committed and synced, so a receipt or an announcement may follow it. The database holds numbers,
names and digests; bytes lie as files named by their digest in `<state>/blobs`.
"""

from fedge.coordinator.store.records import (
    Collected,
    Contribution,
    DeviceRecord,
    DeviceSighting,
    Outcome,
    ParticipantRecord,
    ParticipantStatus,
    PlanRecord,
    Refusal,
    RefusalRecord,
    Retention,
    RoundRecord,
    RoundReport,
    VersionRecord,
)
from fedge.coordinator.store.store import Store

__all__ = [
    "Collected",
    "Contribution",
    "DeviceRecord",
    "DeviceSighting",
    "Outcome",
    "ParticipantRecord",
    "ParticipantStatus",
    "PlanRecord",
    "Refusal",
    "RefusalRecord",
    "Retention",
    "RoundRecord",
    "RoundReport",
    "Store",
    "VersionRecord",
]
