"""The state file: one transaction a call, whatever happens to the disk; damaged, it begins anew."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from fedge.edge_agent import state
from fedge.edge_agent.state import AgentState
from fedge.schemas.blobs import describe
from fedge.schemas.errors import StoreError, StoreUnavailable
from fedge.schemas.messages import (
    LossCurve,
    Offer,
    ReceiptStatus,
    TrialOutcome,
    TrialReason,
    TrialReport,
)
from tests.edge_agent.announcements import version
from tests.edge_agent.small_disks import small_disk


def offer(number: int, *, points: int = 1) -> Offer:
    return Offer(
        round=number,
        base=number - 1,
        update=describe(b"update"),
        examples=10,
        steps=2,
        training_s=0.5,
        loss=LossCurve(by_epoch=(1.0,), by_batch=(1.0,) * points),
        metrics={},
    )


def test_what_was_kept_is_there_after_a_restart(tmp_path: Path) -> None:
    first = AgentState(tmp_path / "s")
    first.keep_boot(7)
    first.keep_failures(3)
    first.keep_announcement(version(4))
    first.put_in_outbox(offer(5))
    # As after kill -9: nothing is closed.
    second = AgentState(tmp_path / "s")
    assert (second.boot(), second.failures()) == (7, 3)
    assert second.announcement() == version(4).model_copy(
        update={"id": second.announcement().id, "ts": second.announcement().ts}
    )
    assert second.outbox() == {5: first.outbox()[5]}
    second.settle(5, ReceiptStatus.REJECTED, "late")
    assert AgentState(tmp_path / "s").outbox() == {}
    (line,) = second.ledger()
    assert (line.round, line.status, line.reason) == (5, "rejected", "late")


def test_an_update_that_was_lost_is_in_the_ledger_and_not_in_the_outbox(tmp_path: Path) -> None:
    memory = AgentState(tmp_path / "s")
    memory.put_in_outbox(offer(5))
    memory.lose(5, "its file is gone")
    assert memory.outbox() == {}
    assert [(p.status, p.reason) for p in memory.ledger()] == [("lost", "its file is gone")]


def test_the_ledger_keeps_the_newest_rounds_and_no_more(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(state, "LEDGER_LINES", 20)
    memory = AgentState(tmp_path / "s")
    for number in range(1, 51):
        memory.put_in_outbox(offer(number))
    assert [line.round for line in memory.ledger()] == list(range(31, 51))
    # Updates without a receipt are another matter: none of them is dropped.
    assert list(memory.outbox()) == list(range(1, 51))


def test_ten_thousand_rounds_take_little_more_than_a_megabyte(tmp_path: Path) -> None:
    assert state.LEDGER_LINES == 10_000
    memory = AgentState(tmp_path / "s")
    memory._run(
        "WITH RECURSIVE n(r) AS (SELECT 1 UNION ALL SELECT r + 1 FROM n WHERE r < 12000) "
        "INSERT INTO ledger SELECT r, r - 1, 4000, 12.345, 6000000, 'rejected', 'late' FROM n"
    )
    memory.put_in_outbox(offer(12_001))
    memory._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert len(memory.ledger()) == 10_000
    assert (tmp_path / "s").stat().st_size < 2 * 1024 * 1024


def test_a_full_disk_changes_nothing_and_is_told_as_unavailable(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 512 * 1024) as disk:
        memory = AgentState(disk.folder / "s")
        memory.put_in_outbox(offer(1))
        disk.fill()
        big = offer(2, points=2000)
        for _ in range(3):
            with pytest.raises(StoreUnavailable, match="full"):
                memory.put_in_outbox(big)
            assert list(memory.outbox()) == [1]
        disk.empty()
        memory.put_in_outbox(big)
        assert list(memory.outbox()) == [1, 2]
        assert list(AgentState(disk.folder / "s").outbox()) == [1, 2]
        memory.close()


def test_a_read_only_disk_is_told_as_unavailable(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "disk", 512 * 1024, "ro") as disk,
        pytest.raises(StoreUnavailable, match="unable to open"),
    ):
        AgentState.open_whole(disk.folder / "s")


def test_a_file_that_another_program_has_locked_is_told_as_unavailable(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(state, "_BUSY_S", 0.01)
    memory = AgentState(tmp_path / "s")
    other = sqlite3.connect(tmp_path / "s", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="locked"):
            memory.put_in_outbox(offer(1))
    other.execute("ROLLBACK")
    memory.put_in_outbox(offer(1))
    assert list(memory.outbox()) == [1]


def test_a_mistake_is_not_told_as_something_that_may_pass(tmp_path: Path) -> None:
    memory = AgentState(tmp_path / "s")
    for statement in ("SELECT * FROM nothing", "INSERT INTO facts VALUES (NULL, NULL)"):
        with pytest.raises(StoreError) as error:
            memory._run(statement)
        assert not isinstance(error.value, StoreUnavailable)


def test_a_call_that_fails_half_way_leaves_nothing_of_itself(tmp_path: Path) -> None:
    memory = AgentState(tmp_path / "s")
    memory._run("ALTER TABLE ledger RENAME TO elsewhere")
    with pytest.raises(StoreError, match="no such table"):
        memory.put_in_outbox(offer(1))
    assert memory.outbox() == {}
    memory._run("ALTER TABLE elsewhere RENAME TO ledger")
    memory.put_in_outbox(offer(1))
    assert list(AgentState(tmp_path / "s").outbox()) == [1]


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2 + 100)


def scribble(path: Path) -> None:
    path.write_bytes(b"this was a database " * 1000)


def rot(path: Path) -> None:
    with path.open("r+b") as file:
        for page in range(1, path.stat().st_size // 4096):
            file.seek(page * 4096)
            file.write(b"\xff" * 64)


@pytest.mark.parametrize("harm", [cut, scribble, rot])
def test_a_damaged_file_is_moved_aside_and_another_begun(tmp_path: Path, harm, caplog) -> None:
    path = tmp_path / "agent.sqlite"
    memory = AgentState(path)
    for number in range(1, 50):
        memory.put_in_outbox(offer(number, points=100))
    memory.close()  # the log is in the file now
    harm(path)
    harmed = path.read_bytes()
    anew = AgentState.open_whole(path)
    assert anew.outbox() == {}
    anew.put_in_outbox(offer(1))
    assert (tmp_path / "agent.sqlite.damaged").read_bytes() == harmed
    assert "agent_state_damaged" in caplog.text
    anew.close()
    assert list(AgentState.open_whole(path).outbox()) == [1]


def test_a_whole_file_is_left_alone(tmp_path: Path) -> None:
    AgentState(tmp_path / "s").put_in_outbox(offer(1))
    assert list(AgentState.open_whole(tmp_path / "s").outbox()) == [1]
    assert not (tmp_path / "s.damaged").exists()


def test_what_another_release_wrote_and_this_one_cannot_read_is_no_crash(tmp_path: Path) -> None:
    memory = AgentState(tmp_path / "s")
    memory.put_in_outbox(offer(1))
    memory.put_in_outbox(offer(2))
    memory._run("UPDATE outbox SET offer = '{\"v\": 9}' WHERE round = 1")
    memory._run("INSERT INTO facts VALUES ('announcement', '{}'), ('boot', 'many')")
    assert memory.outbox()[1] is None
    assert memory.outbox()[2] is not None
    assert memory.announcement() is None
    assert memory.boot() == 0


def test_how_a_trial_ended_first_stays_unless_it_cannot_be_read(tmp_path: Path) -> None:
    memory = AgentState(tmp_path / "s")
    # Also one that ended before it was ever begun: its candidate could not be fetched.
    good, bad = (
        TrialReport(
            rollout=1, version=7, outcome=outcome, reason=reason, detail="measured", hold_out=20
        )
        for outcome, reason in (
            (TrialOutcome.ACTIVE, None),
            (TrialOutcome.ROLLED_BACK, TrialReason.HOLD_OUT),
        )
    )
    memory.end_trial(good)
    memory.end_trial(bad)
    ended = memory.trial(1, 7)
    assert ended is not None
    assert ended.report == good
    memory._run("UPDATE trials SET report = '{}'")
    assert memory.trial(1, 7) is None
    memory.end_trial(bad)
    ended = memory.trial(1, 7)
    assert ended is not None
    assert ended.report == bad
    # After a forget only how it ended is left, of those that are not counted yet.
    memory.forget_measures()
    ended = memory.trial(1, 7)
    assert ended is not None
    assert (ended.report.outcome, ended.report.detail, ended.report.hold_out) == (
        *(TrialOutcome.ROLLED_BACK, "", None),
    )
    memory.close()
