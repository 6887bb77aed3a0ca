"""A minute of chaos: the slice of `make chaos` that every change has to survive."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.brokers import MOSQUITTO

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 420


@pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
@pytest.mark.timeout(LIMIT_S + 30)
def test_the_promise_holds_through_a_minute_of_faults(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.chaos", "--seconds", "60", "--seed", "1", "--json"]
    done = subprocess.run(
        [*command, "--keep", str(tmp_path / "chaos")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.stdout, done.stderr[-3000:]
    report = json.loads(done.stdout)
    told = json.dumps(report["violations"], indent=2)[:8000]
    assert report["violations"] == [], f"seed {report['seed']}: {told}"
    assert report["kit_failures"] == []
    assert done.returncode == 0
    # Far below what a quiet computer does, and enough that the faults met a fleet at work.
    assert report["faults"] >= 20
    assert report["versions"] >= 5
    assert report["versions_remade"] == report["versions"]
    assert report["versions_exported"] == report["versions"] + 1
