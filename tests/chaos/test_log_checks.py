"""The checks of logs, exits and sizes find what was planted."""

from __future__ import annotations

import pytest

from tests.chaos.gauges import Growth, Sample, growth
from tests.chaos.log_checks import (
    exits_are_explained,
    logs_have_no_traceback,
    nothing_piles_up,
    sizes_are_bounded,
    stops_are_orderly,
    work_is_done_once,
)
from tests.chaos.programs import Exit, Stop

STARTED = {"event": "agent_started"}
TRAINED = {"event": "trained", "round": 3}
ACCEPTED = {"event": "receipt", "round": 3, "status": "accepted"}
REJECTED = {"event": "receipt", "round": 3, "status": "rejected"}

FULL = {"event": "storage_unavailable", "what": "receipt"}
FULL_FOR_MODELS = {"event": "storage_unavailable", "what": "model"}
FREE = {"event": "storage_available", "what": "receipt"}


@pytest.mark.parametrize(
    ("events", "violations"),
    [
        ([STARTED, TRAINED, ACCEPTED], 0),
        ([STARTED, TRAINED, REJECTED, TRAINED, ACCEPTED], 0),
        ([STARTED, TRAINED, ACCEPTED, STARTED, ACCEPTED], 0),
        ([STARTED, TRAINED, ACCEPTED, FULL, ACCEPTED, FREE, ACCEPTED], 0),
        ([STARTED, TRAINED, FULL_FOR_MODELS, ACCEPTED, FREE, ACCEPTED], 0),
        ([STARTED, TRAINED, ACCEPTED, FULL_FOR_MODELS, FREE, ACCEPTED], 1),
        ([STARTED, TRAINED, ACCEPTED, FULL, FREE, ACCEPTED, ACCEPTED], 1),
        ([STARTED, TRAINED, TRAINED], 1),
        ([STARTED, TRAINED, STARTED, TRAINED, ACCEPTED], 1),
        ([STARTED, TRAINED, ACCEPTED, TRAINED, ACCEPTED], 1),
        ([STARTED, TRAINED, ACCEPTED, ACCEPTED], 1),
    ],
)
def test_work_that_was_done_twice_is_found(events: list[dict[str, object]], violations: int):
    assert len(work_is_done_once("d0", events).violations) == violations


def an_exit(**changes: object) -> Exit:
    fields: dict[str, object] = {
        "program": "d0",
        "at_s": 10.0,
        "status": 1,
        "wanted": False,
        "served": False,
        "last_words": "{}\nerror: the disk is full\n",
    }
    return Exit(**{**fields, **changes})  # type: ignore[arg-type] # by name


@pytest.mark.parametrize(
    ("end", "violations"),
    [
        (an_exit(), 0),
        (an_exit(status=2), 0),
        (an_exit(wanted=True, status=-9, served=True, last_words=""), 0),
        (an_exit(served=True), 1),
        (an_exit(status=-11), 1),
        (an_exit(status=0), 1),
        (an_exit(last_words="Traceback …\nZeroDivisionError"), 1),
        (an_exit(at_s=99.0), 1),
        (an_exit(program="d1"), 1),
    ],
    ids=[
        "a start on a full disk", "with the other status", "killed", "in the midst of its life",
        "a crash", "without a failure", "without its word", "when the disk was well",
        "when another disk was full",
    ],
)  # fmt: skip
def test_an_end_that_nobody_wanted_is_found(end: Exit, violations: int):
    assert len(exits_are_explained([end], {"d0": [(8.0, 11.0)]}).violations) == violations


def test_a_program_that_does_not_obey_sigterm_is_found():
    stops = [
        Stop("d0", 1.0, 0, served=True),
        Stop("d1", 2.0, None, served=True),
        Stop("d2", 3.0, 1, served=True),
        Stop("d3", 4.0, -15, served=False),
        Stop("d4", 5.0, -15, served=True),
    ]
    found = stops_are_orderly(stops)
    assert [violation.text[:2] for violation in found.violations] == ["d1", "d2", "d4"]
    assert found.cases == 5


def test_a_traceback_is_found_also_within_a_json_line():
    logs = {
        "d0": '{"event": "x"}\n',
        "d1": 'Traceback (most recent call last):\n  File "x.py"\nValueError: no\n',
        "d2": '{"event": "y", "traceback": "Traceback (most recent call last):\\n ValueError"}\n',
    }
    found = logs_have_no_traceback(logs).violations
    assert len(found) == 2
    assert "ValueError: no" in found[0].text


def test_files_that_pile_up_are_found():
    files = {"d0": {"outbox": ["1", "2"], "blobs": ["a"]}, "d1": {"outbox": []}}
    found = nothing_piles_up(files, {"outbox": 1, "blobs": 1})
    told = [violation.text.split(":")[0] for violation in found.violations]
    assert told == ["2 files in outbox of d0"]
    assert found.cases == 3


def samples(program: str, pid: int, rss_bytes: list[int], descriptors: int = 10) -> list[Sample]:
    return [
        Sample(program, pid, 10.0 * index, each, descriptors)
        for index, each in enumerate(rss_bytes)
    ]


def test_memory_that_grows_is_found_and_its_slope_is_told():
    flat = samples("d0", 1, [10, 50, 60, 60, 60, 60, 60, 60])
    leaking = samples("d1", 2, [50 + 100 * index for index in range(10)])
    grown = [growth(program, [*flat, *leaking]) for program in ("d0", "d1", "d2")]
    assert grown[2] is None
    still, leak = grown[0], grown[1]
    assert still == Growth("d0", 60, 0, pytest.approx(0.0, abs=1e-9), 10, 0, 50.0)
    assert leak is not None
    assert leak.slope_bytes_per_s == pytest.approx(10.0)
    assert leak.growth_bytes == 700
    limits = {"d0": 100, "d1": 900}
    found = sizes_are_bounded([still, leak], most_rss_bytes=limits, descriptors_growth=5)
    assert [violation.text[:2] for violation in found.violations] == ["d1"]
    assert found.cases == 2


def test_a_restart_is_not_growth():
    lives = [*samples("d0", 1, [10] * 6), *samples("d0", 2, [500] * 6)]
    found = growth("d0", lives)
    assert found is not None
    assert found.growth_bytes == 0
