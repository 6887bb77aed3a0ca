"""A thousand devices at one broker, a third of them lost or late: do rounds close, is memory flat?

    python benchmarks/large_fleet.py                    a table and JSON, some minutes
    python benchmarks/large_fleet.py --devices 200 --goal 20 --rounds 20

A real coordinator and a real Mosquitto with default settings. The devices are simulated at the
protocol: each has its own name and two real MQTT sessions, checks in as it is told to, and uploads
a real update of the plan through the agent's own sender; it does not train and keeps no files. In
each assignment a device drops out with 10% (it is never heard of again in that round) or is late
with 22% (it delivers after the deadline), the shares of Bonawitz et al. 2019, "Towards Federated
Learning at Scale: System Design", section 9. Reference in the same run: the rounds that would have
reached their goal with the operator's fixed over-selection of 1.3, computed from the same shares.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from processes import Program, mosquitto, print_table, program, wait_for_event

from fedge.coordinator.store import Outcome, Store
from fedge.edge_agent.upload import Uploads
from fedge.schemas import messages, topics
from fedge.schemas.blobs import BlobRef, describe
from fedge.schemas.errors import LinkClosed
from fedge.schemas.link.broker import BrokerSettings
from fedge.schemas.link.protocol import Delivery, Link, LinkUp
from fedge.schemas.messages import Assignment, LossCurve, RoundAnnouncement, RoundPhase
from fedge.schemas.plan import PlanManifest
from fedge.schemas.tensors import encode_tensors
from fedge.schemas.topics import Topics

DROPPED, LATE = 0.10, 0.22
TASK = """
from torch import nn
from fedge.coordinator.task import Task, accuracy, cross_entropy
from fedge.schemas.features import ClassTarget, TabularFeatures

task = Task(
    name="linear",
    model=lambda: nn.Linear(100, 50),
    loss=cross_entropy,
    features=TabularFeatures(columns=100),
    target=ClassTarget(classes=50),
    metrics={"accuracy": accuracy},
)
"""


class SimulatedDevice:
    """One device: two sessions and no disk. `fate`: what becomes of an assignment."""

    def __init__(self, population: str, name: str, port: int, update: tuple[Path, BlobRef]) -> None:
        self._name = name
        self._topics = Topics(population)
        self._rng = random.Random(name)
        broker = BrokerSettings(port=port)
        self._control: Link = broker.link(f"fedge.{name}", self._rng)
        self._bulk: Link = broker.link(f"fedge.{name}.bulk", self._rng)
        self._uploads = Uploads(self._bulk, self._topics, name)
        self._path, self._update = update
        self._tasks: set[asyncio.Task[None]] = set()
        self._checked_in = 0
        self._working = 0
        self._round: RoundAnnouncement | None = None
        self.connected = asyncio.Event()
        self.fates = {"in_time": 0, "late": 0, "dropped": 0}

    async def run(self, connecting: asyncio.Semaphore) -> None:
        async with connecting:
            await self._control.subscribe(*self._topics.device_control(self._name))
            await self._control.start()
            await self._bulk.start()
            while not isinstance(await self._control.next_event(), LinkUp):
                pass
        self.connected.set()
        birth = messages.Presence(boot=1, online=True)
        self._start(
            self._control.publish(
                self._topics.presence(self._name), messages.encode(birth), retain=True
            )
        )
        self._start(self._drain_bulk())
        with contextlib.suppress(LinkClosed):
            while True:
                event = await self._control.next_event()
                if isinstance(event, Delivery):
                    self._control.ack(event)
                    kind = topics.parse(event.topic).message
                    if kind is not None:
                        self._receive(messages.decode(kind, event.payload))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self._uploads.close()
        await self._control.close()
        await self._bulk.close()

    def _receive(self, message: messages.Message) -> None:
        match message:
            case RoundAnnouncement():
                self._round = message
                if message.phase is RoundPhase.GATHERING and message.round > self._checked_in:
                    self._checked_in = message.round
                    self._start(self._check_in(message))
            case Assignment() if message.round > self._working:
                self._working = message.round
                self._start(self._work(message))
            case messages.Grant():
                self._uploads.granted(message, self._update, self._path)
            case messages.Have():
                self._uploads.acknowledged(message)
            case messages.Receipt():
                self._uploads.stop(message.sha256)
            case _:
                pass

    async def _check_in(self, invited: RoundAnnouncement) -> None:
        spread_s = invited.checkin_spread_s
        if self._rng.random() < invited.checkin_share:
            await asyncio.sleep(self._rng.uniform(0, spread_s))
        else:
            await asyncio.sleep(self._rng.uniform(max(1.0, spread_s), 2 * max(1.0, spread_s)))
            now = self._round
            if now is None or now.round != invited.round or now.phase is not RoundPhase.GATHERING:
                return
        await self._send(messages.Checkin(round=invited.round, examples=10, boot=1))

    async def _work(self, assignment: Assignment) -> None:
        draw = self._rng.random()
        if draw < DROPPED:
            self.fates["dropped"] += 1
            return
        if draw < DROPPED + LATE:
            self.fates["late"] += 1
            await asyncio.sleep(assignment.deadline_s * 1.2)
        else:
            self.fates["in_time"] += 1
            await asyncio.sleep(self._rng.uniform(0, 0.1 * assignment.deadline_s))
        await self._send(
            messages.Offer(
                round=assignment.round,
                base=assignment.base,
                update=self._update,
                examples=10,
                steps=1,
                training_s=0.1,
                loss=LossCurve(),
                metrics={},
            )
        )

    async def _send(self, message: messages.Message) -> None:
        topic = self._topics.up(self._name, type(message))
        await self._control.publish(topic, messages.encode(message))

    async def _drain_bulk(self) -> None:
        while True:
            await self._bulk.next_event()

    def _start(self, work: Any) -> None:
        async def carried() -> None:
            with contextlib.suppress(LinkClosed):
                await work

        task = asyncio.create_task(carried())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def write_config(folder: Path, port: int, wanted: argparse.Namespace) -> None:
    (folder / "linear_task.py").write_text(TASK)
    (folder / "fedge.toml").write_text(
        f'population = "large"\ntask = "linear_task.py:task"\nstate_dir = "coordinator"\n'
        f'log_format = "json"\n[broker]\nport = {port}\n'
        f"[round]\ngoal = {wanted.goal}\ndeadline_s = {wanted.deadline_s}\n"
        f"versions = {wanted.rounds}\n"
    )


def write_update(folder: Path) -> tuple[Path, BlobRef]:
    """A right update that changes nothing, in a file that every device sends."""
    with Store.open(folder / "coordinator") as store:
        newest = store.newest_version()
        assert newest is not None
        plan = store.plan(newest.plan_sha256)
        assert plan is not None
        manifest = PlanManifest.decode(store.blobs.read(plan.ref.sha256))
    data = encode_tensors({s.name: np.zeros(s.shape, s.dtype) for s in manifest.update_specs})
    path = folder / "update.safetensors"
    path.write_bytes(data)
    return path, describe(data)


async def serve_rounds(
    folder: Path, port: int, start: Callable[[], Program], wanted: argparse.Namespace
) -> dict[str, Any]:
    update = write_update(folder)
    devices = [
        SimulatedDevice("large", f"d{index:04d}", port, update) for index in range(wanted.devices)
    ]
    connecting = asyncio.Semaphore(50)
    tasks = [asyncio.create_task(device.run(connecting)) for device in devices]
    for device in devices:
        await device.connected.wait()
    coordinator = start()
    memory: dict[int, int] = {}
    started = time.monotonic()
    try:
        while True:
            await asyncio.sleep(0.5)
            made = [e for e in coordinator.events() if e["event"] == "version_made"]
            newest = made[-1]["version"] if made else 0
            memory[newest] = coordinator.resident_bytes()
            if newest >= wanted.rounds or time.monotonic() - started > wanted.limit_s:
                break
            for task in tasks:
                if task.done() and task.exception() is not None:
                    raise SystemExit(f"a device failed: {task.exception()!r}")
    finally:
        seconds = time.monotonic() - started
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(device.close() for device in devices))
    fates = {name: sum(device.fates[name] for device in devices) for name in devices[0].fates}
    return {"seconds": seconds, "memory": memory, "fates": fates}


def slope_of(memory: dict[int, int], last: int) -> float:
    """Bytes a round, by least squares over the last so many rounds."""
    newest = max(memory)
    points = [(number, size) for number, size in memory.items() if number > newest - last]
    numbers, sizes = np.array(points, dtype=float).T
    return float(np.polyfit(numbers, sizes, 1)[0])


def fixed_share(goal: int, factor: float, rounds: int) -> float:
    """Of that many rounds with a fixed cohort, the share that would reach the goal in time."""
    rng = np.random.default_rng(1)
    delivered = rng.binomial(round(goal * factor), 1 - DROPPED - LATE, size=rounds)
    return float((delivered >= goal).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--goal", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--deadline-s", type=float, default=20.0)
    parser.add_argument("--limit-s", type=float, default=1500.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/large_fleet.json"))
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with mosquitto(folder) as (port, broker):
            write_config(folder, port, wanted)
            arguments = ["-m", "fedge.coordinator", "serve", "--config", "fedge.toml"]
            with program("first-life", arguments, folder) as first:
                wait_for_event(first, "version_published")
            # The fleet is there before the coordinator, as after any of its restarts.
            with contextlib.ExitStack() as stack:
                lives: list[Program] = []

                def start() -> Program:
                    lives.append(stack.enter_context(program("coordinator", arguments, folder)))
                    return lives[0]

                found = asyncio.run(serve_rounds(folder, port, start, wanted))
                (coordinator,) = lives
                found["coordinator_cpu_s"] = coordinator.cpu_s()
                found["coordinator_peak_bytes"] = coordinator.peak_bytes()
                found["broker_bytes"] = int(broker.memory_info().rss)
                asked = [e["ask"] for e in coordinator.events() if e["event"] == "round_gathering"]
            with Store.open(folder / "coordinator") as store:
                closed = [r for r in store.rounds() if r.outcome is not None]
                cohorts = [len(store.participants(r.number)) for r in closed]
                accepted = [len(store.accepted_in(r.number)) for r in closed]
    by_goal = [
        record.outcome is Outcome.AGGREGATED and count >= record.goal
        for record, count, cohort in zip(closed, accepted, cohorts, strict=True)
        if cohort
    ]
    cohorts = [cohort for cohort in cohorts if cohort]
    slope = slope_of(found["memory"], 50)
    share = sum(by_goal) / len(by_goal)
    learned = by_goal[next((i + 1 for i, good in enumerate(by_goal) if not good), 0) :]
    report = {
        "rounds": len(by_goal),
        "closed_by_goal": share,
        "closed_by_goal_after_the_first_miss": sum(learned) / max(1, len(learned)),
        "fixed_over_selection": fixed_share(wanted.goal, 1.3, 1000),
        "cohorts": cohorts,
        "asked": asked,
        "memory_slope_bytes_a_round": slope,
        **found,
    }
    fates = found["fates"]
    cpu_s = found["coordinator_cpu_s"] / len(by_goal)
    total = max(1, sum(fates.values()))
    rows = [
        ("devices, goal", f"{wanted.devices}, {wanted.goal}", ""),
        ("rounds closed", f"{len(by_goal)} in {found['seconds']:.0f} s", ""),
        ("dropped out, late", f"{fates['dropped'] / total:.1%}, {fates['late'] / total:.1%}", ""),
        ("closed by goal", f"{share:.1%}", "wanted: at least 99%"),
        ("  after the first miss", f"{report['closed_by_goal_after_the_first_miss']:.1%}", ""),
        ("  cohort fixed at 1.3", f"{report['fixed_over_selection']:.1%}", "reference"),
        ("cohort", f"{cohorts[0]} at first, {cohorts[-1]} at last", ""),
        ("memory slope", f"{slope / 1024:.1f} KiB a round", "over the last 50 rounds"),
        ("coordinator's peak", f"{found['coordinator_peak_bytes'] / 1e6:.0f} MB", ""),
        (
            "coordinator's processor",
            f"{cpu_s:.2f} s a round",
            "",
        ),
        ("broker's memory", f"{found['broker_bytes'] / 1e6:.0f} MB", ""),
    ]
    print_table(rows)
    wanted.out.parent.mkdir(parents=True, exist_ok=True)
    wanted.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k not in ("memory", "cohorts", "asked")}))


if __name__ == "__main__":
    main()
