"""From what a run left behind to its violations and its figures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedge.coordinator.export import export_model
from fedge.coordinator.store import Store
from fedge.schemas.errors import FedgeError
from tests.chaos import checks, log_checks
from tests.chaos.arithmetic import TOLERANCE, Part, remake
from tests.chaos.evidence import Evidence
from tests.chaos.gauges import Growth, growth
from tests.chaos.history import History
from tests.chaos.run import Course
from tests.chaos.schedule import BROKER, COORDINATOR, FLEET
from tests.chaos.stores import (
    Snapshot,
    StoredContribution,
    StoredVersion,
    read_coordinator,
    read_ledger,
)
from tests.chaos.verdict import Checked, Violation, together
from tests.chaos.world import World

ROUND_SLACK_S = 15.0
"""For a busy computer, and for the time between two looks at the store."""
MOST_RSS_BYTES = {COORDINATOR: 900 << 20, BROKER: 200 << 20}
AGENT_RSS_BYTES = 120 << 20
"""Half as much again as they take on a quiet day: torch 600 MB, an agent 45 MB."""
DESCRIPTORS_GROWTH = 100
FILE_LIMITS = {"blobs": 12, "models": 2, "outbox": 1, "uploads": 6}
"""A device keeps the plan's four blobs and two of each of two versions, the models of the last two,
and the update that it may have made last; the coordinator what came for its open round."""
RECOVERY_S = 5.0
"""After a fault: reconnecting with back-off."""


@dataclass
class RemadeVersions:
    """The versions that were made again. `undecided`: where an update more would not show.

    `asked`: how many there are that rounds made. `count`: how many could be computed.
    """

    asked: int = 0
    count: int = 0
    largest_difference: float = 0.0
    undecided: list[int] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)


@dataclass
class Judgement:
    """What was found. `reasons`: of abandoned rounds, numbers as N. `errors`: logged ones.

    `checked`: by the names of the checks.
    """

    checked: dict[str, Checked]
    snapshot: Snapshot
    grown: list[Growth]
    remade: RemadeVersions = field(default_factory=RemadeVersions)
    exported: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    refused_starts: int = 0

    @property
    def violations(self) -> list[Violation]:
        """Of all checks."""
        return [violation for each in self.checked.values() for violation in each.violations]


def judge(made: World, course: Course) -> Judgement:
    """Reads everything that is left and applies every check."""
    snapshot = read_coordinator(made.database)
    course.history.watch(lambda: snapshot, made.state_dir(COORDINATOR) / "blobs")
    end_s = made.timeline[-1][0]
    troubles = [(t.began_s, (t.ended_s or end_s) + RECOVERY_S) for t in made.troubles]
    # Python and torch are loaded anew at each start; on a busy computer that takes long.
    troubles += made.outages(COORDINATOR, end_s)
    logs = {name: program.log_text() for name, program in made.programs.items()}
    disk_troubles: dict[str, list[tuple[float, float]]] = {}
    for t in made.troubles:
        if t.kind.startswith("disk_"):
            disk_troubles.setdefault(t.target, []).append((t.began_s, t.ended_s or end_s))
    grown = [found for name in made.programs if (found := growth(name, course.samples)) is not None]
    found = Judgement({}, snapshot, grown)
    own_exits = [end for end in made.exits if end.program != BROKER]
    found.refused_starts = sum(
        log_checks.is_a_refused_start(end, disk_troubles.get(end.program, ()))
        for end in own_exits
        if not end.wanted
    )
    ledgers = {device: read_ledger(made.ledger(device)) for device in made.devices}
    evidence = made.evidence
    reordered = [
        (t.began_s, (t.ended_s or end_s) + 5)
        for t in made.troubles
        if t.kind == "publish_delayed" and t.target == COORDINATOR
    ]
    limits = {name: MOST_RSS_BYTES.get(name, AGENT_RSS_BYTES) for name in made.programs}
    checked = [
        *course.checked,
        course.history.checked,
        checks.ledgers_agree(ledgers, evidence.made, snapshot),
        checks.receipts_hold(evidence.receipts, snapshot),
        checks.contributions_end(snapshot),
        checks.versions_rise(snapshot),
        checks.announcements_rise("coordinator_rises", evidence.said_versions, snapshot),
        checks.announcements_rise("observer_rises", evidence.announced, snapshot, reordered),
        log_checks.exits_are_explained(own_exits, disk_troubles),
        log_checks.stops_are_orderly(made.stops),
        log_checks.logs_have_no_traceback(logs),
        log_checks.sizes_are_bounded(
            grown, most_rss_bytes=limits, descriptors_growth=DESCRIPTORS_GROWTH
        ),
        log_checks.nothing_piles_up(_left_over(made), FILE_LIMITS),
        checks.questions_are_answered(
            evidence.asked,
            evidence.answered_s,
            {device: _in_the_way(made, device, end_s) for device in made.devices},
        ),
    ]
    if made.pace.mode == "sync":
        # A buffer without a quorum waits for it, whatever its deadline.
        rounds_end = checks.rounds_end(
            course.history.rounds,
            deadline_s=made.pace.deadline_s,
            slack_s=ROUND_SLACK_S,
            troubles=troubles,
            end_s=end_s,
        )
        checked.append(rounds_end)
    checked += [
        log_checks.work_is_done_once(device, made.programs[device].events())
        for device in made.devices
    ]
    for proxy in made.proxies.values():
        course.failed += [f"proxy of {proxy.name}: {error!r}" for error in proxy.failures]
    found.remade = versions_are_their_updates(snapshot, evidence, course.history)
    checked.append(
        Checked("versions_are_their_updates", found.remade.asked, tuple(found.remade.violations))
    )
    exported = _export_versions(made)
    checked.append(exported)
    found.exported = exported.cases - len(exported.violations)
    found.checked = together(checked)
    for record in snapshot.rounds:
        if record.outcome == "abandoned":
            found.reasons["".join("N" if c.isdigit() else c for c in record.reason)[:120]] += 1
    for name, text in logs.items():
        for line in text.splitlines():
            if '"level": "error"' in line:
                event = str(json.loads(line)["event"]).split(" ", 1)[0]
                found.errors[f"{'agents' if name in made.devices else name}: {event}"] += 1
    return found


def versions_are_their_updates(
    snapshot: Snapshot, evidence: Evidence, history: History
) -> RemadeVersions:
    """Every version again, from the copies of the updates and from what the offers said."""
    done = RemadeVersions()
    for version in snapshot.versions:
        if version.round is None:
            continue
        done.asked += 1
        accepted = [each for each in snapshot.accepted if each.counted_in == version.round]
        problem = _remake(version, accepted, evidence, history, done)
        if problem is not None:
            text = f"version {version.number} of round {version.round}: {problem}"
            at_s = history.version_seen_s.get(version.number)
            done.violations.append(Violation("versions_are_their_updates", text, at_s))
    return done


def _remake(
    version: StoredVersion,
    accepted: Sequence[StoredContribution],
    evidence: Evidence,
    history: History,
    done: RemadeVersions,
) -> str | None:
    lost = [each for each in accepted if each.sha256 not in evidence.updates]
    if lost or not accepted:
        return f"updates that nobody sent: {lost}" if lost else "no accepted update"
    base, stored = (history.weights.get(n) for n in (version.base or 0, version.number))
    if base is None or stored is None:
        return "weights that were never seen in the store"
    parts = []
    for each in accepted:
        offer = evidence.offers.get((each.device, each.round, each.sha256))
        if offer is None:
            return f"an update that nobody offered: {each}"
        staleness = (version.base or 0) - offer.base
        if staleness < 0:
            return f"{each} was made from version {offer.base}, newer than {version.base}"
        parts.append(Part(evidence.updates[each.sha256], offer.examples, staleness))
    result = remake(base, parts, stored)
    done.count += 1
    done.largest_difference = max(done.largest_difference, result.difference)
    if not result.decided:
        done.undecided.append(version.number)
    if result.difference <= TOLERANCE:
        return None
    return (
        f"its {len(parts)} accepted updates make other weights, off by {result.difference:.3g} "
        f"(one update more or less: {result.sensitivity:.3g})"
    )


def _in_the_way(made: World, device: str, end_s: float) -> list[tuple[float, float]]:
    """When something was wrong between a device and the coordinator, or with one of them."""
    places = (device, COORDINATOR, BROKER, FLEET)
    return [
        *(
            (t.began_s, (t.ended_s or end_s) + RECOVERY_S)
            for t in made.troubles
            if t.target in places
        ),
        *made.outages(COORDINATOR, end_s),
        *made.outages(device, end_s),
    ]


def _left_over(made: World) -> dict[str, dict[str, list[str]]]:
    """The files of the folders that must stay small."""
    folders = dict.fromkeys(made.devices, ("blobs", "models", "outbox"))
    return {
        name: {
            each: [
                str(path.relative_to(made.state_dir(name)))
                for path in (made.state_dir(name) / each).rglob("*")
                if path.is_file()
            ]
            for each in each_folder
        }
        for name, each_folder in {**folders, COORDINATOR: ("uploads",)}.items()
    }


def _export_versions(made: World) -> Checked:
    """Each version can be had again from the store: its weights, and its model byte for byte."""
    found, cases = [], 0
    with Store.open(made.state_dir(COORDINATOR)) as store:
        for version in store.versions():
            cases += 1
            try:
                export_model(store, version)
            except FedgeError as error:
                text = f"version {version.number}: {error}"
                found.append(Violation("versions_can_be_exported", text))
    return Checked("versions_can_be_exported", cases, tuple(found))
