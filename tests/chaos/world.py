"""The fleet of one run and everything that can be done to it.

A broker, a coordinator and its devices, each of them behind a proxy, with a disk and a wall clock
of its own; the observer and the stranger straight at the broker. Starts all of it, and ends all of
it, also when the kit fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import shutil
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from tests.brokers import HOST, MOSQUITTO
from tests.chaos.client import BareClient
from tests.chaos.clocks import SITE, Clock
from tests.chaos.disks import Disk, NoMounting
from tests.chaos.evidence import Evidence
from tests.chaos.ports import free_port
from tests.chaos.programs import Exit, Program, Stop
from tests.chaos.proxy import Proxy
from tests.chaos.schedule import BROKER, COORDINATOR
from tests.chaos.stranger import Stranger

TEMPORARY = "tmp"
ROOT = Path(__file__).resolve().parents[2]
POPULATION = "chaos"
TASK = f"{Path(__file__).with_name('task.py')}:task"
COORDINATOR_DISK_BYTES, AGENT_DISK_BYTES = 96 << 20, 24 << 20
PATIENT_S = 20.0
"""For what should take a moment, on a computer that is busy with other things."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How the fleet's rounds go: short, so that many fit into a run. `mode`: sync or async.

    `sabotage`: see `sabotage`, None for an honest coordinator.
    """

    mode: str = "sync"
    goal: int = 3
    quorum: int = 2
    gather_s: float = 2.0
    deadline_s: float = 10.0
    local_epochs: int = 24
    sabotage: str | None = None


@dataclass(slots=True)
class Trouble:
    """A fault that was injected: when, in monotonic seconds; `ended_s`: None while it lasts."""

    kind: str
    target: str
    began_s: float
    ended_s: float | None = None


@dataclass
class World:
    """See the top of this file.

    `disks`: empty where nothing may be mounted. `held`: processes that a fault has in its hands.
    `is_kept`: whether what is on the disks stays in their folders when the world ends.
    """

    folder: Path
    devices: tuple[str, ...]
    pace: Pace
    evidence: Evidence
    observer: BareClient
    stranger: Stranger
    broker_port: int
    proxies: dict[str, Proxy] = field(default_factory=dict)
    programs: dict[str, Program] = field(default_factory=dict)
    disks: dict[str, Disk] = field(default_factory=dict)
    clocks: dict[str, Clock] = field(default_factory=dict)
    exits: list[Exit] = field(default_factory=list)
    stops: list[Stop] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)
    held: set[str] = field(default_factory=set)
    timeline: list[tuple[float, str]] = field(default_factory=list)
    is_kept: bool = True
    made_s: float = field(default_factory=time.monotonic)

    @property
    def names(self) -> tuple[str, ...]:
        """Every program of Fedge: the devices and the coordinator."""
        return (*self.devices, COORDINATOR)

    def state_dir(self, name: str) -> Path:
        """A program's state folder."""
        return self.folder / "state" / name

    @property
    def database(self) -> Path:
        """The coordinator's."""
        return self.state_dir(COORDINATOR) / "fedge.sqlite"

    def ledger(self, device: str) -> Path:
        """A device's database."""
        return self.state_dir(device) / "agent.sqlite"

    def note(self, text: str) -> None:
        """A line for whoever asks what happened around a moment."""
        now = time.monotonic()
        self.timeline.append((now, text))
        with (self.folder / "timeline.txt").open("a") as file:
            file.write(f"{now - self.made_s:9.3f}  {text}\n")

    def exited(self, end: Exit) -> None:
        """A process ended."""
        self.exits.append(end)
        how = "as was wanted" if end.wanted else "BY ITSELF"
        self.note(f"{end.program} ended with status {end.status}, {how}")

    def version_in_use(self, device: str) -> int:
        """The version whose model answers on a device, -1 before the first."""
        try:
            found = json.loads((self.state_dir(device) / "active.json").read_bytes())
        except (OSError, ValueError):
            return -1
        return int(found["version"])

    def outages(self, name: str, end_s: float) -> list[tuple[float, float]]:
        """When no process of a program was there, or one that had not connected yet."""
        found, connected = [], self.proxies[name].accepted_s
        for end in self.exits:
            if end.program == name:
                starts = [life.started_s for life in self.programs[name].lives]
                began_s = min((s for s in starts if s > end.at_s), default=end_s)
                served_s = min((s for s in connected if s > began_s), default=end_s)
                found.append((end.at_s, served_s))
        return found

    def recoveries_s(self, name: str) -> list[float]:
        """How long each start took until the program had connected to its broker, in seconds.

        Without the first, in which the coordinator compiles its task.
        """
        connected = self.proxies[name].accepted_s
        starts = [life.started_s for life in self.programs[name].lives[1:]]
        return [
            min(after) - start_s
            for start_s, next_s in itertools.pairwise([*starts, float("inf")])
            if (after := [s for s in connected if start_s < s < next_s])
        ]

    async def stop(self, name: str) -> None:
        """Ends a program in an orderly way, and notes whether it obeyed."""
        stop = await self.programs[name].stop(PATIENT_S)
        if stop is not None:
            self.stops.append(stop)

    async def restart_broker(self, comes_back: str, limits: str, down_s: float) -> None:
        """Kills the broker and starts it again, with or without what it had saved."""
        broker = self.programs[BROKER]
        broker.kill()
        await broker.gone()
        await asyncio.sleep(down_s)
        saved, ancient = (self.folder / BROKER / name for name in ("mosquitto.db", "ancient.db"))
        if comes_back == "empty":
            saved.unlink(missing_ok=True)
        elif comes_back == "ancient" and ancient.exists():
            shutil.copyfile(ancient, saved)
        elif saved.exists():
            shutil.copyfile(saved, ancient)
        write_broker_settings(self.folder / BROKER, self.broker_port, limits)
        await self.start_broker()

    async def start_broker(self) -> None:
        """Returns when the broker takes connections. Raises `TimeoutError`."""
        await self.programs[BROKER].start()
        async with asyncio.timeout(PATIENT_S):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection(HOST, self.broker_port)
                    writer.transport.abort()
                    return
                await asyncio.sleep(0.01)


LIMITS = {
    "default": (),
    "small": ("max_packet_size 61700", "max_inflight_messages 10", "max_queued_messages 100"),
}
"""A broker as it is installed, and one that carries little."""


def write_broker_settings(folder: Path, port: int, limits: str) -> None:
    """Mosquitto's configuration. It saves what it holds now and then, as `kill -9` leaves it."""
    lines = [
        f"listener {port} {HOST}",
        "allow_anonymous true",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
        "log_type notice",
        "persistence true",
        f"persistence_location {folder}/",
        "autosave_interval 2",
        *LIMITS[limits],
    ]
    if os.geteuid() == 0:
        # It would become the user `mosquitto`, who may not read these files.
        lines.append("user root")
    (folder / "mosquitto.conf").write_text("\n".join(lines) + "\n")


@contextlib.asynccontextmanager
async def world(
    folder: Path, device_count: int, pace: Pace, *, with_disks: bool
) -> AsyncIterator[World]:
    """A running fleet that is not harmed yet. Everything of it ends with the block."""
    devices = tuple(f"d{index}" for index in range(device_count))
    evidence = Evidence({d: folder / "state" / d / "outbox" for d in devices})
    port = free_port()
    observer = BareClient(port, "observer", (f"fedge/1/{POPULATION}/all/+",), evidence.of_observer)
    stranger = Stranger(POPULATION, port, evidence)
    made = World(folder, devices, pace, evidence, observer, stranger, port)
    for name in (BROKER, TEMPORARY):
        (folder / name).mkdir(parents=True, exist_ok=True)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(_take_disks_away, made)
        stack.push_async_callback(_end, made)
        for name in made.names:
            if with_disks:
                size_bytes = COORDINATOR_DISK_BYTES if name == COORDINATOR else AGENT_DISK_BYTES
                made.disks[name] = Disk(made.state_dir(name), size_bytes)
            made.clocks[name] = Clock(folder / f"{name}.clock")
            tap = evidence.of_coordinator(name) if name == COORDINATOR else evidence.of_device(name)
            proxy = Proxy(name, port, tap=tap, before_up=_looker(evidence, name))
            made.proxies[name] = await stack.enter_async_context(proxy)
        _configure(made)
        await made.start_broker()
        for client, name in ((observer, "observer"), (stranger.client, "stranger")):
            task = asyncio.create_task(client.run(), name=name)
            stack.callback(task.cancel)
            await client.connected.wait()
        for name in made.names:
            await made.programs[name].start()
        yield made


def _looker(evidence: Evidence, name: str):
    if name == COORDINATOR:
        return lambda: None
    return lambda: evidence.look_into_outbox(name)


def _configure(made: World) -> None:
    folder, pace = made.folder, made.pace
    (folder / "fedge.toml").write_text(
        f'population = "{POPULATION}"\ntask = "{TASK}"\nstate_dir = "state/{COORDINATOR}"\n'
        f'log_format = "json"\nchunk_bytes = 1024\n{_broker_table(made, COORDINATOR)}'
        f'[round]\nmode = "{pace.mode}"\ngoal = {pace.goal}\n'
        f"quorum = {pace.quorum}\nover_selection = 1.3\n"
        f"gather_s = {pace.gather_s}\ndeadline_s = {pace.deadline_s}\n"
        "[uploads]\nslots = 2\nwindow = 2\nsilence_s = 2\n"
        f"[training]\nlocal_epochs = {pace.local_epochs}\n"
    )
    coordinator = ("fedge.coordinator",)
    if pace.sabotage is not None:
        coordinator = ("tests.chaos.sabotage", pace.sabotage)
    commands = {
        COORDINATOR: (*_PYTHON, *coordinator, "serve", "--config", "fedge.toml"),
        BROKER: (MOSQUITTO or "mosquitto", "-c", str(folder / BROKER / "mosquitto.conf")),
    }
    write_broker_settings(folder / BROKER, made.broker_port, "default")
    for index, device in enumerate(made.devices):
        # Of different sizes and kinds, so that no two updates are alike or count alike.
        rng = np.random.default_rng(index)
        x = rng.normal(rng.normal(0, 0.5, 4), 1.0, (120 + 17 * index, 4)).astype(np.float32)
        y = (x[:, 0] + x[:, 1] > 0).astype(np.int64) + (x[:, 2] > 0.5)
        np.savez(folder / f"{device}.npz", x=x, y=y)
        (folder / f"{device}.toml").write_text(
            f'population = "{POPULATION}"\ndevice = "{device}"\nstate_dir = "state/{device}"\n'
            f'log_format = "json"\nengine = "onnx"\n{_broker_table(made, device)}'
            f'[data]\npath = "{device}.npz"\n'
        )
        commands[device] = (*_PYTHON, "fedge.edge_agent", "run", "--config", f"{device}.toml")
    for name, command in commands.items():
        clock = made.clocks.get(name)
        made.programs[name] = Program(
            name,
            command,
            folder=folder,
            environment={
                **os.environ,
                "PYTHONPATH": f"{SITE}{os.pathsep}{ROOT}",
                "OMP_NUM_THREADS": "1",
                # Where a program that is killed leaves things, they go with the folder.
                "TMPDIR": str(folder / TEMPORARY),
                **({} if clock is None else clock.environment),
            },
            on_exit=made.exited,
        )


_PYTHON = (sys.executable, "-m")


def _broker_table(made: World, name: str) -> str:
    return f"[broker]\nport = {made.proxies[name].port}\nreconnect_cap_s = 1\nkeepalive_s = 5\n"


async def _end(made: World) -> None:
    """All processes are gone: the programs, and the trainers that died with their agents."""
    processes = psutil.Process().children(recursive=True)
    for program in made.programs.values():
        await program.end()
    left = [process for process in processes if process.is_running()]
    await asyncio.to_thread(psutil.wait_procs, left, PATIENT_S)


def _take_disks_away(made: World) -> None:
    for disk in made.disks.values():
        try:
            if made.is_kept:
                disk.leave_its_files()
            else:
                disk.unmount()
        except (NoMounting, OSError, shutil.Error) as error:
            made.note(f"the disk {disk.path.name} could not be taken away: {error}")
            print(f"the disk of {disk.path} could not be taken away: {error}", file=sys.stderr)


def rng_of(seed: int, number: int) -> random.Random:
    """What a fault draws while it holds: by its number, so that faults do not disturb another."""
    return random.Random(f"chaos/{seed}/{number}")
