"""`fedge-agent examples` as people and scripts use it: real processes, exit statuses, JSON."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from fedge.edge_agent import example_store
from fedge.edge_agent.agent import EdgeAgent
from fedge.edge_agent.cli import cli, main
from fedge.edge_agent.example_store import FILE_NAME, ExampleStore
from fedge.edge_agent.example_text import MAX_TEXT_CHARS
from fedge.edge_agent.settings import load
from fedge.edge_agent.trainer.process import TrainerProcess
from fedge.schemas.errors import ConfigError
from tests.edge_agent.quick_disk import quick_folder

HOLD = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("BEGIN")
db.execute("SELECT count(*) FROM examples").fetchall()
print("held", flush=True); sys.stdin.readline()
"""


@pytest.fixture
def config() -> Iterator[Path]:
    with quick_folder() as folder:
        path = folder / "agent.toml"
        path.write_text(
            'population = "p"\ndevice = "d"\nstate_dir = "state"\n'
            f'[data]\npath = "state/{FILE_NAME}"\nformat = "store"\n'
        )
        yield path


Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(config: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Calls the program's entry point; its exit status and what it printed."""

    def run(*words: str, stdin: str = "") -> tuple[int, str, str]:
        command = ["fedge-agent", "examples", *words, "--config", str(config)]
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def ask_a_process(config: Path) -> Ask:
    """The same as a program of its own."""

    def run(*words: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "fedge.edge_agent", "examples", *words, "--config", str(config)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def answer(config: Path) -> Callable[..., dict]:
    """The JSON that a command prints, run in this process."""

    def run(*words: str, stdin: str | bytes | None = None) -> dict:
        command = ["examples", *words, "--config", str(config), "--json"]
        done = CliRunner().invoke(cli, command, input=stdin, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    return run


def kept(config: Path) -> list[str]:
    with ExampleStore.configured(config) as store:
        return [each.text for each in store.last(10_000)]


def test_what_is_added_is_listed_counted_and_forgotten(ask_a_process: Ask, config: Path) -> None:
    assert ask_a_process("add", "On my way", "Where are you?") == (0, "2 added\n", "")
    status, out, _ = ask_a_process("list", "--last", "1")
    assert status == 0
    assert out.split()[0] == "2"
    assert out.endswith("Where are you?\n")
    status, out, _ = ask_a_process("count")
    assert status == 0
    assert sum(int(line.split()[1]) for line in out.splitlines()[:2]) == 2
    assert ask_a_process("forget", "--containing", "ON MY") == (0, "1 forgotten\n", "")
    assert kept(config) == ["Where are you?"]
    assert ask_a_process("forget", "--all", "--yes") == (0, "1 forgotten\n", "")
    assert kept(config) == []


def test_every_command_answers_in_json(answer) -> None:
    assert answer("add", "a", "b", "c") == {"ids": [1, 2, 3]}
    listed = answer("list")["examples"]
    assert [(each["id"], each["text"]) for each in listed] == [(1, "a"), (2, "b"), (3, "c")]
    assert {each["split"] for each in listed} <= {"training", "hold_out"}
    counts = answer("count")
    assert counts["training"]["examples"] + counts["hold_out"]["examples"] == 3
    assert counts["erased"] is True
    done = answer("forget", "--id", "2", "--id", "3", "--id", "99")
    assert done == {"examples": 2, "generation": counts["generation"] + 1, "erased": True}


def test_each_line_of_the_input_is_a_text_and_empty_lines_are_none(answer, config: Path) -> None:
    assert answer("add", "-", stdin=b"one\r\n\n  \ntw\xffo\nthree") == {"ids": [1, 2, 3]}
    assert kept(config) == ["one", "tw\ufffdo", "three"]
    assert answer("add", "-", stdin=b"") == {"ids": []}


def test_a_file_of_lines_brings_times_and_users(answer, config: Path, tmp_path: Path) -> None:
    now, file = time.time(), tmp_path / "m.jsonl"
    lines = [
        {"user": "ann", "text": "second", "at": now - 50},
        {"user": "bob", "text": "not hers"},
        {"user": "ann", "text": "first\nin two lines", "at": now - 100},
        {"user": "ann", "text": "too old", "at": 0},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert answer("add", "--jsonl", str(file), "--user", "ann") == {"ids": [1, 2, None]}
    assert kept(config) == ["first in two lines", "second"]
    file.write_text(json.dumps({"text": "a"}) + "\n\n" + json.dumps({"text": "\ud83d\ude00"}))
    answer("add", "--jsonl", str(file))
    assert kept(config)[-2:] == ["a", "\U0001f600"]
    assert answer("add", "--jsonl", "-", stdin='{"text": "piped"}') == {"ids": [5]}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 has no text"),
        ('{"txt": "a"}', "line 2 has no text"),
        ('{"text": 5}', "line 2 has no text"),
        ('{"text": "a", "att": 5}', "unknown key 'att'"),
        ('{"text": "a", "user": "ann"}', "line 2 is of the user 'ann'.*--user"),
        ('{"text": "a", "at": "noon"}', "line 2: 'noon' is no time"),
        ('{"text": "a", "at": 1e400}', "line 2: inf is no time"),
        ('{"text": "a", "at": 1800000000000}', "line 2: .*ahead of this device's clock"),
        ('{"text": ""}', "line 2: an empty text"),
        (json.dumps({"text": "x" * 5000}), "line 2: a text of 5,000 characters is too long"),
        ("x" * 70_000, "line 2 is longer than 65536 bytes"),
    ],
)
def test_a_wrong_line_is_named_and_nothing_is_added(
    line: str, said: str, config: Path, tmp_path: Path
) -> None:
    file = tmp_path / "m.jsonl"
    file.write_text('{"text": "good"}\n' + line + "\n")
    command = ["examples", "add", "--jsonl", str(file), "--config", str(config)]
    with pytest.raises(ConfigError, match=f"(?s){said}.*[Nn]othing was added"):
        CliRunner().invoke(cli, command, catch_exceptions=False)
    assert kept(config) == []


def test_what_was_asked_wrongly_ends_with_status_2(ask: Ask, tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    file.write_text('{"user": "ann", "text": "a"}')
    for words in (
        ("add",),
        ("add", "a", "--jsonl", str(file)),
        ("add", "a", "--user", "ann"),
        ("add", " "),
        ("add", "--jsonl", str(file), "--user", "bob"),
        ("forget",),
        ("forget", "--all", "--id", "3"),
        ("forget", "--containing", "  "),
        ("forget", "--before", "yesterday"),
        ("list", "--last", "0"),
    ):
        status, out, err = ask(*words)
        assert (status, out) == (2, ""), words
        assert "rror: " in err
        assert "Traceback" not in err


def test_forget_before_takes_a_day_or_a_moment_of_this_time_zone(
    answer, config: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        midnight = int(time.time()) // 86_400 * 86_400 - 5 * 86_400 - 9 * 3600
        file = tmp_path / "m.jsonl"
        times = {"evening": midnight - 1, "midnight": midnight, "noon": midnight + 43_200}
        file.write_text("\n".join(json.dumps({"text": t, "at": at}) for t, at in times.items()))
        answer("add", "--jsonl", str(file))
        day = time.strftime("%Y-%m-%d", time.localtime(midnight))
        assert answer("forget", "--before", day)["examples"] == 1
        assert kept(config) == ["midnight", "noon"]
        assert answer("forget", "--before", f"{day}T12:00")["examples"] == 1
        assert kept(config) == ["noon"]
    finally:
        monkeypatch.undo()
        time.tzset()


def test_everything_is_forgotten_only_after_a_yes(ask: Ask, config: Path) -> None:
    ask("add", "a")
    for said in ("", "n\n"):
        status, _, err = ask("forget", "--all", stdin=said)
        assert status == 1
        assert "Forget all texts of this device?" in err
        assert kept(config) == ["a"]
    assert ask("forget", "--all", stdin="y\n")[:2] == (0, "1 forgotten\n")
    assert kept(config) == []


def test_what_is_forgotten_and_not_yet_erased_is_told_with_status_1(
    ask: Ask, config: Path, monkeypatch
) -> None:
    monkeypatch.setattr(example_store, "_FORGET_WAIT_S", 0.05)
    ask("add", "a secret")
    path = config.parent / "state" / FILE_NAME
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        status, out, err = ask("forget", "--all", "--yes")
        assert (status, out) == (1, "1 forgotten\n")
        assert "another program is reading it" in err
        holder.communicate("\n")
    assert ask("forget", "--all", "--yes") == (0, "0 forgotten\n", "")
    assert b"a secret" not in path.read_bytes()


def test_a_damaged_store_says_so_and_everything_can_still_be_forgotten(
    ask: Ask, config: Path
) -> None:
    ask("add", "a secret")
    path = config.parent / "state" / FILE_NAME
    path.write_bytes(path.read_bytes()[2048:] * 3)
    for words in (("add", "b"), ("count",), ("list",), ("forget", "--containing", "secret")):
        status, out, err = ask(*words)
        assert (status, out) == (1, "")
        assert err.startswith("error: cannot use the examples in ")
        assert "forget --all" in err
    status, out, err = ask("forget", "--all", "--yes")
    assert (status, out) == (0, "0 forgotten\n")
    assert "its files are deleted" in err
    assert b"a secret" not in path.read_bytes()
    assert ask("add", "b")[0] == 0


def test_the_settings_of_the_agent_hold(answer, config: Path, tmp_path: Path) -> None:
    with config.open("a") as file:
        file.write("[examples]\nkeep_days = 1\nlimit_bytes = 65536\nhold_out = 0.5\n")
    lines = tmp_path / "m.jsonl"
    at = time.time() - 1000
    lines.write_text(
        "\n".join(json.dumps({"text": f"{n} " + "x" * 900, "at": at + n}) for n in range(100))
    )
    answer("add", "--jsonl", str(lines))
    counts = answer("count")
    assert counts["training"]["size_bytes"] + counts["hold_out"]["size_bytes"] <= 65536
    # 68 texts and a fair coin: less than 10 on a side once in ten thousand million runs.
    assert min(counts[side]["examples"] for side in ("training", "hold_out")) >= 10
    assert kept(config)[-1].startswith("99 ")
    lines.write_text(json.dumps({"text": "yesterday", "at": time.time() - 90_000}))
    assert answer("add", "--jsonl", str(lines)) == {"ids": [None]}


def test_the_commands_work_beside_an_agent(answer, config: Path) -> None:
    agent = EdgeAgent(load(config), TrainerProcess(), random.Random(1))
    assert answer("add", "a") == {"ids": [1]}
    assert answer("forget", "--containing", "a")["examples"] == 1
    del agent


def test_the_help_teaches() -> None:
    def help_of(*words: str) -> str:
        return CliRunner().invoke(cli, ["examples", *words, "--help"]).stdout

    whole = help_of()
    for command in ("add -", "add --jsonl", "count", "forget --containing", "forget --all"):
        assert f"fedge-agent examples {command}" in whole
    assert str(MAX_TEXT_CHARS) in help_of("add")
    assert "Exit status" in help_of("forget")


def test_what_is_added_where_nothing_trains_on_it_is_said(config: Path, ask: Ask) -> None:
    assert "note" not in ask("add", "See you soon")[2]
    config.write_text('population = "p"\ndevice = "d"\nstate_dir = "state"\n')
    status, _, said = ask("add", "See you soon")
    assert status == 0
    assert "does not train on what is added" in said
