"""`fedge db`: check, back up and restore what the coordinator keeps."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedge.coordinator.command_options import config_option, json_option
from fedge.schemas.errors import ConfigError, StoreError, StoreUnavailable
from fedge.schemas.process import EXIT_FAILED

if TYPE_CHECKING:
    from fedge.coordinator.checkup import Checkup
    from fedge.coordinator.settings import Settings
    from fedge.coordinator.store import Store

# Imports below are inside the commands, so that `fedge --help` does not load a database toolkit.

MIB = 1024 * 1024


@click.group()
def db() -> None:
    """Check, back up and restore the state: the database and its files.

    \b
    Is all well?                    fedge db check
    Every night, while it serves:   fedge db backup /backups/$(date +%F)
    After a lost disk:              fedge db restore /backups/2026-01-31

    The state is in state_dir, and in the places that [store] names. Copying state_dir by other
    means while the coordinator serves gives a database and files of different moments: use backup.
    """


@db.command()
@config_option
@json_option
def check(config_path: Path, as_json: bool) -> None:
    """Check that everything kept is whole, and that every promise was kept.

    Reads the database and every file that it names, and says what is wrong and what to do; how much
    space each part takes, how much is free, and what [retention] would free. Changes nothing, and
    may run while the coordinator serves; old files are deleted again when it is done.

    Exit status: 0 all is well, 1 there are problems, 2 asked wrongly.
    """
    from fedge.coordinator import checkup  # noqa: PLC0415 -- see the top of the file
    from fedge.coordinator.settings import load  # noqa: PLC0415 -- as above

    settings = load(config_path)
    try:
        with open_store(settings) as store, _progress("checked") as progress:
            found = checkup.check(
                store,
                settings.state_dir,
                settings.retention.wish,
                now=time.time(),
                progress=progress,
            )
    except StoreUnavailable:
        raise
    except StoreError as error:
        # So damaged that nothing else can be said of it.
        raise StoreError(f"{error}; {checkup.RESTORE}") from error
    if as_json:
        click.echo(json.dumps({"ok": not found.problems} | dataclasses.asdict(found), indent=2))
    else:
        _show_checkup(found)
    if found.problems:
        sys.exit(EXIT_FAILED)


@db.command()
@click.argument("path", type=click.Path(path_type=Path))
@config_option
@json_option
def backup(path: Path, config_path: Path, as_json: bool) -> None:
    """Back up everything to the new folder PATH, while the coordinator serves or not.

    The backup is the state as of one moment: the database (as an SQLite file, also if it is on
    PostgreSQL), every file that it names, and accepted updates of rounds that are open. It is read
    again and verified before it gets its name, so a folder of that name is a good backup. Keep it
    on another disk.

    Exit status: 0 done, 1 failed, and nothing is left; 2 asked wrongly.
    """
    from fedge.coordinator.backup import make_backup  # noqa: PLC0415 -- see the top of the file
    from fedge.coordinator.settings import load  # noqa: PLC0415 -- as above

    settings = load(config_path)
    with open_store(settings) as store, _progress("copied") as progress:
        manifest = make_backup(store, settings.state_dir, path, now=time.time(), progress=progress)
    if as_json:
        click.echo(manifest.model_dump_json(indent=2))
        return
    click.echo(
        f"{path}: population {manifest.population}, up to version {manifest.newest_version} and "
        f"round {manifest.newest_round or '-'}"
    )
    click.echo(
        f"{len(manifest.blobs)} files, {_mib(sum(manifest.blobs.values()))}; "
        f"{len(manifest.updates)} accepted updates of open rounds"
    )


@db.command()
@click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path))
@config_option
@json_option
@click.option(
    "--replace",
    is_flag=True,
    help="If there is a state, replace it. All of it is kept: in a folder replaced-… in state_dir, "
    "and tables of PostgreSQL in a schema of that name. Delete both when you are sure.",
)
@click.option(
    "--gap",
    type=click.IntRange(1, 10**9),
    default=1000,
    show_default=True,
    help="How many versions, and rounds, may have been made since the backup.",
)
def restore(path: Path, config_path: Path, as_json: bool, replace: bool, gap: int) -> None:
    """Make the state from the backup PATH; the next `fedge serve` goes on from there.

    Only while no coordinator serves, and only where there is no state, or with --replace. All of
    the backup is verified before anything is changed. It may be restored to another database or
    another place for files than it was made from: what [store] in the configuration says.

    Devices ignore versions and rounds with numbers that they have seen, so numbers never go back:
    the newest version of the backup is published again with a number that is --gap higher, and so
    are the rounds that follow. Rounds that were open are abandoned, with the reason.

    Exit status: 0 done, 1 failed, 2 asked wrongly.
    """
    from fedge.coordinator.old_state import Place  # noqa: PLC0415 -- see the top of the file
    from fedge.coordinator.restore import restore_backup  # noqa: PLC0415 -- as above
    from fedge.coordinator.settings import load  # noqa: PLC0415 -- as above

    settings = load(config_path)
    place = Place(settings.state_dir, settings.store.database, settings.store.blobs)
    with _progress("verified") as progress:
        done = restore_backup(
            path,
            place,
            population=settings.population,
            replace=replace,
            gap=gap,
            now=time.time(),
            progress=progress,
        )
    stopped = stopped_by(
        settings.round.versions,
        version=done.version,
        newest_version=done.manifest.newest_version,
    )
    facts = {
        "population": done.manifest.population,
        "made_at": done.manifest.made_at,
        "newest_version": done.manifest.newest_version,
        "version": done.version,
        "round": done.round,
        "abandoned": done.abandoned,
        "replaced": done.replaced,
        "aside": done.aside,
        "stopped": None if stopped is None else dataclasses.asdict(stopped),
        "damage": done.damage,
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    click.echo(
        f"population {done.manifest.population}, as of {_time(done.manifest.made_at)}: version "
        f"{done.version} has the weights of version {done.manifest.newest_version}; rounds go on "
        f"above {done.round}"
    )
    for number in done.abandoned:
        click.echo(f"round {number} was open and is abandoned; its updates stay in the backup")
    if done.replaced is not None:
        click.echo(f"the old state is in {settings.state_dir / done.replaced}")
        if settings.store.database is not None:
            click.echo(f"and its tables are in the schema {done.replaced}")
    if done.aside is not None:
        click.echo(
            f"files that this backup does not name are in {settings.state_dir / done.aside}: "
            "delete them when no other state wants them"
        )
    if done.damage is not None:
        click.echo(
            f"the old state is damaged ({done.damage}), so how far its numbers had gone is not "
            f"known: if more than {gap} versions or rounds were made since the backup, restore "
            "again with a larger --gap"
        )
    click.echo("start `fedge serve`: it publishes that version")
    if stopped is not None:
        click.echo(stopped.said)


def open_store(settings: Settings) -> Store:
    """The state that the configuration names, for a command that looks.

    Raises as `Store.open` does, and `ConfigError` if it is another population's.
    """
    from fedge.coordinator.store import Store  # noqa: PLC0415 -- see the top of the file

    store = Store.open(settings.state_dir, settings.store.database, blobs=settings.store.blobs)
    try:
        _check_population(store, settings)
    except BaseException:
        store.close()
        raise
    return store


def _check_population(store: Store, settings: Settings) -> None:
    found = store.population()
    if found not in (None, settings.population):
        raise ConfigError(
            f"the state in {settings.store.database or settings.state_dir.resolve()} belongs to "
            f"population {found!r}, and the configuration says {settings.population!r}"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Stopped:
    """Why no round begins after a restore. `versions`: what `[round] versions` is.

    `version`: the number that it would have to be above. `raise_to`: for as many versions as were
    still to come when the backup was made; None if none were.
    """

    versions: int
    version: int
    raise_to: int | None

    @property
    def said(self) -> str:
        """For people."""
        how = "below" if self.versions < self.version else "not above"
        wish = "" if self.raise_to is None else f" (to {self.raise_to} for as many as before)"
        return (
            f"[round] versions = {self.versions} is {how} {self.version}: no round begins until "
            f"you raise it{wish}"
        )


def stopped_by(versions: int | None, *, version: int, newest_version: int) -> Stopped | None:
    """Whether `[round] versions` ends training at the `version` that a restore went on with.

    `newest_version`: what that was called in the backup.
    """
    if versions is None or versions > version:
        return None
    to_come = versions - newest_version
    return Stopped(versions, version, version + to_come if to_come > 0 else None)


def _show_checkup(found: Checkup) -> None:
    sizes, would = found.sizes, found.collectable
    for name, value in {
        "population": found.population or "-",
        "database": f"{found.database}, schema {found.schema}",
        "versions": f"{found.versions}, with {found.blobs} files",
        "rounds": str(found.rounds),
        "space": f"database {_mib(sizes.database)}, files {_mib(sizes.blobs)}, uploads "
        f"{_mib(sizes.uploads)}, other {_mib(sizes.other)}",
        "free": _mib(found.free_bytes),
        "to be freed": f"{_mib(would.bytes_freed)}: files of {would.versions} versions and "
        f"leftovers ({would.blobs} files), details of {would.rounds} rounds, {would.devices} "
        f"devices, {would.evaluations} evaluations, {would.rollouts} rollouts, "
        f"{would.word_counts} word counts",
    }.items():
        click.echo(f"{name:<12}{value}")
    for problem in found.problems:
        click.echo(f"problem: {problem.what}\n         {problem.advice}")
    if not found.problems:
        click.echo("all is well")


@contextmanager
def _progress(word: str) -> Iterator[Callable[[int, int], None]]:
    """Says on stderr how far long work is: in place on a terminal, else a line now and then."""
    on_terminal = sys.stderr.isatty()
    pause_s = 0.1 if on_terminal else 10.0
    said_at = time.monotonic()
    written = False

    def progress(done: int, files: int) -> None:
        nonlocal said_at, written
        now = time.monotonic()
        if now - said_at >= pause_s:
            said_at, written = now, True
            start, end = ("\r", "") if on_terminal else ("", "\n")
            click.echo(f"{start}{word} {done} of {files} files{end}", nl=False, err=True)

    yield progress
    if written and on_terminal:
        click.echo("\r\033[K", nl=False, err=True)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:,.1f} MiB"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
