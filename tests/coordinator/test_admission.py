"""How many devices are known, and how often each may speak."""

from __future__ import annotations

import contextlib

import pytest

from fedge.coordinator.admission import (
    BURST,
    FORGET_ABOVE,
    MESSAGES_PER_S,
    STRANGERS_BURST,
    Admission,
)
from fedge.schemas.errors import PeerError, RejectReason


def refused(admission, device, now):
    try:
        admission.listen(device, now)
        admission.admit(device)
    except PeerError as error:
        return error.reason is RejectReason.LIMIT_EXCEEDED
    return False


def test_a_flood_is_cut_to_its_rate_and_others_notice_nothing():
    admission = Admission((), limit=10)
    passed = sum(not refused(admission, "flood", now=i / 1000) for i in range(10_000))
    # 10 seconds at the rate, and the burst.
    assert passed == pytest.approx(BURST + 10 * MESSAGES_PER_S, abs=2)
    assert not refused(admission, "honest", now=10.0)


def test_a_device_that_was_too_fast_is_heard_again():
    admission = Admission(["a"], limit=10)
    for _ in range(BURST):
        admission.listen("a", 0.0)
    assert refused(admission, "a", 0.0)
    assert not refused(admission, "a", 2 / MESSAGES_PER_S)


def test_names_beyond_the_limit_are_refused_and_known_ones_are_not():
    admission = Admission(["old"], limit=2)
    assert not refused(admission, "new", 0.0)
    assert refused(admission, "third", 0.0)
    assert not admission.is_known("third")
    assert not refused(admission, "old", 0.0)


def test_a_name_is_taken_up_when_its_message_was_read_and_not_before():
    admission = Admission((), limit=1)
    admission.listen("garbage", 0.0)
    assert not admission.is_known("garbage")
    assert not refused(admission, "honest", 0.0)
    assert admission.is_known("honest")


def test_strangers_share_one_rate():
    admission = Admission(["known"], limit=10**6)
    for index in range(10 * STRANGERS_BURST):
        with contextlib.suppress(PeerError):
            admission.listen(f"garbage-{index}", 0.0)
    # One entry for all of them; a device that is known does not feel it.
    assert len(admission._spent) == 1
    with pytest.raises(PeerError):
        admission.listen("one more", 0.0)
    admission.listen("known", 0.0)
    admission.listen("one more", 1.0)


def test_a_device_that_was_forgotten_makes_room_for_another():
    admission = Admission(["old", "gone"], limit=2)
    admission.keep_only(["old"])
    assert not refused(admission, "new", 0.0)
    assert refused(admission, "third", 0.0)


def test_rates_of_quiet_devices_are_forgotten():
    admission = Admission((), limit=10**6)
    names = [f"d{index}" for index in range(2 * FORGET_ABOVE)]
    admission.keep_only(names)
    for index, name in enumerate(names):
        admission.listen(name, float(index))
    assert len(admission._spent) <= FORGET_ABOVE + 1
