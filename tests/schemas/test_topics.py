"""The topic table: its topics are fixed and parse to what they were built from; no others do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.schemas import messages, topics
from fedge.schemas.blobs import MAX_CHUNKS
from fedge.schemas.errors import PeerError, RejectReason
from fedge.schemas.link.filters import FilterSet, covers
from fedge.schemas.link.paho.link import TOPIC_ALLOWANCE_BYTES
from fedge.schemas.topics import KINDS, RULES, Address, Channel, Topics
from tests.schemas.contract_examples import topic_table

GOLDEN = Path(__file__).parent / "golden" / "topics.json"

names = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,62}", fullmatch=True)
digests = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
chunks = st.integers(0, MAX_CHUNKS - 1)


def test_the_topic_table_is_the_golden_one():
    assert topic_table() == json.loads(GOLDEN.read_text())


@given(names, names, digests, chunks)
def test_every_topic_parses_to_what_it_was_built_from(population, device, digest, chunk):
    table = Topics(population)
    built: dict[str, Address] = {
        table.chunk(digest, chunk): Address(Channel.BLOB, population, sha256=digest, chunk=chunk),
        table.upload_chunk(device, digest, chunk): Address(
            Channel.UP_BULK, population, device=device, sha256=digest, chunk=chunk
        ),
        table.presence(device): Address(
            Channel.STATE, population, device=device, message=messages.Presence
        ),
    }
    for kind in KINDS[Channel.ALL].values():
        built[table.announcement(kind)] = Address(Channel.ALL, population, message=kind)
    for kind in KINDS[Channel.DOWN].values():
        built[table.down(device, kind)] = Address(Channel.DOWN, population, device, kind)
    for kind in KINDS[Channel.UP].values():
        built[table.up(device, kind)] = Address(Channel.UP, population, device, kind)
    for topic, address in built.items():
        assert topics.parse(topic) == address
        # The limits of AWS IoT and Event Grid, and the room that the link keeps for a topic.
        assert topic.count("/") <= 7
        assert len(topic) < TOPIC_ALLOWANCE_BYTES
        expects_device = RULES[address.channel].from_device
        assert topics.device_in(topic) == (device if expects_device else None)


@given(names, names, digests, chunks)
def test_each_side_subscribes_to_exactly_what_the_other_publishes_to_it(
    population, device, digest, chunk
):
    table = Topics(population)
    coordinator = FilterSet([*table.coordinator_control, *table.coordinator_bulk])
    own = FilterSet(table.device_control(device))
    for kind in KINDS[Channel.UP].values():
        assert coordinator.covers(table.up(device, kind))
    assert coordinator.covers(table.presence(device))
    assert coordinator.covers(table.upload_chunk(device, digest, chunk))
    for kind in KINDS[Channel.DOWN].values():
        assert own.covers(table.down(device, kind))
        assert not own.covers(table.down(device + "x", kind))
        assert not coordinator.covers(table.down(device, kind))
    for kind in KINDS[Channel.ALL].values():
        assert own.covers(table.announcement(kind))
    assert not own.covers(table.chunk(digest, chunk))


@given(st.text(max_size=200))
def test_arbitrary_text_is_foreign(text):
    with pytest.raises(PeerError) as refusal:
        topics.parse(text)
    assert refusal.value.reason is RejectReason.FOREIGN_TOPIC


@pytest.mark.parametrize(
    "topic",
    [
        "fedge/2/mnist/all/round",
        "fedge/1/MNIST/all/round",
        "fedge/1/mnist/all/offer",
        "fedge/1/mnist/dn/pi-7/offer",
        "fedge/1/mnist/up/pi-7/grant",
        "fedge/1/mnist/up/../grant",
        "fedge/1/mnist/up/pi-7/checkin/",
        "fedge/1/mnist/up/pi-7/checkin\n",
        "/fedge/1/mnist/all/round",
        "fedge/1/mnist/state/",
        "fedge/1/mnist/blob/" + "a" * 64 + "/01",
        "fedge/1/mnist/blob/" + "a" * 64 + "/-1",
        "fedge/1/mnist/blob/" + "a" * 64 + "/\u0661",
        "fedge/1/mnist/blob/" + "A" * 64 + "/1",
        "fedge/1/mnist/blob/" + "a" * 63 + "/1",
        "fedge/1/" + "m" * 64 + "/all/round",
        "fedge/1/+/all/round",
    ],
)
def test_what_nearly_is_a_topic_is_foreign(topic):
    with pytest.raises(PeerError) as refusal:
        topics.parse(topic)
    assert refusal.value.reason is RejectReason.FOREIGN_TOPIC


@given(st.data())
def test_a_topic_with_one_character_changed_is_foreign_or_another_topic_of_the_table(data):
    topic = data.draw(st.sampled_from(sorted(t for t in topic_table().values() if " " not in t)))
    position = data.draw(st.integers(0, len(topic) - 1))
    changed = topic[:position] + data.draw(st.characters()) + topic[position + 1 :]
    try:
        address = topics.parse(changed)
    except PeerError:
        return
    assert covers(f"fedge/1/{address.population}/#", changed)
    assert address.device is None or f"/{address.device}" in changed


def test_the_device_of_a_foreign_topic_is_known_if_its_place_names_one():
    assert topics.device_in("fedge/1/mnist/up/pi-7/nonsense/deep") == "pi-7"
    assert topics.device_in("fedge/1/mnist/dn/pi-7/grant") is None
    assert topics.device_in("fedge/1/mnist/up/PI/checkin") is None
