"""`fedge demo`: from what was typed to the printed summary, and the exit status."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from fedge.coordinator.demo import tables
from fedge.coordinator.demo.brokers import BrokerChoice
from fedge.coordinator.demo.display import open_display
from fedge.coordinator.demo.examples import load_examples
from fedge.coordinator.demo.experiment import Wishes, resolve
from fedge.coordinator.demo.folder import DemoFolder
from fedge.coordinator.demo.runner import DemoRun
from fedge.coordinator.demo.summary import Summary
from fedge.schemas.process import run_until_stopped

EXIT_STOPPED = 130
"""As shells report a program that Ctrl-C ended."""


def demo(
    wishes: Wishes,
    out: Path,
    *,
    broker: BrokerChoice,
    deadline_s: float,
    as_json: bool,
    started: float,
) -> None:
    """Runs a demonstration and prints its summary, as JSON or as tables.

    `started`: when the user asked for it, in the monotonic clock.

    Exits with `EXIT_STOPPED` if a signal stopped it. Raises as `DemoRun.run`, and `ConfigError`
    for a folder or a task that cannot be used.
    """
    stderr = Console(stderr=True, highlight=False)
    found: list[Summary] = []

    async def work() -> None:
        with open_display(stderr) as display:
            display.say("loading torch and the task")
            experiment = resolve(wishes)
            # Everything that the wishes can be wrong about, before an earlier result is cleared.
            train, test = await asyncio.to_thread(load_examples, experiment)
            folder = DemoFolder.claim(out)
            run = DemoRun(experiment, folder, display, broker=broker, deadline_s=deadline_s)
            summary = await run.run(train, test)
            found.append(replace(summary, duration_s=time.monotonic() - started))
            folder.summary.write_text(json.dumps(found[0].as_dict(), indent=2) + "\n")

    run_until_stopped(work)
    if not found:
        stderr.print("stopped; every program has ended")
        sys.exit(EXIT_STOPPED)
    if as_json:
        print(json.dumps(found[0].as_dict(), indent=2))  # noqa: T201 -- the command's output
    else:
        tables.show(found[0], Console(highlight=False, soft_wrap=True))
