"""The keyboard's benchmark: its n-gram by hand, its split, and that passes are equal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedge.coordinator.server_optimizer import AdamConfig, SgdConfig, server_optimizer
from fedge.coordinator.tasks.next_word import even_cross_entropy, words_cross_entropy
from fedge.edge_agent.data.examples import Examples
from fedge.schemas.words import Vocabulary
from tests.coordinator.plans import plan_named

pytest.importorskip("nltk", reason="pip install -e '.[dev]'")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import keyboard_course as courses  # noqa: E402 -- the benchmarks are programs, not a package
import keyboard_learning as learning  # noqa: E402 -- as above
import keyboard_ngram as ngrams  # noqa: E402 -- as above
import keyboard_report as reports  # noqa: E402 -- as above

WORDS = Vocabulary(["the", "a", "cat", "dog", "sat", "ran", "on", "mat"])
TEXTS = ["The cat sat on the mat. A dog ran.", "the cat ran", "the dog sat on a cat"]


def test_an_ngram_suggests_what_followed_most_often() -> None:
    model = ngrams.NgramSuggestions(WORDS, TEXTS, order=3)
    assert model.suggest(("sat", "on"))[:2] in {("the", "a"), ("a", "the")}
    assert model.suggest((ngrams.START, "the"))[0] == "cat"
    assert len(model.suggest(("never", "seen"))) == 3


@pytest.mark.parametrize("order", [2, 3, 4])
def test_a_ranking_is_that_of_all_words_scored(order) -> None:
    model = ngrams.NgramSuggestions(WORDS, TEXTS, order=order)
    for before in [(ngrams.START,), ("the",), ("sat", "on"), ("a", "cat"), (ngrams.UNKNOWN,)]:
        context = before[-(order - 1) :]
        scored = sorted((-model.score(w, context), WORDS.number(w), w) for w in WORDS.words)
        assert model.suggest(before) == tuple(word for _, _, word in scored[:3])


def test_a_shorter_ngram_counts_the_words_that_it_follows_not_its_occurrences() -> None:
    """Kneser and Ney's own example: after an unseen word, what follows many words comes first."""
    words = Vocabulary(["san", "francisco", "in", "to", "by", "home"])
    texts = ["san francisco"] * 5 + ["in home", "to home", "by home"]
    model = ngrams.NgramSuggestions(words, texts, order=2)
    assert model.suggest(("francisco",))[0] != "francisco"
    assert model.score("home", ()) > model.score("francisco", ())
    assert model.suggest(("san",))[0] == "francisco"


def test_probabilities_after_a_seen_context_add_up_to_one() -> None:
    model = ngrams.NgramSuggestions(WORDS, TEXTS, order=3)
    everything = (*WORDS.words, ngrams.START, ngrams.UNKNOWN)
    for context in [("the",), (ngrams.START, "the"), ()]:
        assert sum(model.score(word, context) for word in everything) == pytest.approx(1.0)


def test_an_ngrams_hits_are_counted_over_all_words() -> None:
    model = ngrams.NgramSuggestions(WORDS, ["the cat"] * 3, order=2)
    # "the" after the start and "cat" after it are hits; "zebra" is in no vocabulary.
    found = model.sums(["The cat zebra!"])
    assert found == {"all_words": 3.0, "first_hits": 2.0, "three_hits": 2.0}


def test_texts_are_cut_by_time_into_parts_that_do_not_overlap() -> None:
    texts = [f"text {n}" for n in range(100)]
    typist = learning.cut_by_time("a", texts)
    assert [len(typist.train), len(typist.validation), len(typist.test)] == [70, 10, 20]
    assert [*typist.train, *typist.validation, *typist.test] == texts
    small = learning.cut_by_time("b", texts[:3])
    assert all(len(part) == 1 for part in (small.train, small.validation, small.test))
    with pytest.raises(ValueError, match="b typed 2 texts"):
        learning.cut_by_time("b", texts[:2])


def toy_devices() -> dict[str, Examples]:
    rng = np.random.default_rng(3)
    devices = {}
    for number in range(5):
        x = rng.normal(size=(2 + number, 2)).astype(np.float32)
        devices[f"d{number}"] = Examples(x, x[:, 1:].copy(), texts=1 + number)
    return devices


@given(windows=st.integers(1, 500), batch=st.integers(1, 16), steps=st.none() | st.integers(1, 30))
def test_the_turns_of_a_pass_see_as_many_windows_as_a_device_has(windows, batch, steps) -> None:
    turns = learning.turns_of(windows, learning.Local(1.0, batch, steps=steps))
    seen = sum(min(turn * batch, windows) for turn in turns)
    # What fills no batch is left out, so that a federated pass is never the longer one.
    assert windows - batch < seen <= windows
    assert all(1 <= turn <= (steps or windows) or windows <= batch for turn in turns)


@given(
    st.dictionaries(
        st.text("abcdef", min_size=1, max_size=2), st.lists(st.integers(1, 9), max_size=6)
    ),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_every_turn_comes_once_and_no_device_twice_in_a_cohort(turns, size, seed) -> None:
    cohorts = list(learning.cohorts_of(turns, size, np.random.default_rng(seed)))
    assert all(1 <= len(cohort) <= size for cohort in cohorts)
    came = [(name, steps) for cohort in cohorts for name, steps in cohort.items()]
    assert sorted(came) == sorted((name, n) for name, own in turns.items() for n in own)


@pytest.mark.e2e  # it compiles a plan, which takes some seconds
def test_a_round_of_all_devices_is_their_mean_by_texts() -> None:
    plan, devices = plan_named("toy-linear"), toy_devices()
    how, fedavg = learning.Local(0.05, 2), server_optimizer(SgdConfig(), plan.manifest.weights)
    start, trainer = plan.initial_weights, learning.Trainer(plan)
    server = learning.Server(cohort=5, optimizer=fedavg)
    moved, state = learning.federated_pass(trainer, start, {}, devices, how, server, 1)
    assert trainer.windows_trained == sum(map(len, devices.values()))
    assert state == {}
    rng = np.random.default_rng([0, 1])
    rng.shuffle(list(devices))
    mean = np.zeros((1, 2))
    for examples in devices.values():
        seed = int(rng.integers(2**31))
        delta = trainer.update(start, examples, how, seed).delta["weight"]
        mean += examples.examples / 15 * delta
    np.testing.assert_allclose(moved["weight"] - start["weight"], mean, atol=1e-6)


@pytest.mark.e2e  # it compiles a plan, which takes some seconds
def test_a_device_with_more_examples_has_more_turns_and_each_counts_the_same() -> None:
    plan, devices = plan_named("toy-linear"), toy_devices()
    how, fedavg = (
        learning.Local(0.05, 2, steps=1),
        server_optimizer(SgdConfig(), plan.manifest.weights),
    )
    trainer = learning.Trainer(plan)
    turns = {name: learning.turns_of(len(own), how) for name, own in devices.items()}
    assert turns == {"d0": [1], "d1": [1], "d2": [1, 1], "d3": [1, 1], "d4": [1, 1, 1]}
    server = learning.Server(cohort=2, optimizer=fedavg)
    learning.federated_pass(trainer, plan.initial_weights, {}, devices, how, server, 1)
    assert trainer.windows_trained == 9 * 2


def test_learning_rates_fall_by_equal_factors_from_the_first_pass_to_the_last() -> None:
    factors = [learning.decay(number, 3, 0.01) for number in (1, 2, 3)]
    assert factors == pytest.approx([1, 0.1, 0.01])
    assert learning.decay(1, 1, 0.1) == 1
    held = [learning.decay(number, 4, 0.01, steady=2) for number in (1, 2, 3, 4)]
    assert held == pytest.approx([1, 1, 0.1, 0.01])


@pytest.mark.e2e  # it compiles a plan, which takes some seconds
def test_a_slower_server_optimizer_moves_by_that_share_and_remembers_the_same() -> None:
    plan, share = plan_named("toy-linear"), 0.25
    config = AdamConfig(name="adam", learning_rate=0.05)
    delta = {name: np.ones_like(value) for name, value in plan.initial_weights.items()}
    moved, moments = {}, {}
    for part in (1.0, share):
        optimizer = server_optimizer(learning.slowed(config, part), plan.manifest.weights)
        moved[part], moments[part] = optimizer.apply(plan.initial_weights, delta, optimizer.init())
    for name, start in plan.initial_weights.items():
        np.testing.assert_allclose(
            moved[share][name] - start, share * (moved[1.0][name] - start), atol=1e-6
        )
    assert all(np.array_equal(moments[1.0][name], moments[share][name]) for name in moments[1.0])


def test_the_share_of_central_is_that_of_the_better_central_training() -> None:
    def one(top1, last):
        return {"top1": top1, "at_last_pass": {"top1": last}}

    found = {"central": one(0.08, 0.1), "central_sgd": one(0.1, 0.05), "federated": one(0.09, 0.05)}
    assert reports.of_central(found, "top1") == pytest.approx(0.9)
    assert reports.of_central(found, "top1", "at_last_pass") == pytest.approx(0.5)


def test_in_an_even_loss_a_word_weighs_the_same_in_a_short_sentence_as_in_a_long_one() -> None:
    known, window = 3, 4  # 3 is the first number of a word; 0 is no word, 1 an unknown one
    scores = torch.zeros(3, window, 6)
    target = torch.tensor([[known] * 4, [known, 0, 0, 0], [1, 0, 0, 0]])
    four, one, none = even_cross_entropy(scores, target).tolist()
    assert four == pytest.approx(np.log(6))
    assert one == pytest.approx(np.log(6) / window)
    assert none == 0
    alike = words_cross_entropy(scores, target).tolist()
    assert alike == pytest.approx([np.log(6), np.log(6), 0])


def test_texts_that_somebody_had_before_are_not_fresh() -> None:
    typists = [
        learning.Typist("a", ("Happy new year!",), ("x",), ("see you",)),
        learning.Typist("b", ("hello",), ("y",), ("HAPPY  new year!", "happy you", "see you")),
    ]
    fresh = learning.fresh_of(typists, {one.name: one.test for one in typists})
    assert fresh == {"a": ["see you"], "b": ["happy you", "see you"]}


def measured(weights, passes) -> courses.Measured:
    reached = float(weights["w"][0])
    return courses.Measured(passes, top1=reached, top3=reached, perplexity=1.0)


def up_and_down(weights, state, number):
    return {"w": weights["w"] + np.float32(3 - number)}, {"calls": state["calls"] + 1}


def test_a_course_that_was_stopped_goes_on_as_if_it_never_was(tmp_path) -> None:
    start = {"w": np.zeros(1, np.float32)}, {"calls": np.zeros(())}
    counted = iter(range(0, 1000, 7))

    def followed(course, passes):
        return courses.follow(
            course, up_and_down, passes=passes, measure=measured,
            windows_trained=lambda: next(counted), on_pass=lambda one: courses.save(one, path),
        )  # fmt: skip

    path = tmp_path / "course.npz"
    assert courses.load(path) is None
    whole = followed(courses.begin(*start, measured), 5)
    followed(courses.begin(*start, measured), 2)
    resumed = followed(courses.load(path), 5)
    assert resumed.curve == whole.curve
    assert [point.passes for point in whole.curve] == [0, 1, 2, 3, 4, 5]
    assert [point.top3 for point in whole.curve] == [0, 2, 3, 3, 2, 0]
    assert resumed.best_passes == whole.best_passes == 2
    assert resumed.best["w"].tolist() == [3.0]
    assert resumed.state["calls"] == 5
    assert resumed.windows_trained == whole.windows_trained == 5 * 7


@pytest.mark.data
@pytest.mark.e2e
def test_the_benchmark_compares_equal_passes_and_reports_every_device(data_dir, tmp_path) -> None:
    report, picture = tmp_path / "report.json", tmp_path / "picture.svg"
    options = {
        "--data": data_dir / "sms" / "messages.jsonl", "--devices": 3, "--messages": 60,
        "--words": 200, "--cells": 8, "--dimensions": 4, "--window": 3, "--passes": 2,
        "--cohort": 2, "--personal-epochs": 1, "--out": tmp_path / "out", "--json": report,
        "--plot": picture, "--methods": "ngram,central,central_sgd,federated,personal",
    }  # fmt: skip
    arguments = [str(part) for option in options.items() for part in option]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "keyboard.py"), *arguments],
        capture_output=True, text=True, timeout=110, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    windows = found["data"]["training_windows"]
    methods = found["methods"]
    assert list(methods) == [
        "ngram", "own_ngram", "central", "central_sgd", "federated", "personal",
    ]  # fmt: skip
    for method in ("central", "central_sgd"):
        assert methods[method]["windows_trained"] == 2 * windows
    # Each device leaves out less than a batch of 8.
    assert 2 * (windows - 3 * 8) < methods["federated"]["windows_trained"] <= 2 * windows
    for method in ("central", "central_sgd", "federated"):
        assert [point["passes"] for point in methods[method]["curve"]] == [0, 1, 2]
        of_last = methods[method]["best_passes"] == 2
        assert (methods[method]["at_last_pass"]["top3"] == methods[method]["top3"]) or not of_last
    assert all(0 <= one["top1"] <= one["top3"] <= 1 for one in methods.values())
    devices = methods["personal"]["devices"]
    assert len(devices) == found["data"]["devices"] == 3
    # A device that keeps the copy of everybody has exactly everybody's numbers.
    assert all(one["before"] == one["after"] for one in devices if one["epochs"] == 0)
    counts = methods["personal"]["all_devices"]["top3"]
    assert counts["above"] + counts["equal"] + counts["below"] == 3
    # Of all words of all devices, so that it is the same number as the federated one's.
    words = sum(one["words"] for one in devices)
    before = sum(one["words"] * one["before"]["top1"] for one in devices) / words
    assert before == pytest.approx(methods["federated"]["top1"])
    assert picture.read_text().startswith("<?xml")
    assert "personal above federated, top3" in done.stdout
