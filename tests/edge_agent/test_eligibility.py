"""The rules, by hand and by Hypothesis: what is broken is said, and nothing else is in the way."""

from __future__ import annotations

from datetime import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedge.edge_agent.eligibility import (
    EligibilitySettings,
    Reading,
    Readings,
    Sensor,
    Standing,
    look_at,
    stand,
)

NOON = time(12, 0)
ALL_RULES = EligibilitySettings(
    charging=True,
    battery_above=0.4,
    idle_for_s=300,
    unmetered=True,
    cooler_than_celsius=70,
    free_memory_bytes=200_000_000,
    hours=("22:00-07:00", "11:00-13:00"),
)
GOOD: dict[Sensor, bool | float] = {
    Sensor.CHARGING: True,
    Sensor.BATTERY: 0.41,
    Sensor.IDLE_FOR_S: 300.0,
    Sensor.METERED: False,
    Sensor.CELSIUS: 69.9,
    Sensor.FREE_MEMORY_BYTES: 2e8,
}
BAD: dict[Sensor, bool | float] = {
    Sensor.CHARGING: False,
    Sensor.BATTERY: 0.4,
    Sensor.IDLE_FOR_S: 299.9,
    Sensor.METERED: True,
    Sensor.CELSIUS: 70.0,
    Sensor.FREE_MEMORY_BYTES: 2e8 - 1,
}
RULE_OF = {
    Sensor.CHARGING: "charging",
    Sensor.BATTERY: "battery_above",
    Sensor.IDLE_FOR_S: "idle_for_s",
    Sensor.METERED: "unmetered",
    Sensor.CELSIUS: "cooler_than_celsius",
    Sensor.FREE_MEMORY_BYTES: "free_memory_bytes",
}


def taken(values: dict[Sensor, bool | float | None]) -> Readings:
    return {sensor: Reading(value, "why") for sensor, value in values.items()}


def broken(rules: EligibilitySettings, readings: Readings, now: time = NOON) -> set[str]:
    return {finding.rule for finding in look_at(rules, readings, now) if not finding.holds}


def test_every_rule_holds_on_its_own_side_of_its_limit() -> None:
    assert broken(ALL_RULES, taken(GOOD)) == set()
    assert broken(ALL_RULES, taken(BAD)) == set(RULE_OF.values())


def test_without_a_key_there_is_no_rule_and_nothing_is_read() -> None:
    assert look_at(EligibilitySettings(), {}, NOON) == []
    assert EligibilitySettings().sensors == frozenset()
    assert ALL_RULES.sensors == set(Sensor)


@given(st.sets(st.sampled_from(Sensor)), st.sets(st.sampled_from(Sensor)))
def test_exactly_the_rules_that_are_on_and_whose_readings_are_bad_are_broken(
    switched_on: set[Sensor], bad: set[Sensor]
) -> None:
    keys = {RULE_OF[sensor] for sensor in switched_on}
    rules = EligibilitySettings.model_validate(ALL_RULES.model_dump(include=keys))
    readings = taken({one: BAD[one] if one in bad else GOOD[one] for one in Sensor})
    assert broken(rules, readings) == {RULE_OF[one] for one in switched_on & bad}
    assert rules.sensors == switched_on


@given(st.sets(st.sampled_from(Sensor)), st.sampled_from(["allow", "refuse"]))
def test_what_cannot_be_read_is_as_the_operator_chose(unknown: set[Sensor], choice: str) -> None:
    rules = ALL_RULES.model_copy(update={"unknown": choice})
    # Unread, and read without a value, are the same.
    readings = taken(GOOD | dict.fromkeys(unknown))
    absent = taken({one: value for one, value in GOOD.items() if one not in unknown})
    for found in (readings, absent):
        expected = {RULE_OF[one] for one in unknown} if choice == "refuse" else set()
        assert broken(rules, found) == expected
    told = [one for one in look_at(rules, readings, NOON) if not one.known]
    assert {one.rule for one in told} == {RULE_OF[one] for one in unknown}
    assert all("not known (why)" in one.reason for one in told)


@pytest.mark.parametrize(
    ("now", "holds"),
    [
        (time(21, 59), False),
        (time(22, 0), True),
        (time(0, 0), True),
        (time(6, 59, 59), True),
        (time(7, 0), False),
        (time(10, 59), False),
        (time(11, 0), True),
        (time(13, 0), False),
    ],
)
def test_hours_may_run_over_midnight_and_end_at_their_end(now: time, holds: bool) -> None:
    assert ("hours" not in broken(ALL_RULES, taken(GOOD), now)) == holds


def test_a_reason_says_what_was_read_and_what_is_wanted() -> None:
    rules = EligibilitySettings(battery_above=0.4, charging=True)
    reasons = [one.reason for one in look_at(rules, taken(BAD), NOON)]
    assert reasons == [
        "charging: on battery, wanted external power",
        "battery_above: 40%, wanted above 40%",
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"hours": ["22:00"]},
        {"hours": ["24:00-07:00"]},
        {"hours": ["07:00-07:00"]},
        {"battery_above": 1.0},
        {"unknown": "perhaps"},
        {"readings_file": "a", "readings_command": ["b"]},
        {"readings_max_age_s": 5},
        {"readings_command": []},
        {"temperature": 3},
    ],
    ids=str,
)
def test_a_rule_that_cannot_work_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        EligibilitySettings.model_validate(wrong)


def test_a_device_that_was_never_looked_at_is_eligible_at_once_if_it_is() -> None:
    assert stand(None, [], 5.0, 60.0).eligible
    assert stand(None, ["hot"], 5.0, 60.0) == Standing(eligible=False, reasons=("hot",))


@given(
    st.lists(st.tuples(st.booleans(), st.floats(0.1, 20.0)), min_size=1, max_size=40),
    st.floats(0.0, 30.0),
)
def test_a_break_counts_at_once_and_its_end_after_the_steady_time(
    looks: list[tuple[bool, float]], steady_for_s: float
) -> None:
    standing, now_s, good_since_s, ever_bad = None, 0.0, None, False
    for bad, after_s in looks:
        now_s += after_s
        standing = stand(standing, ["x"] if bad else [], now_s, steady_for_s)
        good_since_s = None if bad else now_s if good_since_s is None else good_since_s
        ever_bad = ever_bad or bad
        if bad:
            assert not standing.eligible
        elif not ever_bad:
            assert standing.eligible
        if standing.eligible and ever_bad:
            assert now_s - good_since_s >= steady_for_s
        if not standing.eligible:
            assert standing.reasons
            assert bad or now_s - good_since_s < steady_for_s
