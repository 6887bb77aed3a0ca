"""`fedge evaluate` and `fedge evaluation`: what an operator reads, and when he is told no."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from pydantic import BaseModel

from fedge.coordinator.cli import cli
from fedge.coordinator.reports import print_json
from fedge.coordinator.store import PlanRecord, Store
from fedge.schemas.blobs import describe
from fedge.schemas.messages import EvaluationResult, EvaluationStatus, EvaluationSums
from tests.coordinator.states import PARTS, put, put_version
from tests.coordinator.updates import LINEAR, manifest_of

MANIFEST = manifest_of(LINEAR).model_copy(update={"metrics": ("accuracy",)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A state with version 0, measured by twenty devices; one failed, one kept silent."""
    (tmp_path / "fedge.toml").write_text(
        'population = "kitchen"\ntask = "unused"\nstate_dir = "state"\n'
    )
    with Store.open(tmp_path / "state", create=True) as store:
        store.bind_population("kitchen")
        for part in PARTS:
            put(store, part.encode())
        plan = PlanRecord(put(store, MANIFEST.encode()), "test", "f00d", 1.0)
        assert plan.ref == describe(MANIFEST.encode())
        store.record_plan(plan)
        put_version(store, plan, 0)
        store.request_evaluation(0, wanted=22, deadline_s=60.0, seed=1, at=1000.0)
        store.open_evaluation(1, at=1001.0, until=1061.0)
        names = [f"pi-{number:02}" for number in range(20)]
        store.record_evaluation_asked(1, [*names, "broken", "silent"], at=1002.0)
        for number, name in enumerate(names):
            store.record_evaluation_answer(name, measured(10, loss=float(number)), at=1003.0)
        failed = EvaluationResult(
            evaluation=1, number=0, status=EvaluationStatus.FAILED, detail="[red]no memory[/red]"
        )
        store.record_evaluation_answer("broken", failed, at=1003.0)
        store.close_evaluation(1, "the deadline came", at=1061.0)
    return tmp_path


def measured(rows: int, *, loss: float) -> EvaluationResult:
    own = EvaluationSums(
        examples=rows, rows=rows, loss_sum=rows * loss, metrics={"accuracy": rows / 2}
    )
    personal = own.model_copy(update={"loss_sum": rows * (loss - 0.5)})
    return EvaluationResult(
        evaluation=1, number=0, status=EvaluationStatus.OK, sums=own, personal=personal
    )


def run(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, [*arguments, "--config", str(folder / "fedge.toml")])


def test_a_report_shows_the_distribution_the_worst_and_who_did_not_measure(folder: Path) -> None:
    shown = run(folder, "evaluation", "show", "1")
    assert shown.exit_code == 0, shown.output
    lines = [line.split() for line in shown.output.splitlines()]
    assert lines[0][:5] == ["evaluation", "1", "of", "version", "0:"]
    assert "the deadline came" in shown.output
    assert "asked 22: measured 20 of 22, no hold-out 0, failed 1, no answer 1" in shown.output
    loss = next(line for line in lines if line[:1] == ["loss"])
    assert loss == [
        *("loss", "9.5000", "9.5000", "0.0000", "1.9000", "4.7500", "9.5000"),
        *("14.2500", "17.1000", "19.0000"),
    ]
    assert ["accuracy", *["50.00%"] * 9] in lines
    # Sturges: six bins for twenty devices, and every one of them in a bin.
    start = lines.index(["devices", "by", "loss"])
    counts = [int(line[-1]) for line in lines[start + 1 : start + 7]]
    assert sum(counts) == 20
    worst = lines.index(["the", "worst", "by", "loss"])
    assert [line[0] for line in lines[worst + 2 : worst + 7]] == [
        f"pi-{number}" for number in (19, 18, 17, 16, 15)
    ]
    assert ["loss", "20", "-0.5000", "100%"] in lines
    assert ["broken", "failed", "[red]no", "memory[/red]"] in lines
    assert ["silent", "no", "answer"] in lines


def test_json_holds_every_device(folder: Path) -> None:
    found = json.loads(run(folder, "evaluation", "show", "1", "--json").output)
    assert found["counts"] == {
        **dict.fromkeys(("failed", "no_answer"), 1),
        "asked": 22,
        "ok": 20,
        "no_hold_out": 0,
    }
    assert len(found["answers"]) == 22
    assert found["evaluation"]["reason"] == "the deadline came"
    assert [measure["name"] for measure in found["measures"]] == ["loss", "accuracy"]
    assert found["gains"][0]["mean_difference"] == -0.5
    (listed,) = json.loads(run(folder, "evaluation", "list", "--json").output)
    assert listed["number"] == 1
    assert run(folder, "evaluation", "list").output.split()[7:11] == ["1", "0", "22", "1970-01-01"]


def test_without_a_coordinator_nothing_is_asked_for(folder: Path) -> None:
    refused = run(folder, "evaluate")
    assert refused.exit_code != 0
    assert "no coordinator serves" in str(refused.exception)
    with Store.open(folder / "state") as store:
        assert len(store.evaluations()) == 1


def test_an_evaluation_that_is_not_there_is_named(folder: Path) -> None:
    refused = run(folder, "evaluation", "show", "7")
    assert "there is no evaluation 7" in str(refused.exception)


@pytest.mark.parametrize(
    "options", [["--devices", "0"], ["--deadline", "0"], ["--deadline", "99999999"]]
)
def test_what_cannot_be_meant_is_refused(folder: Path, options: list[str]) -> None:
    assert run(folder, "evaluate", *options).exit_code == 2


def test_json_holds_no_number_that_json_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"far": math.inf, "near": [math.nan, -math.inf, 1.5], "sum": Measure(math.inf)})
    said = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert said == {"far": None, "near": [None, None, 1.5], "sum": {"value": None}}


class Measure(BaseModel):
    """A record of pydantic's, which holds what it is given."""

    value: float

    def __init__(self, value: float) -> None:
        super().__init__(value=value)


def test_a_measure_that_was_left_out_is_told(folder: Path) -> None:
    with Store.open(folder / "state") as store:
        store.request_evaluation(0, wanted=2, deadline_s=60.0, seed=1, at=2000.0)
        store.open_evaluation(2, at=2001.0, until=2061.0)
        store.record_evaluation_asked(2, ["far", "near"], at=2002.0)
        for name, loss in (("near", 2.0), ("far", 1e13)):
            said = measured(10, loss=loss).model_copy(update={"evaluation": 2})
            store.record_evaluation_answer(name, said, at=2003.0)
    shown = run(folder, "evaluation", "show", "2").output
    assert "left out: measures of 1 devices beyond 1e+12" in shown
    lines = [line.split() for line in shown.splitlines()]
    assert ["loss", *["2.0000"] * 9] in lines
    assert json.loads(run(folder, "evaluation", "show", "2", "--json").output)["beyond_reason"] == 1
