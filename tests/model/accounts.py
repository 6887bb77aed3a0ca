"""The accounts of a simulated fleet: what was promised, added up again from what each side kept.

It reads the coordinator's store through a door of its own and each device's state file with plain
SQL, and knows every training that was done. It shares no code with the aggregation: what a version
should be is worked out here from the numbers that the devices made up.
"""

from __future__ import annotations

import json
import math
import re
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from fedge.coordinator.rounds import Mode
from fedge.coordinator.store import (
    Outcome,
    ParticipantStatus,
    RoundRecord,
    Store,
    VersionRecord,
)
from fedge.schemas.messages import ReceiptStatus
from fedge.schemas.tensors import read_tensors
from tests.model.hosts import WEIGHT, DeviceHost, Work

_REASON = re.compile(
    r"the deadline came with \d+ updates"
    r"|all \d+ devices answered"
    r"|(no version could be made: )?version \d+ (took the place of its base|was made meanwhile)"
    r"|its base is not the newest version"
    r"|the coordinator was started again in mode"
)
"""Why a round may be abandoned where nothing damages the coordinator's files."""


class Accounts:
    """The books of one fleet. `look` raises `AssertionError` when they do not add up."""

    def __init__(self, coordinator_folder: Path, devices: Iterable[DeviceHost]) -> None:
        self._store = Store.open(coordinator_folder)
        self._devices = list(devices)
        self._works: dict[str, Work] = {}
        self._values: list[float] = []
        self._counted: dict[str, int] = {}
        self._closed: dict[int, RoundRecord] = {}
        self._highest_active: dict[str, int] = {}
        self._announced: dict[int, tuple[object, int]] = {}
        self._began: set[tuple[object, int]] = set()
        self._checked_receipts: dict[str, int] = {}
        self._highest_retained: dict[str, int] = {}
        self._details_gone: set[int] = set()
        self._since_new_card: dict[str, int] = {}
        self._seen_counting: set[str] = set()
        self.broken: list[str] = []

    def close(self) -> None:
        """Closes the door."""
        self._store.close()

    @property
    def versions(self) -> int:
        """How many there are."""
        return len(self._values)

    # ------------------------------------------------------------ what is heard

    def done(self, work: Work) -> None:
        """A training was done; whether its update can be kept is another matter."""
        self._works[work.sha256] = work
        self.failed(work.device, work.round)

    def beginning(self, device: str, number: int) -> None:
        """A training begins. Errors here would end in the agent: they are kept for `look`."""
        host = next(each for each in self._devices if each.name == device)
        if number in self._ledger(host):
            self.broken.append(f"{device} trains again for round {number}, whose update it had")
        if (host.process, number) in self._began:
            self.broken.append(f"{device} trains again for round {number}, which it was to stop")
        self._began.add((host.process, number))

    def failed(self, device: str, number: int) -> None:
        """A training ended without an update: it may be tried once more."""
        host = next(each for each in self._devices if each.name == device)
        self._began.discard((host.process, number))

    # ------------------------------------------------------------ what is checked

    def look(self) -> None:
        """Everything that holds at every moment."""
        assert not self.broken, self.broken
        self._look_at_versions()
        self._look_at_rounds()
        for device in self._devices:
            self._look_at_receipts(device)
            self._look_at_ledger(device)
            self._look_at_numbers(device)

    def look_at_broker(self, retained: Mapping[str, bytes]) -> None:
        """What the broker keeps for whoever comes: its numbers never go back, whoever was killed.

        `retained`: payloads by topic.
        """
        for topic, payload in retained.items():
            for ending, name in (("/all/version", "number"), ("/all/round", "round")):
                if topic.endswith(ending):
                    number = json.loads(payload)[name]
                    assert number >= self._highest_retained.get(name, 0), f"{topic} went back"
                    self._highest_retained[name] = number

    def forget(self, device: DeviceHost) -> None:
        """A device has lost everything: it begins anew."""
        self._highest_active.pop(device.name, None)
        self._since_new_card[device.name] = len(device.receipts)

    def look_back(self) -> None:
        """The same for all that ever was: what was settled has stayed as it was."""
        self._checked_receipts.clear()
        for number, record in self._closed.items():
            assert _fate(self._round(number)) == _fate(record), "a closed round was changed"
        self.look()

    def _look_at_versions(self) -> None:
        versions = self._store.versions()
        assert [each.number for each in versions] == list(range(len(versions)))
        for version in versions[len(self._values) :]:
            self._values.append(self._check(version))

    def _check(self, version: VersionRecord) -> float:
        """The version's value, which is what it should be."""
        tensors = read_tensors(self._store.blobs.path(version.weights.sha256), [WEIGHT])
        elements = set(tensors[WEIGHT.name].tolist())
        assert len(elements) == 1
        (value,) = elements
        if version.round is None:
            # The first one, or a rollback.
            assert value == 0.0 if version.number == 0 else value in self._values
            return value
        record = self._round(version.round)
        assert (record.outcome, record.version) == (Outcome.AGGREGATED, version.number)
        assert record.base == version.base == version.number - 1
        assert math.isclose(
            value, self._values[version.base] + self._mean(record), rel_tol=1e-9, abs_tol=1e-6
        ), f"version {version.number} is not made of the updates that count in it"
        return value

    def _mean(self, record: RoundRecord) -> float:
        total, weight = 0.0, 0
        for one in self._store.accepted_in(record.number):
            assert one.contribution is not None
            sha = one.contribution.update.sha256
            work = self._works[sha]
            assert (work.device, work.round) == (one.device, one.round)
            assert sha not in self._counted, f"{one.device}'s update counts twice"
            self._counted[sha] = record.number
            staleness = record.base - work.base
            assert staleness >= 0
            total += work.examples * work.value / math.sqrt(1 + staleness)
            weight += work.examples
        assert weight > 0
        return total / weight

    def _look_at_rounds(self) -> None:
        rounds = self._store.rounds()
        assert [each.number for each in rounds] == list(range(1, len(rounds) + 1))
        open_rounds = [each for each in rounds if each.outcome is None]
        assert len(open_rounds) <= 1, "two rounds are open"
        for record in rounds:
            if record.outcome is None:
                continue
            if record.outcome is Outcome.ABANDONED:
                self._look_at_reason(record)
            before = self._closed.setdefault(record.number, record)
            assert _fate(before) == _fate(record), "a closed round was changed"
            if not record.details_kept:
                self._details_gone.add(record.number)

    def _look_at_reason(self, record: RoundRecord) -> None:
        """It is one of those that are right, and it is true."""
        assert record.version is None
        assert _REASON.match(record.reason), f"round {record.number}: {record.reason!r}"
        quorum = re.search(r"the quorum is (\d+)", record.reason)
        if quorum and record.details_kept:
            needed = int(quorum[1])
            if record.mode == Mode.SYNC.value:
                # Of a cohort that is smaller, all are enough.
                needed = min(needed, len(self._store.participants(record.number)))
            accepted = len(self._store.accepted_in(record.number))
            assert accepted < needed, f"round {record.number} had its quorum: {record.reason}"

    def _look_at_ledger(self, device: DeviceHost) -> None:
        """What a device has written down of its rounds is what it was told."""
        ledger = self._ledger(device)
        for seen in device.receipts[self._since_new_card.get(device.name, 0) :]:
            assert ledger[seen.round] == seen.status.value, f"{seen}: {ledger[seen.round]}"
        assert device.damaged or "lost" not in ledger.values(), f"{device.name} lost an update"

    def _look_at_receipts(self, device: DeviceHost) -> None:
        checked = self._checked_receipts.get(device.name, 0)
        settled = checked
        for place, seen in enumerate(device.receipts[checked:], start=checked):
            if seen.round in self._details_gone:
                # By the operator's wish. What counts in a version was looked at when it was made.
                assert seen.status is ReceiptStatus.REJECTED or seen.sha256 in self._seen_counting
                continue
            kept = self._store.participant(seen.round, seen.device)
            counts = (
                kept is not None
                and kept.status is ParticipantStatus.ACCEPTED
                and kept.contribution is not None
                and kept.contribution.update.sha256 == seen.sha256
            )
            if seen.status is ReceiptStatus.REJECTED:
                assert not counts, f"{seen} was rejected, and counts"
                continue
            assert kept is not None, f"{seen} was accepted, and is not recorded"
            assert counts, f"{seen} was accepted, and does not count"
            assert kept.counted_in is not None
            self._seen_counting.add(seen.sha256)
            goes_into = self._round(kept.counted_in)
            if goes_into.outcome is Outcome.AGGREGATED:
                assert self._counted.get(seen.sha256) == kept.counted_in, f"{seen} was dropped"
            if goes_into.outcome is not None and settled == place:
                settled = place + 1
        self._checked_receipts[device.name] = settled

    def _look_at_numbers(self, device: DeviceHost) -> None:
        active = _active_version(device.folder)
        if active is not None:
            assert active >= self._highest_active.get(device.name, 0), "a device went back"
            self._highest_active[device.name] = active
        if device.process is None or device.agent is None:
            return
        announced = device.agent._state.announced
        if announced is not None:
            life, before = self._announced.get(id(device), (None, 0))
            assert life is not device.process or announced.number >= before
            self._announced[id(device)] = (device.process, announced.number)

    def _round(self, number: int) -> RoundRecord:
        known = self._closed.get(number)
        if known is not None:
            return known
        return next(each for each in self._store.rounds() if each.number == number)

    @staticmethod
    def _ledger(device: DeviceHost) -> dict[int, str]:
        """Round → offered, accepted, rejected or lost."""
        path = device.folder / "agent.sqlite"
        if not path.exists():
            return {}
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            try:
                return dict(database.execute("SELECT round, status FROM ledger"))
            except sqlite3.OperationalError:
                # Killed before it had a table.
                return {}

    def active(self, device: DeviceHost) -> int:
        """The version in use on a device, -1 before the first."""
        active = _active_version(device.folder)
        return -1 if active is None else active


def _fate(record: RoundRecord) -> RoundRecord:
    """What never changes of a closed round; its details go by the operator's wish."""
    return replace(record, details_kept=True)


def _active_version(folder: Path) -> int | None:
    try:
        return int(json.loads((folder / "active.json").read_bytes())["version"])
    except FileNotFoundError:
        return None
