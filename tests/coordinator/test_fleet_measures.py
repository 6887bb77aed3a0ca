"""The figures of an evaluation, worked by hand and checked against plain sums."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.coordinator.fleet_measures import QUANTILES, fleet_measures
from fedge.coordinator.store import EvaluationAnswer
from fedge.schemas.measures import RatioSpec
from fedge.schemas.messages import EvaluationStatus, EvaluationSums
from tests.coordinator.updates import LINEAR, manifest_of

MANIFEST = manifest_of(LINEAR).model_copy(
    update={
        "metrics": ("accuracy", "hits", "words", "nats"),
        "ratios": (
            RatioSpec(name="top1_recall", numerator="hits", denominator="words"),
            RatioSpec(name="perplexity", numerator="nats", denominator="words", exponential=True),
        ),
    }
)


def sums(rows: int, loss: float, right: float = 0.0, hits: float = 0.0, nats: float = 0.0):
    metrics = {"accuracy": right, "hits": hits, "words": float(rows), "nats": nats}
    return EvaluationSums(examples=rows, rows=rows, loss_sum=loss, metrics=metrics)


def answer(device: str, own: EvaluationSums | None, personal: EvaluationSums | None = None):
    status = EvaluationStatus.NO_HOLD_OUT if own is None else EvaluationStatus.OK
    return EvaluationAnswer(1, device, 1.0, status, 2.0, own, personal)


def by_name(found):
    return {measure.name: measure for measure in found.measures}


def test_a_large_device_moves_the_mean_and_not_the_median():
    found = fleet_measures(
        MANIFEST,
        [
            answer("large", sums(98, loss=9.8, right=98)),
            answer("small-1", sums(1, loss=3.0, right=0)),
            answer("small-2", sums(1, loss=5.0, right=0)),
            answer("without", None),
        ],
    )
    assert (found.devices, found.examples, found.rows) == (3, 100, 100)
    loss, accuracy = by_name(found)["loss"], by_name(found)["accuracy"]
    assert loss.mean == pytest.approx(17.8 / 100)
    assert loss.device_mean == pytest.approx((0.1 + 3 + 5) / 3)
    assert loss.quantiles["median"] == 3.0
    assert loss.quantiles["p10"] == pytest.approx(0.1 + 0.2 * 2.9)
    assert (accuracy.mean, accuracy.quantiles["median"]) == (0.98, 0.0)
    assert [one.device for one in found.by_device] == ["small-2", "small-1", "large"]
    assert found.gains == ()


def test_ratios_are_of_sums_and_not_means_of_ratios():
    found = fleet_measures(
        MANIFEST,
        [
            answer("a", sums(3, 1.0, hits=3, nats=3 * math.log(2))),
            answer("b", sums(1, 1.0, hits=0, nats=math.log(32))),
        ],
    )
    recall, perplexity = by_name(found)["top1_recall"], by_name(found)["perplexity"]
    assert (recall.mean, recall.device_mean) == (0.75, 0.5)
    assert perplexity.mean == pytest.approx(2 ** ((3 * 1 + 5) / 4))
    assert perplexity.device_mean == pytest.approx((2 + 32) / 2)
    assert perplexity.lower_is_better
    assert not recall.lower_is_better
    assert "hits" not in by_name(found)


def test_the_gain_of_personal_copies_is_over_the_devices_that_have_one():
    found = fleet_measures(
        MANIFEST,
        [
            answer("better", sums(10, 20.0, right=5), sums(10, 10.0, right=8)),
            answer("worse", sums(10, 20.0, right=5), sums(10, 25.0, right=4)),
            answer("same", sums(10, 20.0, right=5), sums(10, 20.0, right=5)),
            answer("none", sums(10, 20.0, right=5)),
        ],
    )
    gains = {gain.name: gain for gain in found.gains}
    loss, accuracy = gains["loss"], gains["accuracy"]
    assert (loss.devices, loss.better) == (3, pytest.approx(1 / 3))
    assert loss.mean_difference == pytest.approx((-1.0 + 0.5 + 0.0) / 3)
    assert accuracy.mean_difference == pytest.approx((0.3 - 0.1 + 0.0) / 3)
    assert accuracy.better == pytest.approx(1 / 3)


def test_without_an_answer_there_is_nothing_to_tell():
    found = fleet_measures(MANIFEST, [answer("without", None)])
    assert (found.devices, found.measures, found.by_device) == (0, (), ())


@given(
    st.lists(
        st.tuples(
            st.integers(1, 10**6), st.integers(-(10**12), 10**12).map(float), st.floats(0, 1)
        ),
        min_size=1,
        max_size=40,
    )
)
def test_every_device_is_in_one_bin_and_quantiles_are_in_order(devices):
    answers = [
        answer(f"d{index}", sums(rows, loss, right=share * rows))
        for index, (rows, loss, share) in enumerate(devices)
    ]
    found = fleet_measures(MANIFEST, answers)
    assert fleet_measures(MANIFEST, answers[::-1]).by_device == found.by_device
    for measure in found.measures:
        assert sum(measure.histogram.counts) == measure.devices == len(devices)
        assert len(measure.histogram.counts) <= 10
        values = list(measure.quantiles.values())
        assert list(measure.quantiles) == list(QUANTILES)
        slack = 1e-9 * max(map(abs, values))
        assert all(a <= b + slack for a, b in pairwise(values))
        assert math.isfinite(measure.device_mean)
    total = math.fsum(loss for _, loss, _ in devices) / sum(rows for rows, _, _ in devices)
    assert by_name(found)["loss"].mean == pytest.approx(total, rel=1e-12)


def hostile(hits: float, words: float, nats: float = 1.0, rows: int = 20, loss: float = 20.0):
    metrics = {"accuracy": 1.0, "hits": hits, "words": words, "nats": nats}
    return EvaluationSums(examples=rows, rows=rows, loss_sum=loss, metrics=metrics)


def figures(found) -> list[float]:
    """Every number of a report but the counts."""
    numbers = []
    for one in found.measures:
        numbers += [one.device_mean, *one.quantiles.values()]
        numbers += [
            one.histogram.low,
            one.histogram.high,
            *([] if one.mean is None else [one.mean]),
        ]
    for gain in found.gains:
        numbers += [gain.mean_difference, gain.better]
    return numbers + [value for one in found.by_device for value in one.measures.values()]


@pytest.mark.parametrize(
    ("answers", "beyond"),
    [
        ([answer(name, hostile(1.7e8, 1e-300)) for name in "ab"], 2),
        ([answer("a", hostile(1e8, 1e-300)), answer("b", hostile(-1e8, 1e-300))], 2),
        ([answer("a", hostile(-1e8, 1e-300), hostile(1e8, 1e-300))], 1),
        ([answer("a", hostile(1.0, 20.0, loss=1e15))], 1),
    ],
    ids=["infinite together", "too far apart", "an infinite gain", "a loss"],
)
def test_what_is_beyond_all_reason_is_left_out_and_told(answers, beyond):
    honest = answer("honest", hostile(5.0, 20.0))
    found = fleet_measures(MANIFEST, [honest, *answers])
    assert found.beyond_reason == beyond
    assert all(map(math.isfinite, figures(found)))
    assert found.devices == 1 + len(answers)
    assert by_name(found)["top1_recall"].quantiles["max"] == 0.25
    assert by_name(found)["top1_recall"].mean == pytest.approx(0.25)


any_sum = st.one_of(
    st.floats(-1e15, 1e15), st.sampled_from([0.0, 1e-300, -1e-300, 5e-324, 1e15, -1e15])
)
any_sums = st.builds(hostile, any_sum, any_sum, any_sum, st.integers(1, 10**6), any_sum)


@given(st.lists(st.tuples(any_sums, st.none() | any_sums), min_size=1, max_size=8))
def test_whatever_devices_say_every_figure_is_a_number(said):
    answers = [answer(f"d{at}", own, personal) for at, (own, personal) in enumerate(said)]
    found = fleet_measures(MANIFEST, answers)
    assert all(map(math.isfinite, figures(found)))
    for measure in found.measures:
        assert sum(measure.histogram.counts) == measure.devices <= len(said)


@pytest.mark.parametrize(
    ("sums", "why"),
    [
        (hostile(1.0, 1e-300), "words is 1e-300, which is no count"),
        (hostile(1.0, -3.0), "words is -3, which is no count"),
        (hostile(4.0, 3.0), "top1_recall is 4 of 3, which is no share"),
        (hostile(-1.0, 3.0), "top1_recall is -1 of 3, which is no share"),
        (hostile(0.0, 3.0).model_copy(update={"metrics": {"accuracy": 21.0}}), "accuracy is 21 of"),
    ],
)
def test_sums_that_nobody_can_have_found_are_named(sums, why):
    assert why in (MANIFEST.impossible(sums.metrics, sums.rows) or "")


def test_sums_that_somebody_may_have_found_are_let_in():
    for possible in (hostile(0.0, 0.0), hostile(3.0, 3.0), hostile(2.9999, 2.99999, nats=1e9)):
        assert MANIFEST.impossible(possible.metrics, possible.rows) is None


def test_a_perplexity_that_no_number_holds_is_left_out_and_not_shown_as_a_small_one():
    def perplexity(nats: float) -> float | None:
        sums = {"nats": nats, "words": 1.0}
        return MANIFEST.measured(sums, 1).get("perplexity")

    assert perplexity(699.0) == pytest.approx(math.exp(699.0))
    assert perplexity(701.0) is None
    assert perplexity(1e15) is None
