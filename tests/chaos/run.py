"""One run: a fleet, its faults, the quiet afterwards, and what is left to be judged.

    start ── version 1 ── faults for so many seconds ── all healed ── quiet ── stop ── judge

The quiet is part of the promise: without a human the fleet goes on making versions, and every
update that waits gets its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos import gauges
from tests.chaos.catalogue import BY_NAME
from tests.chaos.fault import Fault, Missed, Skipped
from tests.chaos.history import History
from tests.chaos.schedule import COORDINATOR, Planned
from tests.chaos.stores import Snapshot, read_coordinator, read_outbox
from tests.chaos.verdict import Checked, Violation
from tests.chaos.world import Pace, Trouble, World, rng_of, world

FIRST_VERSION_S = 240.0
LOOK_EVERY_S, GAUGE_EVERY_S = 0.3, 2.0
FURTHER_VERSIONS = 3
PRESENCE_LIMIT_S = 15.0
QUIET_LIMIT_S = 120.0
"""The longest waits in the quiet: an offer is repeated after 37 s, a reconnect takes a second, and
the coordinator rests up to a minute after rounds were abandoned in a row."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a run is asked to be. `tell`: is told, in a line, how far it is."""

    seconds: float
    seed: int
    device_count: int
    kinds: tuple[type[Fault], ...]
    folder: Path
    with_disks: bool
    pace: Pace = field(default_factory=Pace)
    tell: Callable[[str], None] = lambda _: None


@dataclass
class Course:
    """How a run went: what the world does not know of it.

    `planned`: how many faults. `miss_reasons`: of faults that found nothing to strike. `checked`:
    what had to be looked at while the fleet was there.
    """

    began_s: float = 0.0
    healed_s: float = 0.0
    quiet_s: float | None = None
    healed_version: int = -1
    healed_round: int = 0
    planned: Counter[str] = field(default_factory=Counter)
    injected: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    miss_reasons: Counter[str] = field(default_factory=Counter)
    skip_reasons: set[str] = field(default_factory=set)
    history: History = field(default_factory=History)
    samples: list[gauges.Sample] = field(default_factory=list)
    checked: list[Checked] = field(default_factory=list)


class NotStarted(Exception):
    """The fleet made no version before the first fault; the message has the end of a log."""


@contextlib.asynccontextmanager
async def after(options: Options, faults: Sequence[Planned]):
    """Runs the faults; inside the block everything has ended, and its files are still there.

    Yields the world and the course. Raises `NotStarted`.
    """
    course = Course(planned=Counter(planned.kind for planned in faults))
    async with world(
        options.folder, options.device_count, options.pace, with_disks=options.with_disks
    ) as made:
        async with asyncio.TaskGroup() as group:
            watchers = [
                group.create_task(_look(made, course), name="look"),
                group.create_task(_gauge(made, course), name="gauge"),
            ]
            try:
                # Raised within the group, it would come out as a group of exceptions.
                not_started = await _first_version(made, course)
                if not_started is None:
                    options.tell(f"the fleet has made version 1; {len(faults)} faults begin")
                    await _strike_all(made, course, options, faults)
                    options.tell("all faults are healed; the fleet has to calm down by itself")
                    await _be_quiet(made, course)
            finally:
                for watcher in watchers:
                    watcher.cancel()
        if not_started is not None:
            raise not_started
        options.tell("stopping the fleet, and checking what it left")
        for device in made.devices:
            await made.stop(device)
        await _all_are_seen_to_leave(made, course)
        await made.stop(COORDINATOR)
        yield made, course


async def _first_version(made: World, course: Course) -> NotStarted | None:
    try:
        async with asyncio.timeout(FIRST_VERSION_S):
            while 1 not in course.history.versions:  # noqa: ASYNC110 -- others write the store
                await asyncio.sleep(0.1)
    except TimeoutError:
        logs = "\n".join(program.log_text()[-1500:] for program in made.programs.values())
        return NotStarted(f"no version within {FIRST_VERSION_S:g} s:\n{logs}")
    return None


async def _strike_all(
    made: World, course: Course, options: Options, faults: Sequence[Planned]
) -> None:
    course.began_s = time.monotonic()
    made.note("the faults begin")
    async with asyncio.TaskGroup() as group:
        for planned in faults:
            await asyncio.sleep(course.began_s + planned.at_s - time.monotonic())
            fault = BY_NAME[planned.kind](planned, made, rng_of(options.seed, planned.number))
            group.create_task(_strike(fault, course), name=f"fault-{planned.number}")
        await asyncio.sleep(course.began_s + options.seconds - time.monotonic())
    course.healed_s = time.monotonic()
    course.healed_version = max(course.history.versions)
    course.healed_round = max(course.history.ended)
    made.note("all faults are healed")


async def _strike(fault: Fault, course: Course) -> None:
    planned, made = fault.planned, fault.world
    trouble = Trouble(planned.kind, planned.target, time.monotonic())
    made.troubles.append(trouble)
    made.note(f"begins: {planned}")
    try:
        await _strike_alone(fault)
        course.injected[planned.kind] += 1
        made.note(f"ended: fault {planned.number}, {planned.kind} of {planned.target}")
    except Missed as reason:
        course.missed[planned.kind] += 1
        course.miss_reasons[str(reason)] += 1
        made.note(f"missed: fault {planned.number}, {planned.kind}: {reason}")
    except Skipped as reason:
        course.skipped[planned.kind] += 1
        course.skip_reasons.add(str(reason))
    except Exception as error:
        # A defect of the kit: told at the end, for the other faults are worth having.
        course.failed.append(f"fault {planned}: {error!r}")
    finally:
        trouble.ended_s = time.monotonic()


async def _strike_alone(fault: Fault) -> None:
    """As planned, unless an earlier fault has not let go of the process yet: all takes longer here.

    Raises as `Fault.strike` does.
    """
    if not fault.occupies:
        await fault.strike()
        return
    held = fault.world.held
    if fault.target in held:
        raise Missed("another fault has not let go of the process")
    held.add(fault.target)
    try:
        await fault.strike()
    finally:
        held.discard(fault.target)


async def _be_quiet(made: World, course: Course) -> None:
    """Until the fleet made further versions and uses one, all of it is seen, all is answered."""
    wanted = course.healed_version + FURTHER_VERSIONS
    waiting: dict[str, list[int] | str] = {}
    unseen: set[str] = set()
    behind: dict[str, int] = {}
    goes_on, answered, follow, present = [], [], [], []
    try:
        async with asyncio.timeout(QUIET_LIMIT_S):
            while True:
                newest = max(course.history.versions)
                waiting = await asyncio.to_thread(_unanswered, made, course)
                unseen = set(made.devices) - course.history.online
                behind = {
                    device: used
                    for device in made.devices
                    if (used := made.version_in_use(device)) <= course.healed_version
                }
                if newest >= wanted and not (waiting or unseen or behind):
                    break
                await asyncio.sleep(0.3)
        course.quiet_s = time.monotonic() - course.healed_s
    except TimeoutError:
        newest = max(course.history.versions)
        now = time.monotonic()
        if newest < wanted:
            text = (
                f"version {course.healed_version} when all was healed, {newest} after "
                f"{QUIET_LIMIT_S:g} s of quiet; {wanted} were wanted"
            )
            goes_on.append(Violation("the_fleet_goes_on", text, now))
        if waiting:
            text = f"updates without a receipt after {QUIET_LIMIT_S:g} s of quiet: {waiting}"
            answered.append(Violation("every_update_is_answered", text, now))
        if behind:
            text = f"version {newest} is the newest; devices still use {behind}"
            follow.append(Violation("devices_follow", text, now))
        if unseen:
            text = f"not online for the coordinator after {QUIET_LIMIT_S:g} s: {sorted(unseen)}"
            present.append(Violation("presence_is_right", text, now))
    updates = sum(number <= course.healed_round for _, number in made.evidence.made)
    further = max(course.history.versions) - course.healed_version
    course.checked += [
        Checked("the_fleet_goes_on", further, tuple(goes_on)),
        Checked("every_update_is_answered", updates, tuple(answered)),
        Checked("devices_follow", len(made.devices), tuple(follow)),
        Checked("presence_is_right", len(made.devices), tuple(present)),
    ]


async def _all_are_seen_to_leave(made: World, course: Course) -> None:
    """The devices said goodbye: the coordinator's list says so within seconds."""
    began_s, left = time.monotonic(), set(made.devices)
    while left and time.monotonic() < began_s + PRESENCE_LIMIT_S:
        await asyncio.sleep(0.1)
        with contextlib.suppress(sqlite3.Error):
            left = set(made.devices) & (await asyncio.to_thread(_read, made)).online
    found: tuple[Violation, ...] = ()
    if left:
        text = f"still online {PRESENCE_LIMIT_S:g} s after they ended: {sorted(left)}"
        found = (Violation("presence_is_right", text, time.monotonic()),)
    course.checked.append(Checked("presence_is_right", len(made.devices), found))


def _unanswered(made: World, course: Course) -> dict[str, list[int] | str]:
    found: dict[str, list[int] | str] = {}
    for device in made.devices:
        try:
            rounds = [r for r in read_outbox(made.ledger(device)) if r <= course.healed_round]
        except sqlite3.Error as error:
            # What cannot be read is not answered: else an unreadable ledger would be a good one.
            found[device] = f"its ledger cannot be read: {error}"
            continue
        if rounds:
            found[device] = rounds
    return found


def _read(made: World) -> Snapshot:
    return read_coordinator(made.database)


async def _look(made: World, course: Course) -> None:
    blobs = made.state_dir(COORDINATOR) / "blobs"
    while True:
        await asyncio.to_thread(course.history.watch, lambda: _read(made), blobs)
        await asyncio.sleep(LOOK_EVERY_S)


async def _gauge(made: World, course: Course) -> None:
    while True:
        for name, program in made.programs.items():
            pid = program.pid
            found = None if pid is None else await asyncio.to_thread(gauges.sample, name, pid)
            if found is not None:
                course.samples.append(found)
        await asyncio.sleep(GAUGE_EVERY_S)
