"""Evaluations in the store: asked for once, answered once, kept as long as they should be."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedge.coordinator.old_state import Place
from fedge.coordinator.store import Collected, EvaluationAnswer, PlanRecord, Retention, Store
from fedge.schemas.errors import ConfigError, PeerError, RejectReason
from fedge.schemas.messages import EvaluationResult, EvaluationStatus, EvaluationSums
from tests.coordinator.states import closed_round, put, put_plan, put_version
from tests.coordinator.test_backup import back_up, fill, opened, restore
from tests.coordinator.test_store import PLAN, version
from tests.coordinator.updates import LINEAR, manifest_of

REPOSITORY = Path(__file__).parents[2]
SUMS = EvaluationSums(examples=7, rows=9, loss_sum=4.5, metrics={"accuracy": 6.0})
PERSONAL = EvaluationSums(examples=7, rows=9, loss_sum=3.25, metrics={"accuracy": 7.0})


@pytest.fixture
def store(tmp_path, database_url):
    with Store.open(tmp_path / "state", database_url, create=True) as opened_store:
        opened_store.record_plan(PLAN)
        for number in range(3):
            opened_store.record_version(version(number))
        yield opened_store


def request(store, of_version=None, *, wanted=2):
    return store.request_evaluation(of_version, wanted=wanted, deadline_s=60.0, seed=5, at=100.0)


def answer(number=1, *, of_version=2, status=EvaluationStatus.OK, **facts):
    if status is EvaluationStatus.OK:
        facts = {"sums": SUMS, **facts}
    return EvaluationResult(evaluation=number, number=of_version, status=status, **facts)


@pytest.fixture
def asking(store):
    request(store)
    assert store.open_evaluation(1, at=101.0, until=161.0)
    assert store.record_evaluation_asked(1, ["pi-2", "pi-1"], at=102.0)
    return store


def refused(store, device, result):
    with pytest.raises(PeerError) as error:
        store.record_evaluation_answer(device, result, at=110.0)
    return error.value.reason


def test_a_request_is_of_the_newest_version_unless_it_names_one(store):
    first, second = request(store), request(store, 1, wanted=50)
    assert (first.number, first.version, first.wanted) == (1, 2, 2)
    assert (second.number, second.version, second.wanted) == (2, 1, 50)
    assert store.oldest_open_evaluation() == first
    assert store.evaluations() == (first, second)


def test_a_version_that_is_not_there_cannot_be_measured(store):
    with pytest.raises(ConfigError, match="no version 9"):
        request(store, 9)
    assert store.evaluations() == ()


def test_an_evaluation_begins_once_and_its_deadline_with_it(store):
    request(store)
    assert store.open_evaluation(1, at=101.0, until=161.0) is True
    assert store.open_evaluation(1, at=105.0, until=999.0) is False
    record = store.oldest_open_evaluation()
    assert (record.opened_at, record.until, record.closed_at) == (101.0, 161.0, None)


def test_an_answer_comes_back_as_it_was_given(asking):
    assert asking.record_evaluation_answer("pi-1", answer(personal=PERSONAL), at=110.0) is True
    failed = answer(status=EvaluationStatus.FAILED, detail="no memory")
    assert asking.record_evaluation_answer("pi-2", failed, at=111.0) is True
    assert asking.evaluation_report(1).answers == (
        EvaluationAnswer(1, "pi-1", 102.0, EvaluationStatus.OK, 110.0, SUMS, PERSONAL, ""),
        EvaluationAnswer(1, "pi-2", 102.0, EvaluationStatus.FAILED, 111.0, None, None, "no memory"),
    )
    assert asking.evaluation_report(2) is None


def test_a_device_answers_an_evaluation_once(asking):
    assert asking.record_evaluation_answer("pi-1", answer(), at=110.0) is True
    other = answer(sums=PERSONAL)
    assert asking.record_evaluation_answer("pi-1", other, at=120.0) is False
    # Asked again by a coordinator that was killed meanwhile: what it answered stays.
    assert asking.record_evaluation_asked(1, ["pi-1", "pi-3"], at=130.0) is True
    first, *_ = asking.evaluation_report(1).answers
    assert (first.device, first.asked_at, first.answered_at, first.sums) == (
        *("pi-1", 102.0, 110.0),
        SUMS,
    )


def test_of_many_answers_of_one_device_at_once_one_counts(asking):
    with ThreadPoolExecutor(4) as pool:
        first = list(
            pool.map(
                lambda n: asking.record_evaluation_answer("pi-1", answer(), at=float(n)), range(8)
            )
        )
    assert sorted(first) == [False] * 7 + [True]


def test_who_was_not_asked_and_who_measured_something_else_is_refused(asking):
    assert refused(asking, "pi-9", answer()) is RejectReason.NOT_IN_COHORT
    assert refused(asking, "pi-1", answer(number=2)) is RejectReason.NOT_IN_COHORT
    assert refused(asking, "pi-1", answer(of_version=1)) is RejectReason.WRONG_BASE
    assert all(one.status is None for one in asking.evaluation_report(1).answers)


def test_an_answer_after_the_end_is_late_and_changes_nothing(asking):
    assert asking.record_evaluation_answer("pi-1", answer(), at=110.0)
    assert asking.close_evaluation(1, "the deadline came", at=161.0) is True
    before = asking.evaluation_report(1)
    assert refused(asking, "pi-2", answer()) is RejectReason.LATE
    # One that was counted before is no news, and no error.
    assert asking.record_evaluation_answer("pi-1", answer(), at=170.0) is False
    assert asking.record_evaluation_asked(1, ["pi-4"], at=171.0) is False
    assert asking.close_evaluation(1, "again", at=172.0) is False
    assert asking.evaluation_report(1) == before
    assert asking.oldest_open_evaluation() is None


def test_an_answer_that_was_kept_is_there_after_kill_9(tmp_path):
    program = (
        "import os, pathlib, signal, sys; from fedge.coordinator.store import Store; "
        "from tests.coordinator.test_store import PLAN, version; "
        "from tests.coordinator.test_store_evaluations import answer, request; "
        "store = Store.open(pathlib.Path(sys.argv[1]), create=True); "
        "store.record_plan(PLAN); store.record_version(version(2)); request(store); "
        "store.record_evaluation_asked(1, ['pi-1'], at=1.0); "
        "store.record_evaluation_answer('pi-1', answer(), at=2.0); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "state")], cwd=REPOSITORY, check=False
    )
    assert ended.returncode == -signal.SIGKILL
    with Store.open(tmp_path / "state") as store:
        (kept,) = store.evaluation_report(1).answers
    assert (kept.device, kept.sums) == ("pi-1", SUMS)


# ---------------------------------------------------------------- how long it is kept


@pytest.fixture
def filled(tmp_path, database_url):
    where = (tmp_path / "state", database_url)
    with Store.open(*where, create=True) as made:
        plan = put_plan(made)
        put_version(made, plan, 0)
        for number in range(1, 6):
            closed_round(made, plan, number)
    with Store.open(*where, serve=True) as made:
        yield made


def test_a_version_keeps_its_files_while_it_is_measured(filled):
    request(filled, 1)
    wish = Retention(versions=2)
    assert filled.collectable(wish, now=time.time()).versions == 3
    assert filled.collect(wish, now=time.time()).versions == 3
    assert [v.number for v in filled.versions() if v.files_kept] == [1, 4, 5]
    for digest in filled.named_blobs():
        filled.blobs.verify(digest)
    with pytest.raises(ConfigError, match="files of version 2 were deleted"):
        request(filled, 2)
    filled.close_evaluation(1, "over", at=5.0)
    assert filled.collect(wish, now=time.time()).versions == 1
    assert [v.number for v in filled.versions() if v.files_kept] == [4, 5]


def test_the_newest_closed_evaluations_are_kept_and_open_ones(filled):
    for number in range(1, 6):
        request(filled, 5)
        filled.record_evaluation_asked(number, ["pi-1"], at=1.0)
        if number != 2:
            filled.close_evaluation(number, "over", at=2.0)
    assert filled.collect(Retention(), now=time.time()) == Collected()
    wish = Retention(evaluations=2)
    assert filled.collectable(wish, now=time.time()) == Collected(evaluations=2)
    assert filled.collect(wish, now=time.time()).evaluations == 2
    assert [one.number for one in filled.evaluations()] == [2, 4, 5]
    assert filled.evaluation_report(4).answers[0].device == "pi-1"
    assert filled.collect(wish, now=time.time()).evaluations == 0
    assert request(filled).number == 6


def test_a_restored_state_has_its_evaluations_and_closes_those_that_were_open(
    tmp_path, database_url
):
    place = Place(tmp_path / "state", None if database_url.startswith("sqlite") else database_url)
    with fill(place) as store:
        for number in (1, 2):
            request(store, 1)
            store.open_evaluation(number, at=101.0, until=161.0)
            store.record_evaluation_asked(number, ["pi-1"], at=102.0)
        store.record_evaluation_answer("pi-1", answer(1, of_version=1), at=103.0)
        store.close_evaluation(1, "over", at=104.0)
        before = store.evaluation_report(1)
        back_up(place, tmp_path / "backup")
    restore(tmp_path / "backup", place, replace=True)
    with opened(place) as store:
        assert store.evaluation_report(1) == before
        second = store.evaluation_report(2)
        assert second.evaluation.closed_at is not None
        assert second.evaluation.reason.startswith("restored from the backup")
        assert [one.device for one in second.answers] == ["pi-1"]


def test_a_version_of_an_earlier_plan_is_refused_before_anybody_is_asked(filled):
    other = put(filled, manifest_of(LINEAR).model_copy(update={"metrics": ("accuracy",)}).encode())
    plan = PlanRecord(other, task="test", task_fingerprint="f00d", created_at=2.0)
    filled.record_plan(plan)
    put_version(filled, plan, 6)
    with pytest.raises(
        ConfigError, match=r"version 5 is of another plan than the newest, 6: .*quantization"
    ):
        request(filled, 5)
    assert filled.evaluations() == ()
    assert request(filled).version == 6
