"""Predictions made by devices: each one runs `fedge-agent predict` on its own state, offline.

The examples come from the test set, which no device has: an image becomes a PNG file, a row of a
table its numbers, a window of words what was typed before its last word.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fedge.coordinator.datasets import Examples
from fedge.coordinator.demo.programs import Programs
from fedge.coordinator.task import Task
from fedge.schemas.features import ClassTarget, ImageFeatures, NextWordTarget
from fedge.schemas.tensors import Array
from fedge.schemas.words import FIRST_WORD, PADDING, START, Vocabulary

COUNT = 10
AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class Question:
    """An example to predict. `example`: what is typed after `predict`. `truth`: what it is."""

    example: str
    truth: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What `device` said about a question, with the version that it uses.

    `predicted`: a label, or numbers. `probability`: of that label, None for numbers.
    """

    question: Question
    device: str
    version: int
    predicted: str
    probability: float | None

    @property
    def right(self) -> bool | None:
        """Whether the label is the true one; None for numbers."""
        return None if self.probability is None else self.predicted == self.question.truth


def choose_rows(task: Task, test: Examples) -> list[int]:
    """Up to `COUNT` rows of the test set: the first of each class, in class order, then others."""
    if isinstance(task.target, NextWordTarget):
        # Of the longest, the last word of which could be suggested.
        lengths = (np.asarray(test.y) != PADDING).sum(axis=1)
        last = np.asarray(test.y)[np.arange(len(test)), np.maximum(lengths, 1) - 1]
        order = np.argsort(-lengths, kind="stable")
        return [int(row) for row in order if last[row] >= FIRST_WORD][:COUNT]
    if not isinstance(task.target, ClassTarget):
        return list(range(min(COUNT, len(test))))
    firsts = [int(row) for row in np.unique(task.target.encode(test.y), return_index=True)[1]]
    others = sorted(set(range(len(test))) - set(firsts))
    return (firsts + others)[:COUNT]


def ask(task: Task, test: Examples, rows: Sequence[int], folder: Path) -> list[Question]:
    """The questions about these rows; pictures are written to `folder`."""
    return [
        Question(_example(task, test.x[row], folder / f"test-{row}.png"), _truth(task, test.y[row]))
        for row in rows
    ]


async def answers(
    programs: Programs, questions: Sequence[Question], devices: Sequence[tuple[str, Path]]
) -> list[Answer]:
    """An answer to each question, the devices taking turns; `devices`: names and `agent.toml`.

    Raises `ProgramEnded` if a device cannot answer.
    """
    at_once = asyncio.Semaphore(AT_ONCE)

    async def answer(number: int, question: Question) -> Answer:
        name, config = devices[number % len(devices)]
        command = (sys.executable, "-m", "fedge.edge_agent", "predict", "--json", "--config")
        async with at_once:
            said = await programs.run(
                f"{name}-predict", (*command, str(config), "--", question.example)
            )
        return _answer(question, name, said)

    return list(await asyncio.gather(*(answer(n, q) for n, q in enumerate(questions))))


def image_of(task: Task, raw: Array) -> Image.Image | None:
    """The picture that a raw example is, None if the task is not about pictures."""
    features = task.features
    if not isinstance(features, ImageFeatures):
        return None
    pixels = np.asarray(raw, np.float64) * (255.0 / features.raw_max)
    shape = (features.height, features.width, features.channels)
    bytes_ = np.clip(np.rint(pixels), 0, 255).astype(np.uint8).reshape(shape)
    return Image.fromarray(bytes_[:, :, 0] if features.channels == 1 else bytes_)


def _example(task: Task, raw: Array, path: Path) -> str:
    if task.vocabulary is not None:
        return "".join(f"{_word(task.vocabulary, n)} " for n in raw if n not in (PADDING, START))
    image = image_of(task, raw)
    if image is None:
        return ",".join(repr(float(value)) for value in np.asarray(raw).reshape(-1))
    image.save(path)
    return str(path)


def _truth(task: Task, raw: Array) -> str:
    target = task.target
    if task.vocabulary is not None:
        return _word(task.vocabulary, int(raw[raw != PADDING][-1]))
    if isinstance(target, ClassTarget):
        index = int(np.asarray(raw).reshape(()))
        return target.labels[index] if target.labels else str(index)
    return ", ".join(f"{float(value):.4g}" for value in np.asarray(raw).reshape(-1))


def _word(vocabulary: Vocabulary, number: int) -> str:
    # Digits are in no vocabulary: the device reads an unknown word, as it was.
    return vocabulary.word(int(number)) or "0"


def _answer(question: Question, device: str, said: str) -> Answer:
    found = json.loads(said)
    if "words" in found:
        first = found["words"][0]
        return Answer(question, device, found["version"], first["word"], first["probability"])
    if "values" in found:
        predicted = ", ".join(f"{value:.4g}" for value in found["values"])
        return Answer(question, device, found["version"], predicted, None)
    probability = next(
        one["probability"] for one in found["probabilities"] if one["index"] == found["index"]
    )
    return Answer(question, device, found["version"], found["label"], probability)
