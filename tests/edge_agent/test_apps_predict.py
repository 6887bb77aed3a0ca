"""Apps ask the version in use over a real socket, while versions come and go."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from fedge.edge_agent.cli import cli
from fedge.edge_agent.library import Library
from fedge.schemas.features import ClassTarget, ImageFeatures
from fedge.schemas.tensor_spec import TensorSpec
from tests.edge_agent.app_clients import Service, UnixConnection, ask_on, running_service
from tests.edge_agent.plans import NumpyReference, initial_weights, linear_plan
from tests.edge_agent.quick_disk import quick_folder
from tests.edge_agent.word_versions import EVENING, MORNING, WordPlan, put_hand_made_into_use

PREDICT = "/v1/predict"
PLAN = WordPlan()


@pytest.fixture
def service() -> Iterator[Service]:
    with quick_folder() as folder, running_service(folder) as made:
        yield made


def words_of(reply: Any) -> list[str]:
    return [one["word"] for one in reply["words"]]


def test_the_next_word_is_suggested_with_its_probability(service: Service) -> None:
    PLAN.put_into_use(service.settings.state_dir, 7, EVENING)
    reply = service.ask("POST", PREDICT, {"text": "See you "})
    assert reply.status == 200
    assert reply.json["version"] == 7
    assert reply.json["begun"] == ""
    assert words_of(reply.json) == ["soon", "at", "tomorrow"]
    # A half, a quarter and an eighth, of seven eighths.
    likely = [one["probability"] for one in reply.json["words"]]
    assert likely == pytest.approx([4 / 7, 2 / 7, 1 / 7], rel=1e-3)


def test_a_word_that_is_begun_goes_on(service: Service) -> None:
    PLAN.put_into_use(service.settings.state_dir, 7, EVENING)
    reply = service.ask("POST", PREDICT, {"text": "See you t", "top": 5})
    assert reply.json["begun"] == "t"
    assert words_of(reply.json) == ["tomorrow", "train", "thank", "the"]


def test_the_answer_is_that_of_the_command_line(service: Service, tmp_path: Path) -> None:
    PLAN.put_into_use(service.settings.state_dir, 3, MORNING)
    config = tmp_path / "agent.toml"
    config.write_text(
        f'population = "p"\ndevice = "d"\nstate_dir = "{service.settings.state_dir}"\n'
    )
    for typed in ("", "you", "See you at ", "Nobody knows. see"):
        said = CliRunner().invoke(cli, ["predict", "--json", "--config", str(config), "--", typed])
        assert service.ask("POST", PREDICT, {"text": typed}).json == json.loads(said.stdout)


def test_before_the_first_version_the_service_says_not_yet_and_then_answers(
    service: Service,
) -> None:
    reply = service.ask("POST", PREDICT, {"text": "see "})
    assert (reply.status, reply.code) == (503, "no_version")
    assert "Retry-After" in reply.headers
    PLAN.put_into_use(service.settings.state_dir, 0, EVENING)
    assert words_of(service.ask("POST", PREDICT, {"text": "see "}).json) == ["you", "the", "my"]


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({}, "invalid_request"),
        ({"text": "a", "row": [1.0]}, "invalid_request"),
        ({"text": "a", "top": 0}, "invalid_request"),
        ({"text": "a", "top": "3"}, "invalid_request"),
        ({"row": []}, "invalid_request"),
        ({"image": "not base64!"}, "invalid_request"),
        ({"image": 5}, "invalid_request"),
        ({"row": [1.0, 2.0]}, "wrong_example"),
        ({"image": ""}, "wrong_example"),
    ],
)
def test_a_question_that_cannot_be_answered_is_named(
    service: Service, asked: object, code: str
) -> None:
    PLAN.put_into_use(service.settings.state_dir, 0, EVENING)
    reply = service.ask("POST", PREDICT, asked)
    assert (reply.status, reply.code) == (422, code)


# ---------------------------------------------------------------- other tasks


def test_a_row_gives_the_models_number(service: Service) -> None:
    plan, weights = linear_plan(), initial_weights()
    put_hand_made_into_use(service.settings.state_dir, 2, plan, plan.model(weights), plan.manifest)
    reference = NumpyReference(weights)
    row = [0.5, -1.0, 2]
    expected = float((np.array(row) * reference.scale) @ reference.w[:, 0] + reference.b[0])
    reply = service.ask("POST", PREDICT, {"row": row})
    values = [pytest.approx(expected, rel=1e-5)]
    assert reply.json == {"version": 2, "personal": False, "values": values}
    short = service.ask("POST", PREDICT, {"row": [1.0]})
    assert (short.status, short.code) == (422, "wrong_example")
    assert "1 columns, the task has 3" in short.json["error"]["message"]
    huge = service.ask("POST", PREDICT, {"row": [1e38, 1e38, 1e308]})
    assert (huge.status, huge.code) == (422, "wrong_example")
    text = service.ask("POST", PREDICT, {"text": "1, 2, 3"})
    assert (text.status, text.code) == (422, "wrong_example")


def image(width: int, height: int, kind: str = "PNG", **options: Any) -> str:
    out = io.BytesIO()
    Image.new("L", (width, height), 255).save(out, kind, **options)
    return base64.b64encode(out.getvalue()).decode()


@pytest.fixture
def of_images(service: Service) -> Service:
    """A version whose two classes are the first and the second column of an image of 3 x 1."""
    plan = linear_plan()
    manifest = plan.manifest.model_copy(
        update={
            "features": ImageFeatures(height=1, width=3, flat=True),
            "target": ClassTarget(classes=2, labels=("low", "high")),
            "output": TensorSpec(name="output", dtype="float32", shape=(-1, 2)),
        }
    )
    wide = plan.model(
        {
            **initial_weights(),
            "scale": np.ones(3, np.float32),
            "w": np.array([[0, 3], [0, 0], [0, 0]], np.float32),
            "b": np.zeros(2, np.float32),
        }
    )
    put_hand_made_into_use(service.settings.state_dir, 4, plan, wide, manifest)
    return service


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "WEBP"])
def test_an_image_gives_its_likeliest_classes(of_images: Service, kind: str) -> None:
    reply = of_images.ask("POST", PREDICT, {"image": image(6, 2, kind), "top": 2})
    assert reply.status == 200, reply.body
    assert (reply.json["version"], reply.json["label"], reply.json["index"]) == (4, "high", 1)
    odds = np.exp(3.0)
    likely = [one["probability"] for one in reply.json["probabilities"]]
    assert likely == pytest.approx([odds / (odds + 1), 1 / (odds + 1)], rel=0.05)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 3 1\n%%EndComments\n(x) run\n%%EOF\n"


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (base64.b64encode(b"GIF89a of nothing").decode(), "image"),
        (base64.b64encode(POSTSCRIPT).decode(), "not an image in a known format"),
        (image(300, 20, "TIFF"), "not an image in a known format"),
        (image(20_000, 20_000), "pixels"),
        (image(9_000, 9_000), "at most 25,000,000"),
        (image(40, 40)[:60] + "==", "cannot be read"),
    ],
    ids=["garbage", "program", "rare", "bomb", "large", "torn"],
)
def test_bytes_that_are_no_image_or_a_trap_are_refused(
    of_images: Service, sent: str, words: str
) -> None:
    reply = of_images.ask("POST", PREDICT, {"image": sent})
    assert (reply.status, reply.code) == (422, "wrong_example")
    assert words in reply.json["error"]["message"]


# ---------------------------------------------------------------- versions that come


def is_of_its_version(reply: Any) -> bool:
    """Even numbers are of the evening."""
    pairs = EVENING if reply["version"] % 2 == 0 else MORNING
    return words_of(reply) == pairs["you"].split()


def test_each_answer_is_of_the_version_that_it_names_while_versions_come(
    service: Service,
) -> None:
    state_dir = service.settings.state_dir
    PLAN.put_into_use(state_dir, 0, EVENING)
    done = threading.Event()

    def ask_on_and_on() -> list[int]:
        seen = []
        with contextlib.closing(UnixConnection(service.path)) as connection:
            while not done.is_set() or len(seen) < 20:
                reply = ask_on(connection, "POST", PREDICT, {"text": "see you "})
                assert reply.status == 200, reply.body
                assert is_of_its_version(reply.json)
                seen.append(reply.json["version"])
        return seen

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask_on_and_on) for _ in range(3)]
        try:
            for number in range(1, 12):
                PLAN.put_into_use(state_dir, number, EVENING if number % 2 == 0 else MORNING)
                until_answers_with(service, number)
        finally:
            done.set()
        for seen in (each.result() for each in asking):
            assert seen == sorted(seen), "a version answered after its successor had"
            assert len(set(seen)) > 1


def until_answers_with(service: Service, number: int) -> None:
    for _ in range(2000):
        if service.ask("POST", PREDICT, {"text": "see you "}).json["version"] == number:
            return
    raise AssertionError(f"version {number} never answered")


def test_a_version_that_cannot_be_loaded_leaves_the_old_one_answering(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    state_dir = service.settings.state_dir
    PLAN.put_into_use(state_dir, 0, EVENING)
    service.ask("POST", PREDICT, {"text": "see you "})
    PLAN.put_into_use(state_dir, 1, MORNING)
    active = Library(state_dir).active()
    assert active is not None
    active.model.write_bytes(b"not a model")
    with caplog.at_level(logging.WARNING):
        for _ in range(50):
            reply = service.ask("POST", PREDICT, {"text": "see you "})
            assert (reply.status, reply.json["version"]) == (200, 0)
    assert [one.getMessage() for one in caplog.records].count("model_not_loaded") <= 1
    # Its file is put right, which makes it another one.
    PLAN.put_into_use(state_dir, 1, MORNING)
    until_answers_with(service, 1)


def test_a_record_that_is_lost_leaves_the_loaded_version_answering(service: Service) -> None:
    state_dir = service.settings.state_dir
    PLAN.put_into_use(state_dir, 0, EVENING)
    assert service.ask("POST", PREDICT, {"text": "see you "}).status == 200
    for damage in (b"{", b""):
        (state_dir / "active.json").write_bytes(damage)
        assert service.ask("POST", PREDICT, {"text": "see you "}).json["version"] == 0
    (state_dir / "active.json").unlink()
    assert service.ask("POST", PREDICT, {"text": "see you "}).json["version"] == 0
