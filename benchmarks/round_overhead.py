"""What a round costs beside training: time, processor, bytes, memory; real processes and Mosquitto.

    python benchmarks/round_overhead.py                 both parts, a table and JSON
    python benchmarks/round_overhead.py --rounds 50     more rounds in the first part
    python benchmarks/round_overhead.py --only training only the second part

Part one: 10 agents, `mnist-cnn` (431,080 parameters), no local step: every byte of a round moves
and nothing is learned. Beside it, in the same run, the floor: the same chunks through the same
broker by bare links that verify, store and decide nothing. Part two: 4 agents with 1,500 examples
each train for real; the figure is the round's time beyond the slowest training in it. The examples
are random pixels: what they show does not change what they cost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from processes import Program, mosquitto, print_table, program, wait_for_event

from fedge.coordinator.store import Store
from fedge.schemas.link.broker import BrokerSettings
from fedge.schemas.link.protocol import Delivery, Link, LinkUp

CHUNK_BYTES = 58 * 1024
MB = 1e6


def write_examples(path: Path, count: int) -> None:
    rng = np.random.default_rng(count)
    np.savez(path, x=rng.integers(0, 256, (count, 28, 28), np.uint8), y=rng.integers(0, 10, count))


def write_configs(folder: Path, port: int, *, agents: int, examples: int, tables: str) -> None:
    (folder / "fedge.toml").write_text(
        f'population = "bench"\ntask = "mnist-cnn"\nstate_dir = "coordinator"\n'
        f'log_format = "json"\n[broker]\nport = {port}\n{tables}'
    )
    for index in range(agents):
        write_examples(folder / f"part-{index}.npz", examples)
        (folder / f"agent-{index}.toml").write_text(
            f'population = "bench"\ndevice = "d{index:02d}"\nstate_dir = "d{index:02d}"\n'
            f'log_format = "json"\nengine = "onnx"\n[broker]\nport = {port}\n'
            f'[data]\npath = "part-{index}.npz"\n'
        )


@contextlib.asynccontextmanager
async def counters(port: int) -> Any:
    """Reads the broker's own counters: `await read()` gives the newest of each."""
    link = BrokerSettings(port=port).link("bench-observer", random.Random(0))
    await link.subscribe("$SYS/broker/#")
    await link.start()
    values: dict[str, float] = {}

    async def collect() -> None:
        while True:
            event = await link.next_event()
            if isinstance(event, Delivery):
                link.ack(event)
                with contextlib.suppress(ValueError):
                    values[event.topic.removeprefix("$SYS/broker/")] = float(event.payload)

    task = asyncio.create_task(collect())
    try:
        yield values
    finally:
        task.cancel()
        await link.close()


async def without_training(folder: Path, rounds: int, agents: int) -> dict[str, Any]:
    with mosquitto(folder) as (port, broker), contextlib.ExitStack() as stack:
        warm_up = 3
        write_configs(
            folder, port, agents=agents, examples=8,
            tables=f"[round]\ngoal = {agents}\nover_selection = 1.0\n"
            f"versions = {rounds + warm_up}\n[training]\nlocal_epochs = 0\n",
        )  # fmt: skip
        async with counters(port) as values:
            fleet = [stack.enter_context(start_agent(folder, index)) for index in range(agents)]
            for one in fleet:
                await asyncio.to_thread(wait_for_event, one, "examples_counted")
            await asyncio.sleep(2)
            idle_agent = [one.resident_bytes() for one in fleet]
            perturbed = str(Path(__file__).with_name("perturbed_coordinator.py"))
            coordinator = stack.enter_context(start_coordinator(folder, perturbed))
            await asyncio.to_thread(wait_for_event, coordinator, "version_published", version=0)
            idle_coordinator = coordinator.resident_bytes()
            await asyncio.to_thread(
                wait_for_event, coordinator, "version_published", version=warm_up
            )
            cpu_before = coordinator.cpu_s()
            agents_before = sum(one.cpu_s() for one in fleet)
            await asyncio.to_thread(
                wait_for_event, coordinator, "version_published", version=rounds + warm_up
            )
            cpu_s = coordinator.cpu_s() - cpu_before
            agents_cpu_s = sum(one.cpu_s() for one in fleet) - agents_before
            await asyncio.sleep(2.5)  # the broker's counters come once a second
            after = dict(values)
            broker_peak = broker.memory_info().rss
            # Idle again: what stays is the program, its compiled statements and one model.
            resting_coordinator = coordinator.resident_bytes()
            published = {
                line["version"]: line["ts"]
                for line in coordinator.events()
                if line["event"] == "version_published"
            }
            taken = [
                published[n] - published[n - 1] for n in range(warm_up + 1, max(published) + 1)
            ]
            with Store.open(folder / "coordinator") as store:
                newest = store.newest_version()
                assert newest is not None
                model_bytes = newest.weights.size_bytes
            floor_s = await floor(port, model_bytes, agents, repeats=10)
            peaks = {
                "coordinator_idle_bytes": idle_coordinator,
                "coordinator_resting_bytes": resting_coordinator,
                "coordinator_peak_bytes": coordinator.peak_bytes(),
                "agent_idle_bytes": max(idle_agent),
                "agent_peak_bytes": max(one.peak_bytes() for one in fleet),
                "broker_bytes": broker_peak,
            }
    updates = rounds * agents
    # The broker receives one copy of each version and an update a device, and sends a copy of each
    # version to each device and every update to the coordinator. Its counters come once a second,
    # so they are compared over the whole life of the fleet, warm-up and all.
    made = rounds + warm_up
    received_payload = model_bytes * (made + 1 + made * agents)
    sent_payload = model_bytes * (made + 1 + made) * agents
    return {
        "agents": agents,
        "rounds": rounds,
        "model_bytes": model_bytes,
        "round_s_median": statistics.median(taken),
        "round_s_p90": sorted(taken)[int(len(taken) * 0.9)],
        "floor_s_median": floor_s,
        "coordinator_cpu_ms_per_update": 1000 * cpu_s / updates,
        "agents_cpu_ms_per_update": 1000 * agents_cpu_s / updates,
        "received_bytes_over_payload": after["bytes/received"] / received_payload,
        "sent_bytes_over_payload": after["bytes/sent"] / sent_payload,
        "update_wire_bytes": model_bytes * after["bytes/received"] / received_payload,
        **peaks,
        "coordinator_model_copies": (peaks["coordinator_peak_bytes"] - resting_coordinator)
        / model_bytes,
    }


async def floor(port: int, model_bytes: int, agents: int, repeats: int) -> float:
    """Seconds for a round's bytes alone: one model to each, and one from each, by bare links."""
    names = ["floor-center", *(f"floor-{index}" for index in range(agents))]
    links = [
        BrokerSettings(port=port).link(name, random.Random(name), receive_maximum=256)
        for name in names
    ]
    center, devices = links[0], links[1:]
    chunks = [bytes(CHUNK_BYTES)] * (model_bytes // CHUNK_BYTES) + [
        bytes(model_bytes % CHUNK_BYTES)
    ]
    await center.subscribe("floor/up/+/+")
    for index, link in enumerate(devices):
        await link.subscribe("floor/down/+", f"floor/to/{index}")
    for link in links:
        await link.start()
    for link in links:
        while not isinstance(await link.next_event(), LinkUp):
            pass

    async def receive(link: Link, count: int) -> None:
        while count:
            event = await link.next_event()
            if isinstance(event, Delivery):
                link.ack(event)
                count -= 1

    async def send(link: Link, prefix: str) -> None:
        await asyncio.gather(
            *(link.publish(f"{prefix}/{number}", chunk) for number, chunk in enumerate(chunks))
        )

    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        await asyncio.gather(
            send(center, "floor/down"), *(receive(link, len(chunks)) for link in devices)
        )
        await asyncio.gather(
            receive(center, len(chunks) * agents),
            *(send(link, f"floor/up/{index}") for index, link in enumerate(devices)),
        )
        taken.append(time.perf_counter() - started)
    for link in links:
        await link.close()
    return statistics.median(taken)


async def with_training(folder: Path, rounds: int) -> dict[str, Any]:
    agents, examples, warm_up = 4, 1500, 1
    with mosquitto(folder) as (port, _), contextlib.ExitStack() as stack:
        write_configs(
            folder, port, agents=agents, examples=examples,
            tables=f"[round]\ngoal = {agents}\nover_selection = 1.0\n"
            f"versions = {rounds + warm_up}\n"
            "[training]\nlocal_epochs = 1\nbatch_size = 64\nlearning_rate = 0.01\n",
        )  # fmt: skip
        fleet = [stack.enter_context(start_agent(folder, index)) for index in range(agents)]
        for one in fleet:
            await asyncio.to_thread(wait_for_event, one, "examples_counted")
        coordinator = stack.enter_context(start_coordinator(folder))
        await asyncio.to_thread(
            wait_for_event, coordinator, "version_published", version=rounds + warm_up, limit_s=300
        )
        peak = max(one.peak_bytes() + one.children_peak_bytes() for one in fleet)
        trainer_peak = max(one.children_peak_bytes() for one in fleet)
        agent_peak = max(one.peak_bytes() for one in fleet)
        published = {
            line["version"]: line["ts"]
            for line in coordinator.events()
            if line["event"] == "version_published"
        }
        with Store.open(folder / "coordinator") as store:
            beyond = []
            for number in range(warm_up + 1, rounds + warm_up + 1):
                report = store.round_report(number)
                assert report is not None
                slowest = max(
                    p.contribution.training_s for p in report.participants if p.contribution
                )
                taken = published[number] - published[number - 1]
                beyond.append((taken, slowest))
    return {
        "agents": agents,
        "examples_each": examples,
        "rounds": rounds,
        "round_s_median": statistics.median(taken for taken, _ in beyond),
        "slowest_training_s_median": statistics.median(slowest for _, slowest in beyond),
        "beyond_training_ratio_median": statistics.median(
            taken / slowest - 1 for taken, slowest in beyond
        ),
        "agent_and_trainer_peak_bytes": peak,
        "agent_peak_bytes": agent_peak,
        "trainer_peak_bytes": trainer_peak,
    }


def start_agent(folder: Path, index: int) -> contextlib.AbstractContextManager[Program]:
    arguments = ["-m", "fedge.edge_agent", "run", "--config", f"agent-{index}.toml"]
    return program(f"agent-{index}", arguments, folder)


def start_coordinator(folder: Path, *entry: str) -> contextlib.AbstractContextManager[Program]:
    arguments = [*(entry or ("-m", "fedge.coordinator")), "serve", "--config", "fedge.toml"]
    return program("coordinator", arguments, folder)


def show(result: dict[str, Any]) -> None:
    rows = [("what", "measured", "goal")]
    if plain := result.get("without_training"):
        rows += [
            ("-- no training, 10 agents", "", ""),
            ("round, median", f"{plain['round_s_median']:.3f} s", "0.15 s"),
            ("round, 90th percentile", f"{plain['round_s_p90']:.3f} s", ""),
            ("the same bytes by bare links", f"{plain['floor_s_median']:.3f} s", "the floor"),
            ("coordinator CPU an update", f"{plain['coordinator_cpu_ms_per_update']:.1f} ms", ""),
            ("agent CPU an update", f"{plain['agents_cpu_ms_per_update']:.1f} ms", ""),
            ("update on the wire", f"{plain['update_wire_bytes']:,.0f} B of "
             f"{plain['model_bytes']:,}", ""),
            ("broker received / payload", f"{plain['received_bytes_over_payload']:.4f}", "1.05"),
            ("broker sent / payload", f"{plain['sent_bytes_over_payload']:.4f}", ""),
            ("idle agent", f"{plain['agent_idle_bytes'] / MB:.1f} MB", "45 MB"),
            ("agent, peak", f"{plain['agent_peak_bytes'] / MB:.1f} MB", ""),
            ("coordinator, before the first round",
             f"{plain['coordinator_idle_bytes'] / MB:.1f} MB", ""),
            ("coordinator, idle after the last",
             f"{plain['coordinator_resting_bytes'] / MB:.1f} MB", ""),
            ("coordinator, peak", f"{plain['coordinator_peak_bytes'] / MB:.1f} MB", ""),
            ("   above idle, in models", f"{plain['coordinator_model_copies']:.1f}", "3"),
            ("broker", f"{plain['broker_bytes'] / MB:.1f} MB", ""),
        ]  # fmt: skip
    if trained := result.get("with_training"):
        rows += [
            ("-- training, 4 agents", "", ""),
            ("round, median", f"{trained['round_s_median']:.3f} s", ""),
            ("slowest training, median", f"{trained['slowest_training_s_median']:.3f} s", ""),
            ("beyond it", f"{100 * trained['beyond_training_ratio_median']:.1f} %", "5 %"),
            ("agent and its trainer, peaks added",
             f"{trained['agent_and_trainer_peak_bytes'] / MB:.1f} MB", "120 MB"),
            ("   the agent", f"{trained['agent_peak_bytes'] / MB:.1f} MB", ""),
            ("   the trainer", f"{trained['trainer_peak_bytes'] / MB:.1f} MB", ""),
        ]  # fmt: skip
    print_table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="measured rounds without training")
    parser.add_argument("--agents", type=int, default=10)
    parser.add_argument("--training-rounds", type=int, default=6)
    parser.add_argument("--only", choices=["overhead", "training"])
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    result: dict[str, Any] = {}
    if options.only != "training":
        with tempfile.TemporaryDirectory() as folder:
            result["without_training"] = asyncio.run(
                without_training(Path(folder), options.rounds, options.agents)
            )
    if options.only != "overhead":
        with tempfile.TemporaryDirectory() as folder:
            result["with_training"] = asyncio.run(
                with_training(Path(folder), options.training_rounds)
            )
    show(result)
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
