"""The keyboard end to end: texts on devices, words in the plan, suggestions from the ONNX file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from fedge.schemas.words import Vocabulary, WordEncoder
from tests.e2e.demo_process import run_demo

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

PHRASES = ("see you at the station tomorrow", "thank you for the book", "what is the time")
WORDS = "see you at the station tomorrow thank for book what is time"
TASK = f"""
from fedge.coordinator.tasks.next_word import next_word
from fedge.schemas.words import Vocabulary


def task():
    words = Vocabulary({WORDS!r}.split())
    return next_word(words, cells=32, dimensions=16, window=6, learning_rate=1.5)
"""


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("keyboard")
    (folder / "phrases_task.py").write_text(TASK)
    lines = [
        {"user": f"u{user}", "text": f"{PHRASES[(user + n) % 3].capitalize()}!"}
        for user in range(3)
        for n in range(60)
    ]
    (folder / "typed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("--task", "phrases_task.py:task", "--data", "typed.jsonl", "--devices", "3")
    done = run_demo(*options, "--rounds", "8", "--out", "out", "--json", cwd=folder, timeout_s=200)
    assert done.returncode == 0, done.stderr
    return folder / "out", json.loads(done.stdout)


def predict(config: Path, typed: str) -> dict[str, Any]:
    command = (sys.executable, "-m", "fedge.edge_agent", "predict", "--json", "--config")
    done = subprocess.run(
        [*command, str(config), "--", typed], capture_output=True, text=True, check=True, timeout=60
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_fleet_learns_what_is_typed_and_is_measured_in_words(learned) -> None:
    _, summary = learned
    first, last = summary["versions"][0]["metrics"], summary["versions"][-1]["metrics"]
    assert set(last) == {"loss", "top1_recall", "top3_recall", "perplexity"}
    assert last["perplexity"] < first["perplexity"] / 2
    assert last["top3_recall"] > 0.5
    assert summary["versions"][-1]["central"]["top3_recall"] > 0.5


def test_a_device_suggests_the_next_word_and_how_a_word_goes_on(learned) -> None:
    out, _ = learned
    config = out / "devices" / "device-1" / "agent.toml"
    after = predict(config, "See you at the ")
    assert len(after["words"]) == 3
    assert "station" in [one["word"] for one in after["words"]]
    begun = predict(config, "see you at the sta")
    assert [one["word"] for one in begun["words"]] == ["station"]
    assert begun["begun"] == "sta"


def test_the_onnx_file_is_ordinary_and_agrees_with_the_device(learned) -> None:
    out, summary = learned
    model = onnxruntime.InferenceSession(summary["model"]["path"])
    words = Vocabulary(WORDS.split())
    inputs = WordEncoder(words, 6).prefix("thank you ")
    (scores,) = model.run(["output"], {"input": inputs})
    best = words.word(int(scores[0].argmax()))
    said = predict(out / "devices" / "device-2" / "agent.toml", "thank you ")
    assert said["words"][0]["word"] == best


def test_no_text_leaves_its_device(learned) -> None:
    """Not in the coordinator's state, in no log, nor in what another device holds."""
    out, _ = learned
    phrase = b"station tomorrow"
    holding = {
        str(path.relative_to(out))
        for path in out.rglob("*")
        if path.is_file() and phrase in path.read_bytes().lower()
    }
    # The summary's predictions are the demonstration's own questions, from its test set.
    own = {f"devices/device-{number}/texts.jsonl" for number in (1, 2, 3)}
    assert holding <= {*own, "summary.json"}
    assert holding >= own
