"""What the report tells whoever has to trust it: every promise, and what was not looked at."""

from __future__ import annotations

from typing import Any

import pytest

from tests.chaos.catalogue import BY_NAME
from tests.chaos.promises import BY_CHECK, PROMISES
from tests.chaos.telling import WIDTH, as_text
from tests.chaos.verdict import Checked, Violation, together

CASES = 7


def a_report(**changes: Any) -> dict[str, Any]:
    """Of a run with one reset in which all was well, with changes."""
    return {
        "seed": 3,
        "seconds": 60.0,
        "mode": "sync",
        "devices": 5,
        "faults": 1,
        "faults_by_kind": {"reset": 1},
        "kinds": {
            "all": len(BY_NAME),
            "injected": 1,
            "left_out": [],
            "not_drawn": ["cut", "stall"],
            "missed": [],
            "skipped": [],
        },
        "missed": {},
        "miss_reasons": {},
        "skipped": {},
        "skip_reasons": [],
        "versions": 9,
        "versions_under_fault": 4,
        "longest_time_between_versions_s": 3.5,
        "rounds": {"aggregated": 9, "open": 1},
        "abandoned": {},
        "updates_accepted": 28,
        "updates_accepted_by_round": {"aggregated": 27, "open": 1},
        "participants": {"accepted": 28, "silent": 8},
        "refusals": {},
        "receipts_said": 33,
        "receipts_by_status": {"accepted": 31, "rejected": 2},
        "updates_told_accepted": 28,
        "versions_remade": 9,
        "largest_difference": 1e-07,
        "versions_undecided": [],
        "starts_refused_by_a_bad_disk": 0,
        "coordinator_starts_s": {"count": 0, "median": 0.0, "max": 0.0},
        "store_readings": 100,
        "store_unreadable": 2,
        "quiet_s": 8.0,
        "errors_logged": {},
        "sizes": {
            "d0": {
                "max_rss_mb": 45.0,
                "growth_mb": 0.5,
                "slope_kb_per_min": 123.4,
                "slope_span_s": 40.0,
                "max_descriptors": 16,
            }
        },
        "kit_failures": [],
        "checks": [
            {
                "check": promise.check,
                "guarantee": promise.heading,
                "promise": promise.sentence,
                "cases": CASES,
                "of": promise.cases,
                "violations": 0,
            }
            for promise in PROMISES
        ],
        "violations": [],
        **changes,
    }


def with_check(name: str, **changes: Any) -> list[dict[str, Any]]:
    checks = a_report()["checks"]
    return [{**each, **(changes if each["check"] == name else {})} for each in checks]


def line_of(text: str, name: str) -> str:
    (line,) = (each for each in text.splitlines() if BY_CHECK[name].sentence in each)
    return line


def test_every_promise_is_told_with_its_cases_in_one_line():
    text = as_text(a_report())
    for name, promise in BY_CHECK.items():
        assert f"{CASES} {promise.cases}" in line_of(text, name)
        assert line_of(text, name).strip().startswith("held ")
    assert max(len(line) for line in text.splitlines()) <= WIDTH
    total = CASES * len(PROMISES)
    assert f"0 violations in {len(PROMISES)} checks of {total} cases" in text


def test_a_check_that_looked_at_nothing_does_not_hold():
    text = as_text(a_report(checks=with_check("receipts_hold", cases=0)))
    assert line_of(text, "receipts_hold").strip().startswith("no case ")
    assert f" in {len(PROMISES) - 1} checks of " in text


def test_a_check_that_a_mode_does_not_have_is_said():
    text = as_text(a_report(checks=with_check("rounds_end", cases=None)))
    assert "not in this mode" in line_of(text, "rounds_end")


def test_a_broken_promise_is_told_where_it_stands_and_at_the_end():
    violation = {"check": "receipts_hold", "text": "round 3, d0: gone", "at_s": 1, "around": ["x"]}
    checks = with_check("receipts_hold", violations=1)
    text = as_text(a_report(checks=checks, violations=[violation]))
    assert line_of(text, "receipts_hold").strip().startswith("BROKEN 1 ")
    assert "VIOLATION receipts_hold: round 3, d0: gone\nx" in text
    assert "The promise WAS BROKEN: 1 violations" in text


def test_kinds_of_faults_that_did_not_come_up_are_named():
    text = as_text(a_report())
    assert f"1 of {len(BY_NAME)} kinds of faults came up" in text
    assert "not drawn with this seed in this time: cut, stall" in text


def test_what_did_not_happen_has_no_line():
    text = as_text(a_report())
    assert "because" not in text
    assert "abandoned 0 times" not in text
    assert "missed" not in text
    assert "bad disks" not in text
    told = as_text(a_report(abandoned={"the deadline came": 2}, missed={"cut": 1}))
    assert "abandoned 2 times: the deadline came" in told
    assert "missed: when its time came there was nothing to strike" in told


@pytest.mark.parametrize(("seconds", "is_told"), [(599.0, False), (600.0, True)])
def test_a_slope_of_memory_is_told_only_of_a_long_run(seconds: float, is_told: bool):
    text = as_text(a_report(seconds=seconds))
    assert ("KB/min" in text) is is_told
    assert ("123.4" in text) is is_told


def test_parts_of_a_check_are_added_up_and_told_once():
    gone = Violation("presence_is_right", "d0", 1.0)
    parts = [
        Checked("presence_is_right", 5, (gone,)),
        Checked("receipts_hold", 2),
        Checked("presence_is_right", 5, (gone,)),
    ]
    assert together(parts) == {
        "presence_is_right": Checked("presence_is_right", 10, (gone,)),
        "receipts_hold": Checked("receipts_hold", 2),
    }
