"""The messages: their bytes are fixed, and whatever else arrives is refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedge.schemas import messages, topics
from fedge.schemas.blobs import MAX_CHUNKS, describe
from fedge.schemas.errors import PeerError, RejectReason
from fedge.schemas.messages import MAX_MESSAGE_BYTES, Message, decode, encode
from tests.schemas.contract_examples import EXAMPLES

GOLDEN = Path(__file__).parent / "golden"

examples = pytest.mark.parametrize("name", sorted(EXAMPLES))


def refusal(kind: type[Message], data: bytes) -> RejectReason:
    with pytest.raises(PeerError) as caught:
        decode(kind, data)
    assert caught.value.detail
    assert len(caught.value.detail) <= 500
    return caught.value.reason


@examples
def test_the_bytes_of_each_message_are_the_golden_ones(name):
    golden = (GOLDEN / f"{name}.json").read_bytes()
    assert encode(EXAMPLES[name]) + b"\n" == golden
    assert decode(type(EXAMPLES[name]), golden) == EXAMPLES[name]


def test_every_kind_of_message_has_a_golden_example():
    kinds = {kind for kinds in topics.KINDS.values() for kind in kinds.values()}
    assert {type(each) for each in EXAMPLES.values()} == kinds | {messages.Presence}
    assert {path.stem for path in GOLDEN.glob("*.json")} == {*EXAMPLES, "topics"}


@examples
def test_a_message_cut_anywhere_is_truncated(name):
    data = encode(EXAMPLES[name])
    for size in range(1, len(data)):
        assert refusal(type(EXAMPLES[name]), data[:size]) is RejectReason.TRUNCATED


@examples
def test_an_empty_payload_is_truncated(name):
    assert refusal(type(EXAMPLES[name]), b"") is RejectReason.TRUNCATED


@examples
@given(field=st.text(max_size=20), value=st.none() | st.integers() | st.text(max_size=5))
def test_an_extra_field_is_an_unknown_field(name, field, value):
    kind, content = type(EXAMPLES[name]), json.loads(encode(EXAMPLES[name]))
    assume(field not in kind.model_fields)
    content[field] = value
    assert refusal(kind, json.dumps(content).encode()) is RejectReason.UNKNOWN_FIELD


@examples
@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_another_protocol_version_is_told_before_anything_else(name, version):
    kind = type(EXAMPLES[name])
    data = json.dumps({"v": version, "from the future": 1}).encode()
    assert refusal(kind, data) is RejectReason.UNKNOWN_VERSION


@examples
def test_each_required_field_that_is_missing_is_an_invalid_field(name):
    kind, content = type(EXAMPLES[name]), json.loads(encode(EXAMPLES[name]))
    for field, info in kind.model_fields.items():
        if info.is_required():
            rest = {key: value for key, value in content.items() if key != field}
            assert refusal(kind, json.dumps(rest).encode()) is RejectReason.INVALID_FIELD


@examples
def test_a_message_above_the_limit_is_refused_unread(name):
    data = encode(EXAMPLES[name])
    padded = data + b" " * (MAX_MESSAGE_BYTES + 1 - len(data))
    assert refusal(type(EXAMPLES[name]), padded) is RejectReason.OVERSIZED
    assert decode(type(EXAMPLES[name]), padded[:MAX_MESSAGE_BYTES]) == EXAMPLES[name]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xff\xfe", RejectReason.MALFORMED),
        (b"not json", RejectReason.MALFORMED),
        (b"{'v': 1}", RejectReason.MALFORMED),
        (b'{"v": 1} trailing', RejectReason.MALFORMED),
        (b"[" * 5000, RejectReason.MALFORMED),
        (b'{"a":' * 5000, RejectReason.MALFORMED),
        (b"null", RejectReason.INVALID_FIELD),
        (b"[]", RejectReason.INVALID_FIELD),
    ],
)
def test_what_is_no_message_at_all_is_refused_with_a_reason(data, reason):
    assert refusal(messages.Retry, data) is reason


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("assignment", "learning_rate", 0),
        ("assignment", "learning_rate", 1e9),
        ("assignment", "batch_size", 0),
        ("assignment", "seed", -1),
        ("assignment", "plan_sha256", "../../etc/passwd"),
        ("assignment", "deadline_s", -1),
        ("grant", "window", 1001),
        ("grant", "held", "x" * 513),
        ("offer", "examples", 0),
        ("offer", "codec", "pickle"),
        ("receipt", "status", "maybe"),
        ("checkin", "version", -1),
        ("retry", "round", 0),
        ("retry", "id", "UPPER"),
        ("report", "detail", "x" * 501),
    ],
)
def test_a_value_out_of_range_is_an_invalid_field(name, field, value):
    content = json.loads(encode(EXAMPLES[name])) | {field: value}
    data = json.dumps(content).encode()
    assert refusal(type(EXAMPLES[name]), data) is RejectReason.INVALID_FIELD


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_not_finite_never_enters(value):
    data = encode(EXAMPLES["offer"])
    for before in (b'"accuracy":0.5', b'"training_s":12.25', b'"by_epoch":[2.0'):
        head = before.rstrip(b"0123456789.")
        assert data.count(before) == 1
        refusal(messages.Offer, data.replace(before, head + value.encode()))


@examples
@given(data=st.data())
def test_a_mutated_message_is_a_message_or_is_refused(name, data):
    kind, content = type(EXAMPLES[name]), bytearray(encode(EXAMPLES[name]))
    edits = st.lists(
        st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), min_size=1, max_size=8
    )
    for position, byte in data.draw(edits):
        content[position] = byte
    try:
        found = decode(kind, bytes(content))
    except PeerError:
        return
    assert decode(kind, encode(found)) == found


@examples
@given(noise=st.binary(max_size=300))
def test_arbitrary_bytes_are_refused_and_nothing_else_is_raised(name, noise):
    with pytest.raises(PeerError):
        decode(type(EXAMPLES[name]), noise)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner),
    max_leaves=10,
)


@examples
@given(data=st.data())
def test_any_json_in_any_field_is_taken_or_refused_as_invalid(name, data):
    kind, content = type(EXAMPLES[name]), json.loads(encode(EXAMPLES[name]))
    field = data.draw(st.sampled_from(sorted(set(content) - {"v"})))
    content[field] = data.draw(json_values)
    reason = None
    try:
        decode(kind, json.dumps(content).encode())
    except PeerError as error:
        reason = error.reason
    assert reason in (
        None,
        RejectReason.INVALID_FIELD,
        RejectReason.UNKNOWN_FIELD,
        # A lone surrogate is an escape that JSON has and Unicode has not.
        RejectReason.MALFORMED,
    )


def test_the_largest_honest_message_fits():
    largest = describe(bytes(MAX_CHUNKS * 1024), 1024)
    curve = messages.LossCurve(by_epoch=(-1e-300 / 3,) * 1000, by_batch=(-1e-300 / 3,) * 2048)
    metrics = {f"metric_{n:033}": -1e-300 / 3 for n in range(16)}
    fields = EXAMPLES["offer"].model_dump() | {
        "update": largest,
        "loss": curve,
        "metrics": metrics,
    }
    offer = messages.Offer(**fields)
    assert decode(messages.Offer, encode(offer)) == offer
    announcement = EXAMPLES["version"].model_copy(
        update={"plan": largest, "weights": largest, "golden": largest}
    )
    with pytest.raises(ValueError, match="MAX_MESSAGE_BYTES"):
        encode(announcement)


def test_messages_are_told_apart_by_their_ids():
    assert len({messages.Retry(round=1, after_s=0).id for _ in range(100)}) == 100


def test_no_text_of_a_peer_holds_what_a_database_cannot_keep():
    report = messages.decode(
        messages.Report, b'{"kind": "training_failed", "round": 1, "detail": "a\\u0000b"}'
    )
    assert report.detail == "a\ufffdb"
    birth = messages.decode(
        messages.Presence, b'{"boot": 1, "online": true, "agent_version": "1\\u0000"}'
    )
    assert "\0" not in birth.agent_version
