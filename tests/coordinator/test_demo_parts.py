"""The parts of the demonstration that decide something, without any process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.coordinator.datasets import Examples
from fedge.coordinator.demo.brokers import (
    BrokerChoice,
    choose_broker,
    find_mosquitto,
    mosquitto_configuration,
)
from fedge.coordinator.demo.configuration import coordinator_settings, device_settings, write_toml
from fedge.coordinator.demo.examples import hold_out, load_examples, write_examples
from fedge.coordinator.demo.experiment import Wishes, device_names, resolve
from fedge.coordinator.demo.folder import DemoFolder
from fedge.coordinator.demo.plots import SMOOTHED_POINTS, smoothed
from fedge.coordinator.demo.predictions import ask, choose_rows
from fedge.coordinator.demo.progress import Progress, sentence
from fedge.coordinator.demo.summary import DeviceCurve
from fedge.coordinator.demo.texts import people_in, typists
from fedge.coordinator.rounds import Strategy
from fedge.coordinator.settings import load as load_coordinator
from fedge.coordinator.tasks import BUILT_IN_TASKS
from fedge.edge_agent.settings import load as load_agent
from fedge.schemas.errors import ConfigError
from tests.conftest import REPOSITORY

# ---------------------------------------------------------------- the experiment


@pytest.mark.parametrize("name", sorted(BUILT_IN_TASKS))
def test_every_built_in_task_says_how_it_is_demonstrated(name: str) -> None:
    found = resolve(Wishes(task=name))
    assert found.source != "files"
    assert len(found.devices) == found.task.simulation.devices
    assert found.local_epochs == found.task.defaults.local_epochs


def test_a_wish_goes_before_the_tasks_own_choice() -> None:
    wishes = Wishes(
        devices=7, rounds=3, split="shards", local_epochs=5, batch_size=8, learning_rate=0.5,
        strategy=Strategy.CYCLIC, train_examples=100,
    )  # fmt: skip
    found = resolve(wishes)
    assert (len(found.devices), found.rounds, found.split) == (7, 3, "shards")
    assert (found.local_epochs, found.batch_size, found.learning_rate) == (5, 8, 0.5)
    assert (found.strategy, found.train_examples) == (Strategy.CYCLIC, 100)


def test_a_round_of_fedavg_is_a_pass_for_each_local_epoch() -> None:
    found = resolve(Wishes(rounds=10, local_epochs=3))
    assert found.passes(4) == 12
    assert found.central_epochs == 30


@pytest.mark.parametrize(("rounds", "epochs"), [(4, 2), (5, 3), (1, 1), (40, 20)])
def test_a_cyclic_round_is_a_visit_to_one_device(rounds: int, epochs: int) -> None:
    found = resolve(Wishes(task="toy-linear", rounds=rounds))
    assert found.passes(1) == 0.5
    assert found.central_epochs == epochs


def test_weights_for_three_hospitals_do_not_fit_four() -> None:
    with pytest.raises(ConfigError, match=r"weighted:0.6,0.3,0.1.*give --split for 4"):
        resolve(Wishes(task="hospitals", devices=4))


def test_a_task_without_data_asks_for_some(tmp_path: Path) -> None:
    file = tmp_path / "bare.py"
    file.write_text(
        "from torch import nn\n"
        "from fedge.coordinator.task import Task, squared_error\n"
        "from fedge.schemas.features import TabularFeatures, ValueTarget\n"
        "task = Task(name='bare', model=lambda: nn.Linear(2, 1), loss=squared_error,\n"
        "            features=TabularFeatures(columns=2), target=ValueTarget())\n"
    )
    with pytest.raises(ConfigError, match=r"--data, a folder with train.npz and test.npz"):
        resolve(Wishes(task=f"{file}:task"))
    found = resolve(Wishes(task=f"{file}:task", data=tmp_path / "points.npz"))
    x = np.arange(20, dtype=np.float64).reshape(10, 2)
    write_examples(Examples(x, x[:, 0]), tmp_path / "points.npz")
    train, test = load_examples(found)
    assert (len(train), len(test)) == (8, 2)
    assert sorted([*train.y, *test.y]) == list(range(0, 20, 2))


def test_what_is_held_out_is_the_same_for_the_same_seed_only() -> None:
    examples = Examples(np.arange(50)[:, None], np.arange(50))
    assert (hold_out(examples, 1)[1].y == hold_out(examples, 1)[1].y).all()
    assert not (hold_out(examples, 1)[1].y == hold_out(examples, 2)[1].y).all()


def test_device_names_sort_as_their_numbers() -> None:
    names = device_names(12)
    assert list(names) == sorted(names)
    assert (names[0], names[11]) == ("device-01", "device-12")


# ---------------------------------------------------------------- files


def test_the_files_are_read_by_the_programs_they_are_for(tmp_path: Path) -> None:
    experiment = resolve(Wishes(devices=3, rounds=6, learning_rate=0.25))
    folder = DemoFolder.claim(tmp_path / "out")
    broker = choose_broker(BrokerChoice.AMQTT, folder.broker)
    coordinator = load_coordinator(
        write_toml(folder.coordinator / "fedge.toml", coordinator_settings(experiment, broker))
    )
    assert (coordinator.task, coordinator.broker.port) == ("digits", broker.port)
    assert coordinator.round.policy.goal == coordinator.round.policy.quorum == 3
    assert coordinator.round.versions == 6
    assert coordinator.training.learning_rate == 0.25
    assert coordinator.evaluation is not None
    assert coordinator.evaluation.path.resolve() == folder.data / "test.npz"
    agent = load_agent(
        write_toml(
            folder.device("device-2") / "agent.toml",
            device_settings(experiment, "device-2", broker),
        )
    )
    assert agent.device == "device-2"
    assert agent.data is not None
    assert agent.data.path == folder.device("device-2") / "examples.npz"


def test_a_folder_of_someone_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years")
    with pytest.raises(ConfigError, match="not empty and was not made by `fedge demo`"):
        DemoFolder.claim(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_earlier_demonstration_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    first = DemoFolder.claim(tmp_path / "out")
    (first.logs / "broker.log").write_text("old")
    first.report.write_text("old")
    (first.path / "notes.txt").write_text("mine")
    first.release()
    second = DemoFolder.claim(tmp_path / "out")
    assert list(second.logs.iterdir()) == []
    assert not second.report.exists()
    assert (second.path / "notes.txt").read_text() == "mine"


def test_two_demonstrations_cannot_share_a_folder(tmp_path: Path) -> None:
    first = DemoFolder.claim(tmp_path / "out")
    with pytest.raises(ConfigError, match="another demonstration runs in"):
        DemoFolder.claim(tmp_path / "out")
    first.release()


def test_a_file_in_the_place_of_the_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ConfigError, match=r"cannot write to .*out"):
        DemoFolder.claim(tmp_path / "out")


@pytest.mark.parametrize("name", ["fedge.toml", "agent.toml"])
def test_the_readme_configurations_are_read_as_they_stand(name: str, tmp_path: Path) -> None:
    readme = (REPOSITORY / "README.md").read_text()
    [text] = re.findall(rf"```toml\n# {name}\n(.*?)```", readme, re.DOTALL)
    path = tmp_path / name
    path.write_text(text)
    if name == "fedge.toml":
        assert load_coordinator(path).round.versions == 5
    else:
        assert load_agent(path).device == "pi-kitchen"


def test_the_documented_task_for_ones_own_data_can_be_demonstrated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (REPOSITORY / "docs" / "your-own-model.md").read_text()
    data, task = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-c", data], check=True)
    Path("points.py").write_text(task)
    found = resolve(Wishes(task="points.py:task", data=Path("points.npz")))
    train, test = load_examples(found)
    assert (len(train), len(test)) == (480, 120)
    assert found.task.features.encode(train.x).shape == (480, 3)
    assert found.task.target.encode(train.y).shape == (480, 1)


# ---------------------------------------------------------------- what people typed


def write_texts(path: Path, texts: dict[str, int]) -> Path:
    """So many texts of each user, the users taking turns; a text says whose it is and which."""
    turns = [(n, user) for n in range(max(texts.values())) for user in texts if n < texts[user]]
    lines = (json.dumps({"user": user, "text": f"{user} {n}"}) + "\n" for n, user in turns)
    path.write_text("".join(lines))
    return path


def test_one_who_types_on_several_devices_types_on_one_after_the_other(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "typed.jsonl", {"ann": 12, "bob": 4, "cy": 1})
    # Of one text nothing could be tested, so cy has no device.
    people = typists(path, 4)
    assert [one.name for one in people] == ["ann", "bob", "ann", "ann"]
    own = [[*one.train, *one.test] for one in people if one.name == "ann"]
    assert own == [[f"ann {n}" for n in range(start, start + 4)] for start in (0, 4, 8)]
    assert people[1].train == ("bob 0", "bob 1", "bob 2")
    assert people[1].test == ("bob 3",)
    assert [one.name for one in typists(path, 1)] == ["ann"]


@given(st.lists(st.integers(2, 30), min_size=1, max_size=6), st.integers(1, 40))
def test_no_text_is_on_two_devices_and_each_has_one_to_learn_and_one_to_test(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], count: int
) -> None:
    folder = tmp_path_factory.mktemp("typists")
    texts = {f"u{number}": length for number, length in enumerate(lengths)}
    path = write_texts(folder / "typed.jsonl", texts)
    if count > sum(length // 2 for length in lengths):
        with pytest.raises(ConfigError, match=f"give fewer --devices than {count}"):
            typists(path, count)
        return
    people = typists(path, count)
    assert all(one.train and one.test for one in people)
    held = [text for one in people for text in (*one.train, *one.test)]
    assert len(held) == len(set(held)) == sum(lengths[: min(count, len(lengths))])


def test_two_hundred_devices_can_have_pythons_documentation() -> None:
    people = typists(None, 200)
    assert len(people) == 200
    assert min(len(one.train) for one in people) >= 1
    assert len({one.name for one in people}) == len(people_in(None))


# ---------------------------------------------------------------- the broker


def test_without_mosquitto_the_embedded_broker_is_taken_and_says_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    broker = choose_broker(BrokerChoice.AUTO, tmp_path)
    assert (broker.name, broker.protocol) == ("amqtt", "3.1.1")
    assert broker.notice == "demo broker: not secure"
    with pytest.raises(ConfigError, match="apt-get install mosquitto"):
        choose_broker(BrokerChoice.MOSQUITTO, tmp_path)


def test_mosquitto_is_found_where_ordinary_users_do_not_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("fedge.coordinator.demo.brokers._SYSTEM_FOLDERS", str(tmp_path / "sbin"))
    assert find_mosquitto() is None
    binary = tmp_path / "sbin" / "mosquitto"
    binary.parent.mkdir()
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    assert find_mosquitto() == str(binary)


def test_mosquitto_listens_on_this_computer_only_and_keeps_nothing() -> None:
    lines = mosquitto_configuration(1234, as_root=False)
    assert "listener 1234 127.0.0.1" in lines
    assert "persistence false" in lines
    assert "user root" not in lines
    assert "user root" in mosquitto_configuration(1234, as_root=True)


# ---------------------------------------------------------------- progress


def event(name: str, **fields: object) -> dict[str, object]:
    return {"ts": 1.0, "level": "info", "event": name, **fields}


def test_it_is_finished_when_the_last_version_is_measured_and_every_device_uses_it() -> None:
    progress = Progress.of(("device-1", "device-2"), final=3)
    last = [
        ("coordinator", event("goal_reached", version=3)),
        ("coordinator", event("version_evaluated", version=3, examples=9, loss=0.5, accuracy=0.9)),
        ("device-1", event("version_activated", version=3)),
        ("device-2", event("version_activated", version=3)),
    ]
    for source, one in last:
        assert not progress.finished
        progress.observe(source, one)
    assert progress.finished
    assert progress.metrics == {3: {"loss": 0.5, "accuracy": 0.9}}


def test_three_rounds_abandoned_one_after_another_are_a_problem_and_a_version_forgives() -> None:
    progress = Progress.of(("device-1",), final=3)
    abandoned = event("round_abandoned", round=1, reason="too few")
    progress.observe("coordinator", abandoned)
    progress.observe("coordinator", abandoned)
    progress.observe("coordinator", event("version_made", version=1))
    progress.observe("coordinator", abandoned)
    progress.observe("coordinator", abandoned)
    assert progress.problem is None
    progress.observe("coordinator", abandoned)
    assert progress.problem == "3 rounds were abandoned: too few"


def test_a_device_that_cannot_train_is_a_problem_with_its_reason() -> None:
    progress = Progress.of(("device-1",), final=3)
    progress.observe("device-1", event("training_failed", round=1, reason="the loss became nan"))
    assert progress.problem == "device-1 could not train: the loss became nan"


def test_what_other_programs_say_changes_nothing() -> None:
    progress = Progress.of(("device-1",), final=3)
    progress.observe("split", event("version_activated", version=3))
    progress.observe("device-9", event("version_activated", version=3))
    progress.observe("coordinator", event("link_up", client_id="x"))
    assert progress == Progress.of(("device-1",), final=3)


def test_trouble_becomes_a_sentence_whatever_the_event() -> None:
    said = sentence("device-1", event("refused", reason="late") | {"level": "warning"})
    assert said == "device-1: refused reason late"
    assert sentence("device-1", event("link_up")) is None


def test_of_a_crowd_a_line_a_round_is_told_and_not_one_a_device() -> None:
    accepted = event(
        "update_accepted", round=2, device="device-1", loss=0.5, examples=7, training_s=0.1, bytes=9
    )
    made = event("version_made", version=2, round=2, updates=200, examples=1437)
    few, many = 4, 200
    assert sentence("coordinator", accepted, few) is not None
    assert sentence("coordinator", made, few) is None
    assert sentence("coordinator", accepted, many) is None
    assert sentence("coordinator", made, many) == "round 2   200 updates from 1,437 examples"


# ---------------------------------------------------------------- predictions and pictures


def test_each_class_is_asked_about_once_before_any_twice() -> None:
    task = resolve(Wishes()).task
    labels = np.array([3, 3, 1, 0, 1, 2])
    rows = choose_rows(task, Examples(np.zeros((6, 8, 8), np.uint8), labels))
    assert [int(label) for label in labels[rows]] == [0, 1, 2, 3, 3, 1]


def test_a_picture_holds_the_pixels_that_the_model_gets(tmp_path: Path) -> None:
    from PIL import Image  # noqa: PLC0415

    task = resolve(Wishes()).task
    raw = np.arange(64, dtype=np.uint8).reshape(1, 8, 8) % 17
    [question] = ask(task, Examples(raw, np.array([7])), [0], tmp_path)
    assert question.truth == "7"
    with Image.open(question.example) as image:
        back = np.asarray(image, np.float64) * 16 / 255
    assert np.abs(back - raw[0]).max() < 0.05


def test_a_smoothed_curve_keeps_its_mean_and_its_end() -> None:
    losses = [float(value) for value in np.random.default_rng(0).uniform(size=600)]
    steps, means = smoothed(DeviceCurve({}, (), losses, examples=1, steps=1200))
    assert len(means) == SMOOTHED_POINTS
    assert steps[-1] == 1200
    assert np.mean(means) == pytest.approx(np.mean(losses))
    assert smoothed(DeviceCurve({}, (), (), examples=1, steps=0)) == ([], [])


# ---------------------------------------------------------------- the leash


@pytest.mark.skipif(sys.platform != "linux", reason="the leash is Linux' own")
def test_a_leashed_program_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, subprocess, sys\n"
            "child = subprocess.Popen([sys.executable, '-m', 'fedge.coordinator.demo.leash',\n"
            "    str(os.getpid()), 'sleep', '600'], stdout=1)\n"
            "print(child.pid, flush=True)\n"
            "child.wait()\n",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    assert int(parent.stdout.readline()) > 0
    parent.kill()
    parent.wait()
    # The child holds the other end of the pipe: it closes when the child is gone.
    assert parent.stdout.read() == ""
    parent.stdout.close()


def test_a_leashed_program_does_not_start_for_a_parent_that_is_gone() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedge.coordinator.demo.leash", "1", "echo", "alive"],
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, b"")
