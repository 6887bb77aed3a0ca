"""When a device fine-tunes a version for itself: the decision, over any course of events."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedge.edge_agent.personal_models import PersonalRecord
from fedge.edge_agent.personalisation import (
    LONGEST_REST_S,
    Begin,
    Material,
    PersonalisationSettings,
    Situation,
    Wait,
    decide,
    is_up_to_date,
    rest_after,
    seed_for,
)
from fedge.schemas.plan import TrainingDefaults

SETTINGS = PersonalisationSettings(
    min_examples=10, min_hold_out=4, settle_s=60.0, again_after=0.25, epochs=5
)
PLENTY = Material(training=100, hold_out=20, generation=7)
READY = Situation(version=3, since_s=0.0, eligible=True, busy=False, material=PLENTY)


def record_of(situation: Situation, settings: PersonalisationSettings = SETTINGS, **changes: Any):
    """What a personal training of this situation leaves."""
    material = situation.material
    assert material is not None
    return PersonalRecord(
        version=situation.version or 0,
        plan_sha256="0" * 64,
        settings_sha256=settings.digest,
        training=material.training,
        hold_out=material.hold_out,
        generation=material.generation,
        at=0.0,
        outcome="not better",
    ).model_copy(update=changes)


def test_a_version_that_has_stayed_is_personalised():
    assert decide(SETTINGS, READY, 60.0) == Begin(3, PLENTY)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": None}, "no version"),
        ({"material": None}, "not counted"),
        ({"material": Material(9, 20)}, "min_examples: 9 here, 10 wanted"),
        ({"material": Material(100, 3)}, "min_hold_out: 3 held out, 4 wanted"),
        ({"busy": True}, "done for a round"),
        ({"eligible": False}, "rules for training"),
        ({"record": record_of(READY)}, "is done"),
        ({"attempts": 1, "attempt_s": 61.0}, "cut off"),
    ],
)
def test_each_thing_that_is_in_the_way_is_said(changes, words):
    decision = decide(SETTINGS, replace(READY, **changes), 120.0)
    assert isinstance(decision, Wait)
    assert words in decision.reason


def test_a_version_that_has_not_stayed_long_waits_until_it_has():
    decision = decide(SETTINGS, replace(READY, since_s=100.0), 130.0)
    assert isinstance(decision, Wait)
    assert decision.until_s == 160.0


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"training": 129, "hold_out": 20}, False),
        ({"training": 130, "hold_out": 20}, True),
        ({"training": 70, "hold_out": 20}, True),
        ({"training": 100, "hold_out": 20, "generation": 8}, True),
    ],
)
def test_it_is_done_again_when_the_examples_changed_materially_or_something_was_forgotten(
    change, again
):
    """A quarter of 120 examples is 30."""
    now = replace(READY, record=record_of(READY), material=Material(**{"generation": 7, **change}))
    assert isinstance(decide(SETTINGS, now, 60.0), Begin) == again


def test_it_is_done_again_with_other_layers_and_not_with_other_limits():
    record = record_of(READY)
    other = SETTINGS.model_copy(update={"layers": 1})
    assert not is_up_to_date(other, record, 3, PLENTY)
    patient = SETTINGS.model_copy(update={"settle_s": 5.0, "min_examples": 1})
    assert is_up_to_date(patient, record, 3, PLENTY)


def test_what_failed_is_not_tried_again_for_the_same_version_and_examples():
    failed = record_of(READY, outcome="failed", reason="the loss became NaN")
    assert isinstance(decide(SETTINGS, replace(READY, record=failed), 1e6), Wait)
    assert isinstance(decide(SETTINGS, replace(READY, version=4, record=failed), 1e6), Begin)


def test_attempts_in_vain_are_ever_further_apart():
    rests = [rest_after(attempts, 60.0) for attempts in range(1, 20)]
    assert rests[:3] == [60.0, 120.0, 240.0]
    assert rests == sorted(rests)
    assert rests[-1] == LONGEST_REST_S
    assert rest_after(1, 0.0) > 0


# ---------------------------------------------------------------- any situation

times = st.floats(0, 1e6)
materials = st.none() | st.builds(
    Material, st.integers(0, 50), st.integers(0, 12), st.none() | st.integers(0, 2)
)
records = st.none() | st.builds(
    lambda version, settings, material: record_of(
        replace(READY, version=version, material=material), settings
    ),
    st.integers(0, 2),
    st.sampled_from([SETTINGS, SETTINGS.model_copy(update={"layers": 1})]),
    materials.filter(lambda found: found is not None),
)
situations = st.builds(
    Situation,
    version=st.none() | st.integers(0, 2),
    since_s=times,
    eligible=st.booleans(),
    busy=st.booleans(),
    material=materials,
    record=records,
    attempts=st.integers(0, 30),
    attempt_s=times,
)


@given(situations, times)
def test_it_never_begins_in_the_way_of_anything(now, now_s):
    decision = decide(SETTINGS, now, now_s)
    if isinstance(decision, Wait):
        assert decision.reason
        return
    assert now.eligible
    assert not now.busy
    assert decision.version == now.version
    assert decision.material == now.material
    assert now.material is not None
    assert now.material.training >= SETTINGS.min_examples
    assert now.material.hold_out >= SETTINGS.min_hold_out
    assert now_s >= now.since_s + SETTINGS.settle_s
    assert now.attempts == 0 or now_s > now.attempt_s


@given(situations, times)
def test_what_was_done_is_not_done_again_while_nothing_changes(now, now_s):
    decision = decide(SETTINGS, now, now_s)
    if isinstance(decision, Begin):
        done = replace(now, record=record_of(now))
        for later_s in (now_s, now_s + 1.0, now_s + 1e7):
            assert isinstance(decide(SETTINGS, done, later_s), Wait)


@given(situations, times)
def test_a_wait_with_a_time_ends_then(now, now_s):
    decision = decide(SETTINGS, now, now_s)
    if isinstance(decision, Wait) and decision.until_s is not None:
        assert decision.until_s > now_s
        after = decide(SETTINGS, now, decision.until_s)
        assert not isinstance(after, Wait) or after.until_s is None


@given(st.lists(st.floats(0.1, 59.0), min_size=1, max_size=40))
def test_in_a_quick_series_of_versions_nothing_is_begun_until_one_stays(gaps):
    now_s = 0.0
    for version, gap_s in enumerate(gaps):
        situation = replace(READY, version=version, since_s=now_s)
        for part in (0.0, 0.5, 0.999):
            assert isinstance(decide(SETTINGS, situation, now_s + part * gap_s), Wait)
        now_s += gap_s
    last = replace(READY, version=len(gaps), since_s=now_s)
    assert isinstance(decide(SETTINGS, last, now_s + 60.0), Begin)


# ---------------------------------------------------------------- how


def test_the_plan_s_author_decides_what_the_operator_does_not():
    defaults = TrainingDefaults(batch_size=16, learning_rate=0.3, local_epochs=9, proximal_mu=0.5)
    training = SETTINGS.training(defaults, 4)
    assert (training.batch_size, training.learning_rate, training.local_epochs) == (16, 0.3, 5)
    assert training.proximal_mu == 0.0
    own = SETTINGS.model_copy(update={"learning_rate": 0.01, "proximal_mu": 0.1})
    assert own.training(defaults, 4).learning_rate == 0.01
    assert own.training(defaults, 4).proximal_mu == 0.1


def test_the_seed_is_the_same_for_the_same_version_of_the_same_device():
    seeds = {seed_for("p", device, version) for device in "ab" for version in range(5)}
    assert len(seeds) == 10
    assert seed_for("p", "a", 3) in seeds
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize(
    "wrong", [{"layers": 0}, {"layers": []}, {"layers": "some"}, {"layers": True}, {"epochs": 0}]
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValidationError):
        PersonalisationSettings.model_validate(wrong)
