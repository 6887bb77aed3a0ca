"""The report as a text. It is made of the object alone, so that the two never disagree."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.chaos.arithmetic import TOLERANCE
from tests.chaos.catalogue import BY_NAME
from tests.chaos.promises import PROMISES

WIDTH = 98
LEAST_FOR_SLOPE_S = 600.0
"""In a shorter run memory has not settled, and its slope would be a number without a meaning."""
MAX_SHOWN, MAX_MOMENTS = 10, 25


def as_text(report: Mapping[str, Any]) -> str:
    """The faults, the fleet, the promises, what was broken, and one line that says it all."""
    parts = (_faults(report), _fleet(report), _sizes(report), _promises(report), _broken(report))
    return "\n".join(line for part in (*parts, [_verdict(report)]) for line in part)


def _faults(report: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"seed {report['seed']}, {report['seconds']:g} s of faults, {report['devices']} devices, "
        f"{'synchronous' if report['mode'] == 'sync' else 'asynchronous'} rounds"
    )
    yield ""
    columns = [each for each in ("missed", "skipped") if report[each]]
    yield f"{'fault':<28}{'injected':>10}" + "".join(f"{each:>10}" for each in columns)
    for name in BY_NAME:
        counts = [report[column].get(name, 0) for column in ("faults_by_kind", *columns)]
        if any(counts):
            yield (f"{name:<28}" + "".join(f"{count or '':>10}" for count in counts)).rstrip()
    totals = [report["faults"], *(sum(report[column].values()) for column in columns)]
    yield f"{'all':<28}" + "".join(f"{count:>10}" for count in totals)
    yield ""
    if report["missed"]:
        yield from _wrapped(
            "missed: when its time came there was nothing to strike: "
            + _counts(report["miss_reasons"])
        )
    if report["skipped"]:
        yield from _wrapped("skipped: " + "; ".join(report["skip_reasons"]))
    kinds = report["kinds"]
    yield f"{kinds['injected']} of {kinds['all']} kinds of faults came up"
    for key, why in (
        ("left_out", "left out by --only"),
        ("not_drawn", "not drawn with this seed in this time"),
        ("missed", "drawn, but only missed"),
        ("skipped", "not possible on this computer"),
    ):
        if kinds[key]:
            yield from _wrapped(f"{why}: {', '.join(kinds[key])}", indent="  ")
    yield ""


def _fleet(report: Mapping[str, Any]) -> Iterator[str]:
    versions, rounds = report["versions"], report["rounds"]
    yield from _row(
        "versions",
        f"{versions} made, and version 0, which the fleet starts from; "
        f"{report['versions_under_fault']} of them under faults, at most "
        f"{report['longest_time_between_versions_s']:g} s between two",
    )
    yield from _row(
        "rounds",
        f"{rounds.get('aggregated', 0)} made a version, {rounds.get('abandoned', 0)} were "
        f"abandoned, {rounds.get('open', 0)} open at the end",
    )
    for reason, count in report["abandoned"].items():
        yield from _row("", f"abandoned {count} times: {reason}")
    by_round = report["updates_accepted_by_round"]
    ends = {
        "aggregated": "in a version",
        "abandoned": "in an abandoned round",
        "open": "in the open round",
        "lost": "IN NO ROUND",
    }
    where = ", ".join(f"{by_round[end]} {text}" for end, text in ends.items() if end in by_round)
    yield from _row("updates accepted", f"{report['updates_accepted']}: {where or 'none'}")
    said = report["receipts_by_status"]
    others = _counts({status: count for status, count in said.items() if status != "accepted"})
    yield from _row(
        "receipts sent",
        f"{report['receipts_said']}: accepted {said.get('accepted', 0)}, about "
        f"{report['updates_told_accepted']} different updates (said again when an offer came "
        f"again); {others}",
    )
    yield from _row("asked to train", _participants(report["participants"]))
    yield from _row("messages refused", _counts(report["refusals"]))
    starts = report["coordinator_starts_s"]
    if starts["count"]:
        yield from _row(
            "coordinator",
            f"came back {starts['count']} times, and was at its broker after {starts['median']:g} "
            f"s (median), at most {starts['max']:g} s",
        )
    if report["starts_refused_by_a_bad_disk"]:
        yield from _row(
            "bad disks",
            f"{report['starts_refused_by_a_bad_disk']} starts were refused with a sentence about "
            "the disk, and repeated until it was well",
        )
    yield from _row("errors in logs", _counts(report["errors_logged"]))
    quiet_s = report["quiet_s"]
    yield from _row(
        "after the faults",
        "it did not calm down"
        if quiet_s is None
        else f"{quiet_s:g} s until all was answered and every device used a new version",
    )
    yield ""


def _participants(counts: Mapping[str, int]) -> str:
    """Participants by status; the most common of all is the one to explain."""
    told = {
        "accepted": "gave an update that counts",
        "silent": "gave none before their round closed (struck, slow, or no longer needed)",
        "rejected": "gave one that was refused",
        "failed": "said that they could not",
        "asked": "still asked",
        "offered": "still offering",
    }
    return f"{sum(counts.values())} times a device (or the stranger): " + ", ".join(
        f"{counts[status]} {text}" for status, text in told.items() if status in counts
    )


def _sizes(report: Mapping[str, Any]) -> Iterator[str]:
    with_slope = report["seconds"] >= LEAST_FOR_SLOPE_S
    slope = f"{'KB/min':>10}{'over s':>10}" if with_slope else ""
    yield f"{'program':<14}{'most MB':>10}{'growth MB':>12}{slope}{'open files':>12}"
    for program, size in report["sizes"].items():
        line = f"{program:<14}{size['max_rss_mb']:>10}{size['growth_mb']:>12}"
        if with_slope:
            rate = size["slope_kb_per_min"]
            line += f"{'-' if rate is None else rate:>10}{size['slope_span_s']:>10}"
        yield f"{line}{size['max_descriptors']:>12}"
    yield ""


def _promises(report: Mapping[str, Any]) -> Iterator[str]:
    yield "What was checked, and in how many cases (docs/guarantees.md)"
    checks = {each["check"]: each for each in report["checks"]}
    heading = None
    for promise in PROMISES:
        each = checks[promise.check]
        if each["guarantee"] != heading:
            heading = each["guarantee"]
            yield f"  {heading}"
        mark, cases = "held", f"{each['cases']} {each['of']}"
        if each["violations"]:
            mark = f"BROKEN {each['violations']}"
        elif each["cases"] is None:
            mark, cases = "-", "not in this mode"
        elif each["cases"] == 0:
            mark = "no case"
        head = f"    {mark:<9} {cases:<23} "
        yield from _wrapped(each["promise"], first=head, indent=" " * len(head))
    remade, undecided = report["versions_remade"], report["versions_undecided"]
    yield from _wrapped(
        f"{remade} versions were computed again; the largest difference of any weight is "
        f"{report['largest_difference']:.2g} ({TOLERANCE:g} is allowed). "
        + (
            "In each, an update left out or counted twice would have shown."
            if not undecided
            else "An update left out or counted twice would not have shown in version "
            f"{', '.join(map(str, undecided))}."
        ),
        indent="  ",
    )
    yield from _wrapped(
        f"The coordinator's store was read {report['store_readings']} times while all this went "
        f"on; {report['store_unreadable']} times more it was not there yet, locked, or full.",
        indent="  ",
    )
    yield ""


def _broken(report: Mapping[str, Any]) -> Iterator[str]:
    violations: Sequence[Mapping[str, Any]] = report["violations"]
    for each in violations[:MAX_SHOWN]:
        yield f"VIOLATION {each['check']}: {each['text']}"
        yield from each["around"][-MAX_MOMENTS:]
        yield ""
    if len(violations) > MAX_SHOWN:
        yield f"and {len(violations) - MAX_SHOWN} violations more"
    for failure in report["kit_failures"]:
        yield f"THE KIT FAILED: {failure}"


def _verdict(report: Mapping[str, Any]) -> str:
    checks = [each for each in report["checks"] if each["cases"]]
    cases = sum(each["cases"] for each in checks)
    held = "held"
    if report["kit_failures"]:
        held = "may have held, but the kit failed"
    if report["violations"]:
        held = "WAS BROKEN"
    return (
        f"The promise {held}: {len(report['violations'])} violations in {len(checks)} checks of "
        f"{cases} cases.\n{report['faults']} faults, {report['versions']} versions, "
        f"{report['updates_accepted']} updates accepted."
    )


def _row(name: str, text: str) -> Iterator[str]:
    head = f"{name:<18}"
    return _wrapped(text, first=head, indent=" " * len(head))


def _wrapped(text: str, *, first: str | None = None, indent: str = "") -> Iterator[str]:
    yield from textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent if first is None else first,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )


def _counts(counts: Mapping[str, int]) -> str:
    told = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {count}" for name, count in told) or "none"
