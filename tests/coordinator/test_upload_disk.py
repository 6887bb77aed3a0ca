"""The desk on a disk that refuses: nothing is corrupted, little is sent in vain, and it goes on."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedge.coordinator.uploads import DISK_PAUSE_S, Reply, UploadDesk
from fedge.schemas import blob_files
from fedge.schemas.blobs import ChunkSet, chunks_of, describe
from fedge.schemas.errors import StoreUnavailable
from fedge.schemas.messages import Grant
from tests.coordinator.lossy_queue import CHUNK, data_of, network, offer_of


class FullDisk:
    """The system's calls that need space answer as on a full disk while `full` is set."""

    def __init__(self) -> None:
        self.full = False
        self.refused = 0

    def refuse(self) -> None:
        if self.full:
            self.refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[FullDisk]:
    found = FullDisk()
    pwrite, ftruncate = os.pwrite, os.ftruncate

    def write(descriptor: int, data: bytes, position: int) -> int:
        if found.full:
            # What still fits is written first.
            pwrite(descriptor, bytes(data[:100]), position)
        found.refuse()
        return pwrite(descriptor, data, position)

    def truncate(descriptor: int, size: int) -> None:
        found.refuse()
        ftruncate(descriptor, size)

    monkeypatch.setattr(blob_files.os, "pwrite", write)
    monkeypatch.setattr(blob_files.os, "ftruncate", truncate)
    return found


def sender(desk: UploadDesk, device: str, data: bytes) -> Callable[[int, float], tuple[Reply, ...]]:
    chunks = [bytes(chunk) for chunk in chunks_of(data, CHUNK)]
    sha256 = describe(data, CHUNK).sha256

    def send(index: int, now: float) -> tuple[Reply, ...]:
        return tuple(desk.received(device, sha256, index, chunks[index], now)[0])

    return send


def test_a_refused_chunk_can_come_again_and_the_update_is_whole(
    tmp_path: Path, disk: FullDisk
) -> None:
    desk = UploadDesk(tmp_path, slots=1, window=4)
    data = data_of("a", 4)
    desk.offered("a", offer_of(data), 0.0)
    send = sender(desk, "a", data)
    send(0, 0.1)
    disk.full = True
    for index in (1, 2):
        with pytest.raises(StoreUnavailable):
            send(index, 0.2)
    disk.full = False
    for index in (3, 2):
        send(index, 1.0)
    upload = desk._uploads["a"]
    _, finished = desk.received("a", upload.offer.update.sha256, 1, data[CHUNK : 2 * CHUNK], 1.0)
    assert finished is upload
    assert upload.part.commit().read_bytes() == data
    assert desk.taken(upload, 1.0) == []
    assert len(desk) == 0


def test_while_the_disk_is_full_one_chunk_is_asked_for_now_and_then(
    tmp_path: Path, disk: FullDisk
) -> None:
    desk = UploadDesk(tmp_path, slots=4, window=8)
    data = {name: data_of(name, 20) for name in "abcdef"}
    for name, whole in data.items():
        desk.offered(name, offer_of(whole), 0.0)
    disk.full = True
    for name in "abcd":
        with pytest.raises(StoreUnavailable):
            sender(desk, name, data[name])(0, 1.0)
    asked = []
    for _ in range(8):
        due = desk.next_expiry()
        assert due is not None
        assert list(desk.expired(due - 0.1)) == []
        ((device, grant),) = desk.expired(due)
        assert isinstance(grant, Grant)
        assert grant.window == 1
        asked.append(device)
        with pytest.raises(StoreUnavailable):
            sender(desk, device, data[device])(0, due + 0.1)
    # Another one each time, since the last may be gone.
    assert sorted(asked) == sorted("abcd" * 2)
    disk.full = False
    now = desk.next_expiry()
    assert now is not None
    ((device, _),) = desk.expired(now)
    # Once a chunk is written, all go on at once, and nobody has lost a slot by the wait.
    replies = sender(desk, device, data[device])(0, now + 0.1)
    windows = {name: each.window for name, each in replies if isinstance(each, Grant)}
    assert windows == dict.fromkeys("abcd", 8)
    # It was the disk and not the broker.
    assert desk.credit.total == 32


def test_an_offer_that_cannot_be_opened_leaves_nothing_behind(
    tmp_path: Path, disk: FullDisk
) -> None:
    desk = UploadDesk(tmp_path, slots=2, window=4)
    data = data_of("a", 2)
    disk.full = True
    with pytest.raises(StoreUnavailable):
        desk.offered("a", offer_of(data), 0.0)
    assert len(desk) == 0
    assert desk.next_expiry() is None
    disk.full = False
    ((device, grant),) = desk.offered("a", offer_of(data), 1.0)
    assert (device, isinstance(grant, Grant)) == ("a", True)


def test_a_slot_that_cannot_be_used_for_want_of_disk_is_used_later(
    tmp_path: Path, disk: FullDisk
) -> None:
    desk = UploadDesk(tmp_path, slots=1, window=4)
    data = {name: data_of(name, 1) for name in "ab"}
    for name, whole in data.items():
        desk.offered(name, offer_of(whole), 0.0)
    _, finished = desk.received("a", describe(data["a"], CHUNK).sha256, 0, data["a"], 1.0)
    assert finished is not None
    finished.part.commit()
    disk.full = True
    assert list(desk.taken(finished, 1.0)) == []
    assert desk.next_expiry() == 1.0 + DISK_PAUSE_S
    assert list(desk.expired(6.0)) == []
    disk.full = False
    assert [device for device, _ in desk.expired(11.0)] == ["b"]
    assert len(desk) == 1


def test_a_full_disk_and_a_link_that_is_down_make_no_busy_timer(
    tmp_path: Path, disk: FullDisk
) -> None:
    desk = UploadDesk(tmp_path, slots=1, window=4)
    data = data_of("a", 3)
    desk.offered("a", offer_of(data), 0.0)
    disk.full = True
    with pytest.raises(StoreUnavailable):
        sender(desk, "a", data)(0, 1.0)
    desk.heard_again(100.0)
    due = desk.next_expiry()
    assert due is not None
    assert due > 100.0


def test_dropping_and_taking_work_on_a_disk_that_lets_nothing_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = UploadDesk(tmp_path, slots=2, window=4)
    offers = {name: offer_of(data_of(name, 2)) for name in "abc"}
    for name, offer in offers.items():
        desk.offered(name, offer, 0.0)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "unlink", refuse)
    assert desk.drop("a") == offers["a"]
    assert desk.drop_all() == [("b", offers["b"]), ("c", offers["c"])]
    assert len(desk) == 0
    monkeypatch.undo()
    desk.keep_only(())
    assert list(tmp_path.iterdir()) == []


def test_a_fleet_goes_through_a_time_without_disk_and_sends_little_for_nothing(
    tmp_path: Path, disk: FullDisk
) -> None:
    here = network(tmp_path, [40] * 12, room=1000, rate=8)
    while here.now < 3.0:
        here.step()
    disk.full = True
    while here.now < 63.0:
        here.step()
    refused = disk.refused
    # What was on its way, and one chunk each five seconds.
    assert refused <= 12 * 32 + 60 / DISK_PAUSE_S + 1
    disk.full = False
    here.run(limit_s=200.0)
    assert here.complete
    assert min(here.totals) == here.desk.credit.most


def test_what_a_killed_coordinator_had_is_found_at_the_next_offer(tmp_path: Path) -> None:
    data = {name: data_of(name, 3) for name in "abc"}
    before = UploadDesk(tmp_path, slots=3, window=4)
    for name, whole in data.items():
        before.offered(name, offer_of(whole), 0.0)
    for index in (0, 1, 2):
        sender(before, "a", data["a"])(index, 0.0)
    sender(before, "c", data["c"])(1, 0.0)
    desk = UploadDesk(tmp_path, slots=1, window=4)
    assert [device for device, _ in desk.offered("b", offer_of(data["b"]), 0.0)] == ["b"]
    # Complete as it is, it needs no slot.
    assert list(desk.offered("a", offer_of(data["a"]), 0.0)) == []
    assert list(desk.offered("c", offer_of(data["c"]), 0.0)) == []
    found = desk.arrived("a")
    assert found is not None
    assert desk.arrived("a") is None
    assert list(desk.offered("a", offer_of(data["a"]), 0.0)) == []
    assert found.part.commit().read_bytes() == data["a"]
    desk.taken(found, 0.0)
    desk.drop("b")
    ((device, grant),) = desk.expired(1.0)
    assert device == "c"
    assert isinstance(grant, Grant)
    assert ChunkSet.decode(grant.held, 3) == ChunkSet(3, [1])
