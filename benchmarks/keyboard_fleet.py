"""Two hundred keyboards learn the next word together: what it takes of each, and what it brings.

    python benchmarks/keyboard_fleet.py                          some minutes; a table and JSON
    python benchmarks/keyboard_fleet.py --words 10000 --cells 670 --dimensions 96
    python benchmarks/keyboard_fleet.py --data messages.jsonl    lines of {"user": …, "text": …}

A real Mosquitto, a real coordinator, and one `fedge-agent fleet --split users`: each virtual
keyboard has a name, two MQTT sessions, a state folder and the texts of one user (with more
keyboards than users, an earlier or a later part of them). In each round a cohort of them trains on
its own texts. The last fifth of every user's texts is on no keyboard: the coordinator measures each
version on it. The words are a public list's, or those of Python's documentation, so no text was
read to choose them. The file is FEDGE_DATA/sms/messages.jsonl, or what --data names; without one,
topics of Python's documentation stand in for users.

References in the same run: the bytes of the messages themselves, which is what a keyboard would
send that does not keep them; the downlink if only the cohort of a round fetched its version; and
the share of the most frequent word, which is the recall of always suggesting it.

Bytes a device: down, the chunks of versions that its own agent counted; up, the updates in its
ledger. Bytes of the broker: its own counters, headers and answers and all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from processes import Program, mosquitto, print_table, program

from fedge.coordinator.demo.brokers import DemoBroker
from fedge.coordinator.demo.counters import broker_bytes
from fedge.coordinator.demo.texts import people_in, windows_of
from fedge.coordinator.store import Store
from fedge.coordinator.vocabularies import documentation_words, public_words
from fedge.edge_agent.state import AgentState
from fedge.schemas.errors import ConfigError
from fedge.schemas.words import FIRST_WORD, PADDING, Vocabulary, WordEncoder

WINDOW = 16
HELD_OUT = 0.2
MB = 1e6
TASK = """
from pathlib import Path
from fedge.coordinator.tasks.next_word import next_word
from fedge.coordinator.vocabularies import read_words

def task():
    words = read_words(Path(__file__).with_name("words.txt"))
    return next_word(words, cells={cells}, dimensions={dimensions}, window={window})
"""


@dataclass(frozen=True)
class Texts:
    """`train`: on the keyboards, by user. `test`: on none."""

    train: Mapping[str, list[str]]
    test: list[str]
    where: str


def load_texts(data: Path | None) -> Texts:
    if data is None:
        data = Path(os.environ.get("FEDGE_DATA", "")) / "sms" / "messages.jsonl"
        if not data.is_file():
            print(
                "no messages (set FEDGE_DATA or give --data): topics of Python's documentation "
                "stand in for users",
                flush=True,
            )
            data = None
    people = people_in(data)
    cut = {user: max(1, round(len(texts) * HELD_OUT)) for user, texts in people.items()}
    return Texts(
        {user: texts[: -cut[user]] for user, texts in people.items()},
        [text for user, texts in people.items() for text in texts[-cut[user] :]],
        "topics of Python" if data is None else data.name,
    )


def choose_words(count: int, where: str) -> tuple[list[str], str]:
    """Public ones for messages; for Python's documentation, its own."""
    if where != "topics of Python":
        try:
            return public_words("en", count), "a public list of English words"
        except ConfigError:
            pass
    return documentation_words(count), "words of Python's documentation"


def write_files(
    folder: Path, port: int, texts: Texts, wanted: argparse.Namespace
) -> dict[str, Any]:
    words, source = choose_words(wanted.words, texts.where)
    (folder / "words.txt").write_text("".join(f"{word}\n" for word in words))
    (folder / "keyboard_task.py").write_text(
        TASK.format(cells=wanted.cells, dimensions=wanted.dimensions, window=WINDOW)
    )
    with (folder / "messages.jsonl").open("w") as file:
        for user, own in texts.train.items():
            file.writelines(json.dumps({"user": user, "text": text}) + "\n" for text in own)
    test = windows_of(WordEncoder(Vocabulary(words), WINDOW), texts.test)
    np.savez(folder / "test.npz", x=test.x, y=test.y)
    (folder / "fedge.toml").write_text(
        f'population = "keyboards"\ntask = "keyboard_task.py:task"\nstate_dir = "coordinator"\n'
        f'log_format = "json"\nseed = {wanted.seed}\n[broker]\nport = {port}\n'
        f"[round]\ngoal = {wanted.cohort}\nover_selection = 1.0\nversions = {wanted.rounds}\n"
        f'[training]\nlocal_epochs = {wanted.epochs}\n[evaluation]\npath = "test.npz"\n'
    )
    (folder / "agent.toml").write_text(
        f'population = "keyboards"\ndevice = "keyboard"\nstate_dir = "fleet"\nengine = "onnx"\n'
        f'log_format = "json"\n[broker]\nport = {port}\n[data]\npath = "messages.jsonl"\n'
    )
    shown = Counter(int(word) for word in test.y.ravel() if word != PADDING)
    most = max((count, word) for word, count in shown.items() if word >= FIRST_WORD)[0]
    return {
        "words": len(words),
        "words_from": source,
        "test_words": sum(shown.values()),
        "known_share": sum(n for word, n in shown.items() if word >= FIRST_WORD) / shown.total(),
        "most_frequent_word": most / shown.total(),
    }


class Followed:
    """A program's events, each read once as its log grows."""

    def __init__(self, one: Program) -> None:
        self._one = one
        self._file = one.log.open()
        self._rest = ""

    def fresh(self) -> Iterator[dict[str, Any]]:
        text = self._rest + self._file.read()
        *lines, self._rest = text.split("\n")
        yield from (json.loads(line) for line in lines if line.startswith("{"))
        if self._one.process.poll() is not None:
            raise SystemExit(f"{self._one.name} ended:\n{self._one.log.read_text()[-3000:]}")


@dataclass
class Seen:
    """What the programs' events tell; times are theirs."""

    started: set[str] = field(default_factory=set)
    counted: dict[str, int] = field(default_factory=dict)
    down: dict[str, int] = field(default_factory=dict)
    fetched: dict[str, int] = field(default_factory=dict)
    active: dict[str, int] = field(default_factory=dict)
    trainer_peak_bytes: int = 0
    began: dict[int, float] = field(default_factory=dict)
    made: dict[int, float] = field(default_factory=dict)
    measured: dict[int, dict[str, float]] = field(default_factory=dict)
    trouble: Counter[str] = field(default_factory=Counter)
    lines: int = 0

    def take(self, event: dict[str, Any]) -> None:
        self.lines += 1
        device = event.get("device", "")
        if event["level"] != "info":
            self.trouble[event["event"]] += 1
        match event["event"]:
            case "agent_started":
                self.started.add(device)
            case "examples_counted":
                self.counted[device] = event["examples"]
            case "version_fetched":
                self.down[device] = event["received_bytes"]
                self.fetched[device] = event["version"]
            case "version_activated":
                self.active[device] = event["version"]
            case "trained":
                peak = event["peak_rss_bytes"]
                self.trainer_peak_bytes = max(self.trainer_peak_bytes, peak)
            case "round_gathering":
                self.began.setdefault(event["round"], event["ts"])
            case "version_made":
                self.made[event["version"]] = event["ts"]
            case "version_evaluated":
                self.measured[event["version"]] = {
                    name: event[name] for name in ("top1_recall", "top3_recall", "perplexity")
                }


def follow(logs: list[Followed], seen: Seen, done: Callable[[], bool], limit_s: float) -> float:
    """Takes in events until `done`; the seconds it took."""
    began = time.monotonic()
    while True:
        for one in logs:
            for event in one.fresh():
                seen.take(event)
        if done():
            return time.monotonic() - began
        if time.monotonic() - began > limit_s:
            raise SystemExit(
                f"not done after {limit_s:.0f} s (--limit-s): {len(seen.counted)} keyboards "
                f"counted, version {max(seen.made, default=0)} made"
            )
        time.sleep(0.5)


def measure(folder: Path, port: int, broker: Any, wanted: argparse.Namespace) -> dict[str, Any]:
    seen = Seen()
    arguments = ["-m", "fedge.edge_agent", "fleet", "--devices", str(wanted.devices)]
    arguments += ["--split", "users", "--workers", str(wanted.workers)]
    final = wanted.rounds
    with program("fleet", arguments, folder) as fleet:
        logs = [Followed(fleet)]
        start_s = follow(logs, seen, lambda: len(seen.counted) == wanted.devices, wanted.limit_s)
        idle_bytes, idle_files = fleet.resident_bytes(), fleet.process.num_fds()
        print(f"{wanted.devices} keyboards are up after {start_s:.1f} s", flush=True)
        arguments = ["-m", "fedge.coordinator", "serve", "--config", "fedge.toml"]
        with program("coordinator", arguments, folder) as coordinator:
            logs.append(Followed(coordinator))
            follow(logs, seen, lambda: final in seen.made, wanted.limit_s)
            print(f"version {final} is made", flush=True)

            def everywhere() -> bool:
                using = sum(version == final for version in seen.active.values())
                return using == wanted.devices and final in seen.measured

            after_s = follow(logs, seen, everywhere, wanted.limit_s)
            counted = asyncio.run(
                broker_bytes(DemoBroker("mosquitto", port, (), "", "auto"))
            )  # before anybody says goodbye
            found = {
                "fleet_cpu_s": own_cpu_s(fleet),
                "trainers_cpu_s": fleet.cpu_s() - own_cpu_s(fleet),
                "coordinator_cpu_s": coordinator.cpu_s(),
                "fleet_peak_bytes": fleet.peak_bytes(),
                "coordinator_peak_bytes": coordinator.peak_bytes(),
                "broker_bytes": int(broker.memory_info().rss),
                "threads": fleet.process.num_threads(),
            }
    return found | {
        "start_s": start_s,
        "fleet_idle_bytes": idle_bytes,
        "open_files": idle_files,
        "trainer_peak_bytes": seen.trainer_peak_bytes,
        "everywhere_after_s": after_s,
        "broker_received_bytes": None if counted is None else counted.received,
        "broker_sent_bytes": None if counted is None else counted.sent,
        "examples": seen.counted,
        "down_bytes": seen.down,
        "round_s": [seen.made[n] - seen.began[n] for n in sorted(seen.made) if n in seen.began],
        "rounds_s": max(seen.made.values()) - min(seen.began.values()),
        "versions": seen.measured,
        "log_lines": seen.lines,
        "trouble": dict(seen.trouble),
    }


def own_cpu_s(one: Program) -> float:
    times = one.process.cpu_times()
    return float(times.user + times.system)


def read_ledgers(folder: Path) -> dict[str, Any]:
    """What each keyboard wrote down of its own part in rounds."""
    up: dict[str, int] = {}
    training_s: list[float] = []
    statuses: Counter[str] = Counter()
    for state in sorted((folder / "fleet").iterdir()):
        with closing(AgentState(state / "agent.sqlite")) as memory:
            lines = memory.ledger()
        up[state.name] = sum(line.upload_bytes for line in lines)
        training_s += [line.training_s for line in lines]
        statuses.update(line.status for line in lines)
    with Store.open(folder / "coordinator") as store:
        newest = store.newest_version()
        assert newest is not None
    return {
        "up_bytes": up,
        "training_s": training_s,
        "updates": dict(statuses),
        "weights_bytes": newest.weights.size_bytes,
        "model_bytes": newest.model_bytes,
    }


def rows_of(found: dict[str, Any], wanted: argparse.Namespace) -> list[tuple[str, str, str]]:
    down, up = list(found["down_bytes"].values()), list(found["up_bytes"].values())
    updates, fleet_mb = sum(found["updates"].values()), found["fleet_peak_bytes"] / MB
    weights, trained = found["weights_bytes"], [n for n in up if n]
    cohort_down = weights * wanted.cohort * wanted.rounds
    examples = list(found["examples"].values())
    each_mb = found["fleet_idle_bytes"] / MB / wanted.devices
    last = found["versions"][max(found["versions"])]
    first = found["versions"][0]

    def spread(values: list[float], unit: float, digits: int = 2) -> str:
        return (
            f"{statistics.mean(values) / unit:.{digits}f} "
            f"({min(values) / unit:.{digits}f} to {max(values) / unit:.{digits}f})"
        )

    rows = [
        ("keyboards, cohort, rounds", f"{wanted.devices}, {wanted.cohort}, {wanted.rounds}", ""),
        ("texts on a keyboard", spread(examples, 1, 0), f"{found['texts']}"),
        ("model", f"{weights / MB:.2f} MB of weights", f"{found['words']} words"),
        ("start", f"{found['start_s']:.1f} s", "until every keyboard has counted its texts"),
        ("a round", f"{spread(found['round_s'], 1)} s", "invitation to version"),
        (
            "training",
            f"{spread(found['training_s'], 1)} s",
            f"a keyboard and round; {updates} in all",
        ),
        ("down, a keyboard", f"{spread(down, MB)} MB", "its own count of version chunks"),
        ("up, a keyboard", f"{spread(up, MB)} MB", f"its ledger; {len(trained)} took part"),
        ("down, all", f"{sum(down) / MB:,.0f} MB", ""),
        (
            "  the cohort's only",
            f"{cohort_down / MB:,.0f} MB",
            "reference: rounds * cohort * weights",
        ),
        ("up, all", f"{sum(up) / MB:,.1f} MB", ""),
        ("  the messages", f"{found['raw_bytes'] / MB:,.2f} MB", "reference: without privacy"),
    ]
    if found["broker_sent_bytes"] is not None:
        traffic = (
            f"{found['broker_received_bytes'] / MB:,.0f}, {found['broker_sent_bytes'] / MB:,.0f} MB"
        )
        rows.append(("broker received, sent", traffic, "its own counters"))
    rows += [
        ("fleet process", f"{fleet_mb:.0f} MB at most", f"{each_mb:.2f} MB a keyboard at rest"),
        ("training process", f"{found['trainer_peak_bytes'] / MB:.0f} MB at most", ""),
        ("coordinator", f"{found['coordinator_peak_bytes'] / MB:.0f} MB at most", ""),
        ("broker", f"{found['broker_bytes'] / MB:.0f} MB", ""),
        ("processor: fleet", f"{found['fleet_cpu_s']:.0f} s", "links, chunks, files"),
        ("  training processes", f"{found['trainers_cpu_s']:.0f} s",
         f"{found['trainers_cpu_s'] / updates:.2f} s an update, with all that is checked"),
        ("  coordinator", f"{found['coordinator_cpu_s']:.0f} s", "aggregating and measuring"),
        ("top-1 recall", f"{first['top1_recall']:.2%} to {last['top1_recall']:.2%}",
         f"always the most frequent word: {found['most_frequent_word']:.2%}"),
        ("top-3 recall", f"{first['top3_recall']:.2%} to {last['top3_recall']:.2%}",
         f"{found['known_share']:.0%} of the words are known"),
        ("perplexity", f"{first['perplexity']:.0f} to {last['perplexity']:.0f}", "known words"),
    ]  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--devices", type=int, default=200)
    parser.add_argument("--cohort", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--words", type=int, default=2000)
    parser.add_argument("--cells", type=int, default=128)
    parser.add_argument("--dimensions", type=int, default=48)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=3000.0)
    parser.add_argument("--keep", type=Path, help="a new folder for the logs and states")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/keyboard_fleet.json"))
    wanted = parser.parse_args()
    texts = load_texts(wanted.data)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) if wanted.keep is None else wanted.keep
        folder.mkdir(exist_ok=True)
        with mosquitto(folder) as (port, broker):
            about = write_files(folder, port, texts, wanted)
            found = about | measure(folder, port, broker, wanted)
        found |= read_ledgers(folder)
    own = [text for one in texts.train.values() for text in one]
    found |= {
        "texts": texts.where,
        "raw_bytes": sum(len(text.encode()) for text in own),
        "settings": {k: v for k, v in vars(wanted).items() if isinstance(v, int | float)},
    }
    print_table(rows_of(found, wanted))
    print("version  top-1    top-3    perplexity")
    for number, measured in sorted(found["versions"].items()):
        print(
            f"{number:7}  {measured['top1_recall']:6.2%}  {measured['top3_recall']:6.2%}  "
            f"{measured['perplexity']:10.1f}"
        )
    wanted.out.parent.mkdir(parents=True, exist_ok=True)
    wanted.out.write_text(json.dumps(found, indent=2) + "\n")
    long = ("examples", "down_bytes", "up_bytes", "training_s", "versions", "round_s")
    print(json.dumps({name: value for name, value in found.items() if name not in long}))


if __name__ == "__main__":
    main()
