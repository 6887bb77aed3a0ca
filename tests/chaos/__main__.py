"""`python -m tests.chaos`: one seeded run, its report, and an exit status.

The report goes to stdout, everything else to stderr. `make chaos` is the same command.

    0      the promise held; nothing is left
    1      it was broken, or the kit itself failed; the folder with every log is kept and named
    2      asked wrongly, or the fleet did not come up; likewise
    128+n  signal n ended it, and it ended the fleet; likewise
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.brokers import MOSQUITTO
from tests.chaos.catalogue import BY_NAME, chosen
from tests.chaos.disks import NoMounting, enter_private_namespace
from tests.chaos.interruption import Interrupted, Interruption
from tests.chaos.judgement import judge
from tests.chaos.report import as_object
from tests.chaos.run import NotStarted, Options, after
from tests.chaos.schedule import Planned, plan
from tests.chaos.telling import as_text
from tests.chaos.world import Pace

SABOTAGES = ("count_twice", "leave_out", "answer_without_writing", "end_now_and_then")
BESIDES_S = 45.0
"""For the first compilation of the task, the quiet after the faults, the stops and the checks."""


def main() -> int:
    """Parses, runs, prints; returns the exit status."""
    arguments = _arguments()
    try:
        kinds = chosen(arguments.only)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    devices = [f"d{index}" for index in range(arguments.devices)]
    faults = plan(arguments.seed, arguments.seconds, devices, [kind.kind() for kind in kinds])
    if arguments.list:
        print("\n".join(str(each) for each in faults))
        return 0
    if MOSQUITTO is None:
        print("error: mosquitto is not installed", file=sys.stderr)
        return 2
    with_disks = True
    try:
        enter_private_namespace()
    except NoMounting as error:
        _tell(
            "no small disks, so faults of disks are skipped (they need root and the right to "
            f"mount): {error}"
        )
        with_disks = False
    folder = Path(arguments.keep or tempfile.mkdtemp(prefix="fedge-chaos-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        print(f"error: {folder} is not empty", file=sys.stderr)
        return 2
    options = Options(
        arguments.seconds,
        arguments.seed,
        arguments.devices,
        kinds,
        folder,
        with_disks,
        Pace(mode=arguments.mode, sabotage=arguments.sabotage),
        _teller(),
    )
    options.tell(
        f"{arguments.seconds:g} s of faults for {arguments.devices} devices; about "
        f"{_about_s(arguments.seconds)} s in all, with the start of the fleet, the quiet after "
        "the faults, and the checks; longer on a busy computer"
    )
    return _run(options, faults, is_kept=arguments.keep is not None, as_json=arguments.json)


def _run(options: Options, faults: Sequence[Planned], *, is_kept: bool, as_json: bool) -> int:
    """Runs, prints, and keeps or removes the folder; returns the exit status."""
    folder, interruption = options.folder, Interruption()
    try:
        report = interruption.run(_judged(options, faults, is_kept=is_kept))
    except NotStarted as error:
        print(f"error: {error}\neverything is in {folder}", file=sys.stderr)
        return 2
    except Interrupted as error:
        _tell(f"{error}: nothing was checked; what the fleet left is in {folder}")
        return 128 + error.number
    except Exception:
        traceback.print_exc()
        print(f"error: the kit failed; what the fleet left is in {folder}", file=sys.stderr)
        return 1
    is_broken = bool(report["violations"] or report["kit_failures"])
    if is_kept or is_broken:
        report["folder"] = str(folder)
    try:
        print(json.dumps(report, indent=2) if as_json else as_text(report), flush=True)
    except BrokenPipeError:
        # Who read it has seen enough; Python would say so again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    try:
        if is_kept or is_broken:
            (folder / "report.json").write_text(json.dumps(report, indent=2))
        else:
            shutil.rmtree(folder)
    except OSError as error:
        _tell(f"the report stands, but not all is as it should be in {folder}: {error}")
    if is_broken:
        _tell(f"with seed {options.seed} something went wrong; everything is in {folder}")
    return 1 if is_broken else 0


async def _judged(options: Options, faults: Sequence[Planned], *, is_kept: bool) -> dict[str, Any]:
    """The report of a run."""
    async with after(options, faults) as (made, course):
        found = await asyncio.to_thread(judge, made, course)
        report = as_object(options, made, course, found)
        # The small disks vanish; what was on them is wanted where something broke.
        made.is_kept = is_kept or bool(report["violations"] or report["kit_failures"])
    return report


def _about_s(seconds: float) -> int:
    """How long a run takes in all, as seen on two cores, to ten seconds."""
    return round((1.03 * seconds + BESIDES_S) / 10) * 10


def _teller() -> Callable[[str], None]:
    began_s = time.monotonic()
    return lambda text: _tell(f"{time.monotonic() - began_s:5.0f} s  {text}")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Runs a real fleet under seeded faults and checks that nothing accepted is "
        "lost and nothing is counted twice.",
        epilog="faults: " + ", ".join(BY_NAME),
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="how long there are faults")
    parser.add_argument("--seed", type=int, default=1, help="of the schedule")
    parser.add_argument("--devices", type=int, default=5)
    parser.add_argument("--mode", choices=["sync", "async"], default="sync", help="of the rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--keep", metavar="FOLDER", help="keep every file there, in any case")
    parser.add_argument(
        "--only", metavar="KINDS", help="faults whose names begin so; -NAME leaves out; commas"
    )
    parser.add_argument(
        "--sabotage", choices=SABOTAGES, help="a coordinator that breaks the promise: a test of it"
    )
    parser.add_argument("--list", action="store_true", help="print the schedule and end")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
