"""Suggesting the next word on a keyboard (Hard et al. 2018, "Federated Learning for Mobile Keyboard
Prediction", section 4).

A recurrent net with coupled input and forget gates (Greff et al. 2017), a projection of its cells
(Sak et al. 2014), and one table of words for input and output (Press and Wolf 2017). With 10,000
words, 670 cells and 96 dimensions it has 1.41 million parameters, and is small enough for a phone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedge.coordinator.task import SGD, PerExample, SimulationDefaults, Task
from fedge.coordinator.vocabularies import documentation_words
from fedge.schemas.features import NextWordTarget, WordFeatures
from fedge.schemas.measures import RatioSpec
from fedge.schemas.plan import TrainingDefaults
from fedge.schemas.words import FIRST_WORD, PADDING, Vocabulary

_NEVER = -1e4
"""Added to the score of what is no word: its probability is 0, and its gradient too."""


class NextWord(nn.Module):
    """Word numbers int64 `[batch, time]` → scores float32 `[batch, time, words]`.

    `words`: how many numbers there are. `cells`, `dimensions`: of the recurrent layer, and of a
    word. Time is unrolled, so a plan is for one length of windows.
    """

    def __init__(self, words: int, *, cells: int = 670, dimensions: int = 96) -> None:
        super().__init__()
        self.table = nn.Embedding(words, dimensions)
        self.from_word = nn.Linear(dimensions, 3 * cells)
        self.from_past = nn.Linear(dimensions, 3 * cells, bias=False)
        self.project = nn.Linear(cells, dimensions, bias=False)
        nn.init.uniform_(self.table.weight, -0.1, 0.1)
        with torch.no_grad():
            # Forgetting little is where learning over many steps begins (Jozefowicz et al. 2015).
            self.from_word.bias[:cells] = 1.0

    def forward(self, words: Tensor) -> Tensor:
        """The scores of the word after each word."""
        return self._scores(self._read(words))

    def suggest(self, words: Tensor) -> Tensor:
        """Logarithms of the probabilities `[batch, words]` of the word after the last one."""
        past = self._read(words)
        last = (words != PADDING).sum(dim=1).clamp(min=1) - 1
        steps = torch.arange(words.shape[1], device=words.device)
        is_last = (steps == last[:, None]).to(past.dtype)
        return self._scores((past * is_last[:, :, None]).sum(dim=1)).log_softmax(dim=1)

    def _read(self, words: Tensor) -> Tensor:
        """`[batch, time, dimensions]`: what was read up to each word."""
        entered = self.from_word(self.table(words))
        past = entered.new_zeros(words.shape[0], self.table.embedding_dim)
        cell = entered.new_zeros(words.shape[0], self.project.in_features)
        read = []
        for step in range(words.shape[1]):
            forget, output, candidate = (entered[:, step] + self.from_past(past)).chunk(3, dim=1)
            kept = torch.sigmoid(forget)
            cell = kept * cell + (1 - kept) * torch.tanh(candidate)
            past = self.project(torch.sigmoid(output) * torch.tanh(cell))
            read.append(past)
        return torch.stack(read, dim=1)

    def _scores(self, read: Tensor) -> Tensor:
        numbers = torch.arange(self.table.num_embeddings, device=read.device)
        never = (numbers < FIRST_WORD).to(read.dtype) * _NEVER
        return functional.linear(read, self.table.weight, never)


def words_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Mean over the known words of a window, `[batch]`; 0 where there is none.

    `output`: scores `[batch, time, words]`; `target`: `[batch, time]`.
    """
    return log_loss(output, target) / known_words(output, target).clamp(min=1.0)


def even_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Sum over the known words of a window as a share of its length, `[batch]`.

    Every word weighs the same, as it does in recall and perplexity. In a mean over the words of a
    window those of short sentences weigh more.
    """
    return log_loss(output, target) / target.shape[1]


def log_loss(output: Tensor, target: Tensor) -> Tensor:
    """Sum of the cross-entropies at known words, in nats, `[batch]`."""
    losses = functional.cross_entropy(output.transpose(1, 2), target, reduction="none")
    return (losses * _is_known(target)).sum(dim=1)


def known_words(_: Tensor, target: Tensor) -> Tensor:
    """How many words of a window are in the vocabulary, `[batch]`."""
    return _is_known(target).sum(dim=1)


def all_words(_: Tensor, target: Tensor) -> Tensor:
    """How many words a window has, `[batch]`."""
    return (target != PADDING).to(torch.float32).sum(dim=1)


def first_hits(output: Tensor, target: Tensor) -> Tensor:
    """How many words were the first suggestion, `[batch]`."""
    return _within(output, target, 1)


def three_hits(output: Tensor, target: Tensor) -> Tensor:
    """How many words were among three suggestions, `[batch]`."""
    return _within(output, target, 3)


def _is_known(target: Tensor) -> Tensor:
    return (target >= FIRST_WORD).to(torch.float32)


def _within(output: Tensor, target: Tensor, suggestions: int) -> Tensor:
    own = output.gather(2, target[:, :, None])
    better = (output > own).to(torch.float32).sum(dim=2)
    return ((better < suggestions).to(torch.float32) * _is_known(target)).sum(dim=1)


def next_word(
    vocabulary: Vocabulary | None = None,
    *,
    cells: int = 128,
    dimensions: int = 48,
    window: int = 16,
    learning_rate: float = 1.0,
    loss: PerExample = words_cross_entropy,
) -> Task:
    """The task over a vocabulary; without one, of words of Python's own documentation.

    `window`: words that are read at the most. A word that is not in the vocabulary counts as one
    that was not suggested: recall is over all words, perplexity over the known ones. `loss`: or
    `even_cross_entropy`, in which words weigh the same, so that it needs about twice the learning
    rate.
    """
    vocabulary = Vocabulary(documentation_words(2000)) if vocabulary is None else vocabulary
    words = len(vocabulary)
    return Task(
        name="next-word",
        model=lambda: NextWord(words, cells=cells, dimensions=dimensions),
        loss=loss,
        features=WordFeatures(words=words, window=window),
        target=NextWordTarget(words=words, window=window),
        vocabulary=vocabulary,
        infer=_suggest,
        metrics={
            "log_loss": log_loss,
            "known_words": known_words,
            "all_words": all_words,
            "first_hits": first_hits,
            "three_hits": three_hits,
        },
        ratios=(
            RatioSpec(name="top1_recall", numerator="first_hits", denominator="all_words"),
            RatioSpec(name="top3_recall", numerator="three_hits", denominator="all_words"),
            RatioSpec(
                name="perplexity",
                numerator="log_loss",
                denominator="known_words",
                exponential=True,
            ),
        ),
        optimizer=SGD(),
        defaults=TrainingDefaults(batch_size=8, learning_rate=learning_rate, local_epochs=3),
        simulation=SimulationDefaults(data="python-topics", devices=8, rounds=10, split="users"),
    )


def _suggest(model: nn.Module, words: Tensor) -> Tensor:
    if not isinstance(model, NextWord):
        raise TypeError(f"{type(model).__name__} is no NextWord")
    return model.suggest(words)
