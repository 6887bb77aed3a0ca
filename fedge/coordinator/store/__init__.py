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
    EvaluationAnswer,
    EvaluationRecord,
    EvaluationReport,
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
from fedge.coordinator.store.rollouts import RolloutRecord, Terms, TrialRecord
from fedge.coordinator.store.store import Store
from fedge.coordinator.store.word_counts import WordCountRecord

__all__ = [
    "Collected",
    "Contribution",
    "DeviceRecord",
    "DeviceSighting",
    "EvaluationAnswer",
    "EvaluationRecord",
    "EvaluationReport",
    "Outcome",
    "ParticipantRecord",
    "ParticipantStatus",
    "PlanRecord",
    "Refusal",
    "RefusalRecord",
    "Retention",
    "RolloutRecord",
    "RoundRecord",
    "RoundReport",
    "Store",
    "Terms",
    "TrialRecord",
    "VersionRecord",
    "WordCountRecord",
]
