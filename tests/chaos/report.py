"""What a run prints: a table for people, an object for programs."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from typing import Any

from tests.chaos.catalogue import BY_NAME
from tests.chaos.judgement import Judgement
from tests.chaos.run import Course, Options
from tests.chaos.schedule import COORDINATOR
from tests.chaos.verdict import Violation
from tests.chaos.world import World

AROUND_S = 8.0
MAX_SHOWN, MAX_MOMENTS = 10, 25


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
        "missed": dict(sorted(course.missed.items())),
        "skipped": dict(sorted(course.skipped.items())),
        "skip_reasons": sorted(course.skip_reasons),
        "versions": snapshot.newest,
        "versions_under_fault": versions_under_fault,
        "longest_time_between_versions_s": round(max(gaps, default=0.0), 1),
        "rounds": dict(outcomes),
        "abandoned": dict(found.reasons.most_common()),
        "updates_accepted": len(snapshot.accepted),
        "participants": snapshot.statuses,
        "refusals": snapshot.refusals,
        "receipts_said": len(made.evidence.receipts),
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
                "max_descriptors": each.max_descriptors,
            }
            for each in found.grown
        },
        "kit_failures": course.failed,
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


def as_text(report: dict[str, Any]) -> str:
    """The table."""
    lines = [
        f"seed {report['seed']}, {report['seconds']:g} s, {report['devices']} devices, "
        f"mode {report['mode']}",
        "",
    ]
    lines.append(f"{'fault':<28}{'injected':>10}{'missed':>10}{'skipped':>10}")
    for name in BY_NAME:
        counts = [report[column].get(name, 0) for column in ("faults_by_kind", "missed", "skipped")]
        if any(counts):
            lines.append(f"{name:<28}" + "".join(f"{count or '':>10}" for count in counts))
    totals = [report["faults"], *(sum(report[c].values()) for c in ("missed", "skipped"))]
    lines.append(f"{'all':<28}" + "".join(f"{count:>10}" for count in totals))
    lines += [f"skipped: {reason}" for reason in report["skip_reasons"]]
    lines += [
        "",
        f"versions made            {report['versions']}, {report['versions_under_fault']} of them "
        f"under faults; at most {report['longest_time_between_versions_s']:g} s between two",
        f"made again from updates  {report['versions_remade']}, largest difference "
        f"{report['largest_difference']:.2g}; undecided: {len(report['versions_undecided'])}",
        f"exported again           {report['versions_exported']}",
        f"rounds                   {_counts(report['rounds'])}",
        f"updates accepted         {report['updates_accepted']}; receipts: "
        f"{report['receipts_said']}",
        f"participants             {_counts(report['participants'])}",
        f"refusals                 {_counts(report['refusals'])}",
        f"starts refused           {report['starts_refused_by_a_bad_disk']}, on a bad disk",
        f"coordinator's starts     {_counts(report['coordinator_starts_s'])} s to its broker",
        f"quiet afterwards         {report['quiet_s']} s",
        f"errors logged            {_counts(report['errors_logged'])}",
        "",
        "rounds abandoned because",
        *(f"  {count:>4}  {reason}" for reason, count in report["abandoned"].items()),
        "",
        f"{'program':<14}{'max RSS MB':>12}{'growth MB':>12}{'KB/min':>10}{'open files':>12}",
    ]
    for program, size in report["sizes"].items():
        slope = size["slope_kb_per_min"]
        lines.append(
            f"{program:<14}{size['max_rss_mb']:>12}{size['growth_mb']:>12}"
            f"{'-' if slope is None else slope:>10}{size['max_descriptors']:>12}"
        )
    lines.append("")
    for each in report["violations"][:MAX_SHOWN]:
        lines += [f"VIOLATION {each['check']}: {each['text']}", *each["around"][-MAX_MOMENTS:], ""]
    if len(report["violations"]) > MAX_SHOWN:
        lines.append(f"and {len(report['violations']) - MAX_SHOWN} violations more")
    lines += [f"THE KIT FAILED: {failure}" for failure in report["kit_failures"]]
    lines.append(
        f"{report['faults']} faults, {report['versions']} versions, "
        f"{report['updates_accepted']} updates accepted, {len(report['violations'])} violations"
    )
    return "\n".join(lines)


def _counts(counts: dict[str, int]) -> str:
    told = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {count}" for name, count in told) or "none"
