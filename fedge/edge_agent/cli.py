"""`fedge-agent`: the device's command line."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from fedge import __version__
from fedge.edge_agent.command_options import config_option, json_option
from fedge.edge_agent.eligibility_commands import eligibility
from fedge.edge_agent.example_commands import examples
from fedge.edge_agent.keyboard_command import type_in_terminal
from fedge.edge_agent.personal_commands import personal
from fedge.schemas.errors import ConfigError
from fedge.schemas.logs import set_up_logging
from fedge.schemas.process import errors_as_exit_status, run_until_stopped

if TYPE_CHECKING:
    from fedge.edge_agent.settings import Settings
    from fedge.edge_agent.trainer.process import Trainer

# Imports below are inside the commands: `predict` needs no network code, and `run` no runtime.


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fedge-agent")
def cli() -> None:
    """Trains on this device's own examples and answers with the newest model.

    \b
    A device needs one file, agent.toml:

    \b
        population = "digits"            # whose fleet it belongs to
        device = "pi-kitchen"            # its own name in it
        state_dir = "state"              # where versions and unsent updates are kept
        [broker]
        host = "broker.example"
        [data]
        path = "digits.npz"              # arrays x and y; images, IDX and CSV work too

    Exit status: 0 done or stopped, 1 failed, 2 asked wrongly.
    """


@cli.command()
@config_option
def run(config_path: Path) -> None:
    """Serve until stopped: follow the versions, train when asked, send only differences."""
    from fedge.edge_agent.agent import EdgeAgent  # noqa: PLC0415 -- see the top of the file
    from fedge.edge_agent.shared_trainer import SharedTrainer  # noqa: PLC0415 -- as above

    settings = _load(config_path)
    set_up_logging(settings.log_format)

    async def work() -> None:
        # Shared by one: whatever it is asked goes before a personal training.
        trainer = SharedTrainer(_trainer(settings, workers=1), 1)
        try:
            await EdgeAgent(settings, trainer, random.SystemRandom()).run()
        finally:
            await trainer.close()

    run_until_stopped(work)


@cli.command()
@config_option
@click.option("--devices", type=click.IntRange(1, 10_000), help="How many.")
@click.option(
    "--split",
    default="iid",
    show_default=True,
    help="How the data is divided: iid, ordered, shards, dirichlet:ALPHA, weighted:W1,W2,…; or "
    "users: each device has the texts of one user of a .jsonl file, or with more devices than "
    "users an earlier or a later part of them.",
)
@click.option(
    "--each",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Host the devices of FOLDER/*/agent.toml instead, each as its own file says.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Training processes that the devices share.",
)
@click.pass_context
def fleet(  # noqa: PLR0917 -- click calls it by name
    context: click.Context,
    config_path: Path,
    devices: int | None,
    split: str,
    folder: Path | None,
    seed: int,
    workers: int,
) -> None:
    """Host many virtual devices in this process, on one data set divided among them."""
    from fedge.edge_agent import fleet as virtual  # noqa: PLC0415 -- as above
    from fedge.edge_agent.shared_trainer import SharedTrainer  # noqa: PLC0415 -- as above

    if folder is None:
        if devices is None:
            raise click.UsageError("say how many with --devices, or where they are with --each")
        settings = _load(config_path)
        each = virtual.virtual_devices(settings, devices, split, seed)
    else:
        for name in ("config_path", "devices", "split"):
            if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
                raise click.UsageError("--each takes everything but --seed and --workers from them")
        each = virtual.described_devices(folder)
        settings = each[0]
    set_up_logging(settings.log_format)

    async def work() -> None:
        trainer = SharedTrainer(_trainer(settings, workers), workers)
        try:
            await virtual.run_fleet(each, trainer, seed)
        finally:
            await trainer.close()

    run_until_stopped(work)


# The first number of a table's row may be negative: that is no option.
@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("example")
@config_option
@click.option("--top", type=click.IntRange(1, 100), default=3, show_default=True)
@json_option
def predict(example: str, config_path: Path, top: int, as_json: bool) -> None:
    """Answer EXAMPLE with the version in use; needs neither network nor a running agent.

    EXAMPLE is an image file, numbers with commas between them for a task on tables, or what was
    typed so far for a task on words: the word that comes next, or the one that is begun.
    """
    from fedge.edge_agent.library import Library  # noqa: PLC0415 -- as above
    from fedge.edge_agent.predictor import read_example  # noqa: PLC0415 -- as above
    from fedge.edge_agent.serving import NothingToServe, open_serving  # noqa: PLC0415 -- as above

    try:
        serving = open_serving(Library(_load(config_path).state_dir))
    except NothingToServe as error:
        raise ConfigError(str(error)) from error
    prediction = serving.predictor.predict(read_example(example, serving.manifest), top=top)
    if as_json:
        said = {"version": serving.version, "personal": serving.personal, **prediction.as_dict()}
        click.echo(json.dumps(said))
    else:
        own = ", personal" if serving.personal else ""
        click.echo(f"{prediction.sentence()} (version {serving.version}{own})")


@cli.command()
@config_option
@json_option
def status(config_path: Path, as_json: bool) -> None:
    """Show the version in use, what waits to be sent, and the rounds this device took part in."""
    from fedge.edge_agent.library import Library  # noqa: PLC0415 -- as above
    from fedge.edge_agent.state import AgentState  # noqa: PLC0415 -- as above

    settings = _load(config_path)
    active = Library(settings.state_dir).active()
    with contextlib.closing(AgentState(settings.state_dir / "agent.sqlite")) as memory:
        ledger, waiting = memory.ledger(), memory.outbox()
    words = _words_told(settings)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "device": settings.device,
                    "version": None if active is None else active.version,
                    "model": None if active is None else str(active.model),
                    "waiting": sorted(waiting),
                    "word_counts": words,
                    "rounds": [
                        {"round": p.round, "base": p.base, "examples": p.examples,
                         "status": p.status, "reason": p.reason, "training_s": p.training_s,
                         "upload_bytes": p.upload_bytes}
                        for p in ledger
                    ],
                }
            )
        )  # fmt: skip
        return
    click.echo(f"device   {settings.device} of {settings.population}")
    in_use = "none yet" if active is None else f"{active.version}  {active.model}"
    click.echo(f"version  {in_use}")
    click.echo(f"waiting  {len(waiting)} updates without a receipt")
    if words["answers"] or words["epsilon_limit"]:
        click.echo(
            f"words    {words['answers']} told, epsilon {words['epsilon_spent']:g} of "
            f"{words['epsilon_limit']:g} spent"
        )
    for line in ledger[-10:]:
        reason = f" ({line.reason})" if line.reason else ""
        click.echo(
            f"round {line.round}: {line.status}{reason}, {line.examples} examples, "
            f"{line.training_s:.1f} s of training, {line.upload_bytes} bytes"
        )


@cli.group()
def data() -> None:
    """Look at and divide data sets."""


@data.command()
@click.option("--source", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--scheme", default="iid", show_default=True, help="As `fleet --split`.")
@click.option("--parts", type=click.IntRange(1, 65536), required=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--limit", type=click.IntRange(1), help="Only the first so many examples.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@json_option
def split(  # noqa: PLR0917 -- click calls it by name
    source: Path, scheme: str, parts: int, seed: int, limit: int | None, out: Path, as_json: bool
) -> None:
    """Divide a data set into part-0.npz, part-1.npz, … as if it were on as many devices."""
    from fedge.edge_agent.data.config import DataConfig  # noqa: PLC0415 -- as above
    from fedge.edge_agent.data.examples import split_to_files  # noqa: PLC0415 -- as above

    paths = split_to_files(DataConfig(path=source, limit=limit), scheme, parts, seed, out)
    if as_json:
        click.echo(json.dumps([str(path) for path in paths]))
    else:
        click.echo("\n".join(str(path) for path in paths))


cli.add_command(eligibility)
cli.add_command(examples)
cli.add_command(personal)
cli.add_command(type_in_terminal)


def main() -> None:
    """The entry point of `fedge-agent`."""
    with errors_as_exit_status():
        cli()


def _load(config_path: Path) -> Settings:
    from fedge.edge_agent.settings import load  # noqa: PLC0415 -- as above

    return load(config_path)


def _words_told(settings: Settings) -> dict[str, float]:
    from fedge.edge_agent.word_ledger import FILE_NAME, WordLedger  # noqa: PLC0415 -- as above

    limit = settings.word_counts.epsilon_limit
    if not (settings.state_dir / FILE_NAME).exists():
        return {"answers": 0, "epsilon_spent": 0.0, "epsilon_limit": limit}
    with WordLedger(settings.state_dir) as told:
        return {
            "answers": told.answers(),
            "epsilon_spent": told.spent(),
            "epsilon_limit": limit,
        }


def _trainer(settings: Settings, workers: int) -> Trainer:
    from fedge.edge_agent.trainer.process import TrainerPool, TrainerProcess  # noqa: PLC0415 -- as above

    limits = settings.trainer.limits
    return TrainerProcess(limits) if workers == 1 else TrainerPool(workers, limits)
