"""The one place that says what answers: opened, followed, and never half of two versions."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from fedge.edge_agent import serving
from fedge.edge_agent.library import Library
from fedge.edge_agent.serving import NothingToServe, Served, open_serving
from fedge.edge_agent.suggestions import Suggestions
from fedge.schemas.errors import PlanRefused, StoreError
from tests.edge_agent.word_versions import EVENING, MORNING, WordPlan

PLAN = WordPlan()


def first(answer: serving.Answer) -> str:
    assert isinstance(answer.prediction, Suggestions)
    return answer.prediction.words[0].word


class Followed(Served):
    """Tells when a version took over."""

    def __init__(self, state_dir: Path, **more) -> None:
        self.arrived = threading.Event()
        super().__init__(Library(state_dir), replaced=lambda version: self.arrived.set(), **more)


def test_without_a_version_there_is_nothing_and_later_there_is(tmp_path: Path) -> None:
    with Served(Library(tmp_path)) as served:
        with pytest.raises(NothingToServe, match="fedge-agent run"):
            served.predict("see ")
        assert served.loaded is None
        PLAN.put_into_use(tmp_path, 0, EVENING)
        assert first(served.predict("see ")) == "you"


def test_the_old_version_answers_until_the_new_one_is_loaded(tmp_path: Path) -> None:
    PLAN.put_into_use(tmp_path, 0, EVENING)
    with Followed(tmp_path) as served:
        assert served.predict("see ").version == 0
        PLAN.put_into_use(tmp_path, 1, MORNING)
        # This question finds that there is another one, and does not wait for it.
        assert (served.predict("see ").version, first(served.predict("see "))) in (
            (0, "you"), (0, "the"), (1, "the"),
        )  # fmt: skip
        assert served.arrived.wait(30)
        answer = served.predict("see ")
        assert (answer.version, first(answer)) == (1, "the")


def test_a_model_that_is_replaced_under_its_number_is_noticed(tmp_path: Path) -> None:
    PLAN.put_into_use(tmp_path, 0, EVENING)
    with Followed(tmp_path) as served:
        assert first(served.predict("see ")) == "you"
        PLAN.put_into_use(tmp_path, 0, MORNING)
        served.predict("see ")
        assert served.arrived.wait(30)
        assert first(served.predict("see ")) == "the"


def test_the_words_of_a_plan_are_read_once(tmp_path: Path) -> None:
    PLAN.put_into_use(tmp_path, 0, EVENING)
    library = Library(tmp_path)
    before = open_serving(library)
    PLAN.put_into_use(tmp_path, 1, MORNING)
    after = open_serving(library, before)
    assert after.version == 1
    assert after.predictor.vocabulary is before.predictor.vocabulary


def test_a_version_that_fails_to_load_is_tried_again_after_a_while_and_no_sooner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PLAN.put_into_use(tmp_path, 0, EVENING)
    now_s = [0.0]
    tries = []
    opened = serving.open_serving

    def failing(library: Library, before: serving.Serving | None = None) -> serving.Serving:
        if before is None:
            return opened(library)
        tries.append(before.version)
        if len(tries) < 3:
            raise PlanRefused("no memory for it")
        return opened(library, before)

    monkeypatch.setattr(serving, "open_serving", failing)
    with Followed(tmp_path, clock=lambda: now_s[0]) as served:
        served.predict("see ")
        PLAN.put_into_use(tmp_path, 1, MORNING)
        for number in (1, 2):
            for _ in range(5):
                assert served.predict("see ").version == 0
                until_it_rests(served)
            assert len(tries) == number
            now_s[0] += serving.TRY_AGAIN_S
        served.predict("see ")
        assert served.arrived.wait(30)
        assert served.predict("see ").version == 1


def until_it_rests(served: Served) -> None:
    for thread in threading.enumerate():
        if thread.name == "load-version":
            thread.join(30)


def test_a_model_that_goes_while_it_is_opened_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PLAN.put_into_use(tmp_path, 0, EVENING)
    library = Library(tmp_path)
    read = Library.active

    def two_versions_later(self: Library) -> object:
        found = read(self)
        if found is not None and found.version == 0 and self is library:
            # Between the name and the file. `put_into_use` has a library of its own.
            PLAN.put_into_use(tmp_path, 1, MORNING)
            PLAN.put_into_use(tmp_path, 2, EVENING)
        return found

    monkeypatch.setattr(Library, "active", two_versions_later)
    assert open_serving(library).version == 2


def test_what_stays_damaged_is_an_error(tmp_path: Path) -> None:
    PLAN.put_into_use(tmp_path, 0, EVENING)
    (tmp_path / "active.json").write_text("{")
    with pytest.raises(StoreError, match=r"active\.json"):
        open_serving(Library(tmp_path))


def test_a_closed_one_loads_no_more(tmp_path: Path) -> None:
    PLAN.put_into_use(tmp_path, 0, EVENING)
    served = Served(Library(tmp_path))
    served.predict("see ")
    served.close()
    assert served.loaded is None
    assert not [one for one in threading.enumerate() if one.name == "load-version"]
