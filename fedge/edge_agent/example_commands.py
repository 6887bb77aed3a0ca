"""`fedge-agent examples`: give the device texts to learn from, see how many there are, forget them.

Each command opens the store for a moment, beside a running agent or without one.
"""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from fedge.edge_agent.command_options import config_option, json_option
from fedge.schemas.errors import ConfigError, StoreError, StoreUnavailable
from fedge.schemas.process import EXIT_FAILED

if TYPE_CHECKING:
    from fedge.edge_agent.example_store import Counts, ExampleStore, Forgotten, Typed

# Imports below are inside the commands, as in `fedge.edge_agent.cli`.

MAX_LINE_BYTES = 65_536
"""Longer than any line with a text that is kept, however it is escaped."""


@click.group()
def examples() -> None:
    """Give this device texts to learn from, count them, forget them.

    \b
    One message:              fedge-agent examples add "On my way home"
    A line each:              fedge-agent examples add - < messages.txt
    With times:               fedge-agent examples add --jsonl messages.jsonl
    How many:                 fedge-agent examples count
    What must never be seen:  fedge-agent examples forget --containing "hunter2"
    Everything:               fedge-agent examples forget --all

    The texts are in examples.sqlite in state_dir, readable by this user only, and never leave the
    device. They go by age and for room as [examples] in the configuration says. The commands work
    whether or not an agent runs.
    """


@examples.command()
@click.argument("texts", nargs=-1)
@config_option
@click.option(
    "--jsonl",
    "jsonl_path",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
    help='A file of lines {"text": …, "at": …}; `at`, in seconds since 1970, may be left out.',
)
@click.option("--user", help='Of a file of lines {"user": …, "text": …}, only the lines of USER.')
@json_option
def add(
    texts: tuple[str, ...],
    config_path: Path,
    jsonl_path: Path | None,
    user: str | None,
    as_json: bool,
) -> None:
    """Add each TEXT, a sentence or message as it was typed; `-` adds each line of the input.

    All of them are on the disk when this ends, or none: a text that is empty or longer than 4096
    characters stops it, and the error names the line. Lines without a text are skipped.

    About a tenth of what is added is never trained on, only measured on, the same sentence always
    on the same side. Prints how many were added; with --json their ids, for `forget --id`, and
    null for a text that was typed longer ago than keep_days.
    """
    from fedge.edge_agent.example_text import TextRefused  # noqa: PLC0415 -- see the top

    if bool(texts) == (jsonl_path is not None):
        raise click.UsageError('say what to add: TEXT in quotes, "-" for lines, or --jsonl FILE')
    if user is not None and jsonl_path is None:
        raise click.UsageError("--user chooses lines of --jsonl FILE")
    _warn_if_not_trained_on(config_path)
    source = "-" if jsonl_path is None else str(jsonl_path)
    name = "the input" if source == "-" else source
    places: list[str] = []
    with _store(config_path) as store:
        try:
            if jsonl_path is None and texts != ("-",):
                ids = store.add_all(_of_arguments(texts, places))
            else:
                with click.open_file(source, "rb") as file:
                    if jsonl_path is None:
                        ids = store.add_all(_of_lines(file, name, places))
                    else:
                        ids = store.add_all(_of_file(file, name, user, places))
        except TextRefused as error:
            place = places[error.index] if error.index < len(places) else name
            raise ConfigError(f"{place}: {error.reason}; nothing was added") from error
    if user is not None and not ids:
        raise ConfigError(f"{name} has no line of the user {user!r}")
    if as_json:
        click.echo(json.dumps({"ids": ids}))
        return
    old = ids.count(None)
    click.echo(f"{len(ids) - old} added")
    if old:
        click.echo(f"{old} were typed longer ago than keep_days in [examples], and not kept")


@examples.command()
@config_option
@json_option
def count(config_path: Path, as_json: bool) -> None:
    """Show how many texts there are to train on and to measure on, how large and how old.

    `generation` changes with each `forget`. `erased` is false while another program keeps bytes of
    deleted texts from being overwritten; that is tried again by itself.
    """
    with _store(config_path) as store:
        counts = store.count()
    if as_json:
        click.echo(json.dumps(asdict(counts)))
    else:
        click.echo(_table(counts))


@examples.command("list")
@config_option
@click.option(
    "--last",
    "number",
    type=click.IntRange(1, 100_000),
    default=10,
    show_default=True,
    help="How many, counted from the one typed last.",
)
@json_option
def list_texts(config_path: Path, number: int, as_json: bool) -> None:
    """Show the texts that were typed last, with their ids, on this screen only."""
    with _store(config_path) as store:
        found = store.last(number)
    if as_json:
        click.echo(json.dumps({"examples": [asdict(each) for each in found]}))
        return
    for each in found:
        click.echo(f"{each.id:>8}  {_when(each.at)}  {each.split.value:<8}  {each.text}")


@examples.command()
@config_option
@click.option("--all", "everything", is_flag=True, help="All texts. Asks, unless --yes is given.")
@click.option(
    "--before",
    type=click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S"]),
    help="What was typed before this day or moment, in this device's time zone.",
)
@click.option(
    "--containing",
    metavar="PHRASE",
    help='What contains PHRASE, in any case or spacing, also within words: "ann" takes "Planning".',
)
@click.option("--id", "ids", type=int, multiple=True, help="The text of this id; may be repeated.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def forget(  # noqa: PLR0917 -- click calls it by name
    config_path: Path,
    everything: bool,
    before: datetime | None,
    containing: str | None,
    ids: tuple[int, ...],
    yes: bool,
    as_json: bool,
) -> None:
    """Forget texts for good: no byte of them is left in any file of the store.

    A training that goes on at this moment is told, and its result is thrown away. What earlier
    versions of the model learned stays in them.

    Exit status: 0 forgotten and erased; 1 failed, or forgotten, but another program keeps their
    bytes from being overwritten yet; 2 asked wrongly.
    """
    asked = (everything, before is not None, containing is not None, bool(ids))
    if asked.count(True) != 1:
        raise click.UsageError("say what to forget: --all, --before, --containing or --id")
    if everything:
        if not yes:
            click.confirm("Forget all texts of this device?", abort=True, err=True)
        done = _forget_all(config_path)
    else:
        with _store(config_path) as store:
            if before is not None:
                done = store.forget_before(before.timestamp())
            elif containing is not None:
                done = store.forget_containing(containing)
            else:
                done = store.forget_ids(ids)
    if as_json:
        click.echo(json.dumps(asdict(done)))
    else:
        click.echo(f"{done.examples} forgotten")
    if not done.erased:
        click.echo(
            "error: forgotten, but bytes of them are left in the file: another program is reading "
            "it, or the disk is full. The next use of the store tries again, and so does this "
            "command; `fedge-agent examples count` tells",
            err=True,
        )
        sys.exit(EXIT_FAILED)


def _forget_all(config_path: Path) -> Forgotten:
    from fedge.edge_agent.example_store import (  # noqa: PLC0415 -- see the top
        FILE_NAME,
        ExampleStore,
    )
    from fedge.edge_agent.settings import load  # noqa: PLC0415 -- see the top

    try:
        with _store(config_path) as store:
            return store.forget_all()
    except StoreUnavailable:
        raise
    except StoreError as error:
        # Too damaged to be asked, or of a newer release; the wish holds all the same.
        click.echo(f"{error.__cause__ or error}; its files are deleted", err=True)
        ExampleStore.remove(load(config_path).state_dir / FILE_NAME)
        with _store(config_path) as store:
            return store.forget_all()


def _warn_if_not_trained_on(config_path: Path) -> None:
    from fedge.edge_agent.example_store import FILE_NAME  # noqa: PLC0415 -- see the top
    from fedge.edge_agent.settings import load  # noqa: PLC0415 -- see the top

    settings = load(config_path)
    kept, data = settings.state_dir / FILE_NAME, settings.data
    if data is None or not data.is_store or data.path.resolve() != kept.resolve():
        click.echo(
            f"note: this device does not train on what is added: its [data] is not {kept} with "
            'format = "store"',
            err=True,
        )


@contextmanager
def _store(config_path: Path) -> Iterator[ExampleStore]:
    from fedge.edge_agent.example_store import ExampleStore  # noqa: PLC0415 -- see the top

    try:
        with ExampleStore.configured(config_path) as store:
            yield store
    except StoreUnavailable:
        raise
    except StoreError as error:
        if not isinstance(error.__cause__, sqlite3.Error):
            raise
        raise StoreError(
            f"{error}. It is damaged: `fedge-agent examples forget --all` deletes it, and the "
            "next `add` begins another"
        ) from error


# ------------------------------------------------------------ what is added
# `places` gets where each text stands, for errors.


def _of_arguments(texts: Iterable[str], places: list[str]) -> Iterator[Typed]:
    from fedge.edge_agent.example_store import Typed  # noqa: PLC0415 -- see the top

    for number, text in enumerate(texts, 1):
        places.append(f"TEXT {number}")
        yield Typed(text)


def _of_lines(stream: IO[bytes], source: str, places: list[str]) -> Iterator[Typed]:
    from fedge.edge_agent.example_store import Typed  # noqa: PLC0415 -- see the top

    for place, line in _lines(stream, source):
        places.append(place)
        yield Typed(line)


def _of_file(
    stream: IO[bytes], source: str, user: str | None, places: list[str]
) -> Iterator[Typed]:
    from fedge.edge_agent.example_store import Typed  # noqa: PLC0415 -- see the top

    for place, line in _lines(stream, source):
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{place} is not JSON: {error}; nothing was added") from error
        whose, text, at = _fields(found, place)
        if whose is not None and user is None:
            raise ConfigError(
                f"{place} is of the user {whose!r}: a device learns from one user; choose with "
                "--user. Nothing was added"
            )
        if user is None or whose == user:
            places.append(place)
            yield Typed(text, at)


def _fields(found: Any, place: str) -> tuple[str | None, str, float | None]:
    if not isinstance(found, dict) or not isinstance(found.get("text"), str):
        raise ConfigError(f'{place} has no text: lines are {{"text": …}}; nothing was added')
    unknown = sorted(found.keys() - {"user", "text", "at"})
    if unknown:
        raise ConfigError(
            f"{place} has the unknown key {unknown[0]!r}; known are text, at and user. "
            "Nothing was added"
        )
    return found.get("user"), found["text"], found.get("at")


def _lines(stream: IO[bytes], source: str) -> Iterator[tuple[str, str]]:
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        place = f"{source}, line {number}"
        if len(line) > MAX_LINE_BYTES:
            raise ConfigError(f"{place} is longer than {MAX_LINE_BYTES} bytes; nothing was added")
        text = line.decode(errors="replace")
        if text.strip():
            yield place, text


# ------------------------------------------------------------ what is shown


def _table(counts: Counts) -> str:
    lines = []
    for name, side in (("training", counts.training), ("hold-out", counts.hold_out)):
        ages = ""
        if side.oldest is not None and side.newest is not None:
            ages = f", from {_when(side.oldest)} to {_when(side.newest)}"
        lines.append(f"{name:<12}{side.examples} texts, {side.size_bytes} bytes{ages}")
    lines.append(f"{'on disk':<12}{counts.file_bytes} bytes")
    lines.append(f"{'generation':<12}{counts.generation}")
    lines.append(f"{'erased':<12}{'yes' if counts.erased else 'not yet'}")
    return "\n".join(lines)


def _when(at: float) -> str:
    return datetime.fromtimestamp(at).astimezone().isoformat(" ", "seconds")
