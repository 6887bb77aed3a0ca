"""The kit's hosts: disks that fill, clocks that jump, processes that are watched, evidence."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.chaos.clocks import SITE, Clock
from tests.chaos.evidence import Evidence, kind_of
from tests.chaos.mqtt_wire import Publish
from tests.chaos.programs import Exit, Program
from tests.chaos.tampering import Side
from tests.chaos.world import ROOT

FILLS_A_DISK = """
import os, sys
from pathlib import Path
from tests.chaos.disks import Disk, NoMounting, enter_private_namespace
folder = Path(sys.argv[1])
try:
    enter_private_namespace()
    disk = Disk(folder / "disk", 1 << 20)
except NoMounting as error:
    print("skip", error)
    sys.exit()
file = folder / "disk" / "file"
file.write_bytes(b"before")
disk.fill()
try:
    (folder / "disk" / "more").write_bytes(b"x" * 4096)
except OSError as error:
    print(error.errno)
disk.free()
disk.fill(leave_bytes=8192)
(folder / "disk" / "more").write_bytes(b"x" * 8192)
disk.free()
disk.set_read_only(True)
try:
    file.write_bytes(b"after")
except OSError as error:
    print(error.errno)
disk.fill()
disk.set_read_only(False)
print(file.read_bytes().decode(), sorted(os.listdir(folder / "disk")))
"""


def test_a_disk_fills_empties_and_becomes_read_only_and_nobody_else_sees_it(tmp_path: Path):
    command = [sys.executable, "-c", FILLS_A_DISK, str(tmp_path)]
    printed = subprocess.check_output(command, cwd=ROOT, text=True).splitlines()
    if printed[0].startswith("skip"):
        pytest.skip(f"mounting is not allowed here: {printed[0]}")
    assert printed == ["28", "30", "before ['file', 'more']"]
    assert list((tmp_path / "disk").iterdir()) == []


def test_a_clock_jumps_under_a_running_program(tmp_path: Path):
    clock = Clock(tmp_path / "clock")
    program = subprocess.Popen(
        [sys.executable, "-c", "import time\nwhile input(): print(time.time(), flush=True)"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **clock.environment, "PYTHONPATH": str(SITE)},
    )
    assert program.stdin is not None
    assert program.stdout is not None

    def shown_s() -> float:
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdin.write("now\n")
        program.stdin.flush()
        return float(program.stdout.readline()) - time.time()

    try:
        assert abs(shown_s()) < 5
        clock.jump(-3600)
        assert -3605 < shown_s() < -3590
        clock.jump(3600 + 86400)
        assert 86390 < shown_s() < 86405
    finally:
        program.kill()
        program.wait()
        program.stdin.close()
        program.stdout.close()


def program(folder: Path, code: str, exits: list[Exit]) -> Program:
    return Program(
        "p",
        (sys.executable, "-c", code),
        folder=folder,
        environment={**os.environ, "PYTHONPATH": str(ROOT)},
        on_exit=exits.append,
    )


def test_a_program_that_ends_by_itself_is_noted_and_started_again(tmp_path: Path):
    async def work() -> None:
        exits: list[Exit] = []
        watched = program(tmp_path, "import sys; print('error: no room'); sys.exit(1)", exits)
        await watched.start()
        async with asyncio.timeout(20):
            while len(watched.lives) < 2:  # noqa: ASYNC110 -- it tells nobody
                await asyncio.sleep(0.05)
        assert (exits[0].status, exits[0].wanted, exits[0].served) == (1, False, False)
        assert exits[0].last_words == "error: no room\n"
        watched.kill()
        await watched.gone()

    asyncio.run(work())


def test_a_program_that_was_killed_stays_down_until_it_is_started(tmp_path: Path):
    async def work() -> None:
        exits: list[Exit] = []
        watched = program(tmp_path, "import time; time.sleep(60)", exits)
        await watched.start()
        assert watched.running
        assert watched.kill()
        await watched.gone()
        assert not watched.kill()
        assert [(end.status, end.wanted) for end in exits] == [(-9, True)]
        assert not watched.running
        await watched.start()
        stop = await watched.stop(10)
        assert stop is not None
        assert (stop.status, stop.served) == (-15, False)
        assert [end.wanted for end in exits] == [True, True]

    asyncio.run(work())


def test_an_update_is_copied_before_its_offer_leaves_the_device(tmp_path: Path):
    outbox = tmp_path / "outbox"
    outbox.mkdir()
    evidence = Evidence({"d0": outbox})
    evidence.look_into_outbox("d0")
    (outbox / "7.safetensors").write_bytes(b"first")
    (outbox / ".8.safetensors.part").write_bytes(b"half")
    evidence.look_into_outbox("d0")
    (outbox / "7.safetensors").unlink()
    (outbox / "7.safetensors").write_bytes(b"second")
    evidence.look_into_outbox("d0")
    evidence.look_into_outbox("d0")
    assert [evidence.updates[digest] for digest in evidence.made["d0", 7]] == [b"first", b"second"]
    assert set(evidence.made) == {("d0", 7)}


def test_what_is_said_is_noted(tmp_path: Path):
    evidence = Evidence({})
    offer = {"round": 4, "base": 3, "update": {"sha256": "ab"}, "examples": 12}
    topic = "fedge/1/chaos/up/d0/offer"
    evidence.of_device("d0")(Side.UP, Publish(topic, json.dumps(offer).encode(), 1, False))
    assert evidence.offers["d0", 4, "ab"].examples == 12
    assert list(evidence.recorded["offer"]) == [(topic, json.dumps(offer).encode())]
    receipt = {"round": 4, "sha256": "ab", "status": "accepted"}
    said = Publish("fedge/1/chaos/dn/d0/receipt", json.dumps(receipt).encode(), 1, False)
    tap = evidence.of_coordinator("coordinator")
    tap(Side.UP, said)
    assert [(each.device, each.status) for each in evidence.receipts] == [("d0", "accepted")]


def test_a_fault_strikes_as_the_message_it_waits_for_passes():
    evidence = Evidence({})
    struck: list[str] = []
    evidence.when("grant", "d0", lambda: struck.append("now"))
    forget = evidence.when("grant", "d0", lambda: struck.append("never"))
    forget()
    grant = Publish("fedge/1/chaos/dn/d0/grant", b"{}", 1, False)
    evidence.of_device("d1")(Side.DOWN, grant)
    assert struck == []
    evidence.of_device("d0")(Side.DOWN, grant)
    evidence.of_device("d0")(Side.DOWN, grant)
    assert struck == ["now"]


@pytest.mark.parametrize(
    ("topic", "kind", "device"),
    [
        ("fedge/1/chaos/all/round", "round", None),
        ("fedge/1/chaos/blob/abc/3", "blob", None),
        ("fedge/1/chaos/dn/d0/receipt", "receipt", "d0"),
        ("fedge/1/chaos/up/d0/offer", "offer", "d0"),
        ("fedge/1/chaos/upb/d0/abc/0", "chunk", "d0"),
        ("fedge/1/chaos/state/d0", "presence", "d0"),
        ("somebody/else", "foreign", None),
    ],
)
def test_a_message_is_known_by_its_topic(topic: str, kind: str, device: str | None):
    assert kind_of(topic) == (kind, device)
