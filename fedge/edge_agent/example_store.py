"""What is typed on this device, kept here to learn from: one SQLite file, private to its user.

    from pathlib import Path
    from fedge.edge_agent.example_store import ExampleStore

    with ExampleStore.configured(Path("agent.toml")) as store:
        number = store.add("On my way home")    # on the disk when this returns
        store.forget_containing("way home")     # gone from the disk when this returns

Apps add; the training process reads; nothing is ever changed. Several processes may do all of that
at the same time. Texts leave only by `forget_…`, by age (`keep_days`) or for room (`limit_bytes`).
The last two need no background work: they are done by whichever call comes next.

**Deleting is real.** After a deletion no byte of the text is in any file of the store; how, says
`fedge.edge_agent.erasable_file`. For that no other process may be in mid read: `read` goes in
pages, each a moment long. Where some other program holds on to the file, or there is no room to
rewrite it, `Forgotten.erased` is false, and the next call that adds, reads or forgets tries again.
What a flash card keeps of blocks that were given back, no program can reach: encrypt the disk.

**Generations.** `generation` rises with each `forget_…`, also one that finds nothing: what it names
may have been read before it expired. Whoever learns from texts asks for it before the first `read`
and again before the result is used or sent; if it has changed, the result must be thrown away.
Compare for equality only: a new file begins at the time of its making, so it never repeats the
numbers of one that was deleted. Where an agent has its state in the folder of the file, its
personal model and its suspended training are removed with each `forget_…`
(`fedge.edge_agent.personal_files`); what writes one holds the store (`held`).

**Two sides.** A keyed hash of what a text says puts it into the training or the hold-out side, for
good: the same sentence is on the same side however often it is typed, forgotten or not. So the
share is fixed when the file begins; only `forget_all` lets another one in.

Times are the device's wall clock, which expiry cannot do without: while it is ahead, texts expire
early, and while it is behind, late.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fedge.edge_agent.erasable_file import ErasableFile, remove_files
from fedge.edge_agent.example_limits import DEFAULT_LIMITS, ExampleLimits
from fedge.edge_agent.example_text import (
    ROW_BYTES,
    Split,
    TextRefused,
    check_time,
    clean,
    normalise,
    side_of,
)
from fedge.edge_agent.personal_files import forget_learned
from fedge.schemas.closing import Closing
from fedge.schemas.errors import ConfigError, StoreUnavailable
from fedge.schemas.logs import EventLog

log = EventLog(__name__)

FILE_NAME = "examples.sqlite"
"""In the agent's `state_dir`."""
MAX_TEXTS = 100_000
"""In one call of `add_all`, which is one transaction: others wait for it."""
PAGE_TEXTS = 256
"""What a reader holds in memory, and reads at a time."""
_BUSY_S = 5.0
"""What a call waits for the transactions of others, a rewriting of the file among them."""
_FORGET_WAIT_S = 2.0
"""What a forget waits until no other process is in mid read."""
_SWEEP_WAIT_S = 0.05
"""The same for what was not asked for: it is tried again."""
_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS examples (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at REAL NOT NULL,
    held_out INTEGER NOT NULL,
    text TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS examples_by_time ON examples (at);
CREATE TABLE IF NOT EXISTS sides (
    held_out INTEGER PRIMARY KEY,
    examples INTEGER NOT NULL,
    text_bytes INTEGER NOT NULL
) STRICT;
CREATE TRIGGER IF NOT EXISTS counted AFTER INSERT ON examples BEGIN
    UPDATE sides SET examples = examples + 1,
        text_bytes = text_bytes + length(CAST(new.text AS BLOB)) WHERE held_out = new.held_out;
END;
CREATE TRIGGER IF NOT EXISTS discounted AFTER DELETE ON examples BEGIN
    UPDATE sides SET examples = examples - 1,
        text_bytes = text_bytes - length(CAST(old.text AS BLOB)) WHERE held_out = old.held_out;
END;
INSERT OR IGNORE INTO sides VALUES (0, 0, 0), (1, 0, 0);
"""
# As `(at, id) > (?1, ?2)`, for which SQLite would search the index by time alone: slow where many
# texts have the same.
_PAGE = """
SELECT * FROM (
    SELECT id, at, held_out, text FROM examples
    WHERE at = ?1 AND id > ?2 AND id <= ?3 AND held_out = ?4 ORDER BY at, id LIMIT ?5
) UNION ALL SELECT * FROM (
    SELECT id, at, held_out, text FROM examples
    WHERE at > ?1 AND id <= ?3 AND held_out = ?4 ORDER BY at, id LIMIT ?5
) ORDER BY at, id LIMIT ?5
"""


@dataclass(frozen=True, slots=True)
class Typed:
    """A text and when it was typed, in seconds since the epoch; None: now."""

    text: str
    at: float | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """A text that is kept. `at`: seconds since the epoch."""

    id: int
    at: float
    split: Split
    text: str


@dataclass(frozen=True, slots=True)
class SideCount:
    """One side. `size_bytes`: as they count towards the limit. Times: None if there is no text."""

    examples: int
    size_bytes: int
    oldest: float | None
    newest: float | None


@dataclass(frozen=True, slots=True)
class Counts:
    """What is kept.

    `file_bytes`: of the file and its log. `erased`: false while bytes of deleted texts are left.
    """

    training: SideCount
    hold_out: SideCount
    file_bytes: int
    generation: int
    erased: bool


@dataclass(frozen=True, slots=True)
class Forgotten:
    """`examples`: how many are forgotten, and from now on neither read nor counted.

    `erased`: whether their bytes are gone, too; if not, another program holds on to the file, or
    the disk is full, and the next call tries again.
    """

    examples: int
    generation: int
    erased: bool


class ExampleStore(Closing):
    """The file at `path`, made when absent. Any thread may call; threads take turns.

    `clock`: seconds since the epoch.

    This and every method raises `StoreUnavailable` if the disk is full, read-only or locked by
    somebody else; nothing was changed then. `StoreError`: the file is damaged; see `remove`.
    """

    def __init__(
        self,
        path: Path,
        limits: ExampleLimits = DEFAULT_LIMITS,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._limits = limits
        self._clock = clock
        self._file = ErasableFile(
            path,
            f"use the examples in {path}",
            _SCHEMA,
            version=_SCHEMA_VERSION,
            facts={"secret": secrets.token_bytes(32), "generation": int(clock() * 1000)},
            busy_s=_BUSY_S,
        )

    @classmethod
    def configured(cls, config_path: Path) -> Self:
        """The store of the agent whose settings are in `config_path`, with its `[examples]`.

        Also raises `ConfigError`, if the settings cannot be read.
        """
        from fedge.edge_agent.settings import load  # noqa: PLC0415 -- who has a path needs no settings

        settings = load(config_path)
        return cls(settings.state_dir / FILE_NAME, settings.examples.limits)

    @staticmethod
    def remove(path: Path) -> None:
        """Deletes the files of a store, unread: for one that is too damaged to be opened.

        What was learned from them goes with them, as with a `forget_…`. Raises `StoreUnavailable`
        if the disk cannot be written now.
        """
        forget_learned(path.parent)
        remove_files(path)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    # ------------------------------------------------------------ adding

    def add(self, text: str, at: float | None = None) -> int | None:
        """Keeps one text; see `add_all`. Its id."""
        return self.add_all([Typed(text, at)])[0]

    def add_all(self, texts: Iterable[Typed]) -> list[int | None]:
        """Keeps all of the texts, cleaned as `clean` says, or none. They are on the disk then.

        Returns their ids, which are never used again; None for a text that was typed longer ago
        than texts are kept.

        Raises `TextRefused`, with the index, for a text or time that cannot be, or for more than
        `MAX_TEXTS`. `ConfigError` if the share that is held out is not the one of the file.
        """
        now = self._clock()
        typed = [_checked(index, each, now) for index, each in enumerate(texts)]
        oldest = self._limits.oldest(now)
        with self._file.transaction():
            self._agree_on_share(begin=True)
            secret = self._file.fact("secret")
            ids = [None if at < oldest else self._insert(text, at, secret) for text, at in typed]
            self._limits.apply(self._file, now)
        self._file.erase(_SWEEP_WAIT_S)
        return ids

    # ------------------------------------------------------------ reading

    def read(self, split: Split) -> Iterator[Example]:
        """The texts of one side in the order typed, from a few of them in memory at a time.

        Those that were there at the call, less those that are forgotten meanwhile: `generation`
        tells. At most `PAGE_TEXTS` that were already in hand may still come after a forget.

        Raises `ConfigError` as `add_all` does; the rest while it goes on, too.
        """
        self._tidy()
        self._agree_on_share()
        last = self._file.value("SELECT coalesce(max(id), 0) FROM examples")
        return self._pages(split, self._limits.oldest(self._clock()), last)

    def last(self, number: int) -> list[Example]:
        """The `number` texts that were typed last, of both sides, in the order typed."""
        self._tidy()
        oldest = self._limits.oldest(self._clock())
        rows = self._file.rows(
            "SELECT id, at, held_out, text FROM examples WHERE at >= ? "
            "ORDER BY at DESC, id DESC LIMIT ?",
            oldest,
            number,
        )
        return [_example(row) for row in reversed(rows)]

    def count(self) -> Counts:
        """How much there is on each side."""
        self._tidy()
        with self._file.snapshot():
            return Counts(
                training=self._side(Split.TRAINING),
                hold_out=self._side(Split.HOLD_OUT),
                file_bytes=self._file.size_bytes(),
                generation=self.generation(),
                erased=self._file.erased(),
            )

    def generation(self) -> int:
        """Changes with each `forget_…` of any process, see the top of the file. Cheap."""
        return int(self._file.fact("generation"))

    @contextmanager
    def held(self) -> Iterator[int]:
        """The generation, which stays as it is meanwhile: others wait that add or forget."""
        with self._file.transaction():
            yield self.generation()

    # ------------------------------------------------------------ forgetting

    def forget_all(self) -> Forgotten:
        """Forgets every text. The next to add or read may name another share to hold out."""
        return self._forget("TRUE", fresh=True)

    def forget_before(self, moment: float) -> Forgotten:
        """Forgets what was typed before `moment`, in seconds since the epoch."""
        return self._forget("at < ?", moment)

    def forget_containing(self, phrase: str) -> Forgotten:
        """Forgets texts that contain `phrase`: after it none does, in whatever case or spacing.

        Also within words, and in scripts without spaces: "ann" takes "Planning", too. It is better
        that a text too many goes than that one stays. Raises `TextRefused` for an empty phrase.
        """
        wanted = normalise(clean(phrase))
        if not wanted:
            raise TextRefused("an empty phrase: every text contains it; use forget_all")
        with self._file.condition("contains_it", lambda text: wanted in normalise(text)):
            return self._forget("contains_it(text)")

    def forget_ids(self, ids: Iterable[int]) -> Forgotten:
        """Forgets the texts with these ids, as `add` returned them; those unknown are no error."""
        wanted = frozenset(ids)
        with self._file.condition("is_one", lambda number: number in wanted):
            return self._forget("is_one(id)")

    def _forget(self, which: str, *values: float, fresh: bool = False) -> Forgotten:
        with self._file.transaction():
            # First: cut off in between, the model is gone and the texts are there, never the other
            # way round.
            forget_learned(self._path.parent)
            found = self._file.run(f"DELETE FROM examples WHERE {which}", *values).rowcount  # noqa: S608 -- our own conditions
            self._file.mark_deleted()
            self._file.run("UPDATE facts SET value = value + 1 WHERE name = 'generation'")
            if fresh:
                self._file.run("DELETE FROM facts WHERE name = 'hold_out'")
            generation = self.generation()
        erased = self._file.erase(_FORGET_WAIT_S, insist=True)
        log.info("examples_forgotten", examples=found, generation=generation, erased=erased)
        return Forgotten(found, generation, erased)

    # ------------------------------------------------------------ age and room

    def _tidy(self) -> None:
        """Before a read: what is too old or too much goes. What cannot go now is not read."""
        now = self._clock()
        try:
            if self._limits.passed(self._file, now):
                with self._file.transaction():
                    self._limits.apply(self._file, now)
        except StoreUnavailable as error:
            log.warning("examples_not_swept", reason=str(error))
        self._file.erase(_SWEEP_WAIT_S)

    # ------------------------------------------------------------ rows

    def _agree_on_share(self, *, begin: bool = False) -> None:
        """`begin`: whether a file without a share gets the one of the settings."""
        share, known = self._limits.hold_out, self._file.fact("hold_out")
        if known is None:
            if begin:
                self._file.run("INSERT INTO facts VALUES ('hold_out', ?)", share)
        elif known != share:
            raise ConfigError(
                f"{self._path} holds out {known:g} of its texts, and hold_out in [examples] is "
                f"{share:g}: what was trained on must not be measured on. Set it to {known:g}, or "
                "begin anew with `fedge-agent examples forget --all`"
            )

    def _insert(self, text: str, at: float, secret: bytes) -> int | None:
        side = side_of(text, secret, self._limits.hold_out)
        return self._file.run(
            "INSERT INTO examples (at, held_out, text) VALUES (?, ?, ?)", at, _number(side), text
        ).lastrowid

    def _pages(self, split: Split, oldest: float, last: int) -> Iterator[Example]:
        at, number = oldest, 0
        side = _number(split)
        while rows := self._file.rows(_PAGE, at, number, last, side, PAGE_TEXTS):
            page = [_example(row) for row in rows]
            yield from page
            at, number = page[-1].at, page[-1].id

    def _side(self, split: Split) -> SideCount:
        [(examples, text_bytes)] = self._file.rows(
            "SELECT examples, text_bytes FROM sides WHERE held_out = ?", _number(split)
        )
        [(oldest, newest)] = self._file.rows(
            "SELECT min(at), max(at) FROM examples WHERE held_out = ?", _number(split)
        )
        return SideCount(examples, text_bytes + examples * ROW_BYTES, oldest, newest)


def _number(split: Split) -> int:
    return 1 if split is Split.HOLD_OUT else 0


def _checked(index: int, typed: Typed, now: float) -> tuple[str, float]:
    if index >= MAX_TEXTS:
        raise TextRefused(f"at most {MAX_TEXTS:,} texts in one call: make several", index)
    try:
        return clean(typed.text), now if typed.at is None else check_time(typed.at, now)
    except TextRefused as error:
        raise TextRefused(error.reason, index) from error


def _example(row: tuple[Any, ...]) -> Example:
    number, at, held_out, text = row
    return Example(number, at, Split.HOLD_OUT if held_out else Split.TRAINING, text)
