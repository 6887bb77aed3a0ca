"""The promise, as functions that find where it was broken.

Each takes what was found (stores, ledgers, evidence, logs) and returns how many cases it looked at
and the violations among them. They judge data and touch nothing, so that a test can plant a
violation and see it found. `promises` says in a sentence what each is about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from tests.chaos.evidence import Announced, Asked, SaidReceipt
from tests.chaos.history import Open
from tests.chaos.stores import LedgerLine, Snapshot, StoredContribution
from tests.chaos.verdict import Checked, Violation

ASKED_AGAIN_S = 5.0
"""A device is patient for 10 s; what is asked again sooner was asked again for another reason."""

# ---------------------------------------------------------------- promise 1: once, and never lost


def ledgers_agree(
    ledgers: Mapping[str, Sequence[LedgerLine]],
    made: Mapping[tuple[str, int], Sequence[str]],
    snapshot: Snapshot,
) -> Checked:
    """What a device was told was accepted is, with its bytes; what counts was not refused to it.

    `made`: the digests of the updates that each device made in each round.
    """
    stored = _by_place(snapshot)
    found, cases = [], 0
    for device, lines in ledgers.items():
        for line in lines:
            cases += 1
            kept = stored.get((line.round, device))
            place = f"round {line.round}, {device}"
            if line.status == "accepted" and kept is None:
                found.append(f"{place}: accepted in the ledger, and not in the store")
            elif line.status == "accepted" and kept is not None:
                if kept.sha256 not in made.get((device, line.round), ()):
                    found.append(f"{place}: the store has {kept.sha256}, which it never made")
            elif line.status == "rejected" and kept is not None:
                found.append(f"{place}: accepted in the store, rejected ({line.reason}) to it")
    return Checked("ledgers_agree", cases, _all("ledgers_agree", found))


def receipts_hold(receipts: Iterable[SaidReceipt], snapshot: Snapshot) -> Checked:
    """Every receipt that said accepted stands for a row, and none says both."""
    stored = _by_place(snapshot)
    found, cases = [], 0
    statuses: dict[tuple[str, int, str], set[str]] = {}
    for said in receipts:
        cases += 1
        place = f"round {said.round}, {said.device}"
        both = statuses.setdefault((said.device, said.round, said.sha256), set())
        if said.status not in both and both:
            found.append((f"{place}: {said.sha256[:12]} was {sorted(both)} before", said.at_s))
        both.add(said.status)
        if said.status == "accepted":
            kept = stored.get((said.round, said.device))
            if kept is None:
                found.append((f"{place}: a receipt said accepted, the store does not", said.at_s))
            elif kept.sha256 != said.sha256:
                found.append((f"{place}: receipt {said.sha256}, store {kept.sha256}", said.at_s))
    violations = [Violation("receipts_hold", text, at_s) for text, at_s in dict.fromkeys(found)]
    return Checked("receipts_hold", cases, tuple(violations))


def contributions_end(snapshot: Snapshot) -> Checked:
    """Every accepted update is in one version, or its round is open or abandoned for a reason."""
    rounds = {each.number: each for each in snapshot.rounds}
    made_in = Counter(version.round for version in snapshot.versions if version.round is not None)
    versions = {version.number: version for version in snapshot.versions}
    found = [
        f"round {number} made {count} versions" for number, count in made_in.items() if count > 1
    ]
    for number, record in rounds.items():
        if record.outcome == "aggregated":
            version = versions.get(-1 if record.version is None else record.version)
            if version is None or version.round != number or version.base != record.base:
                found.append(f"round {number} says version {record.version}: {version}")
        elif record.outcome == "abandoned":
            if not record.reason:
                found.append(f"round {number} was abandoned without a reason")
            if made_in[number] or record.version is not None:
                found.append(f"round {number} was abandoned and made a version")
        elif number != max(rounds):
            found.append(f"round {number} is open, round {max(rounds)} is the newest")
    found += [
        f"an update of {each.device} counts in round {each.counted_in}, which is not there"
        for each in snapshot.accepted
        if each.counted_in not in rounds
    ]
    found += [
        f"an update of {each.device} for round {each.round} counts in round {each.counted_in}"
        for each in snapshot.accepted
        if each.counted_in < each.round
    ]
    counted = Counter((each.round, each.device) for each in snapshot.accepted)
    found += [f"{place} is there {count} times" for place, count in counted.items() if count > 1]
    cases = len(rounds) + len(snapshot.accepted)
    return Checked("contributions_end", cases, _all("contributions_end", found))


# ---------------------------------------------------------------- promise 2: versions


def versions_rise(snapshot: Snapshot) -> Checked:
    """0, 1, 2, …: each from the one before, none missing."""
    numbers = [version.number for version in snapshot.versions]
    found = []
    if numbers != list(range(len(numbers))):
        found.append(f"version numbers are {numbers}")
    found += [
        f"version {version.number} was made from {version.base}"
        for version in snapshot.versions
        if version.base != (version.number - 1 if version.number else None)
    ]
    return Checked("versions_rise", len(numbers), _all("versions_rise", found))


def announcements_rise(
    check: str,
    announced: Sequence[Announced],
    snapshot: Snapshot,
    excused: Sequence[tuple[float, float]] = (),
) -> Checked:
    """No announcement is of an older version than one before it, nor of one that is not stored.

    What comes out of a broker's memory is not counted: it may have come back with an old one.
    `excused`: times in which the network changed the order of messages.
    """
    found, highest = [], -1
    for each in announced:
        if each.version > snapshot.newest:
            found.append(Violation(check, f"version {each.version} is not stored", each.at_s))
        if each.retained:
            continue
        late = any(began <= each.at_s <= ended for began, ended in excused)
        if each.version < highest and not late:
            text = f"version {each.version} was announced after version {highest}"
            found.append(Violation(check, text, each.at_s))
        highest = max(highest, each.version)
    return Checked(check, len(announced), tuple(found))


# ---------------------------------------------------------------- promise 5: deadlines


def rounds_end(
    rounds: Mapping[int, Open],
    *,
    deadline_s: float,
    slack_s: float,
    troubles: Sequence[tuple[float, float]],
    end_s: float,
) -> Checked:
    """No round trains longer than its deadline and the time of the faults meanwhile.

    `slack_s`: for starts, and for the time between two looks. `end_s`: when the run ended.
    """
    found, cases = [], 0
    for number, seen in rounds.items():
        if seen.training_s is None:
            continue
        cases += 1
        closed_s = end_s if seen.closed_s is None else seen.closed_s
        took_s = closed_s - seen.training_s
        excused_s = overlap_s(troubles, seen.training_s, closed_s)
        if took_s > deadline_s + excused_s + slack_s:
            text = (
                f"round {number} trained for {took_s:.1f} s; its deadline is {deadline_s:g} s, and "
                f"there were {excused_s:.1f} s of faults"
            )
            found.append(Violation("rounds_end", text, closed_s))
    return Checked("rounds_end", cases, tuple(found))


def questions_are_answered(
    asked: Sequence[Asked],
    answered_s: Mapping[str, Sequence[float]],
    troubles: Mapping[str, Sequence[tuple[float, float]]],
) -> Checked:
    """Nobody asks for the same thing twice, seconds apart, where nothing was in the way meanwhile.

    A chunk that was asked for is published, an offer gets a grant or a receipt; who has to ask
    again did not hear it, and will not hear it the next time. `answered_s`: when a device was sent
    a grant or a receipt. `troubles`: of a device, its coordinator and its broker.
    """
    found, before = [], dict[tuple[str, str], Asked]()
    for each in asked:
        earlier = before.get((each.device, each.what))
        before[each.device, each.what] = each
        if earlier is None or each.at_s - earlier.at_s < ASKED_AGAIN_S:
            continue
        span = earlier.at_s, each.at_s
        if overlap_s(troubles.get(each.device, ()), *span) > 0:
            continue
        told = any(span[0] <= at_s <= span[1] for at_s in answered_s.get(each.device, ()))
        if each.what.startswith("offer") and told:
            continue
        text = f"{each.device} asked again after {span[1] - span[0]:.1f} s: {each.what}"
        found.append(Violation("questions_are_answered", text, each.at_s))
    return Checked("questions_are_answered", len(before), tuple(found))


def overlap_s(intervals: Iterable[tuple[float, float]], start_s: float, end_s: float) -> float:
    """How much of the time from `start_s` to `end_s` lies in at least one interval."""
    total, reached = 0.0, start_s
    for interval in sorted(intervals):
        began, ended = max(interval[0], reached), min(interval[1], end_s)
        if ended > began:
            total += ended - began
            reached = ended
    return total


def _all(check: str, texts: Iterable[str]) -> tuple[Violation, ...]:
    return tuple(Violation(check, text) for text in texts)


def _by_place(snapshot: Snapshot) -> dict[tuple[int, str], StoredContribution]:
    return {(each.round, each.device): each for each in snapshot.accepted}
