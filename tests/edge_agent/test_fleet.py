"""Virtual devices: whose data each has, and what cannot be divided."""

from __future__ import annotations

import asyncio
import json
import os
import resource
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from fedge.edge_agent.cli import cli
from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.data.examples import open_examples
from fedge.edge_agent.fleet import (
    FILES_A_DEVICE,
    OTHER_FILES,
    described_devices,
    run_fleet,
    virtual_devices,
)
from fedge.edge_agent.settings import Settings
from fedge.schemas import text_file
from fedge.schemas.errors import ConfigError, StoreError
from fedge.schemas.text_file import read_texts, texts_by_user
from fedge.schemas.words import Vocabulary, WordEncoder

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
ENCODER = WordEncoder(Vocabulary(NUMBERS), 1)


def settings(data: Mapping[str, Any], device: str = "v") -> Settings:
    return Settings.model_validate(
        {"population": "p", "device": device, "state_dir": "states", "data": data}
    )


def write(path: Path, typed: list[tuple[str | None, str]]) -> Path:
    lines = ({"text": text} | ({} if user is None else {"user": user}) for user, text in typed)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def words_on(device: Settings) -> list[str | None]:
    """Of texts of one word each: what the training process would be given, in order."""
    assert device.data is not None
    found = open_examples(device.data, ENCODER)
    return [ENCODER.vocabulary.word(int(target)) for target in found.raw_targets[:, 0]]


def whose(device: Settings) -> str | None:
    return None if device.data is None else device.data.user


# ---------------------------------------------------------------- users


def test_each_device_has_one_users_texts(tmp_path: Path) -> None:
    typed = [("ann", "one"), ("bob", "two"), ("ann", "three"), (None, "four"), ("cy", "five")]
    path = write(tmp_path / "typed.jsonl", typed)
    devices = virtual_devices(settings({"path": path}), 3, "users", 0)
    assert [device.device for device in devices] == ["v-0000", "v-0001", "v-0002"]
    assert [words_on(device) for device in devices] == [["one", "three"], ["two"], ["five"]]
    # Fewer devices than users: the first of them.
    assert [whose(one) for one in virtual_devices(settings({"path": path}), 2, "users", 0)] == [
        "ann",
        "bob",
    ]


def test_with_more_devices_than_users_each_has_an_earlier_or_a_later_part(tmp_path: Path) -> None:
    typed = [("ann", word) for word in NUMBERS[:5]] + [("bob", word) for word in NUMBERS[5:]]
    path = write(tmp_path / "typed.jsonl", typed)
    devices = virtual_devices(settings({"path": path}), 5, "users", 0)
    assert [words_on(device) for device in devices] == [
        ["one", "two"],
        ["six", "seven", "eight"],
        ["three", "four"],
        ["nine", "ten"],
        ["five"],
    ]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 20))
def test_every_text_of_a_user_with_a_device_is_on_exactly_one(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], count: int
) -> None:
    """Or it cannot be divided, and that is said."""
    folder = tmp_path_factory.mktemp("users")
    typed = [(f"u{user}", NUMBERS[n]) for n in range(9) for user in range(len(lengths))]
    typed = [(user, text) for user, text in typed if NUMBERS.index(text) < lengths[int(user[1:])]]
    path = write(folder / "typed.jsonl", typed)
    devices_of = Counter(index % len(lengths) for index in range(count))
    if any(devices_of[user] > length for user, length in enumerate(lengths)):
        with pytest.raises(ConfigError, match="give fewer --devices"):
            virtual_devices(settings({"path": path}), count, "users", 0)
        return
    devices = virtual_devices(settings({"path": path}), count, "users", 0)
    held: dict[str, list[str | None]] = {}
    for device in devices:
        assert words_on(device)
        held.setdefault(str(whose(device)), []).extend(words_on(device))
    assert held == {f"u{user}": NUMBERS[: lengths[user]] for user in sorted(devices_of)}


@pytest.mark.parametrize(
    ("typed", "changes", "said"),
    [
        ([(None, "one")], {}, r"typed.jsonl names no users: .*needs a .jsonl file"),
        ([("ann", "one"), ("bob", "two")], {"user": "ann"}, "remove user from"),
        ([("ann", "one")], {}, r"2 devices for 1 users are 2 for user 'ann', who has 1 texts"),
        ([("ann", "one"), ("ann", "two")], {"limit": 1}, "who has 1 texts: give fewer --devices"),
        ([("", "one"), ("", "two")], {}, "names no users"),
    ],
)
def test_what_cannot_be_divided_by_users_is_said(
    typed: list[tuple[str | None, str]], changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "typed.jsonl", typed)
    with pytest.raises(ConfigError, match=said):
        virtual_devices(settings({"path": path, **changes}), 2, "users", 0)


def test_only_json_lines_say_whose_they_are(tmp_path: Path) -> None:
    plain = tmp_path / "typed.txt"
    plain.write_text("one\ntwo\n")
    with pytest.raises(ConfigError, match=r"typed.txt names no users"):
        virtual_devices(settings({"path": plain}), 2, "users", 0)


def test_one_devices_own_texts_are_not_divided(tmp_path: Path) -> None:
    own = settings({"path": tmp_path / "examples.sqlite"})
    for split in ("users", "iid"):
        with pytest.raises(ConfigError, match="is one device's own"):
            virtual_devices(own, 2, split, 0)


def test_devices_made_from_one_file_have_no_service_for_apps(tmp_path: Path) -> None:
    path = write(tmp_path / "typed.jsonl", [("ann", "one"), ("bob", "two")])
    one = Settings.model_validate(
        settings({"path": path}).model_dump() | {"apps": {"socket": "apps.sock"}}
    )
    with pytest.raises(ConfigError, match=r"remove \[apps\]"):
        virtual_devices(one, 2, "users", 0)


def test_an_unknown_split_names_those_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'user': use iid, .*; or users, for texts"):
        virtual_devices(settings({"path": tmp_path / "typed.jsonl"}), 2, "user", 0)


# ---------------------------------------------------------------- a file of many users


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    return write(tmp_path / "shared.jsonl", [("ann", "one"), ("bob", "two"), ("ann", "three")])


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every line that was looked into."""
    seen: list[bytes] = []
    parse = text_file._parsed

    def parsed(where: str, line: bytes) -> text_file.TextLine | None:
        seen.append(line)
        return parse(where, line)

    monkeypatch.setattr(text_file, "_parsed", parsed)
    return seen


def test_a_file_of_many_users_is_read_whole_once(shared: Path, parsed: list[bytes]) -> None:
    for _ in range(10):
        assert list(read_texts(shared, user="bob")) == ["two"]
    # Three lines to learn where each user's begin, then one for each time.
    assert len(parsed) == 3 + 10


def test_a_file_that_was_written_since_is_read_anew(shared: Path) -> None:
    assert texts_by_user(shared) == {"ann": 2, "bob": 1}
    with shared.open("a") as file:
        file.write('{"user": "bob", "text": "four"}\n')
    assert texts_by_user(shared) == {"ann": 2, "bob": 2}
    assert list(read_texts(shared, user="bob")) == ["two", "four"]
    write(shared, [("cy", "five")])
    with pytest.raises(ConfigError, match="no text of user 'bob'"):
        list(read_texts(shared, user="bob"))


def test_a_line_that_became_anothers_is_not_given_away(shared: Path) -> None:
    assert list(read_texts(shared, user="ann")) == ["one", "three"]
    before = shared.stat()
    # In its place, as long as before, and within what the clock of the file system tells apart.
    shared.write_text(shared.read_text().replace("ann", "eve"))
    os.utime(shared, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(StoreError, match="changed while it was read"):
        list(read_texts(shared, user="ann"))


# ---------------------------------------------------------------- devices as their files say


def describe(folder: Path, name: str, text: str) -> None:
    (folder / name).mkdir()
    (folder / name / "agent.toml").write_text(text)


def test_each_device_is_as_its_own_file_says(tmp_path: Path) -> None:
    for name in ("b", "a"):
        text = f'population = "p"\ndevice = "{name}"\nstate_dir = "s"\n[data]\npath = "own.npz"\n'
        describe(tmp_path, name, text)
    (tmp_path / "notes").mkdir()
    devices = described_devices(tmp_path)
    assert [device.device for device in devices] == ["a", "b"]
    assert [device.state_dir for device in devices] == [tmp_path / "a" / "s", tmp_path / "b" / "s"]
    assert devices[1].data == DataConfig(path=tmp_path / "b" / "own.npz")


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ('device = "a"\nstate_dir = "s"', 'device = "a"\nstate_dir = "s"', "both name the device"),
        (
            'device = "a"\nstate_dir = "../s"',
            'device = "b"\nstate_dir = "../s"',
            "have the same state_dir",
        ),
        (
            'device = "a"\nstate_dir = "s"',
            'device = "b"\nstate_dir = "s"\n[trainer]\nnice = 0',
            r"two/agent.toml: in one process all devices have the same \[trainer\]",
        ),
    ],
)
def test_devices_that_cannot_be_in_one_process_are_said(
    first: str, second: str, said: str, tmp_path: Path
) -> None:
    describe(tmp_path, "one", f'population = "p"\n{first}\n')
    describe(tmp_path, "two", f'population = "p"\n{second}\n')
    with pytest.raises(ConfigError, match=said):
        described_devices(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "say how many with --devices, or where they are with --each"),
        (("--each", ".", "--devices", "2"), "--each takes everything but --seed and --workers"),
        (("--each", ".", "--split", "users"), "--each takes everything but --seed and --workers"),
        (("--each", "."), "no */agent.toml in"),
    ],
)
def test_the_command_asks_for_one_kind_of_fleet(
    options: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["fleet", *options])
    assert done.exit_code != 0
    assert said in done.output + str(done.exception)


# ---------------------------------------------------------------- the host's limits


def test_more_devices_than_the_host_lets_in_are_refused(tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = hard // FILES_A_DEVICE + 1
    if hard == resource.RLIM_INFINITY or count > 100_000:
        pytest.skip(f"this host lets a process open {hard} files")
    many = [settings({"path": tmp_path / "x.npz"})] * count
    said = f"need {OTHER_FILES + FILES_A_DEVICE * count} open files, .* may have {hard}"
    with pytest.raises(ConfigError, match=said):
        asyncio.run(run_fleet(many, None, 0))  # type: ignore[arg-type] -- it is refused before
