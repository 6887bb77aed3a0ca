"""The messages of federated evaluation: bounded, finite, and sums with `ok` alone."""

from __future__ import annotations

import json
import math

import pytest

from fedge.schemas.blobs import MAX_CHUNKS, describe
from fedge.schemas.errors import PeerError, RejectReason
from fedge.schemas.messages import EvaluationRequest, EvaluationResult, decode, encode
from tests.schemas.contract_examples import EXAMPLES


def refusal(changes: dict[str, object]) -> RejectReason:
    content = json.loads(encode(EXAMPLES["evaluated"])) | changes
    with pytest.raises(PeerError) as caught:
        decode(EvaluationResult, json.dumps(content).encode())
    return caught.value.reason


def test_a_request_for_the_largest_version_fits():
    largest = describe(bytes(MAX_CHUNKS * 1024), 1024)
    request = EXAMPLES["evaluation"].model_copy(update={"plan": largest, "weights": largest})
    assert decode(EvaluationRequest, encode(request)) == request


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2e15, -2e15])
@pytest.mark.parametrize("where", ["loss_sum", "metrics"])
def test_a_sum_that_would_spoil_those_of_a_fleet_is_refused(where, value):
    sums = {"examples": 4, "rows": 4, "loss_sum": 1.0, "metrics": {"accuracy": 1.0}}
    sums |= {"loss_sum": value} if where == "loss_sum" else {"metrics": {"accuracy": value}}
    # Python writes NaN and Infinity, which are no JSON: either is refused.
    assert refusal({"sums": sums}) in (RejectReason.INVALID_FIELD, RejectReason.MALFORMED)


def test_sums_go_with_ok_and_with_nothing_else():
    assert refusal({"sums": None, "personal": None}) is RejectReason.INVALID_FIELD
    assert refusal({"status": "no_hold_out"}) is RejectReason.INVALID_FIELD
    assert refusal({"status": "failed", "sums": None}) is RejectReason.INVALID_FIELD


def test_sums_over_nothing_are_refused():
    sums = {"examples": 0, "rows": 0, "loss_sum": 0.0, "metrics": {}}
    assert refusal({"sums": sums}) is RejectReason.INVALID_FIELD


def test_no_field_could_hold_an_example():
    """What a device says is numbers, names of the plan, and one sentence."""
    content = json.loads(encode(EXAMPLES["evaluated"]))
    assert set(content) - {"v", "id", "ts"} == {
        *("evaluation", "number", "status"),
        *("sums", "personal", "detail"),
    }
    assert set(content["sums"]) == {"examples", "rows", "loss_sum", "metrics"}
