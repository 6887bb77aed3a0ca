"""`fedge vocabulary`: a list of words from the fleet, told privately; and what that costs.

A word count is put into the store, where it outlives this command, and the coordinator that serves
the same store carries it out.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedge.coordinator.command_options import config_option, json_option
from fedge.coordinator.db_commands import open_store
from fedge.coordinator.running import reachable_coordinator, tell_to_look
from fedge.schemas.errors import ConfigError
from fedge.schemas.word_reports import MAX_EPSILON, MIN_EPSILON

if TYPE_CHECKING:
    from fedge.coordinator.settings import Settings
    from fedge.coordinator.store import Store, WordCountRecord

# Imports below are inside the commands, so that `fedge --help` does not load a database toolkit.

FLEETS = (100, 10_000, 1_000_000)
EPSILONS = (1.0, 2.0, 4.0, 8.0)
PUBLIC_CANDIDATES = 50_000
"""How many words of a public list are looked for."""
WORDFREQ = "wordfreq:"


class _WithCost(click.Command):
    """Ends its text with the table of what can be seen: computed, so that it cannot be wrong."""

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes both."""
        super().format_help_text(ctx, formatter)
        formatter.write_paragraph()
        for line in visibility_lines():
            formatter.write(f"    {line}\n")


@click.group()
def vocabulary() -> None:
    """Find out which words a fleet types, without learning what anybody types.

    \b
    Ask the devices:          fedge vocabulary collect --epsilon 4
    How many have answered:   fedge vocabulary list
    Make the list of words:   fedge vocabulary estimate --words 10000 --out words.txt
    End it early:             fedge vocabulary stop

    Only devices whose owners have agreed take part ([word_counts] in agent.toml). Each tells one
    noisy word. Small fleets see next to nothing: `fedge vocabulary collect --help` says how much.
    Then a public list, `fedge.coordinator.vocabularies.public_words`, is the better vocabulary.
    """


@vocabulary.command(cls=_WithCost)
@click.option(
    "--epsilon",
    type=click.FloatRange(MIN_EPSILON, MAX_EPSILON),
    default=4.0,
    show_default=True,
    help="The privacy that an answer costs its device; see above.",
)
@click.option(
    "--least-typed",
    type=click.IntRange(1, 1000),
    default=3,
    show_default=True,
    help="Words that a device's user typed less often are not drawn.",
)
@click.option(
    "--new-words",
    "new_only",
    is_flag=True,
    help="Draw only words that the vocabulary in use lacks: the rest drowns them.",
)
@click.option(
    "--deadline",
    "deadline_s",
    type=click.FloatRange(1, 30 * 86400),
    default=86400.0,
    show_default=True,
    metavar="SECONDS",
    help="From when the coordinator begins; what comes later does not count.",
)
@config_option
@json_option
def collect(
    *,
    epsilon: float,
    least_typed: int,
    new_only: bool,
    deadline_s: float,
    config_path: Path,
    as_json: bool,
) -> None:
    """Ask each device that agreed for one noisy word. This command does not wait for them.

    What a device does: it draws one word of those typed on it, by how often each was typed, throws
    all words into e^EPSILON + 1 buckets by a hash function that it has drawn, and names the bucket
    of its word about every second time, and any other bucket else. Only the hash function and the
    name of the bucket leave it.

    What that costs: whatever somebody believed before about what is typed on a device, its answer
    changes the odds by e^EPSILON at the most: 1 means 2.7 times, 2 means 7.4, 4 means 55, 8 means
    2,981. Up to 2 is strong protection. At 4 one word in 56 fits an answer, and about every second
    answer is noise. At 8 one word in 2,982 fits it: little is hidden from somebody who can guess.
    This holds against everybody, the operator and the broker too, and cannot be undone: what was
    told stays told. Costs of several word counts add up; each device stops at its own limit, and
    answers the same word count only ever with the same bytes.

    What can be seen: so many of the devices must draw a word for it to be found in every second
    word count, among 50,000 candidates. A device draws a word with the share that it has of what is
    typed there; of English, "the" has 5%, the 100th word 0.1%, the 1,000th 0.01%.
    """
    settings = _settings(config_path)
    with open_store(settings) as store:
        reachable_coordinator(settings.state_dir)
        record = store.request_word_count(
            epsilon=epsilon,
            least_typed=least_typed,
            new_only=new_only,
            deadline_s=deadline_s,
            at=time.time(),
        )
    pid = tell_to_look(settings.state_dir)
    if as_json:
        from fedge.coordinator import reports  # noqa: PLC0415 -- see the top of the file

        reports.print_json({"word_count": record, "coordinator": pid})
        return
    click.echo(
        f"word count {record.number}: epsilon {epsilon:g}, words typed {least_typed} times or more"
        + (", new ones only" if new_only else "")
    )
    if pid is None:
        click.echo("no coordinator is running: it begins at the next start of `fedge serve`")
    else:
        click.echo(
            f"told the coordinator (process {pid}); it ends {deadline_s:g} s after it begins"
        )


@vocabulary.command("list")
@config_option
@json_option
def list_all(config_path: Path, as_json: bool) -> None:
    """List every word count, with how many devices have answered."""
    from fedge.coordinator import reports  # noqa: PLC0415 -- see the top of the file

    with open_store(_settings(config_path)) as store:
        found = store.word_counts()
    if as_json:
        reports.print_json([{"word_count": record, "devices": n} for record, n in found])
        return
    table = reports.plain_table(
        "word count", "epsilon", "least typed", "words", "requested", "state", "devices"
    )
    for record, devices in found:
        table.add_row(
            str(record.number),
            f"{record.epsilon:g}",
            str(record.least_typed),
            "new" if record.new_only else "all",
            reports.utc_time(record.requested_at),
            _state(record),
            str(devices),
        )
    reports.console.print(table)


@vocabulary.command()
@click.argument("number", type=click.IntRange(1), required=False)
@config_option
def stop(number: int | None, config_path: Path) -> None:
    """End word count NUMBER, or the newest, before its time; what was told is kept."""
    settings = _settings(config_path)
    with open_store(settings) as store:
        reachable_coordinator(settings.state_dir)
        record, _ = _found(store, number)
        closed = store.close_word_count(record.number, "stopped by a command", at=time.time())
    tell_to_look(settings.state_dir)
    click.echo(f"word count {record.number}: {'stopped' if closed else 'had ended before'}")


@vocabulary.command()
@click.argument("number", type=click.IntRange(1), required=False)
@click.option(
    "--candidates",
    "source",
    default="wordfreq:en",
    show_default=True,
    metavar="wordfreq:LANGUAGE|FILE",
    help="The words to look for: the 50,000 most frequent ones of a language, or those of a file, "
    "one a line. Others cannot be found, whoever types them.",
)
@click.option(
    "--words", type=click.IntRange(1, 2**20), default=10_000, show_default=True,
    help="How many the list shall have: those found, then candidates in their order.",
)  # fmt: skip
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the list there, one word a line: a vocabulary for `read_words`.",
)
@config_option
@json_option
def estimate(
    *,
    number: int | None,
    source: str,
    words: int,
    out: Path | None,
    config_path: Path,
    as_json: bool,
) -> None:
    """Find the words that stand out in word count NUMBER, or the newest, and write a list.

    A word is found if its support is above what the luckiest of all candidates would reach by
    chance in one of 20 word counts. Fewer candidates are found more easily. It costs the devices
    nothing to do this again with others, and may be done before the deadline.

    Exit status: 0 done, also if no word was found; 1 failed; 2 asked wrongly, or nobody answered.
    """
    from fedge.coordinator import reports, word_estimates  # noqa: PLC0415 -- see the top of the file

    candidates = _candidates(source, words)
    with open_store(_settings(config_path)) as store:
        record, _ = _found(store, number)
        told = store.word_reports(record.number)
    if not told:
        raise ConfigError(
            f"no device has answered word count {record.number}: see `fedge vocabulary list`; a "
            "device takes part if [word_counts] in its agent.toml says so"
        )
    found = word_estimates.estimate(told, record.epsilon, candidates)
    listed = word_estimates.word_list(found, candidates, words)
    if out is not None:
        _write(out, listed)
    if as_json:
        reports.print_json(
            {"word_count": record, "estimate": found, "out": None if out is None else str(out),
             "words": len(listed)}
        )  # fmt: skip
        return
    error, visible = found.standard_error or 0.0, found.visible_share
    click.echo(
        f"word count {record.number}: {found.devices:,} devices have answered, epsilon "
        f"{record.epsilon:g}"
    )
    click.echo(f"standard error: {100 * error:.2g}% of the devices")
    if visible is None:
        click.echo("too few devices: not even a word that all of them draw would be found")
    else:
        click.echo(f"a word is found if about {100 * visible:.2g}% of the devices draw it")
    click.echo(
        f"had no word to draw: {_between(max(0.0, found.without_words), error)} of the devices"
    )
    click.echo(f"stood out: {len(found.found)} of {found.candidates:,} candidates")
    for one in found.found[:20]:
        click.echo(f"  {one.word}  {_between(one.share, error)}")
    if out is not None:
        rest = len(listed) - min(len(found.found), len(listed))
        click.echo(
            f"{out}: {len(listed):,} words, {rest:,} of them from the candidates as they are"
        )


def visibility_lines() -> list[str]:
    """The table of what can be seen, for each fleet and epsilon."""
    from fedge.coordinator.word_estimates import visible_share  # noqa: PLC0415 -- see the top

    lines = ["devices    " + "".join(f"{f'epsilon {one:g}':>12}" for one in EPSILONS)]
    for devices in FLEETS:
        shares = [visible_share(devices, one, PUBLIC_CANDIDATES) for one in EPSILONS]
        told = "".join(f"{_percent(share):>12}" for share in shares)
        lines.append(f"{devices:<11,}{told}")
    return lines


def _percent(share: float | None) -> str:
    return "no word" if share is None else f"{100 * share:.2g}%"


def _between(share: float, error: float) -> str:
    return f"{100 * share:.2g}% ± {100 * error:.2g}%"


def _candidates(source: str, words: int) -> tuple[str, ...]:
    from fedge.coordinator.vocabularies import public_words, read_words  # noqa: PLC0415 -- as above

    if source.startswith(WORDFREQ):
        language = source.removeprefix(WORDFREQ)
        return tuple(public_words(language, max(PUBLIC_CANDIDATES, words)))
    return read_words(Path(source)).words


def _write(out: Path, words: tuple[str, ...]) -> None:
    from fedge.schemas.words import Vocabulary  # noqa: PLC0415 -- as above

    try:
        out.write_bytes(Vocabulary(words).encode())
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}") from error


def _found(store: Store, number: int | None) -> tuple[WordCountRecord, int]:
    known = {record.number: (record, devices) for record, devices in store.word_counts()}
    if not known:
        raise ConfigError("there is no word count yet: `fedge vocabulary collect` begins one")
    wanted = max(known) if number is None else number
    if wanted not in known:
        raise ConfigError(f"there is no word count {wanted}; `fedge vocabulary list` shows them")
    return known[wanted]


def _state(record: WordCountRecord) -> str:
    if record.closed_at is not None:
        return f"ended: {record.reason}"
    return "under way" if record.opened_at is not None else "waits for the coordinator"


def _settings(config_path: Path) -> Settings:
    from fedge.coordinator.settings import load  # noqa: PLC0415 -- as above

    return load(config_path)
