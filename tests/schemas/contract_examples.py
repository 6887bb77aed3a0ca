"""One fixed example of every message and every topic: the wire that the golden files hold."""

from __future__ import annotations

from fedge.schemas import messages
from fedge.schemas.blobs import BlobRef, ChunkSet, describe
from fedge.schemas.errors import RejectReason
from fedge.schemas.ids import sha256
from fedge.schemas.messages import Message
from fedge.schemas.topics import Topics

SHA = sha256(b"a digest")
HELD = ChunkSet(10, [0, 3, 9]).encode()
FIXED = {"id": "0123456789abcdef", "ts": 1767225600.5}


def ref(text: str) -> BlobRef:
    """The reference of a short text."""
    return describe(text.encode())


EXAMPLES: dict[str, Message] = {
    "version": messages.VersionAnnouncement(
        **FIXED,
        number=3,
        plan=ref("plan"),
        weights=ref("weights"),
        golden=ref("golden"),
        model_sha256=SHA,
        model_bytes=123456,
    ),
    "stable": messages.StableAnnouncement(
        **FIXED,
        number=2,
        plan=ref("plan"),
        weights=ref("older weights"),
        golden=ref("older golden"),
        model_sha256=SHA,
        model_bytes=123456,
    ),
    "candidate": messages.CandidateAnnouncement(
        **FIXED,
        number=3,
        plan=ref("plan"),
        weights=ref("weights"),
        golden=ref("golden"),
        model_sha256=SHA,
        model_bytes=123456,
        rollout=2,
        phase=messages.CandidatePhase.RUNNING,
        share=0.125,
        checks=messages.TrialChecks(
            max_loss_increase=0.1, min_hold_out=20, max_latency_ms=50.0, max_latency_ratio=2.0
        ),
    ),
    "counted": messages.TrialCounted(**FIXED, rollout=2),
    "trial": messages.TrialReport(
        **FIXED,
        rollout=2,
        version=3,
        outcome=messages.TrialOutcome.ROLLED_BACK,
        reason=messages.TrialReason.HOLD_OUT,
        detail="hold-out: loss 2, version 2 has 1, allowed 1.1",
        latency_ms=0.25,
        loss_ratio=2.0,
        hold_out=40,
    ),
    "round": messages.RoundAnnouncement(
        **FIXED,
        round=4,
        base=3,
        phase=messages.RoundPhase.GATHERING,
        checkin_spread_s=2.5,
        checkin_share=0.25,
        oldest=2,
    ),
    "roll": messages.RollCall(**FIXED, spread_s=1.5),
    "assignment": messages.Assignment(
        **FIXED,
        round=4,
        base=3,
        plan_sha256=SHA,
        deadline_s=600.0,
        seed=4294967295,
        batch_size=32,
        learning_rate=0.05,
        local_epochs=2,
        local_steps=100,
        proximal_mu=0.01,
    ),
    "retry": messages.Retry(**FIXED, round=4, after_s=30.0, spread_s=7.5),
    "grant": messages.Grant(**FIXED, round=4, sha256=SHA, window=16, held=HELD),
    "have": messages.Have(**FIXED, round=4, sha256=SHA, held=HELD),
    "receipt": messages.Receipt(
        **FIXED,
        round=4,
        sha256=SHA,
        status=messages.ReceiptStatus.REJECTED,
        reason=RejectReason.NOT_FINITE,
        detail="tensor 'w' holds NaN or infinity",
    ),
    "abort": messages.Abort(**FIXED, round=4, reason=RejectReason.ROUND_ABANDONED),
    "evaluation": messages.EvaluationRequest(
        **FIXED,
        evaluation=2,
        number=3,
        plan=ref("plan"),
        weights=ref("weights"),
        deadline_s=540.5,
    ),
    "checkin": messages.Checkin(**FIXED, round=4, version=3, examples=600, boot=7),
    "offer": messages.Offer(
        **FIXED,
        round=4,
        base=3,
        update=ref("update"),
        examples=600,
        steps=38,
        training_s=12.25,
        loss=messages.LossCurve(by_epoch=(2.0, 1.5), by_batch=(2.25, 1.75, 1.5)),
        metrics={"accuracy": 0.5},
    ),
    "need": messages.Need(**FIXED, sha256=SHA, missing=HELD, chunk_count=10),
    "report": messages.Report(
        **FIXED, kind=messages.ReportKind.ACTIVATED, version=3, round=4, detail="ok"
    ),
    "evaluated": messages.EvaluationResult(
        **FIXED,
        evaluation=2,
        number=3,
        status=messages.EvaluationStatus.OK,
        sums=messages.EvaluationSums(
            examples=40, rows=120, loss_sum=180.5, metrics={"accuracy": 61.0}
        ),
        personal=messages.EvaluationSums(
            examples=40, rows=120, loss_sum=150.25, metrics={"accuracy": 70.0}
        ),
    ),
    "wordcount": messages.WordCountAnnouncement(
        **FIXED,
        campaign="00112233445566778899aabbccddeeff",
        epsilon=4.0,
        least_typed=3,
        new_only=True,
        spread_s=2.5,
    ),
    "wordcountheard": messages.WordCountHeard(**FIXED, campaign="00112233445566778899aabbccddeeff"),
    "wordcountanswer": messages.WordCountAnswer(
        **FIXED,
        campaign="00112233445566778899aabbccddeeff",
        key="0123456789abcdefffffffffffffffff0000000000000001",
        bucket=55,
    ),
    "presence": messages.Presence(**FIXED, boot=7, online=True, agent_version="0.1.0"),
}

TOPICS = Topics("mnist")


def topic_table() -> dict[str, str]:
    """Every topic and filter by what it is for."""
    table = {
        f"all/{name}": TOPICS.announcement(type(EXAMPLES[name]))
        for name in ("version", "stable", "candidate", "round", "roll")
    }
    table["dn/counted"] = TOPICS.down("pi-7", messages.TrialCounted)
    for name in ("assignment", "retry", "grant", "have", "receipt", "abort", "evaluation"):
        table[f"dn/{name}"] = TOPICS.down("pi-7", type(EXAMPLES[name]))
    for name in ("checkin", "offer", "need", "report", "evaluated", "trial"):
        table[f"up/{name}"] = TOPICS.up("pi-7", type(EXAMPLES[name]))
    table["all/words"] = TOPICS.announcement(messages.WordCountAnnouncement)
    table["dn/words"] = TOPICS.down("pi-7", messages.WordCountHeard)
    table["up/words"] = TOPICS.up("pi-7", messages.WordCountAnswer)
    table["blob"] = TOPICS.chunk(SHA, 12)
    table["upb"] = TOPICS.upload_chunk("pi-7", SHA, 0)
    table["state"] = TOPICS.presence("pi-7")
    filters = {
        "filters of the coordinator, control": TOPICS.coordinator_control,
        "filters of the coordinator, bulk": TOPICS.coordinator_bulk,
        "filters of a device": TOPICS.device_control("pi-7"),
    }
    return table | {name: " ".join(some) for name, some in filters.items()}
