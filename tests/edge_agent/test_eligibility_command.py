"""`fedge-agent eligibility` as an operator sees it: what is read, and what is in the way."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from fedge.edge_agent.participation import Usage
from fedge.edge_agent.settings import load
from fedge.edge_agent.state import AgentState
from fedge.schemas.blobs import describe
from fedge.schemas.messages import LossCurve, Offer

HEAD = 'population = "p"\ndevice = "d"\nstate_dir = "state"\n'


def asked(folder: Path, more: str = "", *options: str) -> subprocess.CompletedProcess[str]:
    path = folder / "agent.toml"
    path.write_text(HEAD + more)
    command = [sys.executable, "-m", "fedge.edge_agent", "eligibility", "--config", str(path)]
    return subprocess.run([*command, *options], capture_output=True, text=True, check=False)


def found(folder: Path, more: str, status: int) -> dict[str, Any]:
    done = asked(folder, more, "--json")
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout)


def test_without_rules_a_device_is_eligible(tmp_path: Path) -> None:
    done = asked(tmp_path)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "eligible"
    assert found(tmp_path, "", 0)["reasons"] == []


def test_each_rule_is_told_with_its_reading_and_the_status_says_whether_all_hold(
    tmp_path: Path,
) -> None:
    rules = """[eligibility]
charging = true
battery_above = 0.4
cooler_than_celsius = 70
readings_file = "readings.json"
"""
    readings = tmp_path / "readings.json"
    readings.write_text('{"charging": false, "battery": 0.9, "celsius": 41}')
    told = found(tmp_path, rules, 3)
    assert told["reasons"] == ["charging: on battery, wanted external power"]
    assert {one["rule"]: one["holds"] for one in told["rules"]} == {
        "charging": False,
        "battery_above": True,
        "cooler_than_celsius": True,
    }
    text = asked(tmp_path, rules).stdout.splitlines()
    assert text[0] == "no   charging: on battery (supplied), wanted external power"
    assert text[-1] == "not eligible: charging: on battery, wanted external power"
    readings.write_text('{"charging": true, "battery": 0.9, "celsius": 41}')
    assert found(tmp_path, rules, 0)["eligible"] is True


def test_a_rule_that_cannot_be_read_says_what_happens_then(tmp_path: Path) -> None:
    rules = '[eligibility]\nunmetered = true\nreadings_command = ["no-such-program"]\n'
    refused = asked(tmp_path, rules)
    assert refused.returncode == 3
    assert "not known (no-such-program cannot be started" in refused.stdout
    assert "training is refused" in refused.stdout
    allowed = asked(tmp_path, rules + 'unknown = "allow"\n')
    assert allowed.returncode == 0
    assert "training is allowed" in allowed.stdout


def test_what_is_used_of_a_day_and_the_next_round_come_from_the_ledger(tmp_path: Path) -> None:
    policies = """[participation]
every_rounds = 5
daily_training_s = 100
daily_upload_bytes = 1000
daily_energy_wh = 10
watts = 36
"""
    memory = AgentState(tmp_path / "state" / "agent.sqlite")
    memory.add_usage(Usage(time.time() - 3600, 99.0, 1000), None)
    memory.put_in_outbox(
        Offer(round=7, base=6, update=describe(b"update"), examples=1, steps=1, training_s=1.0,
              loss=LossCurve(), metrics={})
    )  # fmt: skip
    memory.close()
    told = found(tmp_path, policies, 3)
    assert told["policies"] == [
        {"policy": "daily_training_s", "used": 99.0, "limit": 100.0, "holds": True},
        {"policy": "daily_upload_bytes", "used": 1000, "limit": 1000, "holds": False},
        {"policy": "daily_energy_wh", "used": 0.99, "limit": 10.0, "holds": True},
    ]
    assert (told["last_round"], told["next_round"]) == (7, 12)


def test_the_examples_are_counted_only_where_a_policy_asks_for_them(tmp_path: Path) -> None:
    data = '[data]\npath = "data.npz"\n'
    assert found(tmp_path, data, 0)["policies"] == []
    np.savez(tmp_path / "data.npz", x=np.zeros((9, 2)), y=np.zeros(9))
    told = found(tmp_path, data + "[participation]\nminimum_examples = 10\n", 3)
    assert told["reasons"] == ["minimum_examples: 9 here, 10 wanted"]


def test_a_mistake_in_the_table_is_the_operators_and_told_so(tmp_path: Path) -> None:
    done = asked(tmp_path, "[eligibility]\nchargin = true\n")
    assert done.returncode == 2
    assert "unknown key 'eligibility.chargin'; did you mean 'charging'?" in done.stderr
    done = asked(tmp_path, "[participation]\ndaily_energy_wh = 5\n")
    assert done.returncode == 2
    assert "watts" in done.stderr


def test_paths_count_from_the_folder_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(f'{HEAD}[eligibility]\nreadings_file = "now.json"\n')
    assert load(path).eligibility.readings_file == tmp_path / "now.json"
    path.write_text(f'{HEAD}[eligibility]\nreadings_command = ["./tell", "./me"]\n')
    assert load(path).eligibility.readings_command == (str(tmp_path / "tell"), "./me")
    path.write_text(f'{HEAD}[eligibility]\nreadings_command = ["tell"]\n')
    assert load(path).eligibility.readings_command == ("tell",)
