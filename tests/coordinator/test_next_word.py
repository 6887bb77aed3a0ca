"""The keyboard's task: the net of the paper, its measures by hand, and what it suggests."""

from __future__ import annotations

import itertools
import string

import numpy as np
import pytest
import torch

from fedge.coordinator.tasks.next_word import NextWord, next_word, words_cross_entropy
from fedge.schemas.errors import ConfigError
from fedge.schemas.features import NextWordTarget, WordFeatures
from fedge.schemas.measures import measured
from fedge.schemas.words import FIRST_WORD, PADDING, START, UNKNOWN, Vocabulary, WordEncoder


def ten_thousand_numbers() -> Vocabulary:
    letters = itertools.product(string.ascii_lowercase, repeat=4)
    return Vocabulary("".join(one) for one in itertools.islice(letters, 10_000 - FIRST_WORD))


def test_the_published_size_is_1_41_million_parameters() -> None:
    task = next_word(ten_thousand_numbers(), cells=670, dimensions=96, window=20)
    model = task.new_model()
    assert sum(p.numel() for p in model.parameters()) == 1_412_250
    # Nothing else travels with a version.
    assert not list(model.buffers())


def reference(model: NextWord, words: np.ndarray) -> np.ndarray:
    """The scores, as the equations say, one word after the other, in float64."""
    weights = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    table, cells = weights["table.weight"], weights["project.weight"].shape[1]

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    past, cell, scores = np.zeros(table.shape[1]), np.zeros(cells), []
    for word in words:
        gates = weights["from_word.weight"] @ table[word] + weights["from_word.bias"]
        gates += weights["from_past.weight"] @ past
        forget, output = sigmoid(gates[:cells]), sigmoid(gates[cells : 2 * cells])
        # Coupled: what is forgotten makes room for what comes.
        cell = forget * cell + (1 - forget) * np.tanh(gates[2 * cells :])
        past = weights["project.weight"] @ (output * np.tanh(cell))
        scores.append(table @ past)
    return np.array(scores)


def test_the_net_is_a_coupled_gate_lstm_with_a_projection_and_one_table() -> None:
    torch.manual_seed(1)
    model = NextWord(30, cells=11, dimensions=5)
    words = np.array([START, 7, 9, UNKNOWN, 12])
    scores = model(torch.from_numpy(words)[None])[0].detach().numpy()
    expected = reference(model, words)
    np.testing.assert_allclose(scores[:, FIRST_WORD:], expected[:, FIRST_WORD:], atol=1e-6)


def test_what_is_no_word_is_never_suggested() -> None:
    model = NextWord(30, cells=11, dimensions=5)
    words = torch.tensor([[START, 7, 9, PADDING, PADDING], [START, 0, 0, 0, 0]])
    probabilities = model.suggest(words).exp().detach()
    assert probabilities.shape == (2, 30)
    assert float(probabilities[:, :FIRST_WORD].max()) == 0.0
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(2))


def test_a_suggestion_is_the_forecast_after_the_last_word_whatever_is_padded() -> None:
    model = NextWord(30, cells=11, dimensions=5)
    words = torch.tensor([[START, 7, 9, PADDING, PADDING]])
    expected = model(words)[:, 2].log_softmax(dim=1)
    torch.testing.assert_close(model.suggest(words), expected)
    torch.testing.assert_close(model.suggest(words[:, :3]), expected)


def test_the_measures_by_hand() -> None:
    vocabulary = Vocabulary(["a", "b", "c", "d"])
    task = next_word(vocabulary, cells=4, dimensions=3, window=4)
    a, b, c, d = (vocabulary.number(word) for word in "abcd")
    # Scores of two windows: the first expects b, then a, whatever was there; the second d.
    scores = torch.zeros(2, 4, len(vocabulary))
    scores[0, :, b], scores[0, :, a] = 3.0, 2.0
    scores[0, :, c], scores[0, :, d] = 1.0, 0.5
    scores[1, :, d] = 1.0
    target = torch.tensor([[b, a, d, UNKNOWN], [d, PADDING, PADDING, PADDING]])
    sums = {
        name: float(metric(scores, target).double().sum()) for name, metric in task.metrics.items()
    }
    assert sums["all_words"] == 5
    assert sums["known_words"] == 4
    assert sums["first_hits"] == 2  # b, and d in the second window
    assert sums["three_hits"] == 3  # a is second; d is fourth in the first window
    found = measured(sums, 2, tuple(task.metrics), task.ratios)
    assert set(found) == {"top1_recall", "top3_recall", "perplexity"}
    assert found["top1_recall"] == 2 / 5
    assert found["top3_recall"] == 3 / 5
    losses = [
        -scores[i, t].double().log_softmax(0)[target[i, t]]
        for i, t in [(0, 0), (0, 1), (0, 2), (1, 0)]
    ]
    assert found["perplexity"] == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-6)
    mean_loss = words_cross_entropy(scores, target)
    assert float(mean_loss[0]) == pytest.approx(float(torch.stack(losses[:3]).mean()), rel=1e-6)


def test_a_window_without_a_known_word_teaches_nothing() -> None:
    task = next_word(Vocabulary(["a", "b"]), cells=4, dimensions=3, window=2)
    model = task.new_model()
    target = torch.tensor([[UNKNOWN, PADDING]])
    loss = task.loss(model(torch.tensor([[START, PADDING]])), target)
    assert float(loss.detach()) == 0.0
    loss.sum().backward()
    assert all(float(p.grad.abs().max()) == 0.0 for p in model.parameters())


def test_it_learns_a_sentence_by_heart() -> None:
    task = next_word(Vocabulary(["see", "you", "at", "the", "station", "tomorrow"]), window=8)
    encoder = WordEncoder(task.vocabulary, 8)
    inputs, targets = map(torch.from_numpy, encoder.windows(["See you at the station tomorrow!"]))
    model = task.new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        task.loss(model(inputs), targets).mean().backward()
        optimizer.step()
    prefix = torch.from_numpy(encoder.prefix("see you at the "))
    best = int(task.infer(model, prefix).argmax())
    assert encoder.vocabulary.word(best) == "station"


def test_features_of_another_size_than_the_vocabulary_are_refused() -> None:
    task = next_word(Vocabulary(["a", "b"]))
    with pytest.raises(ConfigError, match="9 word numbers, its vocabulary has 5"):
        type(task)(
            name="wrong",
            model=task.model,
            loss=task.loss,
            features=WordFeatures(words=9, window=4),
            target=NextWordTarget(words=9, window=4),
            vocabulary=task.vocabulary,
        )
