"""The device's part of a word count: which word, how private, once, and within its limit."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import asynccontextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from fedge.edge_agent import word_counts, word_sample
from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.example_limits import ExampleLimits
from fedge.edge_agent.example_store import FILE_NAME, ExampleStore
from fedge.edge_agent.typed_texts import TypedTexts
from fedge.edge_agent.word_counts import WordCounts, WordCountSettings
from fedge.edge_agent.word_ledger import FILE_NAME as LEDGER
from fedge.edge_agent.word_ledger import OverLimit, WordLedger
from fedge.edge_agent.word_sample import answer_to, count_words, drawn_word
from fedge.schemas.errors import StoreError
from fedge.schemas.logs import JsonFormatter
from fedge.schemas.messages import (
    WordCountAnnouncement,
    WordCountAnswer,
    WordCountHeard,
    encode,
)
from fedge.schemas.word_reports import NOTHING, bucket_count, bucket_of, truth_bound

LIMIT_S = 20.0
LIMITS = ExampleLimits(hold_out=0.0)
TEXTS = ["The cat sat.", "The cat!", "the dog 42", "hunter2 is my password"]


def asked(campaign: int = 1, **terms: Any) -> WordCountAnnouncement:
    return WordCountAnnouncement(
        **{"campaign": f"{campaign:032x}", "epsilon": 2.0, "least_typed": 2, **terms}
    )


def scripted(*values: int) -> Callable[[int], int]:
    left = list(values)
    return lambda n: left.pop(0)


# ---------------------------------------------------------------- one word of many


def test_a_word_is_drawn_by_how_often_it_was_typed():
    counts = count_words(TEXTS)
    assert counts["the"] == 3
    assert "42" not in counts
    assert "hunter2" not in counts
    drawn = Counter(drawn_word(counts, 2, (), scripted(at)) for at in range(5))
    assert drawn == {"the": 3, "cat": 2}
    assert drawn_word(counts, 2, {"the"}, scripted(1)) == "cat"


@pytest.mark.parametrize(("counts", "known"), [({}, ()), ({"cat": 2}, ()), ({"cat": 9}, {"cat"})])
def test_without_a_word_to_draw_nothing_is_told_as_any_word_is(counts, known):
    assert drawn_word(counts, 3, known, scripted()) == NOTHING
    answer = answer_to(asked(least_typed=3), counts, known, scripted(7, 0))
    assert answer.bucket == bucket_of(NOTHING, answer.key, bucket_count(2.0))


@pytest.mark.parametrize(
    ("asks", "own", "drawn"), [(1, 1, "dog"), (1, 3, "cat"), (3, 1, "cat"), (1, 6, NOTHING)]
)
def test_neither_side_is_told_of_words_that_the_other_finds_too_rare(asks, own, drawn):
    counts = {"dog": 2, "cat": 4}
    words = () if drawn == NOTHING else (0,)
    answer = answer_to(asked(least_typed=asks), counts, (), scripted(*words, 7, 0), least_typed=own)
    assert answer.bucket == bucket_of(drawn, answer.key, bucket_count(2.0))


def test_a_device_that_says_nothing_of_it_draws_no_word_that_was_typed_twice(folder, monkeypatch):
    drawn: list[str] = []
    real = word_sample.drawn_word

    def noted(counts, least_typed, known, draw):
        drawn.append(real(counts, least_typed, known, draw))
        return drawn[-1]

    monkeypatch.setattr(word_sample, "drawn_word", noted)
    floor = WordCountSettings(epsilon_limit=100.0).least_typed

    async def scenario() -> None:
        bench = Bench(folder, limit=100.0, least_typed=floor)
        async with bench.running():
            bench.words.see(free=True)
            for number in range(1, 31):
                bench.words.asked(asked(number, least_typed=1))
                await bench.until_sent(number)

    run(scenario())
    # "The" three times; "cat" twice, "hunter2" and "password" once.
    assert set(drawn) == {"the"}


def test_whatever_was_typed_an_answer_is_at_most_e_to_the_epsilon_times_as_likely():
    """By every way in which the code draws: the word, then the noise; for each of some keys."""
    typed = [{}, {"the": 5}, {"cat": 2}, {"the": 5, "cat": 2, "dog": 3}, {"a": 1, "dog": 9}]
    epsilon, buckets = 1.0, bucket_count(1.0)
    truth = Fraction(truth_bound(epsilon), 2**64)
    terms = asked(epsilon=epsilon)
    for key in (random.Random(seed).randrange(2**192) for seed in range(20)):
        by_texts = []
        for counts in typed:
            total = sum(count for count in counts.values() if count >= 2)
            likely: Counter[int] = Counter()
            for word in range(max(total, 1)):
                first = (word, key) if total else (key,)
                likely[answer_to(terms, counts, (), scripted(*first, 0)).bucket] += truth / max(
                    total, 1
                )
                for other in range(buckets - 1):
                    noise = (2**64 - 1, other)
                    bucket = answer_to(terms, counts, (), scripted(*first, *noise)).bucket
                    likely[bucket] += (1 - truth) / (buckets - 1) / max(total, 1)
            assert sum(likely.values()) == 1
            by_texts.append(likely)
        for bucket in range(buckets):
            of_one = [likely[bucket] for likely in by_texts]
            assert max(of_one) / min(of_one) <= Fraction("2.718281828459045235360287471352663")


# ---------------------------------------------------------------- the ledger


def answer(campaign: int = 1, bucket: int = 3) -> WordCountAnswer:
    return WordCountAnswer(campaign=f"{campaign:032x}", key="0" * 48, bucket=bucket)


def test_what_was_told_is_kept_and_the_first_answer_stays(tmp_path):
    first = answer(bucket=3)
    with WordLedger(tmp_path) as ledger:
        ledger.keep(first, 2.0, 10.0)
        ledger.keep(answer(bucket=5), 2.0, 10.0)
    with WordLedger(tmp_path) as ledger:
        told = ledger.told(first.campaign)
        assert told is not None
        assert encode(told.answer) == encode(first)
        assert not told.heard
        ledger.heard(first.campaign)
        assert ledger.told(first.campaign).heard
        assert (ledger.spent(), ledger.answers()) == (2.0, 1)
        assert ledger.told("0" * 32) is None


def test_the_limit_is_met_and_never_passed(tmp_path):
    with WordLedger(tmp_path) as ledger:
        for number in range(10):
            ledger.keep(answer(number), 0.1, 1.0)
        with pytest.raises(OverLimit, match=r"epsilon_limit = 1 in \[word_counts\]: 1 was spent"):
            ledger.keep(answer(11), 0.1, 1.0)
        assert ledger.answers() == 10


def test_a_damaged_ledger_is_not_begun_anew(tmp_path):
    (tmp_path / LEDGER).write_bytes(b"no database at all " * 100)
    with pytest.raises(StoreError):
        WordLedger(tmp_path)
    assert (tmp_path / LEDGER).read_bytes().startswith(b"no database")


# ---------------------------------------------------------------- asking and answering


class Bench:
    """A device's word counts over a real store and a real ledger."""

    def __init__(self, folder: Path, limit: float = 4.0, least_typed: int = 1) -> None:
        self.folder = folder
        self.sent: list[bytes] = []
        self.kept_first: list[bool] = []
        self.known: frozenset[str] | None = frozenset()
        data = DataConfig(path=folder / FILE_NAME)
        self.typed = TypedTexts("d", data, LIMITS)
        self.words = WordCounts(
            "d",
            limit=limit,
            state_dir=folder,
            data=data,
            typed=self.typed,
            known=lambda: self.known,
            send=self.send,
            rng=random.Random(1),
            least_typed=least_typed,
        )

    async def send(self, message: WordCountAnswer) -> None:
        with WordLedger(self.folder) as ledger:
            told = ledger.told(message.campaign)
        self.kept_first.append(told is not None and told.answer == message)
        self.sent.append(encode(message))

    @asynccontextmanager
    async def running(self):
        work = asyncio.create_task(self.words.run())
        try:
            yield
        finally:
            work.cancel()
            await asyncio.wait({work})

    async def until_sent(self, number: int) -> None:
        async with asyncio.timeout(LIMIT_S):
            while len(self.sent) < number:
                assert all(self.kept_first)
                await asyncio.sleep(0.01)

    async def stays_silent(self, number: int = 0) -> None:
        await asyncio.sleep(0.3)
        assert len(self.sent) == number


@pytest.fixture
def folder(tmp_path) -> Path:
    with ExampleStore(tmp_path / FILE_NAME, LIMITS) as store:
        for text in TEXTS:
            store.add(text)
    return tmp_path


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def spent(folder: Path) -> float:
    with WordLedger(folder) as ledger:
        return ledger.spent()


def test_asked_again_and_after_a_restart_it_says_the_same_byte_for_byte(folder, caplog):
    caplog.set_level(logging.DEBUG)

    async def scenario() -> None:
        bench = Bench(folder)
        async with bench.running():
            bench.words.see(free=True)
            bench.words.asked(asked())
            await bench.until_sent(1)
            bench.words.asked(asked())
            await bench.until_sent(2)
            bench.words.say_again()
            await bench.until_sent(3)
        again = Bench(folder)
        async with again.running():
            # It needs no idle device any more.
            again.words.asked(asked())
            await again.until_sent(1)
            again.words.heard(WordCountHeard(campaign=asked().campaign))
            again.words.say_again()
            await again.stays_silent(1)
        assert len({*bench.sent, *again.sent}) == 1

    run(scenario())
    assert spent(folder) == 2.0
    formatter = JsonFormatter()
    logged = "\n".join(formatter.format(record) for record in caplog.records)
    assert '"event": "word_told"' in logged
    for word in ("cat", "the ", "dog", "password"):
        assert word not in logged


def test_another_campaign_costs_again_until_the_limit_and_then_it_is_silent(folder, caplog):
    async def scenario() -> None:
        bench = Bench(folder, limit=5.0)
        async with bench.running():
            bench.words.see(free=True)
            for number in (1, 2):
                bench.words.asked(asked(number))
                await bench.until_sent(number)
            bench.words.asked(asked(3))
            await bench.stays_silent(2)
            assert len(set(bench.sent)) == 2

    run(scenario())
    assert spent(folder) == 4.0
    (said,) = (one for one in caplog.records if one.message == "word_count_declined")
    assert "epsilon_limit = 5" in JsonFormatter().format(said)


def test_it_waits_until_the_device_is_idle_and_for_its_moment(folder):
    async def scenario() -> None:
        bench = Bench(folder)
        async with bench.running():
            bench.words.asked(asked())
            await bench.stays_silent()
            bench.words.withdrawn()
            bench.words.see(free=True)
            await bench.stays_silent()
            assert spent(folder) == 0.0
            bench.words.asked(asked(2, spread_s=1e6))
            await bench.stays_silent()
            bench.words.asked(asked(3))
            await bench.until_sent(1)

    run(scenario())


def test_a_text_that_is_forgotten_while_it_counts_is_not_told(folder, monkeypatch):
    counted: list[int] = []

    def words_typed(data, limits):
        found = real(data, limits)
        counted.append(found[1]["cat"])
        if len(counted) == 1:
            with ExampleStore(folder / FILE_NAME, LIMITS) as store:
                store.forget_containing("cat")
        return found

    real = word_counts.words_typed
    monkeypatch.setattr(word_counts, "words_typed", words_typed)
    monkeypatch.setattr(word_counts, "AGAIN_S", 0.05)

    async def scenario() -> None:
        bench = Bench(folder)
        async with bench.running():
            bench.words.see(free=True)
            bench.words.asked(asked())
            await bench.until_sent(1)

    run(scenario())
    assert counted == [2, 0]


def test_new_words_wait_for_the_plan_that_says_which_are_known(folder, monkeypatch):
    monkeypatch.setattr(word_counts, "AGAIN_S", 0.05)
    drawn: list[frozenset[str]] = []
    real = answer_to

    def noted(terms, counts, known, **more):
        drawn.append(known)
        return real(terms, counts, known, **more)

    monkeypatch.setattr(word_counts, "answer_to", noted)

    async def scenario() -> None:
        bench = Bench(folder)
        bench.known = None
        async with bench.running():
            bench.words.see(free=True)
            bench.words.asked(asked(new_only=True))
            await bench.stays_silent()
            bench.known = frozenset({"the"})
            await bench.until_sent(1)

    run(scenario())
    assert drawn == [frozenset({"the"})]


@pytest.mark.parametrize("damaged", [True, False])
def test_with_a_damaged_ledger_or_without_texts_it_takes_no_part(folder, caplog, damaged):
    if damaged:
        (folder / LEDGER).write_bytes(b"no database at all " * 100)

    async def scenario() -> None:
        bench = Bench(folder)
        if not damaged:
            bench.words._data = DataConfig(path=folder / "x.npz", format="npz")
            (folder / "x.npz").write_bytes(b"PK")
        async with bench.running():
            bench.words.see(free=True)
            bench.words.asked(asked())
            await bench.stays_silent()

    run(scenario())
    assert "word_count_declined" in caplog.text
