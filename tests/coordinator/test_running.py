"""Who serves a state, as commands beside it know it: never who only holds the lock for a while."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedge.coordinator.running import coordinator_of, reachable_coordinator, tell_to_look
from fedge.schemas.errors import ConfigError
from fedge.schemas.state_lock import LOCK_FILE, StateLock

HOLD = """
import signal, sys, time
from contextlib import ExitStack
from pathlib import Path
from fedge.coordinator.restore import _alone_in
from fedge.schemas.state_lock import StateLock

folder, program = Path(sys.argv[1]), sys.argv[2]
with ExitStack() as held:
    if program == "restore":
        held.enter_context(_alone_in(folder))
    else:
        signal.signal(signal.SIGHUP, lambda *_: print("told", flush=True))
        held.enter_context(StateLock(folder, program))
    print("holds", flush=True)
    while True:
        time.sleep(60)
"""


@contextmanager
def holding(folder: Path, program: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), program],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "holds\n"
            yield process
        finally:
            process.kill()


def test_a_coordinator_is_told(tmp_path: Path) -> None:
    with holding(tmp_path, "coordinator") as process:
        assert reachable_coordinator(tmp_path) == tell_to_look(tmp_path) == process.pid
        assert process.stdout is not None
        assert process.stdout.readline() == "told\n"
    assert coordinator_of(tmp_path) is reachable_coordinator(tmp_path) is None
    assert tell_to_look(tmp_path) is None


def test_a_restore_is_no_coordinator_and_no_signal_ends_it(tmp_path: Path) -> None:
    with holding(tmp_path, "restore") as process:
        assert coordinator_of(tmp_path) is tell_to_look(tmp_path) is None
        with pytest.raises(ConfigError, match=rf"a restore \(process {process.pid}\) uses"):
            StateLock(tmp_path, "coordinator")
        assert process.poll() is None


def test_a_lock_of_a_release_that_wrote_its_number_alone_is_read(tmp_path: Path) -> None:
    with StateLock(tmp_path, "coordinator"):
        assert (tmp_path / LOCK_FILE).read_text() == f"{os.getpid()}\n"
        assert coordinator_of(tmp_path) == os.getpid()


def test_who_looks_at_a_lock_keeps_no_program_from_starting(tmp_path: Path) -> None:
    """Each look takes the lock for an instant, and `fedge evaluate` looks all the time."""
    StateLock(tmp_path, "coordinator").close()
    looked_at = (tmp_path / LOCK_FILE).open("r")
    fcntl.flock(looked_at, fcntl.LOCK_SH | fcntl.LOCK_NB)
    looker = threading.Timer(0.05, looked_at.close)
    looker.start()
    try:
        with StateLock(tmp_path, "coordinator"):
            assert coordinator_of(tmp_path) == os.getpid()
    finally:
        looker.join()


@pytest.fixture
def of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A coordinator that may not be signalled."""

    def refuse(_pid: int, _number: int) -> None:
        raise PermissionError

    with holding(tmp_path, "coordinator") as process:
        monkeypatch.setattr("fedge.coordinator.running.os.kill", refuse)
        yield process.pid
        monkeypatch.undo()


def test_that_it_is_another_users_is_said_before_anything_is_stored(
    tmp_path: Path, of_another_user: int
) -> None:
    with pytest.raises(ConfigError, match=rf"process {of_another_user}\) runs as another user"):
        reachable_coordinator(tmp_path)


def test_what_is_stored_already_is_no_error(
    tmp_path: Path, of_another_user: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        tell_to_look(tmp_path)
    assert ended.value.code == 0
    said = capsys.readouterr().err
    assert f"process {of_another_user}" in said
    assert said.startswith("stored, but")
    assert "SIGHUP" in said
    assert signal.SIGHUP.name in said
