"""Who is online: births, wills, and the roll after an outage."""

from __future__ import annotations

from fedge.coordinator.attendance import Attendance


def born(attendance, device, boot=1, *, retained=False):
    return attendance.present(device, boot, online=True, retained=retained)


def died(attendance, device, boot=1, *, retained=False):
    return attendance.present(device, boot, online=False, retained=retained)


def test_births_and_deaths_are_believed():
    here = Attendance()
    born(here, "a")
    born(here, "b")
    died(here, "a")
    assert here.online == {"b"}


def test_the_death_of_an_earlier_life_is_ignored():
    here = Attendance()
    born(here, "a", boot=2)
    assert not died(here, "a", boot=1)
    assert here.online == {"a"}


def test_who_does_not_answer_the_roll_is_absent():
    here = Attendance(online=["a", "b", "c"])
    here.call_roll(ends_at=10.0)
    born(here, "a", retained=False)
    here.heard("b")
    assert here.absent(9.0) == frozenset()
    assert here.absent(10.0) == {"c"}
    assert here.online == {"a", "b"}
    assert here.roll_ends is None


def test_a_birth_that_the_broker_kept_is_no_answer_to_the_roll():
    # A broker that was killed comes back with what it had on disk, its dead devices among it.
    here = Attendance()
    here.call_roll(ends_at=10.0)
    born(here, "dead", retained=True)
    born(here, "alive", retained=True)
    born(here, "alive")
    assert here.online == {"dead", "alive"}
    assert here.absent(10.0) == {"dead"}


def test_a_retained_birth_after_the_roll_counts():
    here = Attendance()
    born(here, "a", retained=True)
    assert here.absent(10.0) == frozenset()
    assert here.online == {"a"}


def test_a_device_thought_absent_that_speaks_is_online():
    here = Attendance()
    assert here.heard("a")
    assert not here.heard("a")
    assert here.online == {"a"}
