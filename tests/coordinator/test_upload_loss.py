"""The desk against queues that drop what they acknowledged: everything arrives, and steadily."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.coordinator.credit import Credit
from fedge.coordinator.uploads import SPARE_FILES, Reply, UploadDesk
from fedge.schemas.blobs import ChunkSet, chunks_of, describe
from fedge.schemas.messages import Grant, Have
from tests.coordinator.lossy_queue import CHUNK, Device, data_of, network, offer_of


def grants_in(replies: object) -> dict[str, Grant]:
    assert isinstance(replies, (list, tuple))
    return {device: each for device, each in replies if isinstance(each, Grant)}


def held_in(message: Grant | Have, chunks: int) -> set[int]:
    return set(range(chunks)) - set(ChunkSet.decode(message.held, chunks).missing())


def send(
    desk: UploadDesk, device: str, data: bytes, index: int, now: float = 0.0
) -> tuple[Reply, ...]:
    chunk = bytes(list(chunks_of(data, CHUNK))[index])
    return tuple(desk.received(device, describe(data, CHUNK).sha256, index, chunk, now)[0])


# ------------------------------------------------------------------ the credit alone


def test_the_credit_begins_at_what_is_configured_and_shrinks_on_both_sides() -> None:
    credit = Credit(16, 32)
    seen = [(credit.total, credit.slots, credit.window)]
    for _ in range(10):
        assert credit.lost(credit.generation)
        seen.append((credit.total, credit.slots, credit.window))
    assert seen == [
        *[(512, 16, 32), (256, 11, 23), (128, 8, 16), (64, 5, 12), (32, 4, 8), (16, 2, 8)],
        *[(8, 2, 4), (4, 1, 4), (2, 1, 2), (1, 1, 1), (1, 1, 1)],
    ]


def test_of_the_chunks_that_were_on_their_way_together_one_loss_counts() -> None:
    credit = Credit(16, 32)
    before = credit.generation
    assert [credit.lost(before) for _ in range(16)] == [True] + [False] * 15
    assert credit.total == 256
    credit.excuse()
    assert not credit.lost(before + 1)


@given(
    slots=st.integers(1, 500),
    window=st.integers(1, 500),
    events=st.lists(st.booleans(), max_size=300),
)
def test_the_credit_stays_between_one_chunk_and_what_is_configured(
    slots: int, window: int, events: list[bool]
) -> None:
    credit = Credit(slots, window)
    for arrives in events:
        before = credit.total
        credit.arrived() if arrives else credit.lost(credit.generation)
        assert 1 <= credit.total <= slots * window
        assert 1 <= credit.slots <= slots
        assert 1 <= credit.window <= window
        assert credit.slots * credit.window <= credit.total
        assert credit.total >= before if arrives else credit.total <= max(1, before // 2 + 1)


def test_a_halved_credit_is_whole_again_after_a_few_full_credits_of_chunks() -> None:
    credit = Credit(16, 32)
    credit.lost(0)
    arrivals = 0
    while credit.total < 512:
        credit.arrived()
        arrivals += 1
    # Eight more for each full credit: (512² - 256²) / 2 / 8.
    assert arrivals == pytest.approx(12288, rel=0.01)


# ------------------------------------------------------------------ what tells of a loss


def test_a_gap_is_asked_for_as_soon_as_the_last_allowed_chunk_is_there(tmp_path: Path) -> None:
    desk = UploadDesk(tmp_path, slots=1, window=8)
    data = data_of("a", 20)
    desk.offered("a", offer_of(data), 0.0)
    for index in (0, 2, 3, 4, 5, 6):
        assert send(desk, "a", data, index) == ()
    ((device, grant),) = send(desk, "a", data, 7)
    assert device == "a"
    assert isinstance(grant, Grant)
    assert held_in(grant, 20) == {0, 2, 3, 4, 5, 6, 7}
    assert (grant.window, desk.credit.total) == (4, 4)


def test_no_chunk_is_asked_for_twice_while_it_may_be_on_its_way(tmp_path: Path) -> None:
    desk = UploadDesk(tmp_path, slots=1, window=8)
    data = data_of("a", 20)
    desk.offered("a", offer_of(data), 0.0)
    for index in (1, 2, 3, 4, 5, 6):
        # Credit for more would only be lost with the rest: none is given until this is settled.
        assert send(desk, "a", data, index) == ()
    # The missing one was only late: the credit goes on, and nothing was lost.
    ((_, have),) = send(desk, "a", data, 0)
    assert isinstance(have, Have)
    assert desk.credit.total == 8


def test_without_losses_credit_is_freed_by_half_windows_and_only_if_it_is_of_use(
    tmp_path: Path,
) -> None:
    desk = UploadDesk(tmp_path, slots=1, window=8)
    data = data_of("a", 16)
    desk.offered("a", offer_of(data), 0.0)
    told = {index: send(desk, "a", data, index) for index in range(15)}
    # From chunk 7 on the device may send all the rest.
    assert [index for index, replies in told.items() if replies] == [3, 7]


def test_a_lost_last_chunk_is_asked_for_after_a_silence_of_the_devices_own_pace(
    tmp_path: Path,
) -> None:
    desk = UploadDesk(tmp_path, slots=1, window=8, silence_s=100)
    data = data_of("a", 6)
    desk.offered("a", offer_of(data), 0.0)
    for index in range(5):
        send(desk, "a", data, index, now=1.0 + index)
    # The longest interval was one second.
    assert desk.next_expiry() == 9.0
    assert held_in(grants_in(desk.expired(9.0))["a"], 6) == {0, 1, 2, 3, 4}
    assert desk.next_expiry() == 17.0
    assert desk.credit.total == 8


def test_a_silence_counts_as_a_loss_only_if_the_device_then_sends_nothing_twice(
    tmp_path: Path,
) -> None:
    for repeats, total in ((False, 4), (True, 8)):
        desk = UploadDesk(tmp_path / str(repeats), slots=1, window=8)
        data = data_of("a", 40)
        desk.offered("a", offer_of(data), 0.0)
        send(desk, "a", data, 0, now=0.1)
        assert grants_in(desk.expired(5.0)).keys() == {"a"}
        send(desk, "a", data, 1, now=5.1)
        if repeats:
            # Chunk 1 was on its way all the time; after the grant it was sent again.
            send(desk, "a", data, 1, now=5.2)
        send(desk, "a", data, 2, now=5.3)
        assert desk.credit.total == total


def test_a_device_that_dies_costs_no_credit(tmp_path: Path) -> None:
    desk = UploadDesk(tmp_path, slots=4, window=8, silence_s=10)
    for number in range(8):
        data = data_of(f"{number}", 20)
        desk.offered(f"d{number}", offer_of(data), 0.0)
    for number in range(4):
        send(desk, f"d{number}", data_of(f"{number}", 20), 0, now=1.0)
    for now in range(2, 60):
        desk.expired(float(now))
    assert desk.credit.total == 32
    assert desk.on_their_way == 32


def test_what_is_lost_with_the_broker_or_the_link_costs_no_credit(tmp_path: Path) -> None:
    desk = UploadDesk(tmp_path, slots=1, window=8)
    data = data_of("a", 20)
    desk.offered("a", offer_of(data), 0.0)
    desk.heard_again(1.0)
    for index in (0, 2, 3, 4, 5, 6, 7):
        replies = send(desk, "a", data, index, now=2.0)
    assert grants_in(replies)["a"].window == 8
    assert desk.credit.total == 8


# ------------------------------------------------------------------ whole fleets


@settings(max_examples=60, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=10),
    slots=st.integers(1, 6),
    window=st.integers(1, 32),
    room=st.integers(1, 80),
    rate=st.integers(1, 16),
    latency=st.integers(1, 10),
    control_loss=st.sampled_from([0.0, 0.0, 0.2]),
    away=st.tuples(st.floats(0.0, 20.0), st.floats(0.0, 40.0)),
    seed=st.integers(0, 2**32),
)
def test_every_update_arrives_whole_through_any_queue_within_the_credit_and_steadily(
    chunks: list[int],
    slots: int,
    window: int,
    room: int,
    rate: int,
    latency: int,
    control_loss: float,
    away: tuple[float, float],
    seed: int,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        here = network(
            Path(folder), chunks, slots=slots, window=window, room=room, seed=seed,
            rate=rate, latency=latency, control_loss=control_loss,
        )  # fmt: skip
        absent = here.devices[seed % len(chunks)]
        absent.away = (away[0], away[0] + away[1])
        here.run(limit_s=5000.0)
        assert here.complete
        assert here.most_on_their_way <= slots * window
        assert 1 <= min(here.totals) <= max(here.totals) <= slots * window
        # Steadily: never is there a long time in which nothing new arrives, but for a device that
        # is away. A silence costs at most 15 s to notice, and a lost answer to it another 15 s
        # each time, with one chance in five.
        pauses = [b - a for a, b in zip([0.0, *here.fresh_at], here.fresh_at, strict=False)]
        assert max(pauses) <= away[1] + 200.0
        # Losses are few beside what is sent, however small the queue is.
        assert here.sent <= 4 * here.needed + 4 * slots * window


@pytest.mark.parametrize("room", [110, 20, 5])
def test_a_small_queue_carries_a_large_fleet_at_nearly_its_own_pace(
    tmp_path: Path, room: int
) -> None:
    here = network(tmp_path, [82] * 40, room=room, rate=4)
    took_s = here.run(limit_s=1000.0)
    assert here.complete
    # The coordinator takes 80 chunks a second at the most.
    assert took_s <= 1.35 * here.needed / 80
    assert sum(here.repeats.values()) <= 0.02 * here.needed
    assert here.dropped <= 0.3 * here.needed


def test_a_queue_that_holds_the_whole_credit_loses_and_repeats_nothing(tmp_path: Path) -> None:
    for number, rate in enumerate((4, 16)):
        here = network(tmp_path / str(number), [82] * 40, room=512, rate=rate)
        here.run(limit_s=1000.0)
        assert here.complete
        assert (here.dropped, sum(here.repeats.values())) == (0, 0)
        assert (min(here.totals), here.sent) == (512, here.needed)


def test_one_seed_makes_one_run(tmp_path: Path) -> None:
    runs = [
        network(tmp_path / name, [30] * 12, room=40, rate=3, seed=7, control_loss=0.1)
        for name in ("one", "other")
    ]
    assert max(run.run(limit_s=1000.0) for run in runs) < 1000.0
    assert runs[0].totals == runs[1].totals
    assert (runs[0].sent, runs[0].fresh_at) == (runs[1].sent, runs[1].fresh_at)


def test_a_slow_and_uneven_device_does_not_slow_the_others_down(tmp_path: Path) -> None:
    here = network(tmp_path, [82] * 8, room=1000, rate=4)
    # A chunk each four seconds, and a pause that is longer than any silence.
    here.devices[3] = Device("d03", data_of("slow", 30), chunks_per_tick=1 / 80, away=(20.0, 55.0))
    here._by_name["d03"] = here.devices[3]
    here.run(limit_s=1000.0)
    assert here.complete
    assert here.dropped == 0
    assert min(here.totals) == 512


# ------------------------------------------------------------------ bounded


def test_a_long_line_holds_no_files_and_no_disk(tmp_path: Path) -> None:
    desk = UploadDesk(tmp_path, slots=2, window=4)
    for number in range(500):
        desk.offered(f"d{number}", offer_of(data_of(f"{number}", 2)), 0.0)
    assert len(desk) == 500
    assert len(list(tmp_path.rglob("*.part"))) == 2


def test_slots_that_are_lost_again_and_again_keep_few_files_open(tmp_path: Path) -> None:
    desk = UploadDesk(tmp_path, slots=1, window=4, silence_s=10)
    count = SPARE_FILES + 40
    for number in range(count):
        desk.offered(f"d{number}", offer_of(data_of(f"{number}", 3)), 0.0)
    now = 0.0
    for number in range(count):
        send(desk, f"d{number}", data_of(f"{number}", 3), 0, now)
        now += 10.0
        desk.expired(now)
    open_files = [upload for upload in desk._uploads.values() if upload.file is not None]
    assert len(open_files) <= SPARE_FILES + 1
    # A chunk of one whose file was closed comes again with its next grant.
    closed = next(name for name, upload in desk._uploads.items() if upload.file is None)
    data = data_of(closed.removeprefix("d"), 3)
    assert send(desk, closed, data, 1, now) == ()
    for name in [name for name in desk._uploads if name != closed]:
        desk.drop(name)
    assert held_in(grants_in(desk.expired(now))[closed], 3) == {0}
