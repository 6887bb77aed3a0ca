"""What the stores held while the faults went on: seen again and again, and never taken back.

A watcher reads the coordinator's database beside its writer. What was decided once (a version, an
accepted update, a round's end) must be there in every later reading, unchanged, whatever was killed
in between. Weights are copied when they are first named, so that arithmetic does not depend on what
the store kept.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.stores import Snapshot, StoredContribution, StoredRound, StoredVersion
from tests.chaos.verdict import Checked, Violation


@dataclass(slots=True)
class Open:
    """When a round was seen gathering, training and closed, in monotonic seconds."""

    gathering_s: float | None = None
    training_s: float | None = None
    closed_s: float | None = None


@dataclass(slots=True)
class History:
    """Readings so far. `weights`: version number → bytes. `online`: devices, as last read."""

    clock: Callable[[], float] = time.monotonic
    versions: dict[int, StoredVersion] = field(default_factory=dict)
    accepted: dict[tuple[int, str], StoredContribution] = field(default_factory=dict)
    ended: dict[int, StoredRound] = field(default_factory=dict)
    rounds: dict[int, Open] = field(default_factory=dict)
    version_seen_s: dict[int, float] = field(default_factory=dict)
    weights: dict[int, bytes] = field(default_factory=dict)
    violations: list[Violation] = field(default_factory=list)
    online: frozenset[str] = frozenset()
    readings: int = 0
    unreadable: int = 0

    @property
    def checked(self) -> Checked:
        """Of all readings: nothing that was decided was taken back."""
        records = len(self.versions) + len(self.accepted) + len(self.ended)
        return Checked("taken_back", records, tuple(self.violations))

    def watch(self, read: Callable[[], Snapshot], blobs: Path) -> Snapshot | None:
        """One reading of the store and of the weights it names; None if it cannot be read now."""
        try:
            snapshot = read()
        except sqlite3.Error:
            self.unreadable += 1
            return None
        self.observe(snapshot)
        for version in snapshot.versions:
            if version.number not in self.weights:
                with contextlib.suppress(OSError):
                    self.weights[version.number] = (blobs / version.weights).read_bytes()
        return snapshot

    def observe(self, snapshot: Snapshot) -> None:
        """Compares a reading with all earlier ones."""
        now = self.clock()
        self.readings += 1
        self.online = snapshot.online
        versions = {version.number: version for version in snapshot.versions}
        accepted = {(each.round, each.device): each for each in snapshot.accepted}
        ended = {each.number: each for each in snapshot.rounds if each.outcome is not None}
        self._keeps("version", self.versions, versions, now)
        self._keeps("accepted update", self.accepted, accepted, now)
        self._keeps("end of round", self.ended, ended, now)
        for number in versions:
            self.version_seen_s.setdefault(number, now)
        for each in snapshot.rounds:
            seen = self.rounds.setdefault(each.number, Open())
            if each.phase == "gathering" and seen.gathering_s is None:
                seen.gathering_s = now
            if each.phase == "training" and seen.training_s is None:
                seen.training_s = now
            if each.outcome is not None and seen.closed_s is None:
                seen.closed_s = now

    def _keeps(self, what: str, before: dict, now_there: dict, at_s: float) -> None:
        for key, record in list(before.items()):
            if now_there.get(key) != record:
                found = f"{what} {key} was {record} and is {now_there.get(key)}"
                self.violations.append(Violation("taken_back", found, at_s))
                # Told once: from here on the new state is what must stay.
                del before[key]
        before.update(now_there)
