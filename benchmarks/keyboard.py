"""Next words on a keyboard: n-gram, central, federated, and federated made personal.

    python benchmarks/keyboard.py --plot docs/img/keyboard.svg     a table, JSON and the picture
    python benchmarks/keyboard.py --tune --methods federated --passes 4 --learning-rate 0.5

The data are `{"user", "text"}` lines, by default those in FEDGE_DATA/sms: one user is one device.
Each device's texts are cut by time into 70% to train on, 10% to choose by and 20% to test on. The
vocabulary is a public list of words, made without looking at the texts; a word that it lacks counts
as one that was not suggested, for every method alike. `--tune` prints the curve on the parts to
choose by and never looks at the test.

    n-gram       interpolated Kneser-Ney, trained on what all devices typed, pooled; the order with
                 the best validation
    own n-gram   the same, each device with its own texts only
    central      everybody's texts, pooled, with Adam: what adaptive rates reach in one place
    central_sgd  the same with the training step that the devices have; only if asked for
    federated    that step on the devices, weighted means, a server optimizer, which may adapt
    personal     each device trains the federated weights on for itself, and keeps the copy if that
                 is better on its own validation part

Central and federated training make the same number of passes over the same windows: both are
counted. Needs `pip install -e '.[dev]'` (nltk, wordfreq). A run that was stopped goes on after its
last pass; its states are in `--out`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from keyboard_course import Course, Measured, begin, follow, load, save
from keyboard_learning import (
    Device,
    Local,
    Personal,
    Server,
    Trainer,
    Typist,
    cut_by_time,
    decay,
    device_of,
    federated_pass,
    fresh_of,
    personalise,
    pooled,
    slowed,
)
from keyboard_ngram import NgramSuggestions
from keyboard_report import added, recalls, rows, shares, summed
from processes import print_table
from pydantic import TypeAdapter

from fedge.coordinator.compiler import compile_task
from fedge.coordinator.server_optimizer import ServerOptimizerConfig, server_optimizer
from fedge.coordinator.task import Adam
from fedge.coordinator.tasks.next_word import even_cross_entropy, next_word
from fedge.coordinator.vocabularies import public_words
from fedge.schemas.tensors import Tensors
from fedge.schemas.text_file import TextLine
from fedge.schemas.words import Vocabulary, WordEncoder

METHODS = ("ngram", "central", "federated", "personal")
NGRAM_ORDERS = (2, 3, 4, 5)


def main() -> None:
    options = _parser().parse_args()
    typists = read_typists(options.data, options.devices, options.messages)
    words = Vocabulary(public_words("en", options.words))
    measured = {one.name: one.validation if options.tune else one.test for one in typists}
    fresh = fresh_of(typists, measured)
    experiment = Experiment.of(options, typists, words, measured, fresh)
    report: dict[str, Any] = {
        "settings": {name: _plain(value) for name, value in vars(options).items()},
        "data": experiment.facts(),
        "measured_on": "validation" if options.tune else "test",
    }
    print(json.dumps(report["data"]), flush=True)
    found: dict[str, Any] = {}
    if "ngram" in options.methods:
        found["ngram"] = ngram(typists, words, measured, fresh)
        found["own_ngram"] = own_ngram(typists, words, measured, fresh, found["ngram"]["order"])
    for method in ("central", "central_sgd"):
        if method in options.methods:
            found[method] = experiment.course(method)
    if "federated" in options.methods or "personal" in options.methods:
        found["federated"] = experiment.course("federated")
    if "personal" in options.methods:
        found["personal"] = experiment.personal()
    report["methods"] = found
    print_table(rows(found))
    text = json.dumps(report, indent=1)
    if options.json is None:
        print(text)
    else:
        options.json.write_text(text + "\n")
    if options.plot is not None:
        from keyboard_plot import draw  # noqa: PLC0415 -- matplotlib, for one option

        draw(report, options.plot)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    folder = os.environ.get("FEDGE_DATA")
    add("--data", type=Path, default=Path(folder or ".") / "sms" / "messages.jsonl")
    add(
        "--methods",
        type=lambda text: tuple(text.split(",")),
        default=METHODS,
        help="of these and central_sgd; default: %(default)s",
    )
    add("--devices", type=int, help="the first so many users; default: all")
    add("--messages", type=int, help="the last so many of each user; default: all")
    add("--words", type=int, default=2000, help="in the vocabulary")
    add("--cells", type=int, default=128)
    add("--dimensions", type=int, default=48)
    add("--window", type=int, default=8)
    add("--passes", type=int, default=12, help="over the data, central and federated")
    add("--central-learning-rate", type=float, default=0.003, help="of central Adam")
    add("--central-sgd-learning-rate", type=float, default=2.0)
    add("--central-batch-size", type=int, default=8)
    add("--learning-rate", type=float, default=2.0, help="of a device in a round")
    add("--batch-size", type=int, default=8, help="of a device")
    add("--local-steps", type=int, default=5, help="of a device in a round, at most; 0: an epoch")
    add("--cohort", type=int, default=5, help="devices a round")
    add(
        "--server-optimizer",
        type=_server_optimizer,
        default='{"name": "adam", "learning_rate": 0.05, "tau": 0.001}',
        help="as JSON, with the keys of [server_optimizer] in fedge.toml",
    )
    rate = "share of the learning rate in the last pass, to which it falls by equal factors"
    add("--central-last-pass", type=float, default=0.05, help=rate)
    add("--last-pass", type=float, default=0.1, help=f"{rate}, on the devices")
    add("--steady-passes", type=int, default=9, help="before the devices' rate begins to fall")
    add("--server-last-pass", type=float, default=0.05, help=f"{rate}, of the server optimizer")
    add("--personal-learning-rate", type=float, default=0.2)
    add("--personal-epochs", type=int, default=10, help="at most")
    add("--seed", type=int, default=0, help="of cohorts and orders")
    add("--tune", action="store_true", help="look at validation parts only")
    add("--out", type=Path, default=Path(__file__).parent / "out" / "keyboard")
    add("--json", type=Path, help="write the report here, not to standard output")
    add("--plot", type=Path, help="draw the picture here: .svg or .png")
    return parser


def _server_optimizer(text: str) -> ServerOptimizerConfig:
    adapter: TypeAdapter[ServerOptimizerConfig] = TypeAdapter(ServerOptimizerConfig)
    return adapter.validate_json(text)


def read_typists(data: Path, devices: int | None, messages: int | None) -> list[Typist]:
    """The first users of a file with the last messages of each; who typed too few is left out."""
    typed: dict[str, list[str]] = {}
    with data.open(encoding="utf-8") as file:
        for line in file:
            one = TextLine.model_validate_json(line)
            if one.user is not None:
                typed.setdefault(one.user, []).append(one.text)
    return [
        cut_by_time(user, texts[-messages:] if messages else texts)
        for user, texts in list(typed.items())[:devices]
        if len(texts) >= 3
    ]


@dataclass(frozen=True, slots=True)
class Experiment:
    """The devices, the plan and how it is trained."""

    options: argparse.Namespace
    devices: list[Device]
    trainer: Trainer
    central_trainer: Trainer
    start: Tensors
    known_share: float

    @classmethod
    def of(
        cls,
        options: argparse.Namespace,
        typists: Iterable[Typist],
        words: Vocabulary,
        measured: Mapping[str, Sequence[str]],
        fresh: Mapping[str, Sequence[str]],
    ) -> Experiment:
        """Compiles the plans, half a minute each, and makes windows of the texts.

        They differ in the optimizer only: Adam for `central`, SGD for the rest.
        """
        task = next_word(
            words,
            cells=options.cells,
            dimensions=options.dimensions,
            window=options.window,
            loss=even_cross_entropy,
        )
        plan = compile_task(task)
        trainer = central_trainer = Trainer(plan)
        if "central" in options.methods:
            central_trainer = Trainer(compile_task(replace(task, optimizer=Adam())))
        encoder = WordEncoder(words, options.window)
        devices = [device_of(encoder, one, measured[one.name], fresh[one.name]) for one in typists]
        # Somebody who never typed a word has nothing to train on, nor to measure.
        devices = [
            one for one in devices if all(map(len, (one.train, one.validation, one.measured)))
        ]
        targets = pooled(one.train for one in devices).raw_targets
        known = float((targets > 2).sum() / (targets > 0).sum())
        return cls(options, devices, trainer, central_trainer, plan.initial_weights, known)

    def facts(self) -> dict[str, Any]:
        """What the experiment is made of."""
        return {
            "devices": len(self.devices),
            "training_messages": sum(one.train.examples for one in self.devices),
            "training_windows": sum(len(one.train) for one in self.devices),
            "measured_messages": sum(one.measured.examples for one in self.devices),
            "fresh_messages": sum(one.fresh.examples for one in self.devices),
            "training_words_known": round(self.known_share, 4),
            "parameters": sum(spec.element_count for spec in self.trainer.manifest.update_specs),
        }

    def course(self, method: str) -> dict[str, Any]:
        """Trains `method`, or goes on with it: its curve, and its numbers.

        They are of the version that is best on the validation part, which is the one that an
        operator would roll out; those of the last version stand beside them.
        """
        course = self._followed(method)
        measured = pooled(one.measured for one in self.devices)
        fresh = pooled(one.fresh for one in self.devices)
        return {
            **shares(self.trainer.sums(course.best, measured)),
            "fresh": shares(self.trainer.sums(course.best, fresh)),
            "best_passes": course.best_passes,
            "passes": course.passes,
            "at_last_pass": shares(self.trainer.sums(course.weights, measured)),
            "windows_trained": course.windows_trained,
            "curve": [asdict(point) for point in course.curve],
        }

    def personal(self) -> dict[str, Any]:
        """What every device makes of the federated weights."""
        weights = self._followed("federated").best
        options = self.options
        how = Local(options.personal_learning_rate, options.batch_size, options.personal_epochs)
        found: dict[str, Personal] = {}
        for device in self.devices:
            found[device.name] = personalise(self.trainer, weights, device, how)
            if len(found) % 10 == 0:
                print(f"personal: {len(found)} of {len(self.devices)} devices", flush=True)
        return summed(found)

    def _followed(self, method: str) -> Course:
        path = self.options.out / f"{method}-{self._key(method)}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        validation = pooled(one.validation for one in self.devices)
        began = time.monotonic()

        def measure(weights: Tensors, passes: int) -> Measured:
            found = Measured(passes, **shares(self.trainer.sums(weights, validation)))
            print(f"{method}: {found}, {time.monotonic() - began:.0f} s", flush=True)
            return found

        trainer = self.central_trainer if method == "central" else self.trainer
        one_pass, state = (
            self._federated() if method == "federated" else self._central(method, trainer)
        )
        return follow(
            load(path) or begin(self.start, state, measure),
            one_pass,
            passes=self.options.passes,
            measure=measure,
            windows_trained=lambda: trainer.windows_trained,
            on_pass=lambda course: save(course, path),
        )

    def _central(self, method: str, trainer: Trainer) -> tuple[Callable[..., Any], Tensors]:
        options = self.options
        everything = pooled(one.train for one in self.devices)
        how = Local(getattr(options, f"{method}_learning_rate"), options.central_batch_size)

        def one_pass(weights: Tensors, state: Tensors, number: int) -> tuple[Tensors, Tensors]:
            seed = options.seed * 10_000 + number
            slower = self._slowed(how, number, options.central_last_pass)
            # Adam begins anew with each pass, of thousands of steps: nothing but weights is kept.
            return trainer.trained(weights, everything, slower, seed), state

        return one_pass, {}

    def _federated(self) -> tuple[Callable[..., Any], Tensors]:
        options = self.options
        own = {one.name: one.train for one in self.devices}
        steps = options.local_steps or None
        how = Local(options.learning_rate, options.batch_size, steps=steps)
        specs = self.trainer.manifest.weights

        def one_pass(weights: Tensors, state: Tensors, number: int) -> tuple[Tensors, Tensors]:
            slower = self._slowed(how, number, options.last_pass, options.steady_passes)
            rate = decay(number, options.passes, options.server_last_pass)
            optimizer = server_optimizer(slowed(options.server_optimizer, rate), specs)
            server = Server(options.cohort, optimizer, options.seed)
            return federated_pass(self.trainer, weights, state, own, slower, server, number)

        return one_pass, server_optimizer(options.server_optimizer, specs).init()

    def _slowed(self, how: Local, number: int, last: float, steady: int = 1) -> Local:
        """How pass `number` trains, the rate in the last pass being `last` of the first's."""
        rate = how.learning_rate * decay(number, self.options.passes, last, steady)
        return replace(how, learning_rate=rate)

    def _key(self, method: str) -> str:
        """Equal for runs that go on with each other's passes."""
        # The rate of a pass depends on how many there will be: another number is another run.
        every = (
            "data", "devices", "messages", "words", "cells", "dimensions", "window", "passes",
            "seed",
        )  # fmt: skip
        mine = {
            "central": ("central_learning_rate", "central_batch_size", "central_last_pass"),
            "central_sgd": (
                "central_sgd_learning_rate", "central_batch_size", "central_last_pass",
            ),
            "federated": (
                "learning_rate", "batch_size", "local_steps", "cohort", "server_optimizer",
                "last_pass", "server_last_pass", "steady_passes",
            ),
        }[method]  # fmt: skip
        facts = {name: _plain(getattr(self.options, name)) for name in (*every, *mine)}
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:10]


def ngram(
    typists: Iterable[Typist],
    words: Vocabulary,
    measured: Mapping[str, Sequence[str]],
    fresh: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """The order that is best on the validation part, and its numbers."""
    every = list(typists)
    trained = [text for one in every for text in one.train]
    validation = [text for one in every for text in one.validation]
    by_order = {}
    for order in NGRAM_ORDERS:
        model = NgramSuggestions(words, trained, order=order)
        by_order[order] = recalls(model.sums(validation))
        print(f"n-gram of order {order}: {by_order[order]}", flush=True)
    best = max(by_order, key=lambda order: by_order[order]["top3"])
    model = NgramSuggestions(words, trained, order=best)
    return {
        **recalls(model.sums(chain.from_iterable(measured.values()))),
        "fresh": recalls(model.sums(chain.from_iterable(fresh.values()))),
        "order": best,
        "by_order": by_order,
    }


def own_ngram(
    typists: Iterable[Typist],
    words: Vocabulary,
    measured: Mapping[str, Sequence[str]],
    fresh: Mapping[str, Sequence[str]],
    order: int,
) -> dict[str, Any]:
    """What each device reaches alone, with an n-gram of what its own user typed."""
    sums: list[dict[str, float]] = []
    fresh_sums: list[dict[str, float]] = []
    for one in typists:
        model = NgramSuggestions(words, one.train, order=order)
        sums.append(model.sums(measured[one.name]))
        fresh_sums.append(model.sums(fresh[one.name]))
    return {**recalls(added(sums)), "fresh": recalls(added(fresh_sums)), "order": order}


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump()
    return str(value) if isinstance(value, Path) else value


if __name__ == "__main__":
    sys.exit(main())
