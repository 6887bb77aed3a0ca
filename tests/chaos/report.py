"""What a run says: an object for programs, and of it a text for people.

The text is for somebody who has to trust it: what was done to the fleet, what the fleet did
meanwhile, and each promise with the number of cases that were looked at.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tests.chaos.catalogue import BY_NAME
from tests.chaos.judgement import Judgement
from tests.chaos.promises import BY_CHECK, PROMISES
from tests.chaos.run import Course, Options
from tests.chaos.schedule import COORDINATOR
from tests.chaos.stores import Snapshot
from tests.chaos.verdict import Violation
from tests.chaos.world import World

AROUND_S = 8.0


def as_object(options: Options, made: World, course: Course, found: Judgement) -> dict[str, Any]:
    """Everything, as JSON can hold it."""
    snapshot, history = found.snapshot, course.history
    outcomes = Counter(each.outcome or "open" for each in snapshot.rounds)
    seen_s = sorted(history.version_seen_s.values())
    gaps = [later - earlier for earlier, later in itertools.pairwise(seen_s)]
    recoveries = made.recoveries_s(COORDINATOR)
    versions_under_fault = sum(
        course.began_s <= at_s <= course.healed_s for at_s in history.version_seen_s.values()
    )
    return {
        "seed": options.seed,
        "seconds": options.seconds,
        "mode": options.pace.mode,
        "devices": options.device_count,
        "faults": course.injected.total(),
        "faults_by_kind": dict(sorted(course.injected.items())),
        "faults_planned": course.planned.total(),
        "kinds": _kinds(options, course),
        "missed": dict(sorted(course.missed.items())),
        "miss_reasons": dict(course.miss_reasons.most_common()),
        "skipped": dict(sorted(course.skipped.items())),
        "skip_reasons": sorted(course.skip_reasons),
        "versions": snapshot.newest,
        "versions_under_fault": versions_under_fault,
        "longest_time_between_versions_s": round(max(gaps, default=0.0), 1),
        "rounds": dict(outcomes),
        "abandoned": dict(found.reasons.most_common()),
        "updates_accepted": len(snapshot.accepted),
        "updates_accepted_by_round": _by_round(snapshot),
        "participants": snapshot.statuses,
        "refusals": snapshot.refusals,
        "receipts_said": len(made.evidence.receipts),
        "receipts_by_status": dict(Counter(said.status for said in made.evidence.receipts)),
        "updates_told_accepted": len(
            {
                (said.device, said.round, said.sha256)
                for said in made.evidence.receipts
                if said.status == "accepted"
            }
        ),
        "versions_remade": found.remade.count,
        "largest_difference": found.remade.largest_difference,
        "versions_undecided": found.remade.undecided,
        "versions_exported": found.exported,
        "starts_refused_by_a_bad_disk": found.refused_starts,
        "coordinator_starts_s": {
            "count": len(recoveries),
            "median": round(statistics.median(recoveries or [0.0]), 1),
            "max": round(max(recoveries, default=0.0), 1),
        },
        "store_readings": history.readings,
        "store_unreadable": history.unreadable,
        "quiet_s": None if course.quiet_s is None else round(course.quiet_s, 1),
        "errors_logged": dict(found.errors.most_common()),
        "sizes": {
            each.program: {
                "max_rss_mb": round(each.max_rss_bytes / 1e6, 1),
                "growth_mb": round(each.growth_bytes / 1e6, 1),
                "slope_kb_per_min": None
                if each.slope_bytes_per_s is None
                else round(each.slope_bytes_per_s * 60 / 1e3, 1),
                "slope_span_s": round(each.slope_span_s, 1),
                "max_descriptors": each.max_descriptors,
            }
            for each in found.grown
        },
        "kit_failures": course.failed,
        "checks": _checks(found),
        "violations": [
            {
                "check": each.check,
                "text": each.text,
                "at_s": None if each.at_s is None else round(each.at_s - course.began_s, 2),
                "around": moments(made, course, each),
            }
            for each in found.violations
        ],
    }


def moments(made: World, course: Course, violation: Violation) -> list[str]:
    """What happened before a violation, and just after it."""
    if violation.at_s is None:
        return []
    return [
        f"{at_s - course.began_s:8.2f} s  {text}"
        for at_s, text in made.timeline
        if -AROUND_S <= at_s - violation.at_s <= 1
    ]


def _kinds(options: Options, course: Course) -> dict[str, Any]:
    """Which kinds of faults struck, and why the others did not."""
    among = {kind.name for kind in options.kinds}

    def names(wanted: Iterable[str]) -> list[str]:
        without = set(wanted) - set(course.injected)
        return [name for name in BY_NAME if name in without]

    return {
        "all": len(BY_NAME),
        "injected": len(course.injected),
        "left_out": names(set(BY_NAME) - among),
        "not_drawn": names(among - set(course.planned)),
        "missed": names(set(course.missed) - set(course.skipped)),
        "skipped": names(course.skipped),
    }


def _by_round(snapshot: Snapshot) -> dict[str, int]:
    """Accepted updates by what became of the round in which they count."""
    outcomes = {each.number: each.outcome or "open" for each in snapshot.rounds}
    return dict(Counter(outcomes.get(each.counted_in, "lost") for each in snapshot.accepted))


def _checks(found: Judgement) -> list[dict[str, Any]]:
    """Each promise; `cases`: None where this mode does not have it.

    Raises `KeyError` for a check without a promise.
    """
    unknown = set(found.checked) - set(BY_CHECK)
    if unknown:
        raise KeyError(f"checks without a sentence in `promises`: {sorted(unknown)}")
    told = []
    for promise in PROMISES:
        checked = found.checked.get(promise.check)
        told.append(
            {
                "check": promise.check,
                "guarantee": promise.heading,
                "promise": promise.sentence,
                "cases": None if checked is None else checked.cases,
                "of": promise.cases,
                "violations": 0 if checked is None else len(checked.violations),
            }
        )
    return told
