"""What the programs' own logs, exits and sizes say about the promise."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping, Sequence

from tests.chaos.gauges import Growth
from tests.chaos.programs import Exit, Stop
from tests.chaos.verdict import Checked, Violation

EXIT_STATUSES = (1, 2)
"""What `fedge.schemas.process` documents: it failed, or it was asked wrongly."""
TRACEBACK = "Traceback (most recent call last)"


def work_is_done_once(device: str, events: Iterable[Mapping[str, object]]) -> Checked:
    """No round is trained twice by a device, and no receipt settles the same update twice.

    `events`: of the device's log, in order. A round may be trained again after its update was
    rejected. A device that was killed between noting a receipt in its log and in its store, or
    whose disk was full then, notes it again.
    """
    found, cases = [], 0
    trained: dict[object, int] = {}
    receipts: dict[object, int] = {}
    life, disk_is_full, latest = 0, False, None
    for event in events:
        number = event.get("round")
        if event["event"] == "agent_started":
            life, disk_is_full = life + 1, False
        elif event["event"] == "storage_unavailable":
            disk_is_full = True
            if event.get("what") == "receipt":
                receipts.pop(latest, None)
        elif event["event"] == "storage_available":
            disk_is_full = False
        elif event["event"] == "trained":
            cases += 1
            if number in trained:
                found.append(
                    f"{device} trained for round {number} in its life {trained[number]} and again "
                    f"in life {life}"
                )
            trained[number] = life
            receipts.pop(number, None)
        elif event["event"] == "receipt":
            cases += 1
            if event.get("status") == "rejected":
                trained.pop(number, None)
            if receipts.get(number) == life and number in receipts:
                found.append(f"{device} settled round {number} twice in life {life}")
            latest = number
            if not disk_is_full:
                receipts[number] = life
    return Checked("work_is_done_once", cases, _all("work_is_done_once", found))


def exits_are_explained(
    exits: Iterable[Exit], disk_troubles: Mapping[str, Sequence[tuple[float, float]]]
) -> Checked:
    """No program of Fedge ends by itself, but for a start on a bad disk, with its status and word.

    `disk_troubles`: by program, when its disk was bad.
    """
    found, cases = [], 0
    for end in exits:
        cases += 1
        if end.wanted or is_a_refused_start(end, disk_troubles.get(end.program, ())):
            continue
        text = f"{end.program} ended by itself with status {end.status}:\n{end.last_words}"
        found.append(Violation("exits_are_explained", text, end.at_s))
    return Checked("exits_are_explained", cases, tuple(found))


def is_a_refused_start(end: Exit, disk_troubles: Sequence[tuple[float, float]]) -> bool:
    """Whether a program said at its start that its disk cannot be used, and it could not."""
    bad = any(began <= end.at_s <= ended + 3 for began, ended in disk_troubles)
    lines = [line for line in end.last_words.splitlines() if line.strip()]
    said_why = bool(lines) and lines[-1].startswith("error: ")
    return bad and not end.served and end.status in EXIT_STATUSES and said_why


def stops_are_orderly(stops: Iterable[Stop]) -> Checked:
    """SIGTERM ends every program soon: with status 0, or at once where it had just been started."""
    stops = tuple(stops)
    found = (
        Violation("stops_are_orderly", f"{s.program}: {_status(s.status)} after SIGTERM", s.at_s)
        for s in stops
        if s.status != 0 and (s.served or s.status != -signal.SIGTERM)
    )
    return Checked("stops_are_orderly", len(stops), tuple(found))


def nothing_piles_up(
    files: Mapping[str, Mapping[str, Sequence[str]]], limits: Mapping[str, int]
) -> Checked:
    """What a program no longer needs is deleted.

    `files`: of each program's state folder, by folder in it. `limits`: by such a folder, how many
    files it may hold when all is quiet.
    """
    found = [
        f"{len(names)} files in {folder} of {name}: {names[:20]}"
        for name, folders in files.items()
        for folder, names in folders.items()
        if len(names) > limits[folder]
    ]
    cases = sum(len(folders) for folders in files.values())
    return Checked("nothing_piles_up", cases, _all("nothing_piles_up", found))


def _status(status: int | None) -> str:
    return "no end within the limit" if status is None else f"status {status}"


def logs_have_no_traceback(logs: Mapping[str, str]) -> Checked:
    """An expected failure is a sentence; a traceback is a defect."""
    found = []
    for name, text in logs.items():
        start = text.find(TRACEBACK)
        if start >= 0:
            count = text.count(TRACEBACK)
            excerpt = text[max(0, start - 300) : start + 3000].replace("\\n", "\n")
            found.append(f"{count} in the log of {name}:\n{excerpt}")
    cases = sum(len(text.splitlines()) for text in logs.values())
    return Checked("logs_have_no_traceback", cases, _all("logs_have_no_traceback", found))


def sizes_are_bounded(
    grown: Iterable[Growth], *, most_rss_bytes: Mapping[str, int], descriptors_growth: int
) -> Checked:
    """No process takes more memory than its program may, nor opens more and more files."""
    found, cases = [], 0
    for each in grown:
        cases += 1
        if each.max_rss_bytes > most_rss_bytes[each.program]:
            found.append(f"{each.program} took {each.max_rss_bytes / 1e6:.0f} MB")
        if each.descriptors_growth > descriptors_growth:
            found.append(f"{each.program} opened {each.descriptors_growth} files more")
    return Checked("sizes_are_bounded", cases, _all("sizes_are_bounded", found))


def _all(check: str, texts: Iterable[str]) -> tuple[Violation, ...]:
    return tuple(Violation(check, text) for text in texts)
