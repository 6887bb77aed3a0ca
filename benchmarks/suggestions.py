"""Suggestions of a keyboard: how soon they are there, and what a process that gives them takes.

    python benchmarks/suggestions.py                     a table and JSON
    python benchmarks/suggestions.py --state FOLDER      keeps the compiled plan there, or takes it

The model is that of Hard et al. 2018: 10,000 words, 670 cells, 96 dimensions, 1.41 million
parameters, here with its first weights: what it says does not matter to its speed. Sentences of
made-up words are typed key by key, and each key asks for three suggestions, as a keyboard does:

- the predictor alone, in a fresh process that does nothing else (`suggestions_alone.py`), whose
  memory is measured, too;
- `POST /v1/predict` of a running agent over its Unix socket and over 127.0.0.1, from this process,
  one connection for all keys, and one for each key. The agent reaches no broker.

One thread everywhere. Times are by the clock, with all that else runs on the machine; beside them,
the processor time of the serving process for each answer. Where other programs want the processors,
run it before them (Linux: `chrt --fifo 50 python benchmarks/suggestions.py`, as root).
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from processes import print_table
from suggestions_alone import keys, made_up_words, resident_mb, summary

ALONE = Path(__file__).with_name("suggestions_alone.py")
PROMISED_MS = 10.0
PROMISED_MB = 90.0


def make_state(folder: Path) -> None:
    """A device's state folder with the model in use, as if it had been fetched."""
    import torch  # noqa: PLC0415 -- the measured process must not load it

    from fedge.coordinator.compiler import compile_task  # noqa: PLC0415 -- as above
    from fedge.coordinator.tasks.next_word import next_word  # noqa: PLC0415 -- as above
    from fedge.edge_agent.durable import replace_file  # noqa: PLC0415 -- as above
    from fedge.edge_agent.library import Library  # noqa: PLC0415 -- as above
    from fedge.schemas.blobs import describe  # noqa: PLC0415 -- as above
    from fedge.schemas.ids import sha256  # noqa: PLC0415 -- as above
    from fedge.schemas.messages import VersionAnnouncement  # noqa: PLC0415 -- as above
    from fedge.schemas.model_file import complete_model  # noqa: PLC0415 -- as above
    from fedge.schemas.tensors import encode_tensors  # noqa: PLC0415 -- as above
    from fedge.schemas.words import Vocabulary  # noqa: PLC0415 -- as above

    torch.set_num_threads(1)
    torch.manual_seed(1)
    plan = compile_task(next_word(Vocabulary(made_up_words()), cells=670, dimensions=96))
    library = Library(folder)
    for data in plan.blobs.values():
        if not library.blobs.has(sha256(data)):
            library.blobs.put(data)
    infer = plan.blobs[plan.manifest.graphs.infer.sha256]
    model = complete_model(plan.manifest, infer, plan.initial_weights)
    version = VersionAnnouncement(
        number=0,
        plan=describe(plan.manifest.encode()),
        weights=describe(encode_tensors(plan.initial_weights)),
        golden=describe(b"not looked at again"),
        model_sha256=sha256(model),
        model_bytes=len(model),
    )
    replace_file(library.activation_of(version).output, model)
    library.activate(version)


# ---------------------------------------------------------------- through the service


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(self._path))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(connection: http.client.HTTPConnection, token: str, text: str) -> None:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    connection.request("POST", "/v1/predict", json.dumps({"text": text}), headers)
    with connection.getresponse() as response:
        body = response.read()
        assert response.status == 200, body


def processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def agent(folder: Path, state: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    config = folder / "agent.toml"
    config.write_text(
        f'population = "bench"\ndevice = "phone"\nstate_dir = "{state.resolve()}"\n'
        f'log_format = "json"\n[broker]\nport = {free_port()}\n'
        f'[apps]\nsocket = "{folder / "apps.sock"}"\nport = {port}\n'
    )
    with (folder / "agent.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedge.edge_agent", "run", "--config", str(config)],
            stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while b"127.0.0.1:" + str(port).encode() not in (folder / "agent.log").read_bytes():
            assert process.poll() is None, (folder / "agent.log").read_text()
            assert time.monotonic() < deadline, (folder / "agent.log").read_text()
            time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        process.wait(30)


def through_the_service(state: Path, count: int) -> dict[str, Any]:
    typed = keys(count)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as made:
        folder, port = Path(made), free_port()
        with agent(folder, state, port) as process:
            token = (state / "apps.token").read_text().strip()
            doors: dict[str, Callable[[], http.client.HTTPConnection]] = {
                "Unix socket": lambda: UnixConnection(folder / "apps.sock"),
                "127.0.0.1": lambda: http.client.HTTPConnection("127.0.0.1", port, timeout=60),
            }
            resident = {"never asked": resident_mb(process.pid)}
            for door, connected in doors.items():
                for each in (False, True):
                    with contextlib.closing(connected()) as connection:
                        for text in typed[:50]:
                            ask(connection, token, text)
                        began_s = processor_s(process.pid)
                        times_s = []
                        for text in typed:
                            started_s = time.perf_counter()
                            if each:
                                connection.close()
                            ask(connection, token, text)
                            times_s.append(time.perf_counter() - started_s)
                    worked_s = processor_s(process.pid) - began_s
                    name = f"{door}, {'a connection for each' if each else 'one connection'}"
                    found[name] = {
                        **summary(times_s),
                        "processor_mean_ms": worked_s / len(typed) * 1000,
                        "answers": len(typed),
                    }
            resident["all answered"] = resident_mb(process.pid)
    return {"asked": found, "resident_mb": resident}


# ---------------------------------------------------------------- told


def goes_first() -> bool:
    """Whether this and what it starts run before the other programs of the machine."""
    return os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR)


def table(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    one = report["alone"]
    rows = [
        (
            "the predictor alone",
            f"p50 {one['p50_ms']:.2f}, p99 {one['p99_ms']:.2f} ms",
            f"wanted: p99 under {PROMISED_MS:g} ms; processor time p50 "
            f"{one['processor_p50_ms']:.2f}, p99 {one['processor_p99_ms']:.2f} ms",
        ),
        ("opening the model", f"{one['opened_ms']:.0f} ms", "with the runtime, once"),
    ]
    for name, asked in report["service"]["asked"].items():
        rows.append(
            (
                f"/v1/predict, {name}",
                f"p50 {asked['p50_ms']:.2f}, p99 {asked['p99_ms']:.2f} ms",
                f"wanted: p99 under {PROMISED_MS:g} ms; the agent's processor time "
                f"{asked['processor_mean_ms']:.2f} ms on average",
            )
        )
    for name, megabytes in one["resident_mb"].items():
        goal = f"wanted: at most {PROMISED_MB:g} MB" if name == "all answered" else ""
        rows.append((f"memory of the predictor's process, {name}", f"{megabytes:.1f} MB", goal))
    for name, megabytes in report["service"]["resident_mb"].items():
        rows.append((f"memory of the agent, {name}", f"{megabytes:.1f} MB", ""))
    load = ", ".join(f"{value:.1f}" for value in report["load_average"])
    rows.append(
        (
            "load of the machine",
            load,
            f"{os.cpu_count()} processors; {'this went first' if report['goes_first'] else ''}",
        )
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--keys", type=int, default=2000)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/suggestions.json"))
    wanted = parser.parse_args()
    with contextlib.ExitStack() as stack:
        state = wanted.state or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not (state / "active.json").exists():
            make_state(state)
        done = subprocess.run(
            [sys.executable, str(ALONE), str(state), str(wanted.keys)],
            check=True, capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        report = {
            "alone": json.loads(done.stdout),
            "service": through_the_service(state, wanted.keys),
            "load_average": os.getloadavg(),
            "goes_first": goes_first(),
        }
    print_table(table(report))
    wanted.out.parent.mkdir(parents=True, exist_ok=True)
    wanted.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
