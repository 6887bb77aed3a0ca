"""What answers when there is a personal model, and when it was taken back while in memory."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from fedge.edge_agent.example_store import FILE_NAME, ExampleStore
from fedge.edge_agent.library import Library
from fedge.edge_agent.personal_models import PersonalRecord
from fedge.edge_agent.serving import Served, open_serving
from fedge.schemas.errors import PlanRefused, StoreError
from tests.edge_agent.test_serving import first
from tests.edge_agent.word_versions import EVENING, MORNING, WordPlan

PLAN = WordPlan()


def keep_own(state_dir: Path, version: int, pairs=MORNING) -> None:
    """As if a personal training for `version` had ended well."""
    models = Library(state_dir).personal
    parts = models.parts(version)
    parts.model.write_bytes(PLAN.model(pairs))
    parts.weights.write_bytes(b"weights")
    record = PersonalRecord(
        version=version, plan_sha256=PLAN.manifest.digest, settings_sha256="0" * 64,
        training=40, hold_out=10, at=1.0, outcome="better", weights_sha256="1" * 64,
    )  # fmt: skip
    models.keep(record, parts)


@pytest.fixture
def owner(tmp_path: Path) -> Path:
    PLAN.put_into_use(tmp_path, 0, EVENING)
    keep_own(tmp_path, 0)
    return tmp_path


def test_the_personal_model_answers_and_says_so(owner: Path) -> None:
    with Served(Library(owner)) as served:
        answer = served.predict("see ")
        assert (answer.version, answer.personal, first(answer)) == (0, True, "the")


def test_one_that_comes_later_takes_over(tmp_path: Path) -> None:
    PLAN.put_into_use(tmp_path, 0, EVENING)
    arrived = threading.Event()
    with Served(Library(tmp_path), replaced=lambda version: arrived.set()) as served:
        assert not served.predict("see ").personal
        keep_own(tmp_path, 0)
        served.predict("see ")
        assert arrived.wait(30)
        assert served.predict("see ").personal


def test_after_a_forget_the_very_next_answer_is_the_version_s(owner: Path) -> None:
    with Served(Library(owner)) as served, ExampleStore(owner / FILE_NAME) as store:
        assert served.predict("see ").personal
        store.forget_all()
        answer = served.predict("see ")
        assert (answer.version, answer.personal, first(answer)) == (0, False, "you")
        assert not served.predict("see ").personal


def test_a_personal_model_that_cannot_be_replaced_answers_no_more(owner: Path) -> None:
    with Served(Library(owner)) as served:
        assert served.predict("see ").personal
        Library(owner).personal.forget()
        (owner / "models" / "model-0.onnx").write_bytes(b"damaged")
        with pytest.raises(PlanRefused, match="cannot load"):
            served.predict("see ")


def test_a_forget_between_the_look_and_the_opening_opens_the_version(
    owner: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[bool] = []
    plain = Library.serving

    def serving(library: Library):
        found = plain(library)
        assert found is not None
        looks.append(found.personal)
        library.personal.forget()
        return found

    monkeypatch.setattr(Library, "serving", serving)
    assert not open_serving(Library(owner)).personal
    assert looks == [True, False]


def test_after_a_forget_it_answers_no_more_although_another_version_came_meanwhile(
    owner: Path,
) -> None:
    with Served(Library(owner)) as served, ExampleStore(owner / FILE_NAME) as store:
        assert served.predict("see ").personal
        PLAN.put_into_use(owner, 1, EVENING)
        store.forget_all()
        answer = served.predict("see ")
        assert (answer.version, answer.personal, first(answer)) == (1, False, "you")


def test_after_a_forget_it_answers_no_more_although_another_one_was_made_meanwhile(
    owner: Path,
) -> None:
    with Served(Library(owner)) as served, ExampleStore(owner / FILE_NAME) as store:
        before = served.serving()
        assert before.personal
        store.forget_all()
        # Under the same name.
        keep_own(owner, 0, EVENING)
        after = served.serving()
        assert after.personal
        assert after.predictor is not before.predictor
        assert first(served.predict("see ")) == "you"


@pytest.mark.parametrize("damaged", ["models/model-1.onnx", "active.json"])
def test_after_a_forget_it_answers_no_more_although_nothing_else_can(
    owner: Path, damaged: str
) -> None:
    with Served(Library(owner)) as served, ExampleStore(owner / FILE_NAME) as store:
        assert served.predict("see ").personal
        PLAN.put_into_use(owner, 1, EVENING)
        (owner / damaged).write_bytes(b"damaged")
        store.forget_all()
        for _ in range(2):
            with pytest.raises((PlanRefused, StoreError)):
                served.predict("see ")
        PLAN.put_into_use(owner, 1, EVENING)
        assert first(served.predict("see ")) == "you"


def test_a_record_that_is_damaged_stops_no_model_that_nobody_took_back(owner: Path) -> None:
    with Served(Library(owner)) as served:
        assert served.predict("see ").personal
        (owner / "active.json").write_bytes(b"damaged")
        assert served.predict("see ").personal
