"""`fedge-agent type` under a real terminal's rules, with keys as they come from one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedge.edge_agent.example_store import FILE_NAME, ExampleStore
from tests.edge_agent.plans import initial_weights, linear_plan
from tests.edge_agent.word_versions import (
    EVENING,
    MORNING,
    WordPlan,
    put_hand_made_into_use,
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a pseudo-terminal is POSIX'")

LIMIT_S = 60.0
TAB, ENTER, END, BACKSPACE = "\t", "\r", "\x04", "\x7f"
F1, F2, F3, ALT_2, ALT_3 = "\x1bOP", "\x1bOQ", "\x1bOR", "\x1b2", "\x1b3"
_DRAWING = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[()][AB0]|\x1b[=>]|\r")
_WHERE_IS_THE_CURSOR, _AT_THE_TOP = b"\x1b[6n", "\x1b[1;1R"
"""A terminal answers this; without it nothing is drawn at the bottom."""
PLAN = WordPlan()


class Typist:
    """A person at a terminal of 80 columns. `seen`: what was drawn, without how and where."""

    def __init__(self, config: Path, *options: str) -> None:
        self._terminal, program = pty.openpty()
        self._size(80)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fedge.edge_agent", "type", "--config", str(config), *options],
            stdin=program, stdout=program, stderr=program, start_new_session=True,
            env={**os.environ, "TERM": "xterm"},
        )  # fmt: skip
        os.close(program)
        self.seen = ""

    def _size(self, columns: int) -> None:
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self._columns = columns

    def presses(self, *keys: str) -> None:
        for key in keys:
            os.write(self._terminal, key.encode())

    def sees(self, words: str) -> None:
        """Returns when it was drawn since the last time."""
        deadline = time.monotonic() + LIMIT_S
        look_anew = time.monotonic() + 2.0
        while words not in self.seen:
            assert time.monotonic() < deadline, self.seen[-2000:]
            if time.monotonic() > look_anew:
                # Only what changes is drawn, a digit perhaps: in another width, everything.
                look_anew += 2.0
                self._size(self._columns ^ 1)
                self.process.send_signal(signal.SIGWINCH)
            if not select.select([self._terminal], [], [], 0.5)[0]:
                continue
            try:
                data = os.read(self._terminal, 65536)
            except OSError:  # Linux' end of a terminal
                data = b""
            assert data, f"it ended: {self.seen[-2000:]}"
            if _WHERE_IS_THE_CURSOR in data:
                self.presses(_AT_THE_TOP)
            drawn = _DRAWING.sub(b" ", data).decode(errors="replace")
            self.seen = " ".join((self.seen + drawn).split())
        self.seen = self.seen.partition(words)[2]

    def leaves(self) -> int:
        self.presses(END)
        return self.process.wait(LIMIT_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)


@contextlib.contextmanager
def typist(config: Path, *options: str) -> Iterator[Typist]:
    made = Typist(config, *options)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "agent.toml"
    path.write_text('population = "p"\ndevice = "d"\nstate_dir = "state"\n')
    return path


def kept(config: Path) -> list[str]:
    with ExampleStore.configured(config) as store:
        return [one.text for one in store.last(100)]


def until_kept(config: Path, count: int) -> list[str]:
    deadline = time.monotonic() + LIMIT_S
    while len(found := kept(config)) < count:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


def test_suggestions_are_shown_and_taken_with_keys_and_lines_are_kept(
    config: Path, tmp_path: Path
) -> None:
    PLAN.put_into_use(tmp_path / "state", 3, EVENING)
    with typist(config, "--keep") as person:
        # See the table of the evening; each next word is half as likely.
        person.sees("Tab see 57%")
        person.sees("F2 thank 29%")
        person.sees("F3 my 14%")
        person.sees("version 3")
        for keys in (
            ("See ", TAB, ENTER),
            (F1, TAB, TAB, ENTER),
            ("See you ", F2, ENTER),
            ("see you ", ALT_3, ENTER),
            ("See yo", TAB, F3, BACKSPACE, "!", ENTER),
            ("See you ", ALT_2, TAB, ENTER),
            # Nothing goes on from these: Tab has nothing to take.
            ("xyz", TAB, ENTER),
            (ENTER,),
        ):
            person.presses(*keys)
        assert until_kept(config, 7) == [
            "See you",
            "see you soon",
            "See you at",
            "see you tomorrow",
            "See you tomorrow!",
            "See you at home",
            "xyz",
        ]
        assert person.leaves() == 0


def test_without_keep_nothing_is_written(config: Path, tmp_path: Path) -> None:
    PLAN.put_into_use(tmp_path / "state", 3, EVENING)
    with typist(config) as person:
        person.sees("version 3")
        person.presses("My secret", ENTER)
        person.sees("My secret")
        assert person.leaves() == 0
    assert not (tmp_path / "state" / FILE_NAME).exists()


def test_it_follows_the_versions_from_none_to_the_next(config: Path, tmp_path: Path) -> None:
    with typist(config, "--keep") as person:
        person.sees("no version yet")
        person.presses("see ", TAB, ENTER)
        assert until_kept(config, 1) == ["see"]
        PLAN.put_into_use(tmp_path / "state", 0, EVENING)
        # Nobody types.
        person.sees("Tab see 57%")
        person.presses("see ", TAB, ENTER)
        assert until_kept(config, 2)[-1] == "see you"
        PLAN.put_into_use(tmp_path / "state", 1, MORNING)
        person.sees("Tab thank 57%")
        person.sees("version 1")
        person.presses("see ", TAB, ENTER)
        assert until_kept(config, 3)[-1] == "see the"
        assert person.leaves() == 0


def test_a_task_that_is_not_about_words_is_said(config: Path, tmp_path: Path) -> None:
    plan = linear_plan()
    model = plan.model(initial_weights())
    put_hand_made_into_use(tmp_path / "state", 0, plan, model, plan.manifest)
    with typist(config) as person:
        person.sees("hand-made, is not about words")
        assert person.process.wait(LIMIT_S) == 2


@pytest.mark.parametrize("where", ["stdin", "stdout"])
def test_without_a_terminal_it_says_so(config: Path, where: str) -> None:
    ours, terminal = pty.openpty()
    other = {"stdin": "stdout", "stdout": "stdin"}[where]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "fedge.edge_agent", "type", "--config", str(config)],
            stderr=subprocess.PIPE, check=False, timeout=60,
            **{where: subprocess.DEVNULL, other: terminal},
        )  # fmt: skip
    finally:
        os.close(terminal)
        os.close(ours)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: `fedge-agent type` is for people at a terminal")


def test_without_its_library_it_says_what_to_install(config: Path) -> None:
    program = (
        "import sys; sys.modules['prompt_toolkit'] = None\n"
        "from fedge.edge_agent.cli import main; sys.argv[1:] = sys.argv[1:]; main()"
    )
    ours, terminal = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, "type", "--config", str(config)],
            stdin=terminal, stdout=terminal, stderr=subprocess.PIPE, check=False, timeout=60,
        )  # fmt: skip
    finally:
        os.close(terminal)
        os.close(ours)
    assert done.returncode == 2
    assert b"pip install 'fedge[terminal]'" in done.stderr
