"""The upload desk: credit, turns, silence, and nothing lost on the way."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedge.coordinator.uploads import Reply, Upload, UploadDesk
from fedge.schemas.blobs import BlobSender, ChunkSet, chunks_of, describe
from fedge.schemas.errors import PeerError, RejectReason
from fedge.schemas.messages import Grant, LossCurve, Offer

CHUNK = 1024


def data_of(name: str, chunks: int) -> bytes:
    return Random(name).randbytes(chunks * CHUNK - 100)


def offer_of(data: bytes, round_number: int = 1) -> Offer:
    return Offer(
        round=round_number,
        base=0,
        update=describe(data, CHUNK),
        examples=1,
        steps=1,
        training_s=0.0,
        loss=LossCurve(),
        metrics={},
    )


def send(desk: UploadDesk, device: str, data: bytes, index: int, now: float = 0.0) -> Upload | None:
    chunk = bytes(list(chunks_of(data, CHUNK))[index])
    sha256 = describe(data, CHUNK).sha256
    return desk.received(device, sha256, index, chunk, now)[1]


def granted(replies: list[Reply] | tuple[Reply, ...]) -> list[str]:
    return [device for device, message in replies if isinstance(message, Grant)]


def test_no_more_devices_send_than_there_are_slots_and_the_line_is_in_order(tmp_path: Path) -> None:
    desk = UploadDesk(tmp_path, slots=2, window=4)
    data = {name: data_of(name, 1) for name in "abcd"}
    answers = [granted(desk.offered(name, offer_of(data[name]), 0.0)) for name in "abcd"]
    assert answers == [["a"], ["b"], [], []]
    finished = send(desk, "b", data["b"], 0)
    assert finished is not None
    finished.part.commit()
    assert granted(desk.taken(finished, 0.0)) == ["c"]


def test_a_repeated_offer_is_answered_from_where_the_device_stands(tmp_path: Path) -> None:
    desk = UploadDesk(tmp_path, slots=1, window=4)
    data = data_of("a", 3)
    desk.offered("a", offer_of(data), 0.0)
    desk.offered("b", offer_of(data_of("b", 3)), 0.0)
    send(desk, "a", data, 0)
    # While its chunks come, a new grant would only have it send again what is on its way.
    assert desk.offered("a", offer_of(data), 0.5) == ()
    ((device, grant),) = desk.offered("a", offer_of(data), 2.0)
    assert device == "a"
    assert isinstance(grant, Grant)
    assert ChunkSet.decode(grant.held, 3) == ChunkSet(3, [0])
    assert granted(desk.offered("b", offer_of(data_of("b", 3)), 2.0)) == []


def test_a_silent_device_loses_its_slot_and_not_its_chunks(tmp_path: Path) -> None:
    desk = UploadDesk(tmp_path, slots=1, window=4, silence_s=10)
    data = {name: data_of(name, 2) for name in "ab"}
    desk.offered("a", offer_of(data["a"]), 0.0)
    desk.offered("b", offer_of(data["b"]), 0.0)
    send(desk, "a", data["a"], 0, now=5.0)
    assert desk.next_expiry() == 15.0
    assert granted(desk.expired(14.0)) == []
    assert granted(desk.expired(15.0)) == ["b"]
    assert granted(desk.expired(16.0)) == []
    for index in (0, 1):
        finished = send(desk, "b", data["b"], index, now=16.0)
    assert finished is not None
    finished.part.commit()
    ((_, grant),) = desk.taken(finished, 16.0)
    assert isinstance(grant, Grant)
    assert ChunkSet.decode(grant.held, 2) == ChunkSet(2, [0])


def test_without_a_line_a_silent_device_keeps_its_slot_and_is_asked_again(tmp_path: Path) -> None:
    desk = UploadDesk(tmp_path, slots=1, window=4, silence_s=10)
    assert desk.next_expiry() is None
    desk.offered("a", offer_of(data_of("a", 2)), 0.0)
    assert desk.next_expiry() == 10.0
    assert granted(desk.expired(9.0)) == []
    assert granted(desk.expired(10.0)) == ["a"]
    assert desk.next_expiry() == 20.0


def test_offering_again_does_not_prolong_a_turn(tmp_path: Path) -> None:
    desk = UploadDesk(tmp_path, slots=1, window=4, silence_s=10)
    for name in "ab":
        desk.offered(name, offer_of(data_of(name, 2)), 0.0)
    for now in (3.0, 6.0, 9.0):
        assert granted(desk.offered("a", offer_of(data_of("a", 2)), now)) == ["a"]
    assert granted(desk.expired(10.0)) == ["b"]


def test_neither_does_the_same_chunk_again_and_again(tmp_path: Path) -> None:
    desk = UploadDesk(tmp_path, slots=1, window=4, silence_s=10)
    data = data_of("a", 3)
    desk.offered("a", offer_of(data), 0.0)
    desk.offered("b", offer_of(data_of("b", 2)), 0.0)
    for now in (1.0, 5.0, 9.0):
        assert send(desk, "a", data, 0, now) is None
    assert granted(desk.expired(11.0)) == ["b"]


def test_a_device_that_trickles_gives_way_after_some_time_if_others_wait(tmp_path: Path) -> None:
    desk = UploadDesk(tmp_path, slots=1, window=32, silence_s=10)
    data = data_of("a", 30)
    desk.offered("a", offer_of(data), 0.0)
    desk.offered("b", offer_of(data_of("b", 2)), 0.0)
    grants = []
    for index in range(9):
        now = 9.0 * (index + 1)
        send(desk, "a", data, index, now)
        grants += granted(desk.expired(now))
    assert grants == ["b"]
    # It goes on where it was when its turn comes.
    assert desk.drop("b") is not None
    assert desk.next_expiry() == 0.0
    ((_, grant),) = desk.expired(90.0)
    assert isinstance(grant, Grant)
    assert len(ChunkSet.decode(grant.held, 30)) == 9


def test_while_the_link_is_down_nothing_is_due_at_once(tmp_path: Path) -> None:
    desk = UploadDesk(tmp_path, slots=1, window=4, silence_s=10)
    for name in "abc":
        desk.offered(name, offer_of(data_of(name, 2)), 0.0)
    desk.drop("a")
    assert desk.next_expiry() == 0.0
    for now in (50.0, 60.0):
        desk.heard_again(now)
        due = desk.next_expiry()
        assert due is not None
        assert due > now
    assert granted(desk.expired(61.0)) == ["b"]


def test_replacing_an_offer_means_to_wait_anew(tmp_path: Path) -> None:
    desk = UploadDesk(tmp_path, slots=1, window=4)
    for name in "abc":
        desk.offered(name, offer_of(data_of(name, 2)), 0.0)
    assert granted(desk.offered("b", offer_of(data_of("another", 2)), 0.0)) == []
    assert granted(desk.offered("a", offer_of(data_of("different", 2)), 0.0)) == ["c"]
    finished = [send(desk, "c", data_of("c", 2), index) for index in (0, 1)][-1]
    assert finished is not None
    assert granted(desk.taken(finished, 0.0)) == ["b"]


def test_the_same_update_cut_otherwise_or_for_another_round_is_another_update(
    tmp_path: Path,
) -> None:
    desk = UploadDesk(tmp_path, slots=1, window=4)
    data = data_of("a", 4)
    desk.offered("a", offer_of(data), 0.0)
    send(desk, "a", data, 0)
    larger = offer_of(data).model_copy(update={"update": describe(data, 2 * CHUNK)})
    for offer in (larger, offer_of(data, round_number=2)):
        ((_, grant),) = desk.offered("a", offer, 0.0)
        assert isinstance(grant, Grant)
        assert grant.round == offer.round
        assert len(ChunkSet.decode(grant.held, offer.update.chunk_count)) == 0
    assert len(desk) == 1


def test_two_devices_may_send_the_same_bytes(tmp_path: Path) -> None:
    desk = UploadDesk(tmp_path, slots=2, window=4)
    data = data_of("same", 2)
    for device in "ab":
        desk.offered(device, offer_of(data), 0.0)
    paths = set()
    for index in (0, 1):
        for device in "ab":
            finished = send(desk, device, data, index)
            if finished is not None:
                paths.add(finished.part.commit())
    assert len(paths) == 2
    assert all(path.read_bytes() == data for path in paths)


def test_another_update_of_the_same_device_replaces_the_first(tmp_path: Path) -> None:
    desk = UploadDesk(tmp_path, slots=1, window=4)
    first, second = data_of("first", 2), data_of("second", 2)
    desk.offered("a", offer_of(first), 0.0)
    send(desk, "a", first, 0)
    desk.offered("a", offer_of(second), 0.0)
    with pytest.raises(PeerError) as caught:
        send(desk, "a", first, 1)
    assert caught.value.reason is RejectReason.NOT_NEEDED
    send(desk, "a", second, 0)
    assert send(desk, "a", second, 1) is not None
    assert len(desk) == 1


def test_an_update_that_is_being_decided_is_not_replaced_by_another(tmp_path: Path) -> None:
    desk = UploadDesk(tmp_path, slots=1, window=4)
    first, second = data_of("first", 1), data_of("second", 1)
    desk.offered("a", offer_of(first), 0.0)
    finished = send(desk, "a", first, 0)
    assert finished is not None
    assert desk.offered("a", offer_of(second), 0.0) == ()
    assert desk.drop("a") is None
    assert finished.part.commit().read_bytes() == first
    desk.taken(finished, 0.0)
    assert granted(desk.offered("a", offer_of(second), 0.0)) == ["a"]


def test_a_dropped_upload_is_named_so_that_its_device_can_be_told(tmp_path: Path) -> None:
    desk = UploadDesk(tmp_path, slots=1, window=4)
    offers = {name: offer_of(data_of(name, 2)) for name in "ab"}
    for name, offer in offers.items():
        desk.offered(name, offer, 0.0)
    assert desk.drop_all() == list(offers.items())
    assert len(desk) == 0


def test_files_of_other_rounds_are_removed_at_the_start(tmp_path: Path) -> None:
    desk = UploadDesk(tmp_path, slots=2, window=4)
    desk.offered("a", offer_of(data_of("a", 2), round_number=1), 0.0)
    desk.offered("b", offer_of(data_of("b", 2), round_number=2), 0.0)
    UploadDesk(tmp_path, slots=2, window=4).keep_only({2})
    assert [folder.name for folder in tmp_path.iterdir()] == ["2"]


def test_a_chunk_of_nothing_that_was_offered_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    desk = UploadDesk(tmp_path, slots=1, window=4)
    with pytest.raises(PeerError) as caught:
        send(desk, "a", data_of("a", 1), 0)
    assert caught.value.reason is RejectReason.NOT_NEEDED
    assert list(tmp_path.rglob("*")) == []


def test_a_restart_keeps_the_chunks_that_were_verified(tmp_path: Path) -> None:
    data = data_of("a", 4)
    desk = UploadDesk(tmp_path, slots=1, window=8)
    desk.offered("a", offer_of(data), 0.0)
    send(desk, "a", data, 2)
    desk = UploadDesk(tmp_path, slots=1, window=8)
    ((_, grant),) = desk.offered("a", offer_of(data), 0.0)
    assert isinstance(grant, Grant)
    assert ChunkSet.decode(grant.held, 4) == ChunkSet(4, [2])


def test_credit_above_a_brokers_queue_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="overrun"):
        UploadDesk(tmp_path, slots=100, window=10)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    slots=st.integers(1, 3),
    window=st.integers(1, 5),
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    seed=st.integers(0, 2**32),
    loss=st.sampled_from([0.0, 0.3]),
)
def test_every_update_arrives_whole_within_the_credit_whatever_is_lost(
    tmp_path_factory: pytest.TempPathFactory,
    slots: int,
    window: int,
    chunks: list[int],
    seed: int,
    loss: float,
) -> None:
    rng = Random(seed)
    folder = tmp_path_factory.mktemp("desk")
    desk = UploadDesk(folder, slots=slots, window=window, silence_s=10)
    data = {f"d{i}": data_of(f"{seed}/{i}", count) for i, count in enumerate(chunks)}
    senders = {}
    for name, whole in data.items():
        parts = [bytes(chunk) for chunk in chunks_of(whole, CHUNK)]
        senders[name] = BlobSender(describe(whole, CHUNK), parts.__getitem__)
    arrived: dict[str, bytes] = {}
    flying: list[tuple[str, int, bytes]] = []
    now = 0.0

    def hear(replies: tuple[Reply, ...] | list[Reply]) -> None:
        for device, message in replies:
            sender = senders[device]
            held = ChunkSet.decode(message.held, sender.ref.chunk_count)
            if isinstance(message, Grant):
                # A new grant begins a new window: what flew before it may be lost.
                flying[:] = [chunk for chunk in flying if chunk[0] != device]
                sender.granted(message.window, held)
            else:
                sender.acknowledged(held)

    for name, whole in data.items():
        hear(desk.offered(name, offer_of(whole), now))
    for _ in range(2000):
        if len(arrived) == len(data):
            break
        for name, sender in senders.items():
            if name not in arrived:
                flying += [(name, index, payload) for index, payload in sender.take()]
        assert len(flying) <= slots * window
        if not flying or rng.random() < 0.05:
            # A silence: what flew is lost; a device offers again later, and keeps its chunks.
            now += 11
            flying.clear()
            hear(desk.expired(now))
            for name in sorted(set(data) - set(arrived)):
                hear(desk.offered(name, offer_of(data[name]), now))
            continue
        name, index, payload = flying.pop(rng.randrange(len(flying)))
        if rng.random() < loss:
            continue
        sha256 = senders[name].ref.sha256
        replies, finished = desk.received(name, sha256, index, payload, now)
        hear(replies)
        if finished is not None:
            arrived[name] = finished.part.commit().read_bytes()
            flying[:] = [chunk for chunk in flying if chunk[0] != name]
            hear(desk.taken(finished, now))
    assert arrived == data
