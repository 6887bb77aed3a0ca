"""`fedge evaluate` and `fedge evaluation`: have devices measure a version, and see what they found.

The request goes into the store, where it outlives this command, and the coordinator that serves the
same store carries it out. There is no event between two processes but a signal in one direction, so
this one looks at the store now and then until the evaluation is closed.
"""

from __future__ import annotations

import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedge.coordinator.command_options import config_option, json_option
from fedge.coordinator.db_commands import open_store
from fedge.coordinator.running import coordinator_of, reachable_coordinator, tell_to_look
from fedge.schemas.errors import ConfigError, StoreUnavailable
from fedge.schemas.process import EXIT_FAILED

if TYPE_CHECKING:
    from fedge.coordinator.fleet_measures import FleetMeasures
    from fedge.coordinator.store import EvaluationReport, Store

# Imports below are inside the commands, so that `fedge --help` does not load a database toolkit.

LOOK_EVERY_S = 0.5
GONE_S = 20.0
"""A coordinator that is started again within this is waited for."""
EXIT_STOPPED = 130


@click.command(
    epilog="Exit status: 0 devices have measured it; 1 nobody has by the deadline, or the "
    "coordinator has ended; 2 asked wrongly; 130 stopped."
)
@click.option("--version", type=click.IntRange(0), help="Which version. [the newest]")
@click.option(
    "--devices",
    type=click.IntRange(1, 100_000),
    default=50,
    show_default=True,
    help="How many devices should measure it, drawn at random from those that are connected.",
)
@click.option(
    "--deadline",
    "deadline_s",
    type=click.FloatRange(1, 30 * 86400),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="From when the coordinator begins; what comes later does not count.",
)
@config_option
@json_option
def evaluate(
    version: int | None, devices: int, deadline_s: float, config_path: Path, as_json: bool
) -> None:
    """Have devices measure a version on examples that they never train on.

    Each device answers with sums over its own hold-out (hold_out in its configuration) and nothing
    else. Shown are the mean over all examples, how the devices differ, and the worst of them.

    The coordinator has to run: start `fedge serve` first. Evaluations take turns, and rounds go on
    meanwhile. A version of an earlier plan ([export] quantization was changed since) cannot be
    measured. Ctrl-C stops the waiting, not the evaluation: see `fedge evaluation list`.
    """
    from fedge.coordinator import evaluation_reports  # noqa: PLC0415 -- see the top of the file
    from fedge.coordinator.settings import load  # noqa: PLC0415 -- as above

    settings = load(config_path)
    with open_store(settings) as store:
        if reachable_coordinator(settings.state_dir) is None:
            raise ConfigError(
                f"no coordinator serves {settings.state_dir}: start `fedge serve`, which asks the "
                "devices"
            )
        record = store.request_evaluation(
            version,
            wanted=devices,
            deadline_s=deadline_s,
            seed=secrets.randbits(32),
            at=time.time(),
        )
        _say(f"evaluation {record.number} of version {record.version} by {devices} devices")
        tell_to_look(settings.state_dir)
        try:
            closed = _wait(store, settings.state_dir, record.number)
        except KeyboardInterrupt:
            _say(f"it goes on: see `fedge evaluation show {record.number}`")
            sys.exit(EXIT_STOPPED)
        report, measures = _found(store, record.number)
        evaluation_reports.show_evaluation(report, measures, as_json=as_json)
    if not closed or not measures.devices:
        sys.exit(EXIT_FAILED)


@click.group()
def evaluation() -> None:
    """Look at evaluations: what devices have measured."""


@evaluation.command("list")
@config_option
@json_option
def evaluation_list(config_path: Path, as_json: bool) -> None:
    """List every evaluation."""
    from fedge.coordinator import evaluation_reports  # noqa: PLC0415 -- as above
    from fedge.coordinator.settings import load  # noqa: PLC0415 -- as above

    with open_store(load(config_path)) as store:
        evaluation_reports.show_evaluations(store.evaluations(), as_json=as_json)


@evaluation.command("show")
@click.argument("number", type=click.IntRange(1))
@config_option
@json_option
def evaluation_show(number: int, config_path: Path, as_json: bool) -> None:
    """Show evaluation NUMBER: how good the version is, and how the devices differ."""
    from fedge.coordinator import evaluation_reports  # noqa: PLC0415 -- as above
    from fedge.coordinator.settings import load  # noqa: PLC0415 -- as above

    with open_store(load(config_path)) as store:
        report, measures = _found(store, number)
        evaluation_reports.show_evaluation(report, measures, as_json=as_json)


def _found(store: Store, number: int) -> tuple[EvaluationReport, FleetMeasures]:
    from fedge.coordinator.fleet_measures import fleet_measures  # noqa: PLC0415 -- as above
    from fedge.schemas.plan import PlanManifest  # noqa: PLC0415 -- as above

    report = store.evaluation_report(number)
    if report is None:
        raise ConfigError(f"there is no evaluation {number}; `fedge evaluation list` shows them")
    version = store.version(report.evaluation.version)
    if version is None:
        raise ConfigError(f"the state has lost version {report.evaluation.version}: restore it")
    manifest = PlanManifest.decode(store.blobs.read(version.plan_sha256))
    return report, fleet_measures(manifest, report.answers)


def _wait(store: Store, state_dir: Path, number: int) -> bool:
    """Returns when it is closed, or False when no coordinator is there to close it."""
    from fedge.coordinator.evaluation_reports import progress_of  # noqa: PLC0415 -- as above

    told, gone_since = "", None
    while True:
        try:
            report = store.evaluation_report(number)
        except StoreUnavailable as error:
            told = _tell(f"waiting for the database: {error}", told)
            report = None
        if report is not None:
            if report.evaluation.closed_at is not None:
                _tell(progress_of(report), told)
                return True
            told = _tell(progress_of(report), told)
        if coordinator_of(state_dir) is not None:
            gone_since = None
        elif gone_since is None:
            gone_since = time.monotonic()
            told = _tell(f"the coordinator has ended; waiting {GONE_S:.0f} s for the next", told)
        elif time.monotonic() - gone_since > GONE_S:
            _say(f"it goes on when `fedge serve` does: see `fedge evaluation show {number}` then")
            return False
        time.sleep(LOOK_EVERY_S)


def _tell(text: str, told: str) -> str:
    if text != told:
        _say(text)
    return text


def _say(text: str) -> None:
    click.echo(text, err=True)
