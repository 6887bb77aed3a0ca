"""The checks find what was planted: a check that never fails would prove nothing.

A store as the coordinator would have left it, with versions made by hand, is edited in one place,
and the check that is named finds it. On the untouched one none finds anything.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import sqlalchemy

from fedge.coordinator.store.tables import metadata
from tests.chaos import checks
from tests.chaos.arithmetic import TOLERANCE, Part
from tests.chaos.evidence import Announced, Asked, Evidence, SaidReceipt
from tests.chaos.history import History, Open
from tests.chaos.judgement import versions_are_their_updates
from tests.chaos.stores import LedgerLine, Snapshot, read_coordinator, read_ledger, read_outbox
from tests.chaos.verdict import Checked, Violation

DEVICES = ("d0", "d1", "d2")
EXAMPLES = {"d0": 10, "d1": 20, "d2": 40}
ROUNDS = 4
ABANDONED = 3


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tensors(rng: np.random.Generator, scale: float) -> dict[str, np.ndarray]:
    return {
        "a": rng.normal(0, scale, (3, 4)).astype(np.float32),
        "b": rng.normal(0, scale, 5).astype(np.float32),
    }


@dataclass
class Left:
    """What a run left behind. `database`: the coordinator's."""

    database: Path
    evidence: Evidence
    history: History = field(default_factory=History)
    ledgers: dict[str, list[LedgerLine]] = field(default_factory=dict)

    def edit(self, *statements: str) -> None:
        with sqlite3.connect(self.database) as connection:
            for statement in statements:
                assert connection.execute(statement).rowcount > 0, statement

    @property
    def snapshot(self) -> Snapshot:
        return read_coordinator(self.database)

    def violations(self) -> list[Violation]:
        snapshot = self.snapshot
        self.history.observe(snapshot)
        remade = versions_are_their_updates(snapshot, self.evidence, self.history)
        return [
            *self.history.violations,
            *checks.ledgers_agree(self.ledgers, self.evidence.made, snapshot).violations,
            *checks.receipts_hold(self.evidence.receipts, snapshot).violations,
            *checks.contributions_end(snapshot).violations,
            *checks.versions_rise(snapshot).violations,
            *checks.announcements_rise("rises", self.evidence.announced, snapshot).violations,
            *remade.violations,
        ]

    def found(self) -> set[str]:
        return {violation.check for violation in self.violations()}


@pytest.fixture
def left(tmp_path: Path) -> Left:
    """Four rounds of three devices: three versions, and one round that was abandoned."""
    database = tmp_path / "fedge.sqlite"
    engine = sqlalchemy.create_engine(f"sqlite:///{database}")
    metadata.create_all(engine)
    engine.dispose()
    made = Left(database, Evidence({}), ledgers={device: [] for device in DEVICES})
    rng = np.random.default_rng(7)
    weights = tensors(rng, 1.0)
    with sqlite3.connect(database) as connection:
        connection.execute("INSERT INTO plans VALUES ('plan', '{}', 'chaos', 'f', 0)")
        _put_version(connection, made, 0, None, None, weights)
        for number in range(1, ROUNDS + 1):
            _put_round(connection, made, number, weights, rng)
    return made


def _put_version(
    connection: sqlite3.Connection,
    made: Left,
    number: int,
    base: int | None,
    round_number: int | None,
    weights: dict[str, np.ndarray],
) -> None:
    encoded = safetensors.numpy.save(weights)
    made.history.weights[number] = encoded
    made.evidence.announced.append(Announced(number, retained=False, at_s=float(number)))
    ref = json.dumps({"sha256": digest(encoded)})
    connection.execute(
        "INSERT INTO versions (number, plan_sha256, base, round, weights, golden, model_sha256, "
        "model_bytes, metrics, note, created_at) VALUES (?, 'plan', ?, ?, ?, '{}', '', 0, '{}', "
        "'', 0)",
        (number, base, round_number, ref),
    )


def _put_round(
    connection: sqlite3.Connection,
    made: Left,
    number: int,
    weights: dict[str, np.ndarray],
    rng: np.random.Generator,
) -> None:
    abandoned = number == ABANDONED
    base = number - 1 if number <= ABANDONED else number - 2
    version = None if abandoned else base + 1
    outcome, reason = ("abandoned", "too few came") if abandoned else ("aggregated", "")
    connection.execute(
        "INSERT INTO rounds (number, base, phase, goal, quorum, seed, opened_at, gather_until, "
        "outcome, reason, version) VALUES (?, ?, 'closed', 3, 2, 0, 0, 0, ?, ?, ?)",
        (number, base, outcome, reason, version),
    )
    total = dict.fromkeys(weights, np.float64(0))
    for device in DEVICES:
        update = tensors(rng, 0.1)
        sha256 = made.evidence.keep_update(device, number, safetensors.numpy.save(update))
        connection.execute(
            'INSERT INTO participants (round, device, status, detail, "update", examples, '
            "asked_at) VALUES (?, ?, 'accepted', '', ?, ?, 0)",
            (number, device, json.dumps({"sha256": sha256}), EXAMPLES[device]),
        )
        made.evidence.receipts.append(SaidReceipt(device, number, sha256, "accepted", number))
        offer = {"round": number, "base": base, "update": {"sha256": sha256}}
        said = json.dumps({**offer, "examples": EXAMPLES[device]}).encode()
        made.evidence.note_offer(device, said)
        made.ledgers[device].append(LedgerLine(number, "accepted", None))
        for name, tensor in update.items():
            total[name] = total[name] + EXAMPLES[device] * tensor.astype(np.float64)
    if not abandoned:
        for name, weight in weights.items():
            mean = (total[name] / sum(EXAMPLES.values())).astype(np.float32)
            weights[name] = (weight.astype(np.float64) + mean).astype(np.float32)
        _put_version(connection, made, base + 1, base, number, weights)


def test_nothing_is_found_where_nothing_is_wrong(left: Left):
    assert left.violations() == []
    remade = versions_are_their_updates(left.snapshot, left.evidence, left.history)
    assert (remade.count, remade.undecided) == (3, [])
    assert remade.largest_difference < TOLERANCE


EDITS: dict[str, tuple[set[str], tuple[str, ...]]] = {
    "an accepted update is lost": (
        {"ledgers_agree", "receipts_hold", "versions_are_their_updates"},
        ("DELETE FROM participants WHERE round = 2 AND device = 'd1'",),
    ),
    "an accepted update is turned into a rejected one": (
        {"ledgers_agree", "receipts_hold", "versions_are_their_updates"},
        ("UPDATE participants SET status = 'rejected' WHERE round = 2 AND device = 'd1'",),
    ),
    "an update of an abandoned round is lost": (
        {"ledgers_agree", "receipts_hold"},
        ("DELETE FROM participants WHERE round = 3 AND device = 'd0'",),
    ),
    "another update is in its place": (
        {"ledgers_agree", "receipts_hold", "versions_are_their_updates"},
        (
            'UPDATE participants SET "update" = (SELECT "update" FROM participants WHERE round = 1 '
            "AND device = 'd0') WHERE round = 2 AND device = 'd1'",
        ),
    ),
    "an update counts in two rounds, once in a later one": (
        {"versions_are_their_updates"},
        ("UPDATE participants SET counted_in = 4 WHERE round = 2 AND device = 'd2'",),
    ),
    "an update counts before it was asked for": (
        {"contributions_end", "versions_are_their_updates"},
        ("UPDATE participants SET counted_in = 1 WHERE round = 2 AND device = 'd2'",),
    ),
    "a version is missing": (
        {"versions_rise", "contributions_end"},
        ("DELETE FROM versions WHERE number = 2",),
    ),
    "a version was made from another base": (
        {"versions_rise", "contributions_end", "versions_are_their_updates"},
        ("UPDATE versions SET base = 0 WHERE number = 2",),
    ),
    "a version claims another round": (
        {"contributions_end", "versions_are_their_updates"},
        ("UPDATE versions SET round = 3 WHERE number = 2",),
    ),
    "a round was abandoned without a reason": (
        {"contributions_end"},
        ("UPDATE rounds SET reason = '' WHERE number = 3",),
    ),
    "an abandoned round has a version": (
        {"contributions_end"},
        ("UPDATE rounds SET version = 2 WHERE number = 3",),
    ),
    "an old round was forgotten open": (
        {"contributions_end"},
        ("UPDATE rounds SET outcome = NULL, phase = 'training' WHERE number = 3",),
    ),
    "a round is gone": (
        {"contributions_end"},
        ("DELETE FROM rounds WHERE number = 3",),
    ),
}


@pytest.mark.parametrize("planted", EDITS)
def test_a_planted_edit_of_the_store_is_found(left: Left, planted: str):
    expected, statements = EDITS[planted]
    left.edit(*statements)
    assert left.found() == expected


def _spoil(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Left], None]:
    def spoil(left: Left) -> None:
        weights = {
            name: np.array(each)
            for name, each in safetensors.numpy.load(left.history.weights[2]).items()
        }
        change(weights)
        left.history.weights[2] = safetensors.numpy.save(weights)

    return spoil


def _part(left: Left, device: str) -> dict[str, np.ndarray]:
    return safetensors.numpy.load(left.evidence.updates[left.evidence.made[device, 2][0]])


def _counted(weights_of: dict[str, int]) -> Callable[[Left], None]:
    """Version 2 as it would be if round 2's updates had counted so often."""

    def spoil(left: Left) -> None:
        base = safetensors.numpy.load(left.history.weights[1])
        total = sum(weights_of.values())
        left.history.weights[2] = safetensors.numpy.save(
            {
                name: (
                    base[name].astype(np.float64)
                    + sum(
                        n * _part(left, d)[name].astype(np.float64) for d, n in weights_of.items()
                    )
                    / total
                ).astype(np.float32)
                for name in base
            }
        )

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        _counted({"d0": 20, "d1": 20, "d2": 40}),
        _counted({"d1": 20, "d2": 40}),
        _counted({"d0": 10, "d1": 20, "d2": 41}),
        _spoil(lambda weights: weights["b"].__setitem__(3, weights["b"][3] + 1e-4)),
    ],
    ids=["d0 counted twice", "d0 left out", "d2 with one example more", "one weight is off"],
)
def test_a_version_whose_weights_are_not_its_updates_is_found(
    left: Left, spoil: Callable[[Left], None]
):
    spoil(left)
    # Version 3 is made from version 2, so it does not fit either.
    found = left.violations()
    assert {violation.check for violation in found} == {"versions_are_their_updates"}
    assert "version 2 of round 2" in found[0].text


def test_the_honest_count_is_not_found(left: Left):
    _counted(EXAMPLES)(left)
    assert left.violations() == []


def test_equal_updates_leave_a_version_undecided(left: Left):
    """Where one update more or less would not show, the arithmetic says so."""
    from tests.chaos.arithmetic import remake  # noqa: PLC0415 -- beside what it is about

    base = left.history.weights[0]
    update = left.evidence.updates[left.evidence.made["d0", 1][0]]
    alike = remake(base, [Part(update, 10), Part(update, 10)], base)
    assert not alike.decided
    alone = remake(base, [Part(update, 10)], base)
    assert alone.decided
    assert alone.difference > TOLERANCE


def test_a_contradicting_receipt_is_found(left: Left):
    said = left.evidence.receipts[0]
    left.evidence.receipts.append(SaidReceipt(said.device, said.round, said.sha256, "rejected", 9))
    assert left.found() == {"receipts_hold"}


def test_a_receipt_for_other_bytes_is_found(left: Left):
    left.evidence.receipts.append(SaidReceipt("d0", 1, "f" * 64, "accepted", 9))
    assert left.found() == {"receipts_hold"}


def test_a_repeated_receipt_is_no_violation(left: Left):
    left.evidence.receipts.append(left.evidence.receipts[0])
    assert left.found() == set()


def test_a_device_that_was_told_rejected_what_counts_is_found(left: Left):
    left.ledgers["d0"][0] = LedgerLine(1, "rejected", "late")
    assert left.found() == {"ledgers_agree"}


def test_an_older_announcement_is_found_unless_a_broker_remembered_it(left: Left):
    left.evidence.announced.append(Announced(1, retained=True, at_s=50))
    assert left.found() == set()
    left.evidence.announced.append(Announced(2, retained=False, at_s=51))
    assert left.found() == {"rises"}
    excused = checks.announcements_rise(
        "rises", left.evidence.announced, left.snapshot, [(50.5, 51.5)]
    )
    assert excused.violations == ()


def test_an_announcement_of_a_version_that_is_not_stored_is_found(left: Left):
    left.evidence.announced.append(Announced(9, retained=False, at_s=50))
    assert left.found() == {"rises"}


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM versions WHERE number = 3",
        "DELETE FROM participants WHERE round = 4 AND device = 'd2'",
        "UPDATE rounds SET reason = 'another' WHERE number = 3",
    ],
)
def test_what_was_decided_once_may_not_change_later(left: Left, statement: str):
    left.history.observe(left.snapshot)
    assert left.history.violations == []
    left.edit(statement)
    left.history.observe(left.snapshot)
    assert [violation.check for violation in left.history.violations] == ["taken_back"]
    left.history.observe(left.snapshot)
    assert len(left.history.violations) == 1


def test_a_round_may_be_late_by_the_faults_and_no_more():
    rounds = {1: Open(gathering_s=0, training_s=10, closed_s=40)}
    faults = [(0.0, 5.0), (12.0, 20.0), (18.0, 24.0), (39.0, 60.0)]
    assert checks.overlap_s(faults, 10, 40) == pytest.approx(13)

    def found(slack_s: float) -> Checked:
        return checks.rounds_end(rounds, deadline_s=6, slack_s=slack_s, troubles=faults, end_s=100)

    assert found(11.1) == Checked("rounds_end", 1)
    assert len(found(10.9).violations) == 1


ASKED = [Asked("d0", "need of x", 10.0), Asked("d0", "need of x", 20.0)]
OFFERED = [Asked("d0", "offer of round 3", 10.0), Asked("d0", "offer of round 3", 40.0)]


@pytest.mark.parametrize(
    ("asked", "answered_s", "trouble", "violations"),
    [
        (ASKED, [], [], 1),
        (ASKED, [12.0], [], 1),
        (ASKED, [], [(5.0, 9.0), (21.0, 22.0)], 1),
        (ASKED, [], [(12.0, 13.0)], 0),
        (ASKED[:1], [], [], 0),
        ([ASKED[0], Asked("d0", "need of y", 20.0)], [], [], 0),
        ([ASKED[0], Asked("d1", "need of x", 20.0)], [], [], 0),
        ([ASKED[0], Asked("d0", "need of x", 11.0)], [], [], 0),
        (OFFERED, [], [], 1),
        (OFFERED, [41.0], [], 1),
        (OFFERED, [12.0], [], 0),
    ],
)
def test_a_question_without_an_answer_is_found(
    asked: list[Asked],
    answered_s: list[float],
    trouble: list[tuple[float, float]],
    violations: int,
):
    found = checks.questions_are_answered(asked, {"d0": answered_s}, {"d0": trouble})
    assert len(found.violations) == violations
    assert found.cases == len({(each.device, each.what) for each in asked})


def test_a_round_that_never_closed_is_late_at_the_end():
    rounds = {1: Open(gathering_s=0, training_s=10)}
    found = checks.rounds_end(rounds, deadline_s=6, slack_s=5, troubles=[], end_s=22)
    assert len(found.violations) == 1


def test_a_device_s_ledger_and_outbox_are_read(tmp_path: Path):
    from fedge.edge_agent.state import AgentState  # noqa: PLC0415 -- only for its tables

    path = tmp_path / "agent.sqlite"
    AgentState(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO outbox (round, sha256, offer) VALUES (3, 'x', '{}')")
        connection.execute(
            "INSERT INTO ledger (round, base, examples, training_s, upload_bytes, status, reason) "
            "VALUES (2, 1, 5, 0.1, 10, 'rejected', 'late')"
        )
    assert read_ledger(path) == (LedgerLine(2, "rejected", "late"),)
    assert read_outbox(path) == (3,)
