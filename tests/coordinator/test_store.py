from __future__ import annotations

import dataclasses
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import event

from fedge.coordinator.recovery import last_visited
from fedge.coordinator.settings import load
from fedge.coordinator.store import (
    Contribution,
    DeviceSighting,
    Outcome,
    ParticipantStatus,
    PlanRecord,
    Refusal,
    Retention,
    RoundRecord,
    Store,
    VersionRecord,
)
from fedge.schemas.errors import ConfigError, PeerError, RejectReason, StoreError
from fedge.schemas.messages import LossCurve, RoundPhase
from fedge.schemas.state_lock import StateLock
from tests.coordinator.updates import blob

PLAN = PlanRecord(blob("plan"), task="digits", task_fingerprint="f00d", created_at=1.0)


def version(number, *, round_number=None, note="", at=2.0):
    return VersionRecord(
        number=number,
        plan_sha256=PLAN.ref.sha256,
        weights=blob(f"weights {number}"),
        golden=blob(f"golden {number}"),
        model_sha256="a" * 64,
        model_bytes=1234,
        created_at=at,
        base=None if number == 0 else number - 1,
        round=round_number,
        metrics={"loss": 0.5, "accuracy": 0.75},
        note=note,
    )


def a_round(number, base=0):
    return RoundRecord(
        number=number,
        base=base,
        goal=2,
        quorum=1,
        seed=42,
        opened_at=10.0,
        gather_until=40.0,
    )


def contribution(text="update", examples=30):
    return Contribution(
        update=blob(text),
        examples=examples,
        steps=4,
        training_s=1.5,
        loss=LossCurve(by_epoch=(0.9, 0.4), by_batch=(1.0, 0.8, 0.5, 0.3)),
        metrics={"accuracy": 0.5},
    )


@pytest.fixture
def store(tmp_path, database_url):
    with Store.open(tmp_path / "state", database_url, create=True) as opened:
        opened.record_plan(PLAN)
        opened.record_version(version(0))
        yield opened


@pytest.fixture
def training(store):
    store.open_round(a_round(1))
    store.record_assignment(1, ["pi-1", "pi-2", "pi-3"], train_until=640.0, at=40.0)
    return store


# ---------------------------------------------------------------- versions


def test_a_version_comes_back_as_it_was_kept(store):
    kept = version(5, note="rollback of 3")
    store.record_version(kept)
    assert store.version(5) == kept == store.newest_version()
    assert [v.number for v in store.versions()] == [0, 5]
    assert store.version(4) is None


def test_an_evaluation_is_kept_with_its_version(store):
    store.record_metrics(0, {"loss": 0.25})
    assert store.version(0) == dataclasses.replace(version(0), metrics={"loss": 0.25})
    with pytest.raises(StoreError, match="no version 7"):
        store.record_metrics(7, {"loss": 0.25})


@pytest.mark.parametrize("number", [0, 3])
def test_version_numbers_only_rise(store, number):
    store.record_version(version(3))
    with pytest.raises(StoreError, match="after version 3"):
        store.record_version(version(number))
    assert store.newest_version().number == 3


def test_a_version_needs_its_plan(store):
    foreign = dataclasses.replace(version(1), plan_sha256="b" * 64)
    with pytest.raises(StoreError):
        store.record_version(foreign)
    assert store.newest_version().number == 0


def test_a_plan_recorded_twice_is_one_plan(store):
    store.record_plan(dataclasses.replace(PLAN, created_at=99.0))
    assert store.plan(PLAN.ref.sha256) == PLAN
    assert store.plan("c" * 64) is None


def test_a_version_closes_its_round_in_the_same_transaction(training):
    training.record_accepted(1, "pi-1", contribution(), at=50.0)
    training.record_version(version(1, round_number=1, at=60.0))
    closed = training.newest_round()
    assert (closed.phase, closed.outcome) == (RoundPhase.CLOSED, Outcome.AGGREGATED)
    assert (closed.version, closed.closed_at) == (1, 60.0)
    assert training.open_rounds() == ()


def test_a_round_makes_at_most_one_version(training):
    training.record_version(version(1, round_number=1))
    with pytest.raises(StoreError):
        training.record_version(version(2, round_number=1))
    assert training.newest_version().number == 1


def test_no_version_comes_from_an_abandoned_round(training):
    training.abandon_round(1, "the deadline came with 0 updates", at=640.0)
    with pytest.raises(StoreError, match="round 1 is not open"):
        training.record_version(version(1, round_number=1))
    assert training.newest_version().number == 0


# ---------------------------------------------------------------- rounds and participants


def test_an_open_round_is_found_again_with_its_deadlines(store):
    store.open_round(a_round(1))
    assert store.open_rounds() == (a_round(1),)
    store.record_assignment(1, ["pi-2", "pi-1"], train_until=640.0, at=40.0)
    (found,) = store.open_rounds()
    assert (found.phase, found.train_until) == (RoundPhase.TRAINING, 640.0)
    assert [p.device for p in store.participants(1)] == ["pi-1", "pi-2"]
    assert {p.status for p in store.participants(1)} == {ParticipantStatus.ASKED}


def test_a_round_number_is_used_once(store):
    store.open_round(a_round(1))
    with pytest.raises(StoreError):
        store.open_round(a_round(1))


def test_an_accepted_contribution_comes_back_as_it_was_kept(training):
    training.record_offer(1, "pi-1", contribution(), at=45.0)
    assert training.participant(1, "pi-1").status is ParticipantStatus.OFFERED
    assert training.record_accepted(1, "pi-1", contribution(), at=50.0) is True
    kept = training.participant(1, "pi-1")
    assert kept.status is ParticipantStatus.ACCEPTED
    assert kept.contribution == contribution()
    assert (kept.asked_at, kept.offered_at, kept.decided_at) == (40.0, 45.0, 50.0)


def test_a_duplicate_update_is_counted_once(training):
    assert training.record_accepted(1, "pi-1", contribution("first"), at=50.0) is True
    assert training.record_accepted(1, "pi-1", contribution("first"), at=51.0) is False
    assert training.record_accepted(1, "pi-1", contribution("second"), at=52.0) is False
    kept = training.participant(1, "pi-1")
    assert kept.contribution.update == blob("first")
    assert kept.decided_at == 50.0


def test_nothing_that_comes_later_undoes_an_accepted_update(training):
    training.record_accepted(1, "pi-1", contribution(), at=50.0)
    before = training.participant(1, "pi-1")
    training.record_offer(1, "pi-1", contribution("other"), at=51.0)
    assert not training.record_rejected(1, "pi-1", RejectReason.NOT_FINITE, "NaN", at=52.0)
    assert not training.record_failed(1, "pi-1", "out of memory", at=53.0)
    training.record_assignment(1, ["pi-1"], train_until=640.0, at=54.0)
    training.abandon_round(1, "superseded", at=55.0)
    assert training.participant(1, "pi-1") == before


def test_a_device_that_was_refused_may_deliver_a_good_update(training):
    training.record_rejected(1, "pi-1", RejectReason.DIGEST_MISMATCH, "chunk 3", at=50.0)
    refused = training.participant(1, "pi-1")
    assert (refused.status, refused.reason) == (
        ParticipantStatus.REJECTED,
        RejectReason.DIGEST_MISMATCH,
    )
    assert training.record_accepted(1, "pi-1", contribution(), at=51.0) is True
    good = training.participant(1, "pi-1")
    assert (good.status, good.reason, good.detail) == (ParticipantStatus.ACCEPTED, None, "")


def test_a_device_that_was_not_asked_has_no_part(training):
    for record in (
        lambda: training.record_offer(1, "pi-9", contribution(), at=50.0),
        lambda: training.record_accepted(1, "pi-9", contribution(), at=50.0),
        lambda: training.record_accepted(2, "pi-1", contribution(), at=50.0),
        lambda: training.record_rejected(1, "pi-9", RejectReason.LATE, "", at=50.0),
        lambda: training.record_failed(1, "pi-9", "", at=50.0),
    ):
        with pytest.raises(PeerError) as refused:
            record()
        assert refused.value.reason is RejectReason.NOT_IN_COHORT
    assert training.participant(1, "pi-9") is None


def test_an_update_after_the_close_is_late_and_kept_as_such(training):
    training.record_accepted(1, "pi-1", contribution(), at=50.0)
    training.record_version(version(1, round_number=1, at=60.0))
    assert training.participant(1, "pi-2").status is ParticipantStatus.SILENT
    with pytest.raises(PeerError) as refused:
        training.record_accepted(1, "pi-2", contribution(), at=61.0)
    assert refused.value.reason is RejectReason.LATE
    training.record_rejected(1, "pi-2", RejectReason.LATE, "closed before", at=61.0)
    assert training.participant(1, "pi-2").reason is RejectReason.LATE


def test_a_closed_round_assigns_nobody(training):
    training.abandon_round(1, "superseded", at=50.0)
    with pytest.raises(StoreError, match="not open"):
        training.record_assignment(1, ["pi-4"], train_until=700.0, at=51.0)
    assert training.participant(1, "pi-4") is None


def test_a_device_keeps_its_history_when_it_is_assigned_again(training):
    training.record_offer(1, "pi-1", contribution(), at=45.0)
    before = training.participant(1, "pi-1")
    training.record_assignment(1, ["pi-1", "pi-2"], train_until=640.0, at=46.0)
    assert training.participant(1, "pi-1") == before
    assert len(training.participants(1)) == 3


def test_the_device_that_was_asked_last_is_found_with_one_statement_however_long_ago(store):
    assert store.last_participant_before(1) is None
    for number, cohort in ((1, ["pi-2", "pi_1", "pi-1"]), (2, ["pi-7"]), (3, []), (1003, [])):
        store.open_round(a_round(number))
        store.record_assignment(number, cohort, train_until=640.0, at=40.0)
    statements = []
    event.listen(
        store.database.engine,
        "before_cursor_execute",
        lambda _connection, _cursor, statement, *_others: statements.append(statement),
    )
    found = {number: last_visited(store, number) for number in (1, 2, 3, 4, 1004)}
    # Of several, the first by name, whatever the database thinks of "-" and "_".
    assert found == {1: None, 2: "pi-1", 3: "pi-7", 4: "pi-7", 1004: "pi-7"}
    assert len([each for each in statements if not each.startswith("BEGIN")]) == len(found)


def test_the_report_of_a_round_tells_who_did_what(training):
    training.record_accepted(1, "pi-1", contribution(), at=50.0)
    training.record_rejected(1, "pi-2", RejectReason.NOT_FINITE, "tensor 'w'", at=51.0)
    training.count_refusals(
        [Refusal(RejectReason.NOT_FINITE, "tensor 'w'", at=51.0, round=1, device="pi-2")]
    )
    training.record_version(version(1, round_number=1, at=60.0))
    report = training.round_report(1)
    assert [(p.device, p.status.value) for p in report.participants] == [
        ("pi-1", "accepted"),
        ("pi-2", "rejected"),
        ("pi-3", "silent"),
    ]
    assert report.version == training.version(1)
    assert [(r.device, r.count) for r in report.refusals] == [("pi-2", 1)]
    assert training.round_report(2) is None


# ---------------------------------------------------------------- refusals and devices


def test_refusals_are_counted_by_round_device_and_reason(store):
    store.count_refusals(
        [
            Refusal(RejectReason.TRUNCATED, "first", at=1.0, round=1, device="pi-1"),
            Refusal(RejectReason.TRUNCATED, "second", at=2.0, round=1, device="pi-1"),
            Refusal(RejectReason.MALFORMED, "third", at=3.0),
            Refusal(RejectReason.MALFORMED, "fourth", at=4.0),
        ]
    )
    store.count_refusals([Refusal(RejectReason.MALFORMED, "fifth", at=5.0, device="pi-1")])
    counted = [
        (r.reason.value, r.round, r.device, r.count, r.last_detail) for r in store.refusals()
    ]
    assert counted == [
        ("malformed", None, "pi-1", 1, "fifth"),
        ("malformed", None, None, 2, "fourth"),
        ("truncated", 1, "pi-1", 2, "second"),
    ]


def test_a_sighting_changes_what_it_knows_and_nothing_else(store):
    store.record_devices(
        [
            DeviceSighting("pi-2", at=1.0),
            DeviceSighting("pi-1", at=1.0, boot=3, online=True, agent_version="0.1.0"),
            DeviceSighting("pi-1", at=2.0, examples=30, version=0),
        ]
    )
    store.record_devices([DeviceSighting("pi-1", at=3.0, online=False)])
    first, second = store.devices()
    assert (first.name, first.first_seen_at, first.last_seen_at) == ("pi-1", 1.0, 3.0)
    assert (first.boot, first.online, first.examples, first.version) == (3, False, 30, 0)
    assert first.agent_version == "0.1.0"
    assert (second.name, second.online, second.boot) == ("pi-2", False, None)


# ---------------------------------------------------------------- opening, locking, other processes


def test_a_folder_without_state_is_not_made_by_a_reader(tmp_path):
    with pytest.raises(ConfigError, match="no coordinator state"):
        Store.open(tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_a_state_folder_that_cannot_be_made_is_a_setting_to_change(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be made"):
        Store.open(tmp_path / "file" / "state", create=True)


def test_a_foreign_database_is_not_taken_for_state(tmp_path):
    sqlite3.connect(tmp_path / "fedge.sqlite").close()
    (tmp_path / "fedge.sqlite").touch()
    with pytest.raises(ConfigError, match="holds no coordinator state"):
        Store.open(tmp_path)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite:///:memory:", "forgets"),
        ("nonsense", "cannot be read"),
        ("mysql://host/db", "sqlite or postgresql"),
        ("postgresql+nothing://host/db", "driver is not installed"),
    ],
)
def test_a_url_that_cannot_work_is_refused(url, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        Store.open(tmp_path, url, create=True)


CONFIGURATION = 'population = "kitchen"\ntask = "digits"\nstate_dir = "state"\n[store]\n'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('database = "postgresql://fedge:secret@host/db"', "password never stands"),
        ('database = "postgresql://fedge@host/db?password=secret"', "password never stands"),
        ('blobs = "sftp://fedge:secret@host/blobs"', "password never stands"),
        ('database = "sqlite:///elsewhere.sqlite"', "postgresql+psycopg://"),
        ('database = "mysql://host/db"', "postgresql+psycopg://"),
        ('blobs = "/mnt/blobs"', "file:///mnt/folder"),
        ("[retention]\nversions = 1", "greater than or equal to 2"),
        ("[retention]\nrounds = 0", "greater than or equal to 1"),
    ],
)
def test_a_place_that_cannot_be_used_is_refused_with_the_way_out(tmp_path, line, said):
    path = tmp_path / "fedge.toml"
    path.write_text(CONFIGURATION + line)
    with pytest.raises(ConfigError, match=re.escape(said)) as refused:
        load(path)
    assert "secret" not in str(refused.value)


def test_places_and_retention_are_read_from_the_configuration(tmp_path):
    path = tmp_path / "fedge.toml"
    url = "postgresql+psycopg://fedge@host/db"
    path.write_text(
        f'{CONFIGURATION}database = "{url}"\nblobs = "s3://a/b"\n[retention]\nversions = 3\n'
    )
    settings = load(path)
    assert (settings.store.database, settings.store.blobs) == (url, "s3://a/b")
    assert settings.retention.wish == Retention(versions=3)


def test_the_database_may_lie_elsewhere(tmp_path):
    url = f"sqlite:///{tmp_path / 'elsewhere.sqlite'}"
    with Store.open(tmp_path / "state", url, create=True) as store:
        store.record_plan(PLAN)
    with Store.open(tmp_path / "state", url) as store:
        assert store.plan(PLAN.ref.sha256) == PLAN
    assert not (tmp_path / "state" / "fedge.sqlite").exists()


def test_state_belongs_to_one_population(store):
    assert store.population() is None
    store.bind_population("kitchen")
    store.bind_population("kitchen")
    with pytest.raises(ConfigError, match="'kitchen', not 'garden'"):
        store.bind_population("garden")
    assert store.population() == "kitchen"


def test_two_coordinators_never_serve_one_folder(tmp_path, database_url):
    folder = tmp_path / "state"
    with Store.open(folder, database_url, create=True, serve=True):
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
            Store.open(folder, database_url, serve=True)
        Store.open(folder, database_url).close()
    Store.open(folder, database_url, serve=True).close()


def test_many_threads_write_without_losing_one_another(training):
    names = [f"pi-{index}" for index in range(8)]
    training.record_assignment(1, names, train_until=640.0, at=40.0)
    with ThreadPoolExecutor(8) as pool:
        counted = list(
            pool.map(
                lambda name: training.record_accepted(1, name, contribution(), at=50.0), names * 3
            )
        )
    assert sum(counted) == len(names)


def test_a_commit_is_synced_to_the_disk(tmp_path):
    with Store.open(tmp_path, create=True) as store, store._database.read() as connection:
        journal = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
        synchronous = connection.exec_driver_sql("PRAGMA synchronous").scalar()
        foreign_keys = connection.exec_driver_sql("PRAGMA foreign_keys").scalar()
    assert (journal, synchronous, foreign_keys) == ("wal", 2, 1)


ACCEPT_AND_HANG = """
import sys, pathlib, time
from fedge.coordinator.store import Store
from tests.coordinator.test_store import PLAN, a_round, contribution, version

store = Store.open(pathlib.Path(sys.argv[1]), sys.argv[2], create=True, serve=True)
store.record_plan(PLAN)
store.record_version(version(0))
store.open_round(a_round(1))
store.record_assignment(1, ["pi-1", "pi-2"], train_until=640.0, at=40.0)
print(store.record_accepted(1, "pi-1", contribution(), at=50.0), flush=True)
sys.stdin.read()
"""


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )


def test_what_was_accepted_is_there_after_kill_9_before_the_receipt(tmp_path, database_url):
    folder = tmp_path / "state"
    with start(ACCEPT_AND_HANG, folder, database_url) as process:
        assert process.stdout.readline() == "True\n"
        with pytest.raises(ConfigError, match=f"process {process.pid}"):
            StateLock(folder, "coordinator")
        process.send_signal(signal.SIGKILL)
        process.wait()
    with Store.open(folder, database_url, serve=True) as store:
        (found,) = store.open_rounds()
        assert found.phase is RoundPhase.TRAINING
        statuses = {p.device: p.status for p in store.participants(1)}
        assert statuses == {"pi-1": ParticipantStatus.ACCEPTED, "pi-2": ParticipantStatus.ASKED}
        assert store.participant(1, "pi-1").contribution == contribution()
        # The device had no receipt and sends again: it is counted once.
        assert store.record_accepted(1, "pi-1", contribution(), at=70.0) is False


READ_ROUNDS = """
import sys, pathlib
from fedge.coordinator.store import Store

with Store.open(pathlib.Path(sys.argv[1]), sys.argv[2]) as store:
    for _ in sys.stdin:
        report = store.round_report(1)
        print(*(f"{p.device}={p.status.value}" for p in report.participants), flush=True)
"""


def test_two_other_processes_read_while_the_coordinator_writes(tmp_path, database_url):
    where = (tmp_path / "state", database_url)
    with Store.open(*where, create=True, serve=True) as store:
        store.record_plan(PLAN)
        store.record_version(version(0))
        store.open_round(a_round(1))
        store.record_assignment(1, ["pi-1", "pi-2"], train_until=640.0, at=40.0)
        with start(READ_ROUNDS, *where) as first, start(READ_ROUNDS, *where) as second:

            def ask(process):
                process.stdin.write("\n")
                process.stdin.flush()
                return process.stdout.readline().split()

            assert ask(first) == ask(second) == ["pi-1=asked", "pi-2=asked"]
            store.record_accepted(1, "pi-2", contribution(), at=50.0)
            assert ask(first) == ask(second) == ["pi-1=asked", "pi-2=accepted"]
            with store._database.write():
                # Readers see the last committed state and do not wait for the writer.
                assert ask(first) == ["pi-1=asked", "pi-2=accepted"]
            first.stdin.close()
            second.stdin.close()


# ---------------------------------------------------------------- any order of calls

DEVICES = st.sampled_from(["a", "b", "c", "stranger"])


class RoundModel(RuleBasedStateMachine):
    """Any order of assignments, offers, decisions and closings, against a dictionary."""

    def __init__(self, new_url):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.where = (Path(self.folder.name), new_url())
        self.store = Store.open(*self.where, create=True)
        self.store.record_plan(PLAN)
        self.store.record_version(version(0))
        self.store.open_round(a_round(1))
        self.status: dict[str, str] = {}
        self.update: dict[str, str] = {}
        self.open = True

    @rule(devices=st.lists(st.sampled_from(["a", "b", "c"])))
    def assign(self, devices):
        try:
            self.store.record_assignment(1, devices, train_until=9.0, at=1.0)
        except StoreError:
            assert not self.open
            return
        assert self.open
        for device in devices:
            self.status.setdefault(device, "asked")

    @rule(device=DEVICES, update=st.sampled_from(["x", "y"]))
    def accept(self, device, update):
        status = self.status.get(device)
        expected = None
        if status is None:
            expected = RejectReason.NOT_IN_COHORT
        elif status != "accepted" and not self.open:
            expected = RejectReason.LATE
        if expected is not None:
            with pytest.raises(PeerError) as refused:
                self.store.record_accepted(1, device, contribution(update), at=2.0)
            assert refused.value.reason is expected
            return
        counted = self.store.record_accepted(1, device, contribution(update), at=2.0)
        assert counted is (status != "accepted")
        if counted:
            self.status[device], self.update[device] = "accepted", update

    @rule(device=DEVICES)
    def reject(self, device):
        self._decide(
            device,
            "rejected",
            lambda: self.store.record_rejected(1, device, RejectReason.WRONG_SHAPE, "", at=2.0),
        )

    @rule(device=DEVICES)
    def fail(self, device):
        self._decide(device, "failed", lambda: self.store.record_failed(1, device, "", at=2.0))

    def _decide(self, device, status, record):
        try:
            changed = record()
        except PeerError:
            assert device not in self.status
            return
        assert changed is (self.status[device] != "accepted")
        if changed:
            self.status[device] = status

    @rule(aggregated=st.booleans())
    def close(self, aggregated):
        try:
            if aggregated:
                self.store.record_version(version(1, round_number=1))
            else:
                self.store.abandon_round(1, "superseded", at=3.0)
        except StoreError:
            assert not self.open
            return
        assert self.open
        self.open = False
        for device, status in self.status.items():
            if status == "asked":
                self.status[device] = "silent"

    @rule()
    def restart(self):
        self.store.close()
        self.store = Store.open(*self.where)

    @invariant()
    def the_store_says_what_happened(self):
        found = self.store.participants(1)
        assert {p.device: p.status.value for p in found} == self.status
        assert {p.device: p.contribution.update for p in found if p.status.value == "accepted"} == {
            device: blob(update) for device, update in self.update.items()
        }
        assert bool(self.store.open_rounds()) is self.open

    def teardown(self):
        self.store.close()
        self.folder.cleanup()


def check_any_order(machine, request, kind):
    """Runs a state machine over new databases of one kind."""
    new_url = (
        request.getfixturevalue("postgres").used_database if kind == "postgresql" else lambda: None
    )
    run_state_machine_as_test(
        lambda: machine(new_url),
        settings=settings(
            max_examples=12 if kind == "sqlite" else 4,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_any_order_of_calls_keeps_the_promises(request, kind):
    check_any_order(RoundModel, request, kind)


def test_a_note_is_kept_for_the_next_life_and_replaced_by_the_next(store: Store) -> None:
    assert store.note("over_selection") is None
    store.keep_note("over_selection", "one")
    store.keep_note("over_selection", "two")
    assert store.note("over_selection") == "two"
