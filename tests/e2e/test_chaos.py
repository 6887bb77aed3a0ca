"""A minute of chaos: the slice of `make chaos` that every change has to survive.

And the command as a newcomer types it: it has to end with the right status, and leave nothing
behind that it does not name.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.brokers import MOSQUITTO
from tests.chaos.promises import BY_CHECK

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
    # A check that looked at nothing would have found nothing.
    assert {each["check"] for each in report["checks"] if each["cases"]} == set(BY_CHECK)
    struck = [report["faults_by_kind"], report["missed"], report["skipped"]]
    assert sum(sum(counts.values()) for counts in struck) == report["faults_planned"]


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


COMMAND = (sys.executable, "-m", "tests.chaos")
NOBODY = "nobody"


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files that nobody else uses and every user may enter."""
    folder = Path(tempfile.mkdtemp(prefix="fedge-test-chaos-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def environment(temporary: Path) -> dict[str, str]:
    """As here, but that temporary files go to the folder."""
    return {**os.environ, "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}


def processes(temporary: Path) -> list[psutil.Process]:
    """Whatever still runs of a run: all of it inherited where its temporary files go."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TMPDIR", "").startswith(str(temporary)):
                found.append(process)
    return found


def mounts(temporary: Path) -> list[str]:
    """What is mounted there, for whichever process."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
            found += [line for line in lines if str(temporary) in line]
    return found


def assert_nothing_runs(temporary: Path) -> None:
    """Neither a process nor a mount is left."""
    _, alive = psutil.wait_procs(processes(temporary), timeout=10)
    assert alive == []
    # A process that is just dying has no environment any more, and still its mounts.
    ends_s = time.monotonic() + 10
    while mounts(temporary) and time.monotonic() < ends_s:
        time.sleep(0.1)
    assert mounts(temporary) == []


def without_rights(temporary: Path) -> tuple[tuple[str, ...], dict[str, Any]]:
    """How a command is run that may mount nothing: what goes before it, and options of `run`.

    As another user, or where that one may not read this Python, as root without the right to mount,
    as in a container. Skips the test where neither is possible.
    """
    if os.geteuid() != 0:
        pytest.skip("who runs this has no rights to give up")
    user = pwd.getpwnam(NOBODY)
    run_as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        subprocess.run(
            [sys.executable, "-c", "import fedge.coordinator, tests.chaos, psutil"],
            cwd=ROOT,
            capture_output=True,
            check=True,
            **run_as,
        )
        os.chown(temporary, user.pw_uid, user.pw_gid)
        return (), run_as
    if shutil.which("setpriv") is None:
        pytest.skip(f"{NOBODY} may not read this Python, and there is no setpriv")
    return ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"), {}


@pytest.mark.parametrize("may_mount", [True, False], ids=["as who runs this", "without rights"])
def test_the_command_as_it_is_typed_ends_well_and_leaves_nothing(
    temporary: Path, may_mount: bool
) -> None:
    before, run_as = ((), {}) if may_mount else without_rights(temporary)
    done = subprocess.run(
        [*before, *COMMAND, "--seconds", "15", "--seed", "7"],
        cwd=ROOT,
        env=environment(temporary),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        **run_as,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("seed 7, 15 s of faults")
    assert lines[-2].startswith("The promise held: 0 violations in ")
    for promise in BY_CHECK.values():
        assert any(line.startswith("    held ") and promise.sentence in line for line in lines)
    assert "Traceback" not in done.stderr
    assert may_mount or "no small disks, so faults of disks are skipped" in done.stderr
    assert_nothing_runs(temporary)
    assert list(temporary.iterdir()) == []


@contextlib.contextmanager
def running(temporary: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of many minutes, which is killed in the end if the test did not end it."""
    run = subprocess.Popen(
        [*COMMAND, "--seconds", "600", "--seed", "7"],
        cwd=ROOT,
        env=environment(temporary),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with run:
        try:
            yield run
        finally:
            run.kill()


def wait_for(run: subprocess.Popen[str], said: str) -> None:
    """Reads what the run says until it says that."""
    assert run.stderr is not None
    assert any(said in line for line in run.stderr), f"it ended without saying {said!r}"


@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGINT, "s in all"), (signal.SIGTERM, "faults begin")],
    ids=["SIGINT at the start", "SIGTERM among faults"],
)
def test_a_signal_ends_a_run_and_its_folder_is_named(
    temporary: Path, number: signal.Signals, moment: str
) -> None:
    with running(temporary) as run:
        wait_for(run, moment)
        time.sleep(4)  # in the midst of what it said
        run.send_signal(number)
        run.send_signal(number)
        told, error = run.communicate(timeout=60)
    assert run.returncode == 128 + number
    (folder,) = temporary.iterdir()
    assert f"{number.name}: nothing was checked; what the fleet left is in {folder}" in error
    assert "Traceback" not in error
    assert told == ""
    assert_nothing_runs(temporary)
    if "faults" in moment:
        # What was on the small disks is there as well.
        assert (folder / "state" / "coordinator" / "fedge.sqlite").stat().st_size > 0


def test_a_run_that_is_killed_leaves_no_process_and_no_mount(temporary: Path) -> None:
    with running(temporary) as run:
        wait_for(run, "faults begin")
        time.sleep(2)
        assert len(processes(temporary)) > 3
        run.kill()
        run.communicate(timeout=60)
    assert_nothing_runs(temporary)


def test_a_fleet_that_does_not_come_up_is_a_sentence_and_a_folder(temporary: Path) -> None:
    code = (
        "import sys; from tests.chaos import run; run.FIRST_VERSION_S = 1.0\n"
        "from tests.chaos.__main__ import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--seconds", "600"],
        cwd=ROOT,
        env=environment(temporary),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 2
    (folder,) = temporary.iterdir()
    assert "error: no version within 1 s" in done.stderr
    assert str(folder) in done.stderr
    assert "Traceback" not in done.stderr
    assert_nothing_runs(temporary)
