"""`python -m tests.chaos`: one seeded run, its report, and an exit status.

The report goes to stdout, everything else to stderr. `make chaos` is the same command.

    0  the promise held
    1  it was broken, or the kit itself failed; the folder with every log is kept
    2  asked wrongly, or the fleet did not come up
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
from pathlib import Path

from tests.brokers import MOSQUITTO
from tests.chaos.catalogue import BY_NAME, chosen
from tests.chaos.disks import NoMounting, enter_private_namespace
from tests.chaos.judgement import judge
from tests.chaos.report import as_object, as_text
from tests.chaos.run import NotStarted, Options, after
from tests.chaos.schedule import plan
from tests.chaos.world import Pace

SABOTAGES = ("count_twice", "leave_out", "answer_without_writing", "end_now_and_then")


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
        print(f"no small disks, faults of disks are skipped: {error}", file=sys.stderr)
        with_disks = False
    kept = arguments.keep is not None
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
    )
    try:
        report = asyncio.run(_run(options, faults))
    except NotStarted as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    broken = bool(report["violations"] or report["kit_failures"])
    if broken or kept:
        (folder / "report.json").write_text(json.dumps(report, indent=2))
        report["folder"] = str(folder)
    else:
        shutil.rmtree(folder)
    print(json.dumps(report, indent=2) if arguments.json else as_text(report))
    if broken:
        print(
            f"the promise was broken with seed {arguments.seed}; everything is in {folder}",
            file=sys.stderr,
        )
    return 1 if broken else 0


async def _run(options: Options, faults):
    async with after(options, faults) as (made, course):
        found = await asyncio.to_thread(judge, made, course)
        report = as_object(options, made, course, found)
        for disk in made.disks.values():
            # The disk vanishes with this process; what was on it is wanted where something broke.
            shutil.copytree(disk.path, options.folder / "kept" / disk.path.name)
    return report


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
