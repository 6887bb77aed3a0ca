"""A device in rollouts without network and processes: real files, real checks, jobs done in place.

`die_at`: the process is killed before durable change number so many; what a killed process leaves
is what the next `Device` in the same folder begins with.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedge.edge_agent import activation, library
from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.free_time import FreeTime
from fedge.edge_agent.library import Library
from fedge.edge_agent.rollout_follower import RolloutFollower
from fedge.edge_agent.state import AgentState
from fedge.edge_agent.storage_watch import StorageWatch
from fedge.edge_agent.trainer.child import Worker
from fedge.edge_agent.trial import Trials
from fedge.edge_agent.versions import Versions
from fedge.schemas.blobs import BlobRef, describe
from fedge.schemas.ids import sha256
from fedge.schemas.messages import (
    CandidateAnnouncement,
    CandidatePhase,
    Message,
    StableAnnouncement,
    TrialChecks,
    TrialCounted,
    TrialReport,
    VersionAnnouncement,
)
from fedge.schemas.tensors import encode_tensors
from tests.edge_agent.plans import HandMadePlan, examples, initial_weights, linear_plan

CHECKS = TrialChecks(max_loss_increase=0.1, min_hold_out=20)
TRUE = np.array([[1.0], [-2.0], [0.5]], np.float32)


class Killed(BaseException):
    """The process is gone."""


class Deaths:
    """Counts durable changes, and is the death of the process before one of them."""

    def __init__(self) -> None:
        self.count = 0
        self.die_at: int | None = None

    def before(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any, **named: Any) -> Any:
            if self.die_at is not None and self.count >= self.die_at:
                raise Killed
            self.count += 1
            return change(*arguments, **named)

        return changed


@pytest.fixture
def deaths(monkeypatch: pytest.MonkeyPatch) -> Deaths:
    """Every durable change of a device in rollouts is counted."""
    found = Deaths()
    for module in (library, activation):
        monkeypatch.setattr(module, "replace_file", found.before(module.replace_file))
    for name in ("begin_trial", "end_trial", "count_trial", "keep_announcement"):
        monkeypatch.setattr(AgentState, name, found.before(getattr(AgentState, name)))
    return found


def weights(error: float) -> dict[str, np.ndarray]:
    """Of a linear model that is so far from the truth."""
    start = initial_weights()
    scale = start["scale"].reshape(-1, 1)
    return {
        **start,
        "w": ((TRUE + np.float32(error)) / scale).astype(np.float32),
        "b": np.array([0.3], np.float32),
    }


class Site:
    """What is published: versions by number, each with its blobs."""

    def __init__(self) -> None:
        self.plan: HandMadePlan = linear_plan()
        self.blobs: dict[str, bytes] = {}
        self.versions: dict[int, dict[str, Any]] = {}
        manifest = self.plan.manifest
        for data in (
            *(manifest.encode(), self.plan.train, self.plan.eval, self.plan.infer),
            self.plan.golden,
        ):
            self.publish(data)

    def publish(self, data: bytes) -> BlobRef:
        self.blobs[sha256(data)] = data
        return describe(data)

    def make(self, number: int, error: float, **facts: Any) -> None:
        """Version `number`, so far from the truth. `facts`: what is announced instead."""
        from safetensors.numpy import load  # noqa: PLC0415 -- only where versions are made

        made = weights(error)
        inputs = load(self.plan.golden)["input"]
        outputs = ((inputs * made["scale"]) @ made["w"] + made["b"]).astype(np.float32)
        model = self.plan.model(made)
        self.versions[number] = {
            "number": number,
            "plan": describe(self.plan.manifest.encode()),
            "weights": self.publish(encode_tensors(made)),
            "golden": self.publish(encode_tensors({"output": outputs})),
            "model_sha256": sha256(model),
            "model_bytes": len(model),
        } | facts

    def newest(self, number: int, *, staged: bool = True) -> VersionAnnouncement:
        return VersionAnnouncement(**self.versions[number], staged=True if staged else None)

    def stable(self, number: int) -> StableAnnouncement:
        return StableAnnouncement(**self.versions[number])

    def candidate(
        self,
        number: int,
        rollout: int = 1,
        phase: CandidatePhase = CandidatePhase.RUNNING,
        share: float = 1.0,
        checks: TrialChecks = CHECKS,
    ) -> CandidateAnnouncement:
        return CandidateAnnouncement(
            **self.versions[number], rollout=rollout, phase=phase, share=share, checks=checks
        )


class InPlace:
    """A trainer that does each job here. `fail`: raised instead, if it says so for a job."""

    def __init__(self) -> None:
        self.jobs: list[Any] = []
        self.fail: Callable[[Any], BaseException | None] = lambda _: None
        self._worker = Worker()

    async def run(self, job: Any, on_progress: object = None) -> Any:
        self.jobs.append(job)
        await asyncio.sleep(0)
        error = self.fail(job)
        if error is not None:
            raise error
        return self._worker.do(job, lambda _: None)


class Device:
    """One life of a device whose state is in `folder`."""

    def __init__(self, folder: Path, site: Site, *, hold_out: float = 0.5, **limits: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.site = site
        self.said: list[Message] = []
        self.fetched: list[str] = []
        self.used: list[int] = []
        self.received_bytes = 0
        path = folder / "data.npz"
        if not path.exists():
            x, y = examples(200)
            np.savez(path, x=x, y=y)
        self.library = Library(folder, limits.get("cache_limit_bytes"))
        self.memory = AgentState(folder / "agent.sqlite")
        self.trainer: Any = InPlace()
        storage = StorageWatch("d", first_retry_s=0.01)
        anything: Any = self
        self.versions = Versions(
            "d",
            library=self.library,
            downloads=anything,
            memory=self.memory,
            trainer=self.trainer,
            storage=storage,
            feed=lambda _: None,
            report=self.send,
        )
        free = FreeTime()
        self.trials = Trials(
            "d",
            library=self.library,
            versions=self.versions,
            memory=self.memory,
            trainer=self.trainer,
            storage=storage,
            data=None if hold_out == 0 else DataConfig(path=path, hold_out=hold_out),
            typed=None,
            threads=1,
            until_idle=self.idle,
            free=free,
        )
        self.follower = RolloutFollower(
            "p",
            "d",
            library=self.library,
            versions=self.versions,
            trials=self.trials,
            memory=self.memory,
            trainer=self.trainer,
            storage=storage,
            feed=lambda event: self.used.append(event.version),  # type: ignore[union-attr] -- Activated
            send=self.send,
            until_idle=self.idle,
            free=free,
        )
        self.follower.see(free=True)
        self.versions.recover()

    async def send(self, message: Message) -> None:
        self.said.append(message)

    async def idle(self) -> None:
        return

    async def fetch(self, refs: Iterable[BlobRef], *, for_a_round: bool = False) -> None:
        """As `Downloads.fetch`, from the site."""
        for ref in refs:
            await asyncio.sleep(0)
            if not self.library.blobs.has(ref.sha256):
                self.fetched.append(ref.sha256)
                self.library.blobs.put(self.site.blobs[ref.sha256])

    def hear(self, *messages: Message) -> None:
        for message in messages:
            match message:
                case StableAnnouncement():
                    self.follower.heard_stable(message)
                case CandidateAnnouncement():
                    self.follower.heard_candidate(message)
                case TrialCounted():
                    self.follower.heard_counted(message)
                case VersionAnnouncement():
                    self.follower.heard_version(message)

    @property
    def in_use(self) -> int | None:
        active = self.library.active()
        return None if active is None else active.version

    @property
    def reports(self) -> list[TrialReport]:
        return [one for one in self.said if isinstance(one, TrialReport)]

    def _acts(self) -> bool:
        return any(task.get_name() == "rollout-d" for task in asyncio.all_tasks())

    async def rest(self, *messages: Message) -> None:
        """Hears these and acts until nothing is left to do; raises `Killed` if it is killed."""
        self.hear(*messages)
        running = asyncio.create_task(self.follower.run())
        quiet = 0
        while quiet < (20 if self._acts() else 3) and not running.done():
            before = (len(self.said), len(self.used), len(self.trainer.jobs), len(self.fetched))
            # Threads write files: a moment without any change is the end, a longer one if it acts.
            await asyncio.sleep(0.02)
            after = (len(self.said), len(self.used), len(self.trainer.jobs), len(self.fetched))
            quiet = quiet + 1 if before == after else 0
        if running.done():
            running.result()
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


async def until(what: Callable[[], bool]) -> None:
    """Returns when it is so; fails if it is not within ten seconds."""
    async with asyncio.timeout(10):
        while not what():  # noqa: ASYNC110 -- files and other tasks tell nobody
            await asyncio.sleep(0.01)


@contextlib.contextmanager
def device(folder: Path, site: Site, **options: Any) -> Iterator[Device]:
    made = Device(folder, site, **options)
    try:
        yield made
    finally:
        # What a killed process has open is closed by the kernel.
        made.memory.close()


@pytest.fixture
def site() -> Site:
    """Version 5 is stable, 7 is better, 8 is worse, 9 is the base of training, and 10 the next."""
    made = Site()
    made.make(5, error=0.5)
    made.make(7, error=0.25)
    made.make(8, error=5.0)
    made.make(9, error=0.1)
    made.make(10, error=0.05)
    return made


async def settled(here: Device, site: Site) -> None:
    """The device uses the stable version."""
    await here.rest(site.newest(9), site.stable(5), site.candidate(5, rollout=0, share=0.0))
    assert here.in_use == 5
    here.said.clear()
    here.used.clear()
