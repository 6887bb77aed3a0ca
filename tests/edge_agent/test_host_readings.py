"""The readings: a fake /sys, a fake busctl on PATH, and what an operator may write."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from fedge.edge_agent.eligibility import EligibilitySettings, Reading, Readings, Sensor
from fedge.edge_agent.host import reader as reader_module
from fedge.edge_agent.host.bus import idle_reading, metered_reading
from fedge.edge_agent.host.power import power_readings
from fedge.edge_agent.host.program import MAX_OUTPUT_BYTES, READ_LIMIT_S, NotRead, answer_of
from fedge.edge_agent.host.reader import HostReader


def read(rules: EligibilitySettings, **options: object) -> Readings:
    return asyncio.run(HostReader(rules, wall_clock=time.time, **options).read())


# ---------------------------------------------------------------- /sys/class/power_supply

linux = pytest.mark.skipif(sys.platform != "linux", reason="/sys is Linux'")

BATTERY = {"type": "Battery", "capacity": "55"}
MOUSE = {"type": "Battery", "scope": "Device", "capacity": "5", "status": "Discharging"}


def supplies(folder: Path, **told: dict[str, str]) -> Path:
    for name, attributes in told.items():
        (folder / name).mkdir()
        for attribute, text in attributes.items():
            (folder / name / attribute).write_text(text + "\n")
    return folder


@linux
@pytest.mark.parametrize(
    ("told", "charging", "battery"),
    [
        ({}, True, 1.0),
        ({"hidpp_battery_0": MOUSE}, True, 1.0),
        ({"BAT0": BATTERY | {"status": "Discharging"}}, False, 0.55),
        ({"BAT0": BATTERY | {"status": "Charging"}}, True, 0.55),
        ({"battery": BATTERY | {"status": "Full"}}, True, 0.55),
        ({"BAT0": BATTERY | {"status": "Unknown"}}, None, 0.55),
        ({"BAT0": {"type": "Battery", "status": "Discharging"}}, False, None),
        # Held at a limit by the firmware: on mains, not charging.
        (
            {
                "BAT0": BATTERY | {"status": "Not charging"},
                "AC": {"type": "Mains", "online": "1"},
            },
            True,
            0.55,
        ),
        (
            {"BAT0": BATTERY | {"status": "Full"}, "AC": {"type": "Mains", "online": "0"}},
            False,
            0.55,
        ),
        (
            {
                "BAT0": BATTERY | {"status": "Discharging"},
                "BAT1": {"type": "Battery", "capacity": "100", "status": "Full"},
                "usb": {"type": "USB", "online": "0"},
                "hidpp_battery_0": MOUSE,
            },
            False,
            0.775,
        ),
    ],
    ids=str,
)
def test_power_supplies_tell_external_power_and_the_charge(
    told: dict[str, dict[str, str]], charging: bool | None, battery: float | None, tmp_path: Path
) -> None:
    found = power_readings(supplies(tmp_path, **told))
    assert [one.value for one in found] == [charging, battery]


@linux
def test_a_host_without_power_supplies_is_on_mains(tmp_path: Path) -> None:
    charging, battery = power_readings(tmp_path / "none")
    assert (charging.value, battery.value) == (True, 1.0)
    assert "mains" in charging.note


# ---------------------------------------------------------------- psutil


def test_the_hottest_real_sensor_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sensed:
        def __init__(self, label: str, current: float) -> None:
            self.label, self.current = label, current

    rules = EligibilitySettings(cooler_than_celsius=70)
    told = {"cpu": [Sensed("a", 40.0), Sensed("b", 61.5)], "none": [Sensed("", -128.0)]}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: told, raising=False)
    assert read(rules)[Sensor.CELSIUS] == Reading(61.5, "cpu b")
    monkeypatch.setattr(psutil, "sensors_temperatures", dict, raising=False)
    assert read(rules)[Sensor.CELSIUS].value is None
    monkeypatch.delattr(psutil, "sensors_temperatures", raising=False)
    assert "does not tell" in read(rules)[Sensor.CELSIUS].note


def test_memory_that_the_training_itself_holds_counts_as_free() -> None:
    rules = EligibilitySettings(free_memory_bytes=1)
    held = bytearray(os.urandom(1) * (256 * 1024 * 1024))
    without = read(rules)[Sensor.FREE_MEMORY_BYTES].value
    own = read(rules, own_pids=lambda: [os.getpid(), 2**22 + 1])[Sensor.FREE_MEMORY_BYTES].value
    # The rest of the machine moves meanwhile, by less than this.
    assert own - without > len(held) / 2
    assert 0 < without < psutil.virtual_memory().total


def test_only_what_a_rule_needs_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_hottest", "_free_memory", "power_readings"):
        monkeypatch.setattr(reader_module, name, None)
    monkeypatch.setattr(reader_module, "_SERVICES", dict.fromkeys(reader_module._SERVICES))
    assert read(EligibilitySettings(hours=("00:00-23:59",))) == {}
    monkeypatch.setattr(reader_module, "_hottest", lambda: Reading(1.0))
    assert read(EligibilitySettings(cooler_than_celsius=70)) == {Sensor.CELSIUS: Reading(1.0)}


def test_a_sensor_that_hangs_delays_nobody_and_is_asked_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    goes_on, begun = threading.Event(), []

    def hangs() -> Reading:
        begun.append(1)
        goes_on.wait(30)
        return Reading(50.0)

    monkeypatch.setattr(reader_module, "_hottest", hangs)
    monkeypatch.setattr(reader_module, "READ_LIMIT_S", 0.05)

    async def scenario() -> None:
        reader = HostReader(EligibilitySettings(cooler_than_celsius=70), wall_clock=time.time)
        for _ in range(3):
            late = (await reader.read())[Sensor.CELSIUS]
            assert (late.value, "longer than" in late.note) == (None, True)
        assert len(begun) == 1
        goes_on.set()
        found = [(await reader.read())[Sensor.CELSIUS].value for _ in range(2)]
        assert found[-1] == 50.0, "its answer came, too late for the look that it was for"

    asyncio.run(scenario())


# ---------------------------------------------------------------- logind and NetworkManager


def fake_busctl(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `busctl` on PATH that writes its arguments down and then does as `script` says."""
    busctl = folder / "busctl"
    busctl.write_text(f'#!/bin/sh\nprintf "%s " "$@" >> {folder}/asked\n{script}\n')
    busctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder / "asked"


def test_idle_is_since_logind_says_so_and_never_while_somebody_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = '{"type":"t","data":1000000000}'
    asked = fake_busctl(
        tmp_path, f'echo \'{{"type":"b","data":true}}\'; echo \'{line}\'', monkeypatch
    )
    # Microseconds of CLOCK_MONOTONIC.
    assert asyncio.run(idle_reading(lambda: 1600.0)) == Reading(600.0, "logind")
    assert asked.read_text() == (
        "--system --json=short --auto-start=no get-property org.freedesktop.login1 "
        "/org/freedesktop/login1 org.freedesktop.login1.Manager IdleHint IdleSinceHintMonotonic "
    )
    fake_busctl(tmp_path, f'echo \'{{"type":"b","data":false}}\'; echo \'{line}\'', monkeypatch)
    assert asyncio.run(idle_reading(lambda: 1600.0)).value == 0.0


@pytest.mark.parametrize(
    ("told", "metered"), [(0, None), (1, True), (2, False), (3, True), (4, False), (9, None)]
)
def test_a_network_is_metered_as_network_manager_knows_or_guesses(
    told: int, metered: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_busctl(tmp_path, f'echo \'{{"type":"u","data":{told}}}\'', monkeypatch)
    found = asyncio.run(metered_reading())
    assert found.value is metered
    assert "NetworkManager" in found.note


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo 'Failed to connect to bus' >&2; exit 1", "status 1: Failed to connect"),
        ("echo nonsense", "no JSON"),
        ("exit 0", "0 lines"),
        ("sleep 60", f"longer than {READ_LIMIT_S:g} s"),
        ("yes", "more than"),
    ],
)
def test_a_bus_that_does_not_answer_is_a_reading_that_is_not_known(
    script: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_busctl(tmp_path, script, monkeypatch)
    found = asyncio.run(metered_reading())
    assert found.value is None
    assert told in found.note


def test_a_host_without_busctl_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "cannot be started" in asyncio.run(idle_reading()).note


# ---------------------------------------------------------------- the operator's own

RULES = {"charging": True, "battery_above": 0.4}
ANOTHER_SOURCE = {"BAT0": BATTERY | {"status": "Discharging"}}


def from_file(path: Path, host: Path, **more: object) -> Readings:
    rules = EligibilitySettings.model_validate(RULES | {"readings_file": path} | more)
    return read(rules, supplies=host)


@linux
def test_a_file_takes_the_place_of_what_the_host_says_and_of_nothing_else(tmp_path: Path) -> None:
    path, host = tmp_path / "readings.json", tmp_path / "host"
    host.mkdir()
    supplies(host, **ANOTHER_SOURCE)
    path.write_text('{"charging": true, "celsius": 12}')
    found = from_file(path, host)
    assert found[Sensor.CHARGING] == Reading(value=True, note="supplied")
    assert found[Sensor.BATTERY].value == 0.55


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"charging": 7}', b'{"chargin": true}', b'{"battery": 80}', b"\xff\xfe",
     b'{"battery": NaN}', b" " * (MAX_OUTPUT_BYTES + 1)],
)  # fmt: skip
def test_a_broken_file_makes_everything_unknown_and_says_what_is_wrong(
    content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "readings.json"
    path.write_bytes(content)
    found = from_file(path, tmp_path / "no-host")
    assert {one.value for one in found.values()} == {None}
    assert all(str(path) in one.note for one in found.values())


def test_a_file_that_is_absent_old_or_no_file_makes_everything_unknown(tmp_path: Path) -> None:
    path = tmp_path / "readings.json"
    assert "No such file" in from_file(path, tmp_path)[Sensor.CHARGING].note
    os.mkfifo(path)
    assert "no file" in from_file(path, tmp_path)[Sensor.CHARGING].note
    path.unlink()
    path.write_text(json.dumps({"charging": True, "battery": 1}))
    os.utime(path, (time.time() - 100,) * 2)
    assert from_file(path, tmp_path, readings_max_age_s=101)[Sensor.CHARGING].value is True
    assert "older" in from_file(path, tmp_path, readings_max_age_s=99)[Sensor.CHARGING].note


def test_a_command_supplies_readings_and_a_broken_one_makes_them_unknown() -> None:
    def supplied(*command: str) -> Reading:
        rules = EligibilitySettings(charging=True, readings_command=command)
        return read(rules)[Sensor.CHARGING]

    assert supplied("echo", '{"charging": false}') == Reading(value=False, note="supplied")
    assert "exit status 3" in supplied("sh", "-c", "exit 3").note
    assert "cannot be started" in supplied("no-such-program").note
    assert "the output of echo" in supplied("echo", "hello").note


def test_a_command_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    script = f"sleep 60 & echo $! > {mark}; wait"
    with pytest.raises(NotRead, match="longer"):
        asyncio.run(answer_of(("sh", "-c", script)))
    started = int(mark.read_text())
    gone = time.monotonic() + 10
    while time.monotonic() < gone:
        # A zombie nobody waits for has ended, too.
        if not psutil.pid_exists(started) or psutil.Process(started).status() == "zombie":
            return
        time.sleep(0.02)
    raise AssertionError("what the command started lives on")
