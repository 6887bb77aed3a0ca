"""`fedge`: the operator's command line."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedge import __version__
from fedge.coordinator.command_options import config_option as _config
from fedge.coordinator.command_options import json_option as _json
from fedge.coordinator.db_commands import db, open_store
from fedge.coordinator.evaluation_commands import evaluate, evaluation
from fedge.coordinator.rollout_commands import rollout
from fedge.coordinator.running import tell_to_look
from fedge.coordinator.tasks import BUILT_IN_TASKS
from fedge.coordinator.vocabulary_commands import vocabulary
from fedge.schemas.errors import ConfigError, StoreError
from fedge.schemas.logs import set_up_logging
from fedge.schemas.process import (
    errors_as_exit_status,
    keep_memory_together,
    run_until_stopped,
)

if TYPE_CHECKING:
    from fedge.coordinator.settings import Settings
    from fedge.coordinator.store import RoundReport, Store, VersionRecord
    from fedge.schemas.plan import PlanManifest

# Imports below are inside the commands: only `serve` and `demo` need torch, which takes seconds.


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fedge")
def cli() -> None:
    """Federated learning for fleets of small devices, over MQTT.

    \b
    See it work:          fedge demo
    Run a coordinator:    fedge serve --config fedge.toml
    Look at what it did:  fedge round list, fedge round show N, fedge version list
    How good is it:       fedge evaluate
    Who gets it, when:    fedge rollout status
    Keep it safe:         fedge db check, fedge db backup PATH

    \b
    A coordinator needs one file, fedge.toml:

    \b
        population = "digits"            # the devices that share this task
        task = "digits"                  # built in, or my_task.py:task
        state_dir = "state"
        [broker]
        host = "broker.example"
        [round]
        goal = 100                       # updates that make a version

    Exit status: 0 done or stopped, 1 failed, 2 asked wrongly.
    """


@cli.command()
@_config
def serve(config_path: Path) -> None:
    """Serve until stopped: publish versions, run rounds, average updates, export ONNX.

    SIGTERM ends it after what is being written; the next start goes on with the same round.
    SIGHUP makes it look for versions that another command has added.
    """
    from fedge.coordinator import serving  # noqa: PLC0415 -- see the top of the file
    from fedge.coordinator.settings import load  # noqa: PLC0415 -- as above

    keep_memory_together()
    settings = load(config_path)
    set_up_logging(settings.log_format)
    run_until_stopped(lambda: serving.serve(settings))


@cli.command(epilog="Exit status: 0 done, 1 failed, 2 asked wrongly, 130 stopped.")
@click.option(
    "--task",
    default="digits",
    show_default=True,
    metavar="NAME|FILE.py:ATTR",
    help=f"Built in: {', '.join(BUILT_IN_TASKS)}; or your own.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="For MNIST: the folder that holds MNIST/raw, fetched into if it is not there; default: "
    "FEDGE_DATA if set, else ~/.cache/fedge. For next-word: a .jsonl file of "
    '{"user": …, "text": …} lines. For any other task: a folder with train.npz and '
    "test.npz, or one .npz file of which a fifth is kept for the test.",
)
@click.option("--devices", type=click.IntRange(1, 200), help="How many agents. [the task's own]")
@click.option("--rounds", type=click.IntRange(1, 10_000), help="Versions to make. [the task's own]")
@click.option(
    "--split",
    metavar="SCHEME",
    help="How the data is divided: iid, ordered, shards, dirichlet:ALPHA, weighted:W1,W2,… "
    "[the task's own]",
)
@click.option(
    "--strategy",
    type=click.Choice(["fedavg", "cyclic"]),
    help="Average the devices' updates, or let the model visit one after another. [the task's own]",
)
@click.option("--train-examples", type=click.IntRange(1), help="Only the first so many.")
@click.option("--local-epochs", type=click.IntRange(1, 1000), help="Passes a round on a device.")
@click.option("--batch-size", type=click.IntRange(1, 65536))
@click.option("--learning-rate", type=click.FloatRange(0, 1000, min_open=True))
@click.option(
    "--broker",
    type=click.Choice(["auto", "mosquitto", "amqtt"]),
    default="auto",
    show_default=True,
    help="auto: mosquitto if it is installed, else amqtt, which is not secure.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Of the split, the rounds and the order of the examples.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo-out"),
    show_default=True,
    help="The folder for everything; an earlier demonstration's is cleared.",
)
@click.option("--no-central", is_flag=True, help="Skip the central training beside it.")
@click.option(
    "--deadline",
    "deadline_s",
    type=click.FloatRange(1),
    default=3600.0,
    show_default=True,
    metavar="SECONDS",
    help="Give up after so long.",
)
@_json
def demo(
    *,
    task: str,
    data: Path | None,
    devices: int | None,
    rounds: int | None,
    split: str | None,
    strategy: str | None,
    train_examples: int | None,
    local_epochs: int | None,
    batch_size: int | None,
    learning_rate: float | None,
    broker: str,
    seed: int,
    out: Path,
    no_central: bool,
    deadline_s: float,
    as_json: bool,
) -> None:
    """Show a whole federation on this computer: a broker, a coordinator and agents.

    Each agent is a process with its own part of the data, which never leaves it. They talk over
    MQTT as a real fleet does. At the end: the accuracy of each version beside the same model
    trained in one place, the bytes up and down, a picture, the ONNX file, and what devices predict
    with it. Progress goes to stderr, the summary to stdout.

    \b
    Nothing to download, under a minute:   fedge demo
    A harder split over more devices:      fedge demo --devices 8 --split shards
    MNIST, the convolutional net:          fedge demo --task mnist-cnn --data ~/data
    A quick look at it:                    fedge demo --task mnist-cnn --train-examples 4000
    A model of your own:                   fedge demo --task my_task.py:task
    Without Mosquitto:                     fedge demo --broker amqtt
    """
    started = time.monotonic()
    from fedge.coordinator.demo import command  # noqa: PLC0415 -- see the top of the file
    from fedge.coordinator.demo.brokers import BrokerChoice  # noqa: PLC0415 -- as above
    from fedge.coordinator.demo.experiment import Wishes  # noqa: PLC0415 -- as above
    from fedge.coordinator.rounds import Strategy  # noqa: PLC0415 -- as above

    wishes = Wishes(
        task=task,
        data=data,
        devices=devices,
        rounds=rounds,
        split=split,
        strategy=None if strategy is None else Strategy(strategy),
        train_examples=train_examples,
        local_epochs=local_epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        central=not no_central,
    )
    command.demo(
        wishes,
        out,
        broker=BrokerChoice(broker),
        deadline_s=deadline_s,
        as_json=as_json,
        started=started,
    )


# ---------------------------------------------------------------- versions


@cli.group()
def version() -> None:
    """Look at versions, export them, go back to an earlier one."""


@version.command("list")
@_config
@_json
def version_list(config_path: Path, as_json: bool) -> None:
    """List every version with its metrics."""
    from fedge.coordinator import reports  # noqa: PLC0415 -- as above

    with _store(config_path) as store:
        reports.show_versions(store.versions(), as_json=as_json)


@version.command("show")
@click.argument("number", type=click.IntRange(0))
@_config
@_json
def version_show(number: int, config_path: Path, as_json: bool) -> None:
    """Show version NUMBER."""
    from fedge.coordinator import reports  # noqa: PLC0415 -- as above

    with _store(config_path) as store:
        found = _version(store, number)
        reports.show_version(found, _plan(store, found), as_json=as_json)


@version.command("export")
@click.argument("number", type=click.IntRange(0))
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
@_config
def version_export(number: int, path: Path, config_path: Path) -> None:
    """Write the ONNX file of version NUMBER to PATH: the same bytes that devices run."""
    from fedge.coordinator.export import export_model  # noqa: PLC0415 -- as above

    with _store(config_path) as store:
        model = export_model(store, _version(store, number))
    try:
        path.write_bytes(model)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    click.echo(f"version {number}: {path}, {len(model)} bytes")


@version.command("rollback")
@click.argument("number", type=click.IntRange(0))
@_config
def version_rollback(number: int, config_path: Path) -> None:
    """Make a new version with the weights of version NUMBER, and have it published.

    Numbers never go back: after a rollback from 12 to 9 the newest version is 13, equal to 9. A
    round that was under way is abandoned, since its base is no longer the newest version.

    With [rollout] mode "staged" or "manual" this changes what devices train from, and not yet what
    apps use: the new version is rolled out as any other. To take a version back from apps while its
    rollout is under way: fedge rollout abort.
    """
    from fedge.coordinator.export import rolled_back  # noqa: PLC0415 -- as above

    with _store(config_path) as store:
        newest = store.newest_version()
        target = _version(store, number)
        if newest is None or newest.number == number:
            raise ConfigError(f"version {number} is the newest already")
        made = rolled_back(newest, target, time.time())
        store.record_version(made, copy_of=number)
        click.echo(f"version {made.number} has the weights of version {number}")
        _say_what_apps_use(store, made)
    pid = tell_to_look(_settings(config_path).state_dir)
    if pid is None:
        click.echo("no coordinator is running: it is published at the next start")
        return
    click.echo(f"told the coordinator (process {pid}) to publish it")


def _say_what_apps_use(store: Store, made: VersionRecord) -> None:
    stable, running = store.stable_version(), store.newest_rollout()
    if stable is None:
        return
    click.echo(
        f"apps go on using version {stable} until version {made.number} is rolled out: by itself "
        f'with [rollout] mode "staged", else fedge rollout start --version {made.number}'
    )
    if running is not None and running.ended_at is None:
        click.echo(
            f"rollout {running.number} of version {running.version} goes on: to end it, "
            "fedge rollout abort"
        )


# ---------------------------------------------------------------- rounds and devices


@cli.group("round")
def round_group() -> None:
    """Look at rounds: who was asked, who answered, who was refused and why."""


@round_group.command("list")
@_config
@_json
def round_list(config_path: Path, as_json: bool) -> None:
    """List every round and how it ended."""
    from fedge.coordinator import reports  # noqa: PLC0415 -- as above

    with _store(config_path) as store:
        reports.show_rounds(store.rounds(), as_json=as_json)


@round_group.command("show")
@click.argument("number", type=click.IntRange(1))
@_config
@_json
def round_show(number: int, config_path: Path, as_json: bool) -> None:
    """Show round NUMBER: its devices, their updates, and everything that was refused."""
    from fedge.coordinator import reports  # noqa: PLC0415 -- as above

    with _store(config_path) as store:
        reports.show_round(_round(store, number), as_json=as_json)


@cli.group()
def device() -> None:
    """Look at the devices of the population."""


@device.command("list")
@_config
@_json
def device_list(config_path: Path, as_json: bool) -> None:
    """List every device that was ever seen."""
    from fedge.coordinator import reports  # noqa: PLC0415 -- as above

    with _store(config_path) as store:
        reports.show_devices(store.devices(), as_json=as_json)


cli.add_command(db)
cli.add_command(evaluate)
cli.add_command(evaluation)
cli.add_command(rollout)
cli.add_command(vocabulary)


def main() -> None:
    """The entry point of `fedge`."""
    with errors_as_exit_status(), _packages_are_here():
        cli()


@contextlib.contextmanager
def _packages_are_here() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "fedge":
            raise
        raise ConfigError(
            f"this needs the coordinator's packages ({error.name} is missing): "
            "pip install 'fedge[coordinator]', or in a checkout pip install '.[coordinator]'"
        ) from error


def _settings(config_path: Path) -> Settings:
    from fedge.coordinator.settings import load  # noqa: PLC0415 -- as above

    return load(config_path)


def _store(config_path: Path) -> Store:
    return open_store(_settings(config_path))


def _version(store: Store, number: int) -> VersionRecord:
    found = store.version(number)
    if found is None:
        raise ConfigError(f"there is no version {number}; `fedge version list` shows them")
    return found


def _plan(store: Store, version: VersionRecord) -> PlanManifest | None:
    from fedge.schemas.plan import PlanManifest  # noqa: PLC0415 -- as above

    try:
        return PlanManifest.decode(store.blobs.read(version.plan_sha256))
    except StoreError:
        # What is known of the version is worth telling without it.
        return None


def _round(store: Store, number: int) -> RoundReport:
    found = store.round_report(number)
    if found is None:
        raise ConfigError(f"there is no round {number}; `fedge round list` shows them")
    return found
