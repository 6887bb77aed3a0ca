"""A minute of chaos: the slice of `make chaos` that every change has to survive."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.brokers import MOSQUITTO

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 420

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed"),
    pytest.mark.timeout(LIMIT_S + 30),
]


def chaos(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit status and the report of a run."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", "--json", "--keep", str(folder), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.stdout, done.stderr[-3000:]
    return done.returncode, json.loads(done.stdout)


def test_the_promise_holds_through_a_minute_of_faults(tmp_path: Path) -> None:
    status, report = chaos(tmp_path / "chaos", "--seconds", "60", "--seed", "1")
    told = json.dumps(report["violations"], indent=2)[:8000]
    assert report["violations"] == [], f"seed {report['seed']}: {told}"
    assert report["kit_failures"] == []
    assert status == 0
    # Far below what a quiet computer does, and enough that the faults met a fleet at work.
    assert report["faults"] >= 20
    assert report["versions"] >= 5
    assert report["versions_remade"] == report["versions"]
    assert report["versions_exported"] == report["versions"] + 1


@pytest.mark.parametrize(
    ("sabotage", "check"),
    [
        ("count_twice", "versions_are_their_updates"),
        ("answer_without_writing", "receipts_hold"),
    ],
)
def test_a_coordinator_that_breaks_the_promise_is_found(
    tmp_path: Path, sabotage: str, check: str
) -> None:
    arguments = ("--seconds", "6", "--only", "reset", "--devices", "4", "--sabotage", sabotage)
    status, report = chaos(tmp_path / "chaos", *arguments)
    assert status == 1
    assert check in {violation["check"] for violation in report["violations"]}
    assert report["kit_failures"] == []
