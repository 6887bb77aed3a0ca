"""The report of a trial: a reason with what was rolled back alone, and numbers that stay finite."""

from __future__ import annotations

import json

import pytest

from fedge.schemas.errors import PeerError, RejectReason
from fedge.schemas.messages import MOST_MEASURED, TrialReport, decode, encode
from tests.schemas.contract_examples import EXAMPLES


def decoded(**changes: object) -> TrialReport:
    content = json.loads(encode(EXAMPLES["trial"])) | changes
    return decode(TrialReport, json.dumps(content).encode())


@pytest.mark.parametrize(
    "changes", [{"outcome": "active", "reason": "fetch"}, {"reason": None}, {"outcome": "active"}]
)
def test_a_reason_goes_with_what_was_rolled_back_and_with_nothing_else(changes) -> None:
    """The tables have the same rule: what breaks it must not come so far."""
    with pytest.raises(PeerError, match="a reason goes with") as caught:
        decoded(**changes)
    assert caught.value.reason is RejectReason.INVALID_FIELD
    assert decoded(outcome="active", reason=None).reason is None


@pytest.mark.parametrize("value", [1e300, -1e300])
def test_what_a_ruined_version_gives_is_said_and_stays_finite(value: float) -> None:
    report = decoded(loss_ratio=value)
    assert report.loss_ratio == (MOST_MEASURED if value > 0 else -MOST_MEASURED)
    # A device says the same of what it has measured.
    assert decode(TrialReport, encode(report)) == report
    assert decoded(latency_ms=1e300).latency_ms == MOST_MEASURED


@pytest.mark.parametrize("changes", [{"latency_ms": -1}, {"loss_ratio": float("inf")}])
def test_what_is_no_measure_is_refused(changes) -> None:
    with pytest.raises(PeerError):
        decoded(**changes)
