"""`fedge demo` as a newcomer meets it: real processes, a real broker, real training."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from tests.brokers import MOSQUITTO
from tests.conftest import REPOSITORY
from tests.e2e.demo_process import all_gone, run_demo, started_demo

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

ENDLESS = ("--task", "toy-linear", "--rounds", "10000", "--no-central", "--out", "out")


@dataclass(frozen=True)
class Ran:
    out: Path
    summary: dict[str, Any]
    stderr: str


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("digits")
    done = run_demo("--rounds", "4", "--out", "out", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return Ran(folder / "out", json.loads(done.stdout), done.stderr)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """On the embedded broker, with the tables that people see instead of JSON."""
    folder = tmp_path_factory.mktemp("toy")
    done = run_demo("--task", "toy-linear", "--broker", "amqtt", "--out", "out", cwd=folder)
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "out" / "summary.json").read_text())
    return Ran(folder / "out", summary, done.stdout + done.stderr)


# ---------------------------------------------------------------- what comes out


def test_every_version_is_measured_beside_the_central_training(digits: Ran) -> None:
    versions = digits.summary["versions"]
    assert [line["version"] for line in versions] == [0, 1, 2, 3, 4]
    assert [line["passes"] for line in versions] == [0, 2, 4, 6, 8]
    assert versions[0]["central"] == versions[0]["metrics"]
    assert versions[-1]["metrics"]["accuracy"] > 0.8
    assert versions[-1]["central"]["accuracy"] > 0.9
    assert versions[-1]["central"] == digits.summary["central"][7]


def test_the_devices_have_different_parts_of_the_data_and_each_only_its_own(digits: Ran) -> None:
    parts = []
    for folder in sorted((digits.out / "devices").iterdir()):
        assert [path.name for path in folder.rglob("*.npz")] == ["examples.npz"]
        with np.load(folder / "examples.npz") as file:
            parts.append((file["x"], file["y"]))
    assert sum(len(y) for _, y in parts) == digits.summary["train_examples"] == 1437
    mixtures = [np.bincount(y, minlength=10) / len(y) for _, y in parts]
    assert max(np.abs(one - other).sum() for one in mixtures for other in mixtures) > 0.5
    images = np.concatenate([x for x, _ in parts]).reshape(1437, -1)
    with np.load(digits.out / "data" / "test.npz") as file:
        test = file["x"].reshape(len(file["x"]), -1)
    assert not (test[:, None, :] == images[None, :, :]).all(axis=2).any()


def test_the_onnx_file_reaches_the_accuracy_that_was_reported(digits: Ran) -> None:
    model = digits.out / "model.onnx"
    assert digits.summary["model"]["path"] == str(model)
    with np.load(digits.out / "data" / "test.npz") as file:
        x, y = file["x"].astype(np.float32), file["y"]
    inputs = ((x / 16.0 - 0.3053) / 0.3760).astype(np.float32).reshape(-1, 1, 8, 8)
    session = onnxruntime.InferenceSession(model)
    predicted = session.run(None, {"input": inputs})[0].argmax(axis=1)
    reported = digits.summary["versions"][-1]["metrics"]["accuracy"]
    assert (predicted == y).mean() == pytest.approx(reported, abs=1e-6)


def test_devices_predict_with_the_last_version_what_the_model_says(digits: Ran) -> None:
    session = onnxruntime.InferenceSession(digits.out / "model.onnx")
    answers = digits.summary["predictions"]
    assert [answer["question"]["truth"] for answer in answers] == [str(n) for n in range(10)]
    assert {answer["device"] for answer in answers} == {f"device-{n}" for n in (1, 2, 3, 4)}
    for answer in answers:
        assert answer["version"] == 4
        with Image.open(answer["question"]["example"]) as image:
            pixels = np.asarray(image, np.float32) / 255.0
        inputs = ((pixels - 0.3053) / 0.3760).astype(np.float32).reshape(1, 1, 8, 8)
        output = session.run(None, {"input": inputs})[0][0]
        assert answer["predicted"] == str(output.argmax())
        expected = np.exp(output - output.max()) / np.exp(output - output.max()).sum()
        assert answer["probability"] == pytest.approx(expected.max(), abs=1e-4)


def test_bytes_are_those_of_the_records(digits: Ran) -> None:
    traffic = digits.summary["traffic"]
    events = [
        json.loads(line)
        for line in (digits.out / "logs" / "coordinator.log").read_text().splitlines()
    ]
    accepted = [event["bytes"] for event in events if event["event"] == "update_accepted"]
    assert len(accepted) == 4 * 4
    assert traffic["updates_up"] == sum(accepted)
    # Every device fetches the plan and the weights of version 0 at least.
    weights = 4 * 6090
    assert traffic["published"] > 5 * weights
    assert traffic["fetched_down"] > 4 * weights
    if digits.summary["broker"] == "mosquitto":
        assert traffic["broker"]["received"] > traffic["updates_up"] + traffic["published"]
        assert traffic["broker"]["sent"] > traffic["updates_up"] + traffic["fetched_down"]


def test_the_picture_is_there_and_has_something_on_it(digits: Ran) -> None:
    with Image.open(digits.summary["report"]) as image:
        assert image.format == "PNG"
        assert min(image.size) > 500
        assert len(image.convert("RGB").resize((200, 100)).getcolors(20_000)) > 50


def test_the_model_visits_two_devices_and_learns_as_one_computer_would(toy: Ran) -> None:
    versions = toy.summary["versions"]
    first, last = versions[0]["metrics"], versions[-1]["metrics"]
    assert 0.8 < first["sum of losses"] < 1.2
    assert last["sum of losses"] < 0.003
    assert last["sum of losses"] == pytest.approx(4 * last["loss"])
    assert versions[-1]["central"]["sum of losses"] < 0.005
    assert versions[1]["central"] is None  # half a pass
    assert len(toy.summary["predictions"]) == 4
    for answer in toy.summary["predictions"]:
        assert float(answer["predicted"]) == pytest.approx(
            float(answer["question"]["truth"]), abs=0.2
        )


def test_the_embedded_broker_says_that_it_is_not_secure(toy: Ran) -> None:
    assert toy.summary["broker"] == "amqtt"
    assert "demo broker: not secure" in toy.stderr


# ---------------------------------------------------------------- how it ends


@pytest.mark.parametrize(
    ("how", "when"),
    [
        (signal.SIGINT, "version 1 "),
        (signal.SIGTERM, "started "),
        (signal.SIGKILL, "version 1 "),
    ],
)
def test_no_process_is_left_however_it_ends(how: signal.Signals, when: str, tmp_path: Path) -> None:
    with started_demo(*ENDLESS, cwd=tmp_path) as demo:
        demo.read_until(when)
        family = demo.family()
        assert len(family) >= 5  # the demonstration, broker, coordinator, agents; trainers too
        demo.process.send_signal(how)
        demo.read_rest()
        assert all_gone(family)
        assert demo.family() == []
        assert demo.process.returncode == (-9 if how is signal.SIGKILL else 130)


@pytest.mark.parametrize(
    ("victim", "last_word"),
    [
        ("broker", "mosquitto.conf"),
        ("coordinator", "fedge.toml"),
        ("device-2", "device-2/agent.toml"),
    ],
)
def test_a_program_that_dies_is_named_and_ends_everything(
    victim: str, last_word: str, tmp_path: Path
) -> None:
    if victim == "broker" and MOSQUITTO is None:
        pytest.skip("mosquitto is not installed (Debian: apt-get install mosquitto)")
    with started_demo(*ENDLESS, cwd=tmp_path) as demo:
        demo.read_until("started ")
        family = demo.family()
        # One that has just ended has no command line any more.
        lines = {one: one.cmdline() for one in family}
        [target] = [one for one, line in lines.items() if line and line[-1].endswith(last_word)]
        target.kill()
        said = demo.read_rest()
        assert demo.process.returncode == 1
        assert f"error: {victim} was ended by signal 9" in said
        assert f"{victim}.log" in said
        assert all_gone(family)


# ---------------------------------------------------------------- asked wrongly


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--task", "digit"), "Did you mean 'digits'?"),
        (("--split", "weighted:1,2"), "2 weights for 4 parts"),
    ],
)
def test_a_wrong_wish_is_one_line_and_status_2(
    options: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    done = run_demo(*options, cwd=tmp_path)
    assert done.returncode == 2
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said in error
    assert "Traceback" not in done.stderr


def test_too_little_time_is_said_with_what_to_do(tmp_path: Path) -> None:
    done = run_demo(*ENDLESS, "--deadline", "1", cwd=tmp_path)
    assert done.returncode == 1
    assert "not finished after 1 s" in done.stderr
    assert "--deadline" in done.stderr


# ---------------------------------------------------------------- a model of one's own


def test_the_readme_model_runs_as_the_readme_says(tmp_path: Path) -> None:
    readme = (REPOSITORY / "README.md").read_text()
    [source] = re.findall(r"```python\n# my_task\.py\n(.*?)```", readme, re.DOTALL)
    assert len([line for line in source.splitlines() if line.strip()]) <= 25
    [command] = re.findall(r"^fedge (demo --task my_task\.py:.*)$", readme, re.MULTILINE)
    (tmp_path / "my_task.py").write_text(source)
    done = run_demo(*command.split()[1:], "--rounds", "2", "--no-central", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    versions = json.loads(done.stdout)["versions"]
    assert [line["central"] for line in versions] == [None, None, None]
    assert versions[-1]["metrics"]["loss"] < versions[0]["metrics"]["loss"]
