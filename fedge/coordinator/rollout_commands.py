"""`fedge rollout`: which devices a version reaches, how it fares there, and how to stop it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedge.coordinator.command_options import config_option, json_option
from fedge.coordinator.db_commands import open_store
from fedge.coordinator.rollouts import Wish
from fedge.coordinator.running import tell_to_look
from fedge.schemas.errors import ConfigError

if TYPE_CHECKING:
    from fedge.coordinator.settings import Settings

# Imports below are inside the commands, so that `fedge --help` does not load a database toolkit.


@click.group()
def rollout() -> None:
    """Bring a version to a few devices first, then to more, then to all; or stop it.

    \b
    How far is it, and is it good:     fedge rollout status
    Bring version 12 out in stages:    fedge rollout start --version 12
    Bring it to all devices at once:   fedge rollout start --version 12 --straight
    Let no more devices begin:         fedge rollout pause, fedge rollout resume
    Take it back from everybody:       fedge rollout abort

    Each device tries the version beside the one that it uses: the file, its outputs, its latency,
    and its loss on examples that the device never trains on. If it is worse, the device keeps what
    it had and says why. When too many do, the rollout stops by itself and all devices go back to
    the last good version, which they keep. Training goes on meanwhile, from the newest version.

    \b
    This needs [rollout] in fedge.toml:
        mode = "staged"    the newest version, stage by stage, one after the other
        mode = "manual"    only what `fedge rollout start` says
    With mode = "every", the default, each newest version is used by all devices at once.

    Exit status: 0 done, 1 failed, 2 asked wrongly.
    """


@rollout.command()
@config_option
@click.option(
    "--version", "number", type=click.IntRange(0), metavar="N", help="Which.  [the newest]"
)
@click.option(
    "--straight", is_flag=True, help="To all devices at once; it is watched as the others are."
)
def start(config_path: Path, number: int | None, straight: bool) -> None:
    """Begin to bring a version out, in the stages that [rollout] says.

    One rollout at a time. The version may be any whose files are kept, also an older one. What
    [rollout] says now holds for this rollout to its end.
    """
    settings = _settings(config_path)
    _check_mode(settings)
    with open_store(settings) as store:
        if number is None:
            newest = store.newest_version()
            if newest is None:
                raise ConfigError("there is no version yet")
            number = newest.number
        terms = settings.rollout.terms(straight=straight)
        made = store.start_rollout(number, terms, at=time.time())
    stages = ", ".join(f"{share:g}" for share in terms.stages)
    click.echo(
        f"rollout {made.number}: version {made.version}, beside version {made.stable}; "
        f"shares {stages}"
    )
    _tell(settings, "begin")


@rollout.command()
@click.argument("number", type=click.IntRange(1), required=False)
@config_option
@json_option
def status(number: int | None, config_path: Path, as_json: bool) -> None:
    """Show the newest rollout, or rollout NUMBER: its stages, its devices, what it waits for."""
    from fedge.coordinator import rollout_reports  # noqa: PLC0415 -- see the top of the file
    from fedge.schemas.state_lock import StateLock  # noqa: PLC0415 -- as above

    settings = _settings(config_path)
    with open_store(settings) as store:
        record = store.newest_rollout() if number is None else store.rollout(number)
        if record is None and number is not None:
            raise ConfigError(
                f"there is no rollout {number}; `fedge rollout list` shows those there are"
            )
        found = rollout_reports.RolloutReport.of(
            store,
            record,
            population=settings.population,
            mode=settings.rollout.mode,
            running=StateLock.holder(settings.state_dir) is not None,
            now=time.time(),
        )
    rollout_reports.show(found, as_json=as_json)


@rollout.command("list")
@config_option
@json_option
def list_(config_path: Path, as_json: bool) -> None:
    """List every rollout and how it ended."""
    from fedge.coordinator import rollout_reports  # noqa: PLC0415 -- as above

    settings = _settings(config_path)
    with open_store(settings) as store:
        records = store.rollouts()
        counts = [store.trial_counts(record.number) for record in records]
    rollout_reports.show_all(records, counts, as_json=as_json)


@rollout.command()
@config_option
def pause(config_path: Path) -> None:
    """Let no more devices begin to try the version; who passed goes on using it.

    What devices report is still counted, and still stops the rollout if too many failed.
    """
    _wish(config_path, Wish.PAUSE, "paused", "pause it")


@rollout.command()
@config_option
def resume(config_path: Path) -> None:
    """Go on with a rollout that was paused, in the same stage."""
    _wish(config_path, Wish.RUN, "goes on", "go on")


@rollout.command()
@config_option
@click.option("--reason", default="", metavar="TEXT", help="For the record.")
def abort(config_path: Path, reason: str) -> None:
    """End the rollout and take the version back from every device that uses it.

    Devices go back to the last good version, whose file they have kept: without fetching anything,
    as soon as they hear of it.
    """
    text = f"aborted by the operator: {reason}" if reason else "aborted by the operator"
    _wish(config_path, Wish.ABORT, "is taken back", "take it back", text)


def _wish(config_path: Path, wish: Wish, done: str, doing: str, reason: str = "") -> None:
    settings = _settings(config_path)
    with open_store(settings) as store:
        record = store.wish_of_rollout(wish, reason)
    click.echo(f"rollout {record.number} of version {record.version} {done}")
    _tell(settings, doing)


def _tell(settings: Settings, doing: str) -> None:
    pid = tell_to_look(settings.state_dir)
    if pid is None:
        click.echo(f"no coordinator is running: it will {doing} at the next start")
    else:
        click.echo(f"told the coordinator (process {pid}) to {doing}")


def _check_mode(settings: Settings) -> None:
    from fedge.coordinator.rollouts import ServingMode  # noqa: PLC0415 -- as above

    if settings.rollout.mode is ServingMode.EVERY:
        raise ConfigError(
            '[rollout] mode is "every": each newest version is used by all devices at once. Set it '
            'to "staged" or "manual" and start the coordinator again'
        )


def _settings(config_path: Path) -> Settings:
    from fedge.coordinator.settings import load  # noqa: PLC0415 -- as above

    return load(config_path)
