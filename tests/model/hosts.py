"""The hosts of a simulated fleet: the real coordinator and real agents, started, killed, started.

Nothing between the two ends is simulated but the network, the threads and the clocks: what runs is
`fedge.coordinator.service.Coordinator` on its real store, and `fedge.edge_agent.agent.EdgeAgent` on
its real state folder. In place of the model is one tensor; in place of the training process is a
`Learner`, whose updates are numbers that no other training gives: a sum tells what is in it.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from fedge.coordinator.server_optimizer import SgdConfig, server_optimizer
from fedge.coordinator.service import Coordinator, Plan
from fedge.coordinator.settings import ResolvedTraining, RoundSettings, UploadSettings
from fedge.coordinator.store import PlanRecord, Retention, Store
from fedge.coordinator.uploads import UploadDesk
from fedge.coordinator.version_maker import VersionMaker
from fedge.edge_agent.agent import EdgeAgent
from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.engines import EngineName
from fedge.edge_agent.outbox import Outbox
from fedge.edge_agent.settings import Settings
from fedge.edge_agent.trainer.jobs import (
    Activated,
    ActivateJob,
    Counted,
    CountJob,
    Trained,
    TrainJob,
)
from fedge.edge_agent.trainer.process import TrainerKilled
from fedge.schemas.blobs import describe
from fedge.schemas.errors import FedgeError, TrainingFailed
from fedge.schemas.features import TabularFeatures, ValueTarget
from fedge.schemas.ids import sha256
from fedge.schemas.link.protocol import Link, Will
from fedge.schemas.messages import LossCurve, ReceiptStatus
from fedge.schemas.plan import Graphs, Padding, PlanManifest, TrainingDefaults, WeightSpec
from fedge.schemas.tensor_spec import TensorSpec
from fedge.schemas.tensors import Tensors, encode_tensors
from tests.model.world import Process, World

POPULATION = "model"
CHUNK_BYTES = 1024
WEIGHT = TensorSpec(name="weight", dtype="float64", shape=(300,))
"""Three chunks: enough for some to be lost."""
EPOCH_S = 1_700_000_000.0

_BLOBS = {
    name: f"the {name} of the model".encode() for name in ("train", "eval", "infer", "golden")
}
_REFS = {name: describe(data, CHUNK_BYTES) for name, data in _BLOBS.items()}
MANIFEST = PlanManifest(
    task="model",
    weights=(WeightSpec(tensor=WEIGHT, role="parameter"),),
    features=TabularFeatures(columns=1),
    target=ValueTarget(),
    output=TensorSpec(name="output", dtype="float32", shape=(-1, 1)),
    padding=Padding.MASK,
    defaults=TrainingDefaults(),
    graphs=Graphs(train=_REFS["train"], eval=_REFS["eval"], infer=_REFS["infer"]),
    golden=_REFS["golden"],
)
PLAN = Plan(MANIFEST, describe(MANIFEST.encode(), CHUNK_BYTES))


def tensors_of(value: float) -> Tensors:
    """The one tensor, every element alike."""
    return {WEIGHT.name: np.full(WEIGHT.shape, value)}


def prepare_store(folder: Path) -> None:
    """A coordinator's state folder as `fedge serve` leaves it when the plan is compiled."""
    with Store.open(folder, create=True) as store:
        store.bind_population(POPULATION)
        for data in (*_BLOBS.values(), MANIFEST.encode()):
            store.blobs.put(data)
        store.record_plan(PlanRecord(PLAN.ref, "model", "fingerprint", EPOCH_S))


def _release(weights: Tensors) -> Any:
    """What `Releaser.build` gives, without a model to export."""
    data = encode_tensors(weights)
    golden = encode_tensors({"output": np.asarray(weights[WEIGHT.name][:1])})
    return SimpleNamespace(
        weights=data,
        golden=golden,
        weights_ref=describe(data, CHUNK_BYTES),
        golden_ref=describe(golden, CHUNK_BYTES),
        model_sha256=sha256(b"model" + data),
        model_bytes=1,
    )


@dataclass
class Host:
    """A machine: its folder and its clock outlive the processes on it.

    `clock_error_s`: how far its wall clock is off. `ended`: how its last process ended, if it did
    so by itself.
    """

    name: str
    folder: Path
    world: World
    clock_error_s: float = 0.0
    process: Process | None = None
    main: asyncio.Task[None] | None = None
    ended: BaseException | None = None
    disk_refuses: bool = False
    wanted: bool = True
    """Whether somebody starts it again when it is down."""

    @property
    def client_ids(self) -> tuple[str, str]:
        """Of its two sessions: control and bulk."""
        raise NotImplementedError

    def wall_clock(self) -> float:
        """Seconds since the epoch, as this host believes."""
        return EPOCH_S + self.world.now_s + self.clock_error_s

    def start(self) -> None:
        """Starts the program, if it does not run."""
        if self.process is not None:
            return
        self.ended = None
        offset_s = self.world.rng.uniform(0.0, 1e5)
        process = self.process = self.world.process(offset_s=offset_s, work_s=0.2)
        process.disk_refuses = self.disk_refuses
        process.on_death = self._gone
        with self.world.as_process(process), process.loop.running():
            try:
                self.main = process.loop.create_task(self.program(process))
            except FedgeError as error:
                # As the command does: it says what is wrong and ends.
                self.ended = error
        if self.ended is not None:
            self.world.kill(process)

    def kill(self) -> None:
        """kill -9."""
        if self.process is not None:
            self.world.kill(self.process)

    def stop(self) -> None:
        """SIGTERM."""
        if self.main is not None:
            self.main.cancel()

    def refuse_writes(self, refuses: bool) -> None:
        """Its disk is full, or not any more."""
        self.disk_refuses = refuses
        if self.process is not None:
            self.process.disk_refuses = refuses

    def look(self) -> None:
        """Whether the program has ended by itself. What it raised is in `ended`."""
        if self.process is None or self.main is None or not self.main.done():
            return
        if not self.main.cancelled():
            self.ended = self.main.exception()
        self.world.kill(self.process)

    def program(self, process: Process) -> Any:
        """The coroutine of the program, made anew."""
        raise NotImplementedError

    def let_go(self) -> None:
        """What the kernel takes from a process that is gone."""

    def _gone(self) -> None:
        self.let_go()
        self.process = self.main = None


# ---------------------------------------------------------------- the coordinator


@dataclass
class CoordinatorHost(Host):
    """Where `fedge serve` runs. `rounds`: may be changed between two lives."""

    rounds: RoundSettings = field(default_factory=RoundSettings)
    uploads: UploadSettings = field(default_factory=UploadSettings)
    retention: Retention | None = None
    look_again: asyncio.Event = field(default_factory=asyncio.Event)
    store: Store | None = None

    @property
    def client_ids(self) -> tuple[str, str]:
        return "coordinator", "coordinator.bulk"

    def program(self, process: Process) -> Any:
        self.look_again = asyncio.Event()
        self.store = Store.open(self.folder, create=True, serve=True)
        control, bulk = self.client_ids
        maker = VersionMaker(
            blobs=self.store.blobs,
            manifest=MANIFEST,
            plan_sha256=PLAN.ref.sha256,
            build=_release,
            optimizer=server_optimizer(SgdConfig(), MANIFEST.weights),
            initial=tensors_of(0.0),
            weighting=self.rounds.weighting,
        )
        desk = UploadDesk(
            self.folder / "uploads",
            slots=self.uploads.slots,
            window=self.uploads.window,
            silence_s=self.uploads.silence_s,
        )
        return Coordinator(
            population=POPULATION,
            store=self.store,
            plan=PLAN,
            maker=maker,
            desk=desk,
            control=process.link(control, receive_maximum=256),
            bulk=process.link(bulk),
            round_settings=self.rounds,
            training=ResolvedTraining(
                batch_size=1, learning_rate=0.1, local_epochs=1, proximal_mu=0.0
            ),
            seed=1,
            look_again=self.look_again,
            retention=self.retention,
            clock=process.loop.time,
            wall_clock=self.wall_clock,
        ).run()

    def tell_to_look_again(self) -> None:
        """SIGHUP."""
        if self.process is not None:
            self.look_again.set()

    def let_go(self) -> None:
        if self.store is not None:
            self.store.close()
            self.store = None


# ---------------------------------------------------------------- a device


@dataclass(frozen=True)
class Work:
    """One training that was done: the update that it gave, and what it was for."""

    device: str
    round: int
    base: int
    value: float
    examples: int
    sha256: str


@dataclass(frozen=True)
class Seen:
    """A receipt that a device has taken to heart: it has forgotten the update."""

    device: str
    round: int
    sha256: str
    status: ReceiptStatus


class Learner:
    """The training process of one device: as long as it takes, a number that was never given.

    `done` is told of every training that gave an update, `beginning` of every one that begins and
    `failed` of every one that fails, each by device and round.
    """

    def __init__(
        self,
        host: DeviceHost,
        done: Callable[[Work], None],
        beginning: Callable[[str, int], None],
        failed: Callable[[str, int], None],
    ) -> None:
        self._host = host
        self._done = done
        self._beginning = beginning
        self._failed = failed

    async def run(self, job: Any, on_progress: Any = None) -> Any:
        rng = self._host.world.rng
        match job:
            case CountJob():
                await asyncio.sleep(rng.choice((0.0, 1.0)))
                return Counted(examples=self._host.examples, hold_out=0)
            case ActivateJob():
                await asyncio.sleep(rng.uniform(0.0, 2.0))
                job.output.write_bytes(b"a model")
                return Activated(latency_ms=1.0, largest_difference=0.0)
            case TrainJob():
                return await self._train(job, rng)
        raise AssertionError(job)

    async def _train(self, job: TrainJob, rng: random.Random) -> Trained:
        number, base = int(job.output.stem), self._host.agent._versions.held.number
        self._beginning(self._host.name, number)
        await asyncio.sleep(rng.uniform(0.5, self._host.training_s))
        if self._host.fails:
            self._failed(self._host.name, number)
            raise rng.choice((TrainingFailed, TrainerKilled))("the model says so")
        value = float(rng.getrandbits(40))
        data = encode_tensors(tensors_of(value))
        job.output.write_bytes(data)
        update = describe(data, job.chunk_bytes)
        self._done(Work(self._host.name, number, base, value, self._host.examples, update.sha256))
        return Trained(
            update=update,
            examples=self._host.examples,
            steps=1,
            loss=LossCurve(),
            metrics={},
            training_s=1.0,
            peak_rss_bytes=1,
        )

    async def close(self) -> None:
        """There is nothing to end."""


@dataclass
class DeviceHost(Host):
    """Where `fedge-agent` runs. `fails`: its trainings do; `training_s`: the longest of them."""

    examples: int = 1
    fails: bool = False
    training_s: float = 10.0
    done: Callable[[Work], None] = lambda work: None
    beginning: Callable[[str, int], None] = lambda device, number: None
    failed: Callable[[str, int], None] = lambda device, number: None
    agent: Any = None
    receipts: list[Seen] = field(default_factory=list)
    damaged: bool = False
    """Whether a file of its outbox was ever damaged."""

    @property
    def client_ids(self) -> tuple[str, str]:
        prefix = f"fedge.{POPULATION}.device.{self.name}"
        return f"{prefix}.control", f"{prefix}.bulk"

    def program(self, process: Process) -> Any:
        def link(client_id: str, rng: random.Random, *, will: Will | None = None) -> Link:
            return process.link(client_id, will=will)

        settings = Settings(
            population=POPULATION,
            device=self.name,
            state_dir=self.folder,
            engine=EngineName.ONNX,
            data=DataConfig(path=self.folder / "examples.npz"),
        )
        # The one thing that is not read from a file: who makes its links.
        settings = settings.model_copy(update={"broker": SimpleNamespace(link=link)})
        self.agent = EdgeAgent(
            settings,
            Learner(self, self.done, self.beginning, self.failed),
            random.Random(self.world.rng.random()),
            wall_clock=self.wall_clock,
        )
        self._watch_receipts(self.agent._outbox)
        return self.agent.run()

    def _watch_receipts(self, outbox: Outbox) -> None:
        plain = outbox.settle

        def settle(number: int, status: ReceiptStatus, reason: str | None) -> None:
            offer = outbox.offer(number)
            assert offer is not None
            plain(number, status, reason)
            self.receipts.append(Seen(self.name, number, offer.update.sha256, status))

        outbox.settle = settle  # type: ignore[method-assign] -- this one object is watched

    def lose_everything(self) -> None:
        """A new SD card."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def damage_an_update(self) -> None:
        """A byte of a file in the outbox is not what it was."""
        self.damaged = True
        for path in sorted((self.folder / "outbox").glob("*.safetensors")):
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)

    def let_go(self) -> None:
        if self.agent is not None:
            # A transaction that the kill cut short is undone, as at the next opening.
            self.agent._memory.close()
