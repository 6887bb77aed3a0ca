"""The example store: what is answered is kept, what is deleted is gone, and sides never mix."""

from __future__ import annotations

import random
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.edge_agent import example_store
from fedge.edge_agent.example_limits import SLACK, ExampleLimits
from fedge.edge_agent.example_store import ExampleStore, Typed
from fedge.edge_agent.example_text import (
    MAX_TEXT_CHARS,
    ROW_BYTES,
    Split,
    TextRefused,
    clean,
    normalise,
    side_of,
)
from fedge.edge_agent.settings import ExampleSettings
from fedge.schemas.errors import ConfigError, StoreError, StoreUnavailable
from tests.edge_agent.quick_disk import quick_folder
from tests.edge_agent.small_disks import small_disk

DAY_S = 86_400.0
NOW = 1_800_000_000.0


class Clock:
    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def texts(store: ExampleStore) -> list[str]:
    """What both sides give together, in no order."""
    return sorted(each.text for split in Split for each in store.read(split))


def bytes_of(folder: Path) -> bytes:
    """All files of a store together.

    Read by another process: closing one of them in this one would drop the locks that SQLite has.
    """
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return subprocess.run(["cat", *files], stdout=subprocess.PIPE, check=True).stdout


def in_a_process(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A real one, with pipes to it."""
    start = "import sys\nfrom pathlib import Path\n"
    start += "from fedge.edge_agent.example_store import *\n"
    start += "store = ExampleStore(Path(sys.argv[1]))\n"
    return subprocess.Popen(
        [sys.executable, "-c", start + script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def path() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder / "store" / "examples.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[ExampleStore]:
    with ExampleStore(path, clock=Clock()) as made:
        yield made


# ------------------------------------------------------------ texts


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("On my way", "On my way"),
        ("  two\r\nlines\t", "two lines"),
        ("a\x00b\x07\x1bc", "a b c"),
        ("a\u2028b\x85c", "a b c"),
        ("\ud83d\ude00 ok", "\U0001f600 ok"),
        ("cut \ud83d", "cut \ufffd"),
        ("👩\u200d👧 ક\u200dષ", "👩\u200d👧 ક\u200dષ"),
        ("inner  spaces stay", "inner  spaces stay"),
        ("x" * MAX_TEXT_CHARS, "x" * MAX_TEXT_CHARS),
    ],
)
def test_a_text_is_kept_as_it_was_typed_in_one_line_of_valid_unicode(
    typed: str, kept: str, store: ExampleStore
) -> None:
    store.add(typed)
    assert [each.text for each in store.last(1)] == [kept]


@pytest.mark.parametrize("typed", ["", "   ", "\n\x00\t", "\u2029", "\u00a0\u3000"])
def test_a_text_without_anything_is_refused(typed: str, store: ExampleStore) -> None:
    with pytest.raises(TextRefused, match="empty"):
        store.add(typed)


def test_a_text_that_is_too_long_is_refused_and_not_cut(store: ExampleStore) -> None:
    with pytest.raises(TextRefused, match="4,097 characters is too long"):
        store.add("x" * (MAX_TEXT_CHARS + 1))
    with pytest.raises(TextRefused, match="10,000,000 characters is too long"):
        store.add("\ud83d" * 10_000_000)
    assert texts(store) == []


def test_of_a_call_with_one_wrong_text_nothing_is_kept_and_the_error_says_which(
    store: ExampleStore,
) -> None:
    with pytest.raises(TextRefused, match="text 3: an empty text") as refused:
        store.add_all([Typed("a"), Typed("b"), Typed(" "), Typed("c")])
    assert refused.value.index == 2
    assert texts(store) == []


@pytest.mark.parametrize(
    "at",
    [-1.0, float("nan"), float("inf"), 10**400, True, "yesterday", NOW * 1000, NOW + 2 * DAY_S],
)
def test_a_time_at_which_nothing_can_be_typed_is_refused(at, store: ExampleStore) -> None:
    with pytest.raises(TextRefused, match="time"):
        store.add("a", at)
    assert texts(store) == []


def test_more_texts_than_a_call_may_bring_are_refused_as_they_come(
    store: ExampleStore, monkeypatch
) -> None:
    monkeypatch.setattr(example_store, "MAX_TEXTS", 10)
    endless = (Typed(f"text {n}") for n in iter(int, 1))
    with pytest.raises(TextRefused, match="at most 10 texts"):
        store.add_all(endless)
    assert texts(store) == []


@given(st.text(max_size=40))
def test_cleaning_and_normalising_again_change_nothing(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    try:
        kept = clean(text)
    except TextRefused:
        return
    assert clean(kept) == kept
    assert kept.encode().decode() == kept


# ------------------------------------------------------------ sides


SAME = ("Straße nach Köln", "  STRASSE\nNACH   KO\u0308LN ", "\uff53trasse nach köln")


def test_what_says_the_same_is_on_the_same_side(path: Path) -> None:
    seen = set()
    # Of a fair coin 40 throws are not all alike by chance, nor 40 pairs of sides equal.
    for number in range(40):
        with ExampleStore(path, ExampleLimits(hold_out=0.5), clock=Clock()) as store:
            for text in SAME:
                store.add(f"{text} {number}")
            found = {each.split for each in store.last(3)}
            assert len(found) == 1
            seen |= found
    assert seen == set(Split)


def test_a_text_that_was_forgotten_comes_back_on_its_side(path: Path) -> None:
    sentences = [f"sentence {number}" for number in range(60)]
    limits = ExampleLimits(hold_out=0.5)

    def sides() -> dict[str, Split]:
        with ExampleStore(path, limits, clock=Clock()) as store:
            store.add_all(map(Typed, sentences))
            return {each.text: each.split for each in store.last(len(sentences))}

    first = sides()
    with ExampleStore(path, limits) as store:
        store.forget_containing("1")
        store.forget_all()
    assert sides() == first
    assert set(first.values()) == set(Split)


def test_the_share_that_is_held_out_is_the_one_asked_for() -> None:
    secret, many = b"s" * 32, 20_000
    for share in (0.0, 0.01, 0.1, 0.5, 0.9):
        held = sum(side_of(f"text {n}", secret, share) is Split.HOLD_OUT for n in range(many))
        # Five standard deviations: once in two million runs by chance; and the secret is fixed.
        assert abs(held - share * many) <= 5 * (share * (1 - share) * many) ** 0.5


def test_two_devices_divide_differently(tmp_path: Path) -> None:
    divided = []
    for name in ("a", "b"):
        with ExampleStore(tmp_path / name, ExampleLimits(hold_out=0.5), clock=Clock()) as store:
            store.add_all(Typed(f"text {n}") for n in range(64))
            divided.append([each.split for each in store.last(64)])
    assert divided[0] != divided[1]


@given(
    st.binary(min_size=32, max_size=32),
    st.text(min_size=1, max_size=20),
    st.floats(0, 1, exclude_max=True),
)
def test_the_side_of_a_text_depends_on_nothing_but_what_it_says(secret, text, share) -> None:
    first = side_of(text, secret, share)
    assert side_of(normalise(text), secret, share) is first
    assert side_of(f"  {text}\t", secret, share) is first
    # A larger share only moves texts out of training.
    if first is Split.HOLD_OUT:
        assert side_of(text, secret, share + (1 - share) / 2) is Split.HOLD_OUT


def test_another_share_is_refused_until_everything_is_forgotten(path: Path) -> None:
    with ExampleStore(path, clock=Clock()) as store:
        store.add("a")
    with ExampleStore(path, ExampleLimits(hold_out=0.2), clock=Clock()) as other:
        for use in (lambda: other.add("b"), lambda: other.read(Split.TRAINING)):
            with pytest.raises(ConfigError, match=r"holds out 0\.1 .* is 0\.2: .*forget --all"):
                use()
        # What the owner asks of the store needs no share.
        assert other.count().training.examples + other.count().hold_out.examples == 1
        assert other.forget_all().examples == 1
        other.add("b")
        assert texts(other) == ["b"]


# ------------------------------------------------------------ order, ids, limits


def test_texts_are_read_in_the_order_typed_whenever_they_were_added(
    path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(example_store, "PAGE_TEXTS", 3)
    rng = random.Random(1)
    times = [NOW - rng.randrange(20) for _ in range(50)]
    with ExampleStore(path, clock=Clock()) as store:
        store.add_all(Typed(f"text {n}", at) for n, at in enumerate(times))
        expected = [f"text {n}" for n in sorted(range(50), key=lambda n: (times[n], n))]
        assert [each.text for each in store.last(100)] == expected
        for split in Split:
            read = [each.text for each in store.read(split)]
            assert read == [text for text in expected if text in set(read)]
        assert texts(store) == sorted(expected)


def test_what_is_added_while_reading_is_read_next_time(store: ExampleStore, monkeypatch) -> None:
    monkeypatch.setattr(example_store, "PAGE_TEXTS", 2)
    store.add_all(Typed(f"text {n}") for n in range(30))
    read = 0
    for _ in store.read(Split.TRAINING):
        store.add(f"more {read}")
        read += 1
    assert read <= 30


def test_an_id_is_never_given_twice(store: ExampleStore) -> None:
    first = [store.add(f"text {n}") for n in range(5)]
    store.forget_all()
    again = store.add("text 0")
    assert again not in first
    assert store.forget_ids(first).examples == 0
    assert store.forget_ids([again, 10**6]).examples == 1


def test_expired_texts_are_neither_kept_nor_read_and_raise_no_generation(path: Path) -> None:
    clock = Clock()
    with ExampleStore(path, ExampleLimits(keep_days=10), clock=clock) as store:
        assert store.add("too old already", NOW - 10 * DAY_S - 1) is None
        store.add("grey", NOW - 9 * DAY_S)
        store.add("young")
        generation = store.generation()
        assert texts(store) == ["grey", "young"]
        clock.now += 1.01 * DAY_S
        assert texts(store) == ["young"]
        assert store.count().training.examples + store.count().hold_out.examples == 1
        assert b"grey" not in bytes_of(path.parent)
        clock.now += 9 * DAY_S
        store.add("new")
        assert texts(store) == ["new"]
        assert store.generation() == generation


def test_a_sweep_takes_what_would_expire_soon_so_that_few_sweeps_do(
    path: Path, monkeypatch
) -> None:
    clock = Clock()
    with ExampleStore(path, ExampleLimits(keep_days=10), clock=clock) as store:
        rewritten = []
        rewrite = store._file._rewrite
        monkeypatch.setattr(
            store._file, "_rewrite", lambda wait_s: rewritten.append(clock.now) or rewrite(wait_s)
        )
        # A text an hour for 24 days; in the last 14 of them texts expire.
        for n in range(24 * 24):
            clock.now += 3600
            store.add(f"text {n}")
        sweeps = 14 / (10 * SLACK)
        assert sweeps * 0.8 <= len(rewritten) <= sweeps + 1
        oldest = store.last(10_000)[0].at
        assert 0 <= oldest - (clock.now - 10 * DAY_S) <= 10 * DAY_S * SLACK + 3600


def test_the_oldest_go_when_there_is_too_much_and_not_more_than_must(path: Path) -> None:
    limit = 100_000
    with ExampleStore(path, ExampleLimits(limit_bytes=limit), clock=Clock()) as store:
        rng = random.Random(3)
        added = []
        for n in range(600):
            text = f"text {n}:" + "é" * rng.randrange(300)
            clock_s = NOW - 1000 + n
            store.add(text, clock_s)
            added.append(text)
            if n % 50 == 0 or n > 560:
                kept = [each.text for each in store.last(1000)]
                size = sum(len(each.encode()) + ROW_BYTES for each in kept)
                assert kept == added[-len(kept) :]
                assert size <= limit
                if len(kept) < len(added):
                    assert size >= limit * (1 - SLACK) - 4 * MAX_TEXT_CHARS
                counts = store.count()
                assert counts.training.size_bytes + counts.hold_out.size_bytes == size


def test_the_settings_keep_what_the_store_keeps_by_itself() -> None:
    assert ExampleSettings().limits == ExampleLimits()
    assert ExampleSettings(keep_days=1, limit_bytes=65536, hold_out=0).limits == ExampleLimits(
        1, 65536, 0
    )


WORDS = st.sampled_from(["ann", "Bob", "ßig", "SSIG", "key", "\uff2b\uff25\uff39", "a b", "x"])
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(WORDS, min_size=1, max_size=4), st.integers(0, 12)),
        st.tuples(st.just("containing"), WORDS),
        st.tuples(st.just("before"), st.integers(0, 12)),
        st.tuples(st.just("ids"), st.lists(st.integers(1, 20), max_size=4)),
        st.tuples(st.just("all")),
        st.tuples(st.just("pass"), st.integers(0, 4)),
        st.tuples(st.just("reopen")),
    ),
    max_size=25,
)


@given(OPERATIONS)
@settings(max_examples=60, deadline=None)
def test_any_order_of_calls_leaves_what_a_plain_list_would(operations) -> None:
    """Times are whole days, so that the slack of a sweep (0.2 of 10 days) decides nothing."""
    with quick_folder() as folder:
        limits = ExampleLimits(keep_days=10.5, hold_out=0.5)
        clock = Clock()
        store = ExampleStore(folder / "s", limits, clock=clock)
        model: list[tuple[float, int, str]] = []
        sides: dict[str, Split] = {}
        forgets, next_id, first = 0, 1, store.generation()
        for name, *values in operations:
            match name:
                case "add":
                    words, days = values
                    text, at = " ".join(words), clock.now - days * DAY_S
                    number = store.add(text, at)
                    assert number == (next_id if days <= 10 else None)
                    if number is not None:
                        model.append((at, number, text))
                        next_id += 1
                case "containing":
                    wanted = normalise(values[0])
                    gone = [each for each in model if wanted in normalise(each[2])]
                    assert store.forget_containing(values[0]).examples == len(gone)
                    model = [each for each in model if each not in gone]
                    forgets += 1
                case "before":
                    moment = clock.now - values[0] * DAY_S
                    store.forget_before(moment)
                    model = [each for each in model if each[0] >= moment]
                    forgets += 1
                case "ids":
                    store.forget_ids(values[0])
                    model = [each for each in model if each[1] not in values[0]]
                    forgets += 1
                case "all":
                    assert store.forget_all().examples == len(model)
                    model, forgets = [], forgets + 1
                case "pass":
                    clock.now += values[0] * DAY_S
                case "reopen":
                    store.close()
                    store = ExampleStore(folder / "s", limits, clock=clock)
            model = sorted(each for each in model if each[0] >= clock.now - 10.5 * DAY_S)
            found = store.last(1000)
            assert [(each.at, each.id, each.text) for each in found] == model
            for split in Split:
                read = list(store.read(split))
                assert read == [each for each in found if each.split is split]
                for each in read:
                    assert sides.setdefault(normalise(each.text), split) is split
            counts = store.count()
            assert counts.erased
            assert counts.generation == store.generation() == first + forgets
            assert counts.training.examples + counts.hold_out.examples == len(model)
        store.close()


# ------------------------------------------------------------ deleting is real


def churn(store: ExampleStore, rng: random.Random, steps: int) -> set[str]:
    """Adds and expires until pages were split, merged and used again. The marks still there."""
    there: dict[int, str] = {}
    for step in range(steps):
        if rng.random() < 0.6 or not there:
            mark = f"<{step:08d}>"
            number = store.add(mark * rng.choice([1, 3, 10, 30, 100, 400]), NOW - rng.random())
            there[number] = mark
        else:
            number = rng.choice(list(there))
            with store._file.transaction():
                store._file.run("DELETE FROM examples WHERE id = ?", number)
            del there[number]
    return set(there.values())


def test_the_files_are_searched_where_deleting_alone_leaves_copies(tmp_path: Path) -> None:
    """So that the tests below can fail: rows deleted without an erasure can be found."""
    with (
        quick_folder() as folder,
        ExampleStore(folder / "s", clock=Clock()) as store,
    ):
        there = churn(store, random.Random(2), 400)
        data = bytes_of(folder)
        gone = {f"<{n:08d}>" for n in range(400)} - there
        assert any(mark.encode() in data for mark in gone)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_after_a_forget_no_byte_of_a_text_is_in_any_file(seed: int) -> None:
    rng = random.Random(seed)
    with (
        quick_folder() as folder,
        ExampleStore(folder / "s", clock=Clock()) as store,
    ):
        marks = {f"<{n:08d}>" for n in range(300)}
        there = churn(store, rng, 300)
        for mark in sorted(there)[::7]:
            assert store.forget_containing(mark).erased
            there.discard(mark)
            data = bytes_of(folder)
            assert {each for each in marks if each.encode() in data} == there
        [oldest] = [each.id for each in store.last(1000)[:1]]
        assert store.forget_ids([oldest]).examples == 1
        assert store.forget_before(NOW - 0.5).erased
        there = {each.text[:10] for each in store.last(1000)}
        data = bytes_of(folder)
        assert {each for each in marks if each.encode() in data} == there
        assert store.forget_all().erased
        assert b"<0" not in bytes_of(folder)
        # And the room is given back.
        assert store.count().file_bytes < 100_000


def test_what_expires_or_must_make_room_is_gone_from_the_files_too() -> None:
    with quick_folder() as folder:
        clock = Clock()
        limits = ExampleLimits(limit_bytes=100_000)
        with ExampleStore(folder / "s", limits, clock=clock) as store:
            for n in range(400):
                store.add(f"<{n:08d}>" * (1 + n % 90), NOW - 400 + n)
                if n % 25 == 0:
                    data = bytes_of(folder)
                    found = {k for k in range(n + 1) if f"<{k:08d}>".encode() in data}
                    assert found == {int(each.text[1:9]) for each in store.last(1000)}
            assert len(found) < 376
            clock.now += 29.999 * DAY_S
            list(store.read(Split.TRAINING))
            kept = {int(each.text[1:9]) for each in store.last(1000)}
            data = bytes_of(folder)
            assert {k for k in range(400) if f"<{k:08d}>".encode() in data} == kept


def test_the_files_are_for_this_user_only(store: ExampleStore, path: Path) -> None:
    store.add("a")
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert modes == {f"{path.name}{ending}": 0o600 for ending in ("", "-wal", "-shm")}


def test_a_phrase_is_found_in_any_case_width_and_spacing_and_within_words(
    store: ExampleStore,
) -> None:
    kept = ["my key is 123", "100% sure", "100 sure"]
    gone = ["My  HUNTER\u00a02 is", "\uff48\uff55\uff4e\uff54\uff45\uff52 2", "xhunter 23"]
    store.add_all(map(Typed, kept + gone))
    assert store.forget_containing(" hunter 2 ").examples == 3
    assert texts(store) == sorted(kept)
    assert store.forget_containing("100%").examples == 1
    with pytest.raises(TextRefused, match="empty"):
        store.forget_containing(" ")
    assert len(texts(store)) == 2


# ------------------------------------------------------------ generations


def test_each_forget_raises_the_generation_also_one_that_finds_nothing(
    store: ExampleStore, path: Path
) -> None:
    before = store.generation()
    store.add("a")
    assert store.generation() == before
    for number, forget in enumerate(
        (
            lambda: store.forget_ids([]),
            lambda: store.forget_before(0),
            lambda: store.forget_containing("never typed"),
            store.forget_all,
        ),
        1,
    ):
        done = forget()
        assert done.generation == store.generation() == before + number
    with ExampleStore(path) as other:
        assert other.generation() == before + 4


def test_a_store_that_was_deleted_does_not_begin_at_its_old_generation(path: Path) -> None:
    clock = Clock()
    with ExampleStore(path, clock=clock) as store:
        store.forget_all()
        before = store.generation()
    ExampleStore.remove(path)
    assert not any(path.parent.iterdir())
    clock.now += 1
    with ExampleStore(path, clock=clock) as store:
        assert store.generation() > before


# ------------------------------------------------------------ many at once


def test_a_forget_while_another_process_reads_is_done_at_once(
    path: Path, store: ExampleStore
) -> None:
    store.add_all(Typed(f"<{n:05d}> is a text of some length") for n in range(2000))
    reader = in_a_process(
        "generation = store.generation()\n"
        "seen = []\n"
        "for number, each in enumerate(store.read(Split.TRAINING)):\n"
        "    seen.append(each.id)\n"
        "    if number == 100:\n"
        "        print('in mid read', flush=True); sys.stdin.readline()\n"
        "print(len(seen), max(seen), store.generation() - generation)\n",
        path,
    )
    with reader:
        assert reader.stdout.readline() == "in mid read\n"
        assert store.forget_ids(range(1000, 3000)).erased
        data = bytes_of(path.parent)
        assert not [n for n in range(999, 2000) if f"<{n:05d}>".encode() in data]
        seen, highest, raised = map(int, reader.communicate("\n")[0].split())
    # It read on without an error, got nothing that was forgotten, and can know that it must stop.
    assert highest < 1000
    assert example_store.PAGE_TEXTS < seen < 1000
    assert raised == 1


HOLD = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("BEGIN")
db.execute("SELECT count(*) FROM examples").fetchall()
print("held", flush=True); sys.stdin.readline()
db.execute("COMMIT"); db.close()
print("let go", flush=True); sys.stdin.readline()
"""


def test_a_forget_that_cannot_be_finished_says_so_and_the_next_call_finishes_it(
    path: Path, store: ExampleStore, monkeypatch
) -> None:
    monkeypatch.setattr(example_store, "_FORGET_WAIT_S", 0.05)
    store.add("a secret of mine")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        done = store.forget_containing("secret")
        assert (done.examples, done.erased) == (1, False)
        assert texts(store) == []
        assert b"a secret" in bytes_of(path.parent)
        assert not store.count().erased
        # Adding goes on, and does not wait for the other each time.
        attempts = []
        monkeypatch.setattr(store._file, "_rewrite", attempts.append)
        for n in range(20):
            store.add(f"text {n}")
        assert attempts == []
        monkeypatch.undo()
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == "let go\n"
        with ExampleStore(path, clock=Clock()) as another:
            another.add("the next call")
            assert another.count().erased
        assert b"a secret" not in bytes_of(path.parent)
        assert store.forget_containing("never typed").erased
        holder.communicate("\n")


def test_what_was_deleted_and_not_erased_before_a_power_cut_is_erased_afterwards(
    path: Path,
) -> None:
    child = in_a_process(
        "import os, signal\n"
        "store.add('a secret of mine')\n"
        "store._file._rewrite = lambda wait_s: os.kill(os.getpid(), signal.SIGKILL)\n"
        "store.forget_all()\n",
        path,
    )
    child.communicate()
    assert child.returncode == -9
    assert b"a secret" in bytes_of(path.parent)
    with ExampleStore(path) as store:
        assert texts(store) == []
        assert store.count().erased
    assert b"a secret" not in bytes_of(path.parent)


def test_what_was_answered_before_kill_9_is_there_and_nothing_half(path: Path) -> None:
    rng = random.Random(5)
    answered: dict[int, str] = {}
    for life in range(3):
        child = in_a_process(
            "n = 0\n"
            "while True:\n"
            "    n += 1\n"
            "    print(store.add(f'life {sys.argv[2]} text {n}'), flush=True)\n"
            "    if n % 10 == 0:\n"
            "        store.add_all(Typed(f'batch {sys.argv[2]}.{n}') for _ in range(7))\n",
            path,
            life,
        )
        with child:
            until = rng.randrange(20, 80)
            for n in range(1, until):
                answered[int(child.stdout.readline())] = f"life {life} text {n}"
            child.kill()
            rest = child.stdout.read().split("\n")[:-1]
            answered |= {int(each): f"life {life} text {until + n}" for n, each in enumerate(rest)}
    with ExampleStore(path) as store:
        kept = store.last(10_000)
        assert store._file.rows("PRAGMA integrity_check") == [("ok",)]
        counts = store.count()
    assert counts.training.examples + counts.hold_out.examples == len(kept)
    by_id = {each.id: each.text for each in kept}
    assert answered.items() <= by_id.items()
    # Beyond what was answered at most one text of each life.
    assert sum(text.startswith("life") for text in by_id.values()) <= len(answered) + 3
    batches = [text for text in by_id.values() if text.startswith("batch")]
    assert batches
    assert {batches.count(each) for each in batches} == {7}


def test_many_processes_make_open_and_fill_one_store_at_once(path: Path) -> None:
    path.parent.mkdir()
    start = path.parent.parent / "start"
    children = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import sys, time\nfrom pathlib import Path\n"
                "from fedge.edge_agent.example_store import *\n"
                "while not Path(sys.argv[2]).exists(): time.sleep(0.001)\n"
                "with ExampleStore(Path(sys.argv[1])) as store:\n"
                "    for n in range(15):\n"
                "        print(store.add(f'{sys.argv[3]} {n}'))\n"
                "        list(store.read('training'))\n",
                path,
                start,
                str(k),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        for k in range(4)
    ]
    time.sleep(0.5)
    start.touch()
    ids = [int(line) for child in children for line in child.communicate()[0].split()]
    assert [child.returncode for child in children] == [0] * 4
    assert sorted(ids) == list(range(1, 61))
    with ExampleStore(path) as store:
        assert sorted(each.text for each in store.last(100)) == sorted(
            f"{k} {n}" for k in range(4) for n in range(15)
        )


def test_threads_may_share_a_store(store: ExampleStore) -> None:
    failures = []

    def work(k: int) -> None:
        try:
            for n in range(20):
                store.add(f"thread {k} text {n}")
                list(store.read(Split.TRAINING))
                store.count()
                if n == 10:
                    store.forget_containing(f"thread {k} text 3")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(texts(store)) == 4 * 19


def test_a_reader_holds_a_page_and_not_the_store(store: ExampleStore) -> None:
    store.add_all(Typed(f"{n} " + "x" * 500) for n in range(8000))
    tracemalloc.start()
    try:
        size = sum(len(each.text) for each in store.read(Split.TRAINING))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 3_000_000
    assert peak < 600_000


def test_an_app_that_adds_loads_nothing_but_the_standard_library() -> None:
    with quick_folder() as folder:
        child = in_a_process("store.add('a')\nprint(*sys.modules)\n", folder / "s")
        loaded = {name.partition(".")[0] for name in child.communicate()[0].split()}
    assert "sqlite3" in loaded
    assert not loaded & {"numpy", "onnxruntime", "paho", "pydantic", "click", "asyncio", "torch"}


# ------------------------------------------------------------ disks


def test_on_a_full_disk_nothing_changes_what_is_there_is_read_and_it_passes(
    tmp_path: Path,
) -> None:
    with small_disk(tmp_path / "disk", 1024 * 1024) as disk:
        path = disk.folder / "s"
        with ExampleStore(path, clock=Clock()) as store:
            store.add("before")
            store.add("a secret")
            disk.fill()
            for _ in range(3):
                with pytest.raises(StoreUnavailable, match="full"):
                    store.add_all(Typed(f"{n} " + "x" * 4000) for n in range(300))
            assert [each.text for each in store.last(2)] == ["before", "a secret"]
            assert texts(store) == ["a secret", "before"]
            disk.empty()
            store.add("after")
            assert store.forget_containing("secret").erased
            assert texts(store) == ["after", "before"]
            assert b"a secret" not in bytes_of(disk.folder)


def test_a_forget_on_a_full_disk_is_done_as_far_as_it_goes_and_finished_later(
    tmp_path: Path,
) -> None:
    with (
        small_disk(tmp_path / "disk", 4 * 1024 * 1024) as disk,
        ExampleStore(disk.folder / "s", clock=Clock()) as store,
    ):
        store.add_all(Typed(f"{n} " + "x" * 1000) for n in range(1000))
        store.add("a secret")
        assert store.forget_ids([]).erased
        # Room for the deletion, and not for writing the whole file again.
        disk.fill(leave_bytes=100_000)
        done = store.forget_containing("secret")
        assert (done.examples, done.erased) == (1, False)
        assert "a secret" not in texts(store)
        disk.empty()
        assert store.forget_ids([]).erased
        assert b"a secret" not in bytes_of(disk.folder)


def test_what_expired_on_a_full_disk_is_not_read(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1024 * 1024) as disk:
        clock = Clock()
        with ExampleStore(disk.folder / "s", clock=clock) as store:
            store.add_all(Typed(f"{n} " + "x" * 1000) for n in range(200))
            disk.fill()
            clock.now += 31 * DAY_S
            assert texts(store) == []
            assert store.last(10) == []
            disk.empty()
            store.add("after")
            assert texts(store) == ["after"]


def test_a_read_only_disk_is_told_as_unavailable(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "disk", 512 * 1024, "ro") as disk,
        pytest.raises(StoreUnavailable, match="Read-only"),
    ):
        ExampleStore(disk.folder / "s")


def test_a_file_that_another_program_has_locked_is_told_as_unavailable(
    path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(example_store, "_BUSY_S", 0.01)
    with ExampleStore(path) as store:
        store.add("a")
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        generation = store.generation()
        for use in (lambda: store.add("b"), store.forget_all):
            with pytest.raises(StoreUnavailable, match="locked"):
                use()
        assert (texts(store), store.generation()) == (["a"], generation)
        other.execute("ROLLBACK")
        store.add("b")
        assert texts(store) == ["a", "b"]
        other.close()


def test_a_damaged_file_is_told_as_damage_and_can_be_removed(path: Path) -> None:
    with ExampleStore(path) as store:
        store.add("a")
    path.write_bytes(b"this was a store " * 1000)
    with pytest.raises(StoreError, match="not a database") as error:
        ExampleStore(path)
    assert not isinstance(error.value, StoreUnavailable)
    ExampleStore.remove(path)
    with ExampleStore(path) as store:
        assert texts(store) == []


def test_a_file_of_a_newer_release_is_left_alone(path: Path) -> None:
    with ExampleStore(path) as store:
        store._file.run("PRAGMA user_version = 2")
    before = path.read_bytes()
    with pytest.raises(StoreError, match="newer release"):
        ExampleStore(path)
    assert path.read_bytes() == before
