"""The course of a demonstration, from an empty folder to the summary.

It starts the programs, waits for what they say, asks the devices, ends everything, and reads the
coordinator's store. All waiting is for events, under one deadline.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedge.coordinator.datasets import Examples
from fedge.coordinator.demo import predictions
from fedge.coordinator.demo.brokers import BrokerChoice, DemoBroker, choose_broker
from fedge.coordinator.demo.configuration import (
    EXAMPLES,
    STATE,
    TEXTS,
    coordinator_settings,
    device_settings,
    write_toml,
)
from fedge.coordinator.demo.counters import BrokerBytes, broker_bytes
from fedge.coordinator.demo.display import Display
from fedge.coordinator.demo.errors import DemoFailed, ProgramEnded
from fedge.coordinator.demo.examples import TEST_FILE, TRAIN_FILE, typists_of, write_examples
from fedge.coordinator.demo.experiment import Experiment
from fedge.coordinator.demo.folder import DemoFolder
from fedge.coordinator.demo.plots import draw_report
from fedge.coordinator.demo.predictions import Answer
from fedge.coordinator.demo.programs import Event, Program, Programs
from fedge.coordinator.demo.progress import BROKER, CENTRAL, COORDINATOR, Progress
from fedge.coordinator.demo.summary import (
    ModelFile,
    Summary,
    Traffic,
    bytes_up,
    device_curves,
    version_lines,
)
from fedge.coordinator.demo.texts import write_texts
from fedge.coordinator.store import Store, VersionRecord
from fedge.schemas.errors import ConfigError
from fedge.schemas.ids import sha256

FLEET = "fleet"
"""The program that hosts all devices, where they are many."""
MOST_PROCESSES = 32
"""Above so many devices one process hosts them all: each of its own takes some 60 MB."""

_AGENT = (sys.executable, "-m", "fedge.edge_agent")
_COORDINATOR = (sys.executable, "-m", "fedge.coordinator")
_CENTRAL = (sys.executable, "-m", "fedge.coordinator.demo.central")


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What only the running programs could tell."""

    answers: list[Answer]
    counted: BrokerBytes | None


class DemoRun:
    """One demonstration. `clock`: monotonic seconds."""

    def __init__(
        self,
        experiment: Experiment,
        folder: DemoFolder,
        display: Display,
        *,
        broker: BrokerChoice,
        deadline_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._experiment = experiment
        self._folder = folder
        self._display = display
        self._broker_choice = broker
        self._deadline_s = deadline_s
        self._clock = clock
        self._started = clock()
        self._progress = Progress.of(experiment.devices, experiment.rounds)
        self._changed = asyncio.Event()

    async def run(self, train: Examples, test: Examples) -> Summary:
        """Runs it to its end; no program is left when this returns or raises.

        Raises `ConfigError` for what cannot be run as asked, `ProgramEnded` if a program ended,
        `DemoFailed` if the end cannot be reached, or not within the deadline.
        """
        broker = choose_broker(self._broker_choice, self._folder.broker)
        self._announce(train, test, broker)
        async with Programs(self._folder.logs, self._observe) as programs:
            try:
                async with asyncio.timeout(self._deadline_s):
                    outcome = await programs.guard(self._course(programs, broker, train, test))
            except TimeoutError as error:
                raise DemoFailed(
                    f"not finished after {self._deadline_s:g} s ({self._progress.phase}): allow "
                    "more with --deadline, or ask for less with --rounds or --train-examples; "
                    f"the logs are in {self._folder.logs}"
                ) from error
        summary = self._summary(outcome, broker, train, test)
        await asyncio.to_thread(draw_report, summary, self._folder.report)
        return summary

    # ------------------------------------------------------------ the course

    async def _course(
        self, programs: Programs, broker: DemoBroker, train: Examples, test: Examples
    ) -> _Outcome:
        data = self._folder.data
        await asyncio.to_thread(write_examples, test, data / TEST_FILE)
        await programs.start(BROKER, broker.command, ready=broker.ready)
        await self._start_coordinator(programs, broker)
        await asyncio.to_thread(write_examples, train, data / TRAIN_FILE)
        if self._experiment.source == "texts":
            await asyncio.to_thread(self._hand_out_texts)
        else:
            await self._split(programs)
        await self._start_devices(programs, broker)
        central = await self._start_central(programs) if self._experiment.central else None
        self._display.say(
            f"started   a coordinator and {len(self._experiment.devices)} agents"
            f"{' in one process' if self._in_one_process else ''}; logs in {self._folder.logs}"
        )
        await self._until(lambda progress: progress.finished)
        answers, counted = await asyncio.gather(self._ask(programs, test), broker_bytes(broker))
        if central is not None:
            if central.process.returncode is None:
                self._display.say(
                    f"central   {len(self._progress.central)} of {self._experiment.central_epochs} "
                    "epochs are done: waiting for the rest"
                )
            await central.finish()
        return _Outcome(answers, counted)

    async def _start_coordinator(self, programs: Programs, broker: DemoBroker) -> None:
        config = write_toml(
            self._folder.coordinator / "fedge.toml",
            coordinator_settings(self._experiment, broker),
        )
        await programs.start(COORDINATOR, (*_COORDINATOR, "serve", "--config", str(config)))

    def _hand_out_texts(self) -> None:
        people = typists_of(self._experiment)
        for device, one in zip(self._experiment.devices, people, strict=True):
            write_texts(one.train, self._folder.device(device) / TEXTS)

    async def _split(self, programs: Programs) -> None:
        experiment, parts = self._experiment, self._folder.data / "parts"
        options = {
            "--source": self._folder.data / TRAIN_FILE,
            "--scheme": experiment.split,
            "--parts": len(experiment.devices),
            "--seed": experiment.seed,
            "--out": parts,
        }
        command = (*_AGENT, "data", "split", "--json", *_flat(options))
        try:
            written = json.loads(await programs.run("split", command))
        except ProgramEnded as error:
            if error.returncode == 2:
                raise ConfigError(error.tail.removeprefix("error: ")) from error
            raise
        for device, part in zip(experiment.devices, written, strict=True):
            shutil.move(part, self._folder.device(device) / EXAMPLES)
        parts.rmdir()

    @property
    def _in_one_process(self) -> bool:
        return len(self._experiment.devices) > MOST_PROCESSES

    async def _start_devices(self, programs: Programs, broker: DemoBroker) -> None:
        configs = {
            device: write_toml(
                self._config(device), device_settings(self._experiment, device, broker)
            )
            for device in self._experiment.devices
        }
        if self._in_one_process:
            command = (*_AGENT, "fleet", "--each", str(self._folder.devices))
            workers = ("--workers", str(os.cpu_count() or 1))
            await programs.start(FLEET, (*command, *workers))
            return
        for device, config in configs.items():
            await programs.start(device, (*_AGENT, "run", "--config", str(config)))

    async def _start_central(self, programs: Programs) -> Program:
        experiment = self._experiment
        options = {
            "--task": experiment.reference,
            "--data": self._folder.data,
            "--epochs": experiment.central_epochs,
            "--batch-size": experiment.batch_size,
            "--learning-rate": experiment.learning_rate,
            "--seed": experiment.seed,
        }
        return await programs.start(CENTRAL, (*_CENTRAL, *_flat(options)), lasting=False)

    async def _ask(self, programs: Programs, test: Examples) -> list[Answer]:
        task = self._experiment.task
        rows = predictions.choose_rows(task, test)
        questions = predictions.ask(task, test, rows, self._folder.predictions)
        devices = [(device, self._config(device)) for device in self._experiment.devices]
        return await predictions.answers(programs, questions, devices)

    # ------------------------------------------------------------ events

    def _observe(self, source: str, event: Event) -> None:
        if source == FLEET:
            source = event.get("device", FLEET)
        self._progress.observe(source, event)
        self._display.update(source, event, self._progress)
        self._changed.set()

    async def _until(self, condition: Callable[[Progress], bool]) -> None:
        while not condition(self._progress):
            if self._progress.problem is not None:
                raise DemoFailed(f"{self._progress.problem}; the logs are in {self._folder.logs}")
            self._changed.clear()
            await self._changed.wait()

    # ------------------------------------------------------------ the end

    def _announce(self, train: Examples, test: Examples, broker: DemoBroker) -> None:
        experiment = self._experiment
        self._display.say(
            f"task      {experiment.task.name}: {len(train):,} examples on "
            f"{len(experiment.devices)} devices, split {experiment.split}; {len(test):,} to test on"
        )
        self._display.say(
            f"training  {experiment.strategy.value}, {experiment.rounds} rounds, local epochs "
            f"{experiment.local_epochs}, batch size {experiment.batch_size}, learning rate "
            f"{experiment.learning_rate:g}"
        )
        self._display.say(f"broker    {broker.name} on 127.0.0.1:{broker.port}")
        if broker.notice is not None:
            self._display.say(broker.notice)

    def _summary(
        self, outcome: _Outcome, broker: DemoBroker, train: Examples, test: Examples
    ) -> Summary:
        experiment, progress = self._experiment, self._progress
        central = tuple(progress.central[epoch] for epoch in sorted(progress.central))
        with Store.open(self._folder.coordinator / STATE) as store:
            lines = version_lines(store, experiment, central, len(test))
            curves = device_curves(store, experiment.devices)
            up = bytes_up(store)
            abandoned = sum(record.version is None for record in store.rounds())
            newest = store.newest_version()
        if newest is None:
            raise DemoFailed("the coordinator's store holds no version")
        down = sum(device.downloaded_bytes for device in progress.devices.values())
        return Summary(
            task=experiment.task.name,
            strategy=experiment.strategy.value,
            split=experiment.split,
            seed=experiment.seed,
            rounds=experiment.rounds,
            local_epochs=experiment.local_epochs,
            batch_size=experiment.batch_size,
            learning_rate=experiment.learning_rate,
            train_examples=len(train),
            test_examples=len(test),
            broker=broker.name,
            duration_s=self._clock() - self._started,
            versions=lines,
            central_epochs=experiment.central_epochs if experiment.central else None,
            central=central,
            devices=curves,
            traffic=Traffic(up, progress.published_bytes, down, outcome.counted),
            model=self._keep_model(newest),
            predictions=tuple(outcome.answers),
            report=str(self._folder.report),
            logs=str(self._folder.logs),
            rounds_abandoned=abandoned,
            notice=broker.notice,
        )

    def _keep_model(self, version: VersionRecord) -> ModelFile:
        """Copies the file that the first device made of a version: the coordinator's, to the byte.

        Raises `DemoFailed` if it is not.
        """
        state = self._folder.device(self._experiment.devices[0]) / STATE
        made = (state / "models" / f"model-{version.number}.onnx").read_bytes()
        digest = sha256(made)
        if digest != version.model_sha256:
            raise DemoFailed(
                f"{self._experiment.devices[0]} made another model of version {version.number} "
                f"than the coordinator: {digest}, not {version.model_sha256}"
            )
        self._folder.model.write_bytes(made)
        return ModelFile(str(self._folder.model), len(made), digest)

    def _config(self, device: str) -> Path:
        return self._folder.device(device) / "agent.toml"


def _flat(options: Mapping[str, object]) -> list[str]:
    return [str(word) for option in options.items() for word in option]
