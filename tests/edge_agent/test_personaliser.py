"""The shell around personal training: what it asks for, what it keeps, and what it gives up for.

The training process is played by hand; the library, the record and the files are real.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.durable import replace_file
from fedge.edge_agent.library import Library
from fedge.edge_agent.participation import Usage
from fedge.edge_agent.personal_models import HeldOutSums
from fedge.edge_agent.personalisation import PersonalisationSettings
from fedge.edge_agent.personaliser import Personaliser, Seen
from fedge.edge_agent.state import AgentState
from fedge.edge_agent.storage_watch import StorageWatch
from fedge.edge_agent.trainer.jobs import (
    Counted,
    CountJob,
    Personalised,
    PersonaliseJob,
    Progressed,
)
from fedge.edge_agent.trainer.process import Trainer, TrainerKilled, TrainingInterrupted
from fedge.edge_agent.usage import UsageMeter
from fedge.schemas.blobs import BlobRef, describe
from fedge.schemas.errors import FedgeError, StoreUnavailable, TrainingFailed
from fedge.schemas.ids import sha256
from fedge.schemas.messages import VersionAnnouncement
from fedge.schemas.tensors import encode_tensors
from tests.edge_agent.plans import initial_weights, linear_plan

PLAN = linear_plan()
SETTINGS = PersonalisationSettings(min_examples=5, min_hold_out=2, settle_s=0.0)
IDLE = Seen(active=0, held=0, eligible=True, busy=False)
LIMIT_S = 20.0


class Process:
    """Trains when it is told to, with the result that the test wants."""

    def __init__(self) -> None:
        self.jobs: list[PersonaliseJob] = []
        self.interrupted: list[PersonaliseJob] = []
        self.begun = asyncio.Event()
        self.let = asyncio.Event()
        self.turn = asyncio.Event()
        self.turn.set()
        self.loss = 1.0
        self.error: FedgeError | None = None
        self.stopped: asyncio.Event = asyncio.Event()

    async def run(self, job: Any, on_progress: Any = None) -> Any:
        if isinstance(job, CountJob):
            return Counted(examples=40, hold_out=10)
        assert isinstance(job, PersonaliseJob)
        self.jobs.append(job)
        self.begun.set()
        await self.turn.wait()
        on_progress(Progressed(epoch=0, step=0, steps=2, loss=1.0))
        stopping = asyncio.create_task(self.stopped.wait())
        going = asyncio.create_task(self.let.wait())
        try:
            await asyncio.wait([stopping, going], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            going.cancel()
        if self.stopped.is_set():
            self.stopped.clear()
            raise TrainingInterrupted(1, 2, kept=False)
        if self.error is not None:
            raise self.error
        return self.answer(job)

    def answer(self, job: PersonaliseJob) -> Personalised:
        better = self.loss < 2.0
        if better:
            job.weights_output.write_bytes(b"weights")
            job.model_output.write_bytes(b"onnx")
        return Personalised(
            examples=40, steps=15, training_s=0.5, evaluation_s=0.1,
            common=HeldOutSums(examples=10, rows=10, loss_sum=2.0, metrics={}),
            personal=HeldOutSums(examples=10, rows=10, loss_sum=self.loss, metrics={}),
            weights_sha256=sha256(b"weights") if better else None, peak_rss_bytes=1,
        )  # fmt: skip

    def interrupt(self, job: Any) -> bool:
        self.interrupted.append(job)
        self.stopped.set()
        return True

    async def again(self, number: int) -> None:
        """Returns when so many trainings have begun."""
        async with asyncio.timeout(LIMIT_S):
            while len(self.jobs) < number:
                self.begun.clear()
                await self.begun.wait()


class Device:
    """One whose version 0 is in use."""

    def __init__(
        self,
        folder: Path,
        *,
        with_eval: bool = True,
        cache_limit_bytes: int | None = None,
        meter: UsageMeter | None = None,
    ) -> None:
        self.library = Library(folder, cache_limit_bytes)
        self.process = Process()
        self.fetched: list[BlobRef] = []
        self.changes = 0
        for data in (PLAN.manifest.encode(), PLAN.train, PLAN.infer, PLAN.golden):
            self.library.blobs.put(data)
        if with_eval:
            self.library.blobs.put(PLAN.eval)
        self.held = self.use(0)
        self.personaliser = Personaliser(
            "d", "p", SETTINGS, data=DataConfig(path=folder / "data.npz", hold_out=0.2),
            typed=None, threads=1, trainer=cast("Trainer", self.process), library=self.library,
            held=lambda: self.held, fetch=self.fetch, meter=meter, changed=self.changed,
            wall_clock=lambda: 1e9,
        )  # fmt: skip

    def use(self, number: int) -> VersionAnnouncement:
        weights = encode_tensors(initial_weights(number))
        self.library.blobs.put(weights)
        version = VersionAnnouncement(
            number=number, plan=describe(PLAN.manifest.encode()), weights=describe(weights),
            golden=describe(PLAN.golden), model_sha256="0" * 64, model_bytes=1,
        )  # fmt: skip
        self.library.activation_of(version).output.write_bytes(b"common")
        self.library.activate(version)
        self.held = version
        return version

    def changed(self) -> None:
        self.changes += 1

    async def fetch(self, refs: Any) -> None:
        self.fetched += refs
        self.library.blobs.put(PLAN.eval)

    @property
    def serves_personal(self) -> bool:
        serving = self.library.serving()
        assert serving is not None
        return serving.personal

    async def outcome(self) -> str:
        """What is written down, once something is."""
        async with asyncio.timeout(LIMIT_S):
            while (record := self.library.personal.record()) is None:  # noqa: ASYNC110 -- a file
                await asyncio.sleep(0.01)
        return record.outcome


@contextlib.asynccontextmanager
async def running(folder: Path, **options: Any) -> AsyncIterator[Device]:
    device = Device(folder, **options)
    task = asyncio.create_task(device.personaliser.run())
    try:
        yield device
        assert not task.done()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in (folder / "models").iterdir() if path.name.startswith(".")]


def test_what_is_better_answers_and_what_is_not_does_not(tmp_path):
    async def scenario() -> None:
        for loss, expected in ((1.0, "better"), (2.0, "not better"), (3.0, "not better")):
            folder = tmp_path / str(loss)
            async with running(folder) as device:
                device.process.loss = loss
                device.process.let.set()
                device.personaliser.see(IDLE)
                assert await device.outcome() == expected
                assert device.serves_personal == (expected == "better")
                assert leftovers(folder) == []

    asyncio.run(scenario())


def test_the_job_is_of_the_version_s_own_weights(tmp_path):
    async def scenario() -> None:
        async with running(tmp_path) as device:
            device.personaliser.see(IDLE)
            await device.process.again(1)
            (job,) = device.process.jobs
            assert job.weights == device.library.blobs.path(device.held.weights.sha256)
            assert job.settings.batch_size == PLAN.manifest.defaults.batch_size
            assert job.settings.learning_rate == PLAN.manifest.defaults.learning_rate
            assert job.settings.local_epochs == SETTINGS.epochs
            assert device.personaliser.is_training

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "otherwise",
    [
        Seen(active=0, held=0, eligible=True, busy=True),
        Seen(active=0, held=1, eligible=True, busy=False),
        Seen(active=0, held=0, eligible=False, busy=False),
    ],
    ids=["assignment", "newer", "rule"],
)
def test_it_yields_and_begins_again_later(tmp_path, otherwise):
    async def scenario() -> None:
        async with running(tmp_path) as device:
            device.personaliser.see(IDLE)
            await device.process.again(1)
            device.personaliser.see(otherwise)
            async with asyncio.timeout(LIMIT_S):
                while device.personaliser.is_training:  # noqa: ASYNC110 -- it tells `changed` only
                    await asyncio.sleep(0)
            # A broken rule ends the process; for work, the process stays.
            assert len(device.process.interrupted) == (0 if otherwise.eligible else 1)
            await asyncio.sleep(0.1)
            assert len(device.process.jobs) == 1
            assert device.library.personal.record() is None
            assert device.changes == 2
            device.process.let.set()
            device.personaliser.see(IDLE)
            assert await device.outcome() == "better"
            assert len(device.process.jobs) == 2

    asyncio.run(scenario())


def test_a_training_of_what_is_forgotten_ends_at_once(tmp_path):
    async def scenario() -> None:
        async with running(tmp_path) as device:
            device.personaliser.see(IDLE)
            await device.process.again(1)
            device.personaliser.look_again()
            await asyncio.sleep(0.05)
            assert device.personaliser.is_training
            device.personaliser.look_again(forgotten=True)
            await device.process.again(2)
            assert device.library.personal.record() is None

    asyncio.run(scenario())


def test_a_failure_that_would_come_again_is_written_down_and_not_repeated(tmp_path):
    async def scenario() -> None:
        async with running(tmp_path) as device:
            device.process.error = TrainingFailed("the loss became NaN")
            device.process.let.set()
            device.personaliser.see(IDLE)
            assert await device.outcome() == "failed"
            record = device.library.personal.record()
            assert record is not None
            assert record.reason == "the loss became NaN"
            for seen in (Seen(0, 0, eligible=True, busy=True), IDLE) * 3:
                device.personaliser.see(seen)
                await asyncio.sleep(0.05)
            assert len(device.process.jobs) == 1
            # Another version may fare better.
            device.process.error = None
            device.use(1)
            device.personaliser.see(Seen(1, 1, eligible=True, busy=False))
            await device.process.again(2)

    asyncio.run(scenario())


@pytest.mark.parametrize("error", [TrainerKilled("killed"), StoreUnavailable("No space left")])
def test_what_may_pass_is_tried_again_after_a_rest(tmp_path, error):
    async def scenario() -> None:
        async with running(tmp_path) as device:
            device.process.error = error
            device.process.let.set()
            device.personaliser.see(IDLE)
            loop = asyncio.get_running_loop()
            await device.process.again(1)
            begun_s = loop.time()
            await device.process.again(2)
            # A rest of a second where settle_s is none.
            assert loop.time() - begun_s >= 0.9
            assert device.library.personal.record() is None
            device.process.error = None
            assert await device.outcome() == "better"

    asyncio.run(scenario())


def test_the_next_life_does_not_do_it_again(tmp_path):
    async def scenario() -> None:
        async with running(tmp_path) as device:
            device.process.let.set()
            device.personaliser.see(IDLE)
            await device.outcome()
        async with running(tmp_path) as device:
            device.personaliser.see(IDLE)
            await asyncio.sleep(0.2)
            assert device.process.jobs == []
            assert device.serves_personal

    asyncio.run(scenario())


def test_a_newer_version_s_own_takes_the_place_of_the_older_one(tmp_path):
    async def scenario() -> None:
        async with running(tmp_path) as device:
            device.process.let.set()
            device.personaliser.see(IDLE)
            await device.outcome()
            assert device.library.personal.weights_of(0) is not None
            device.process.loss = 5.0
            device.use(1)
            assert not device.serves_personal
            device.personaliser.see(Seen(1, 1, eligible=True, busy=False))
            await device.process.again(2)
            assert device.library.personal.weights_of(0) is None
            assert not device.serves_personal

    asyncio.run(scenario())


def test_the_graph_that_measures_is_fetched_once_and_stays_with_its_plan(tmp_path):
    async def scenario() -> None:
        async with running(tmp_path, with_eval=False) as device:
            device.process.let.set()
            device.personaliser.see(IDLE)
            await device.outcome()
            assert device.fetched == [PLAN.manifest.graphs.eval]
            newer = device.use(1)
            device.library.make_room(newer, newer)
            device.personaliser.see(Seen(1, 1, eligible=True, busy=False))
            await device.process.again(2)
            assert len(device.fetched) == 1

    asyncio.run(scenario())


def test_what_measures_takes_the_room_of_what_nobody_needs(tmp_path):
    stale = b"an older version's" * 100

    async def scenario() -> None:
        async with running(tmp_path / "unlimited") as device:
            needed = sum(path.stat().st_size for path in (tmp_path / "unlimited/blobs").iterdir())
        async with running(
            tmp_path / "limited", with_eval=False, cache_limit_bytes=needed + 10
        ) as device:
            device.library.blobs.put(stale)
            device.process.let.set()
            device.personaliser.see(IDLE)
            assert await device.outcome() == "better"
            assert device.fetched == [PLAN.manifest.graphs.eval]
            assert not device.library.blobs.has(sha256(stale))
            blobs = (tmp_path / "limited/blobs").iterdir()
            assert sum(path.stat().st_size for path in blobs) == needed
        async with running(
            tmp_path / "small", with_eval=False, cache_limit_bytes=needed - 10
        ) as device:
            device.personaliser.see(IDLE)
            assert await device.outcome() == "failed"
            assert device.fetched == []

    asyncio.run(scenario())


class Ledger:
    """What is written down of the time."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def add_usage(self, used: Usage, line: int | None) -> int:
        self.seconds.append(used.training_s)
        return 0


def test_waiting_for_its_turn_is_no_training(tmp_path):
    waited_s = 0.4

    async def scenario() -> None:
        ledger = Ledger()
        meter = UsageMeter(cast("AgentState", ledger), StorageWatch("d"), lambda: 1e9)
        async with running(tmp_path, meter=meter) as device:
            device.process.turn.clear()
            device.process.let.set()
            device.personaliser.see(IDLE)
            await device.process.again(1)
            await asyncio.sleep(waited_s)
            assert (device.personaliser.is_training, device.changes) == (False, 0)
            assert meter.unwritten().training_s == 0.0
            device.process.turn.set()
            assert await device.outcome() == "better"
            assert device.changes == 2
            assert len(ledger.seconds) == 1
            assert ledger.seconds[0] < waited_s / 2

    asyncio.run(scenario())


def test_what_waits_for_its_turn_makes_way_too(tmp_path):
    async def scenario() -> None:
        async with running(tmp_path) as device:
            device.process.turn.clear()
            device.personaliser.see(IDLE)
            await device.process.again(1)
            device.personaliser.see(Seen(active=0, held=0, eligible=True, busy=True))
            await asyncio.sleep(0.05)
            assert device.changes == 0
            device.process.turn.set()
            device.process.let.set()
            device.personaliser.see(IDLE)
            assert await device.outcome() == "better"
            assert len(device.process.jobs) == 2

    asyncio.run(scenario())


def test_a_record_of_forgotten_texts_is_removed_wherever_they_were(tmp_path):
    """Whoever forgets removes it; a store in another folder does not know of it."""

    async def scenario() -> None:
        async with running(tmp_path) as device:
            device.process.let.set()
            device.personaliser.see(IDLE)
            await device.outcome()
            record = device.library.personal.record()
            assert record is not None
            stale = record.model_copy(update={"generation": 7})
            replace_file(tmp_path / "personal.json", stale.model_dump_json().encode())
            device.personaliser.see(Seen(0, 0, eligible=False, busy=False))
            async with asyncio.timeout(LIMIT_S):
                while device.serves_personal:  # noqa: ASYNC110 -- a file
                    await asyncio.sleep(0.01)
            assert device.library.personal.record() is None

    asyncio.run(scenario())
