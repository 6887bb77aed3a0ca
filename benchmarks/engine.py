"""What training with a plan costs a device: onnxruntime against eager torch, on the built-in tasks.

    python benchmarks/engine.py [--tasks digits,mnist-cnn] [--steps 50] [--json FILE]

Each measurement is a process of its own with one thread, on the same random batches of the task's
own batch size and the same initial weights. `eager torch` is what a user would write without Fedge:
the module, its loss, `backward`, `torch.optim`; `torch engine` runs the plan's graph in torch.
Builds of torch with CUDA take several times the memory of those for the CPU alone. The table says:

    ms/step      median over the steps after the first five
    peak MB      the most memory that was resident, everything imported included
    start s      from the start of the process until it could take its first step
    difference   the largest difference of a weight after one step, to eager torch
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedge.schemas.tensors import Array

ENGINES = ("onnxruntime", "torch eager", "torch engine")
WARM_UP_STEPS = 5
BATCHES = 4


@dataclass(frozen=True, slots=True)
class Measurement:
    task: str
    engine: str
    parameters: int
    batch_size: int
    ms_per_step: float
    peak_mb: float
    start_s: float
    largest_difference: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", help="built-in tasks with commas between them; default: all")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=Path, help="write the numbers to this file, too")
    arguments = parser.parse_args()

    from fedge.coordinator.tasks import BUILT_IN_TASKS  # noqa: PLC0415 -- the workers do without

    names = arguments.tasks.split(",") if arguments.tasks else sorted(BUILT_IN_TASKS)
    measurements = []
    print(_line("task", "parameters", "batch", "engine", "ms/step", "peak MB", "start s", "diff."))
    for name in names:
        for one in measure_task(name, arguments.steps):
            measurements.append(one)
            print(
                _line(
                    one.task, one.parameters, one.batch_size, one.engine,
                    f"{one.ms_per_step:.2f}", f"{one.peak_mb:.0f}", f"{one.start_s:.2f}",
                    f"{one.largest_difference:.1e}",
                ),
                flush=True,
            )  # fmt: skip
    report = json.dumps([asdict(one) for one in measurements], indent=2)
    print(report)
    if arguments.json is not None:
        arguments.json.write_text(report + "\n")


def measure_task(name: str, steps: int) -> list[Measurement]:
    """Compiles the task and runs one process for each engine."""
    import numpy as np  # noqa: PLC0415 -- the workers import what they measure

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parameters, batch_size = write_inputs(name, folder)
        found = {engine: _run_worker(engine, name, folder, steps) for engine in ENGINES}
        results = {engine: dict(np.load(folder / f"{engine}.npz")) for engine in ENGINES}
    eager = results["torch eager"]
    return [
        Measurement(
            name, engine, parameters, batch_size,
            largest_difference=max(
                float(np.abs(results[engine][tensor] - eager[tensor]).max()) for tensor in eager
            ),
            **found[engine],
        )
        for engine in ENGINES
    ]  # fmt: skip


def write_inputs(name: str, folder: Path) -> tuple[int, int]:
    """Plan, weights and batches; (number of parameters, batch size)."""
    import numpy as np  # noqa: PLC0415 -- as above

    from fedge.coordinator.compiler import compile_task  # noqa: PLC0415 -- as above
    from fedge.coordinator.task import load_task  # noqa: PLC0415 -- as above
    from fedge.schemas.features import ClassTarget  # noqa: PLC0415 -- as above

    plan = compile_task(load_task(name))
    manifest = plan.manifest
    (folder / "manifest.json").write_bytes(manifest.encode())
    (folder / "train.onnx").write_bytes(plan.blobs[manifest.graphs.train.sha256])
    np.savez(folder / "weights.npz", **plan.initial_weights)
    rng = np.random.default_rng(0)
    size = manifest.defaults.batch_size
    batches = {}
    for index in range(BATCHES):
        shape = (size, *manifest.features.tensor.shape[1:])
        batches[f"input{index}"] = rng.normal(size=shape).astype(np.float32)
        target = manifest.target
        batches[f"target{index}"] = (
            rng.integers(target.classes, size=size)
            if isinstance(target, ClassTarget)
            else rng.normal(size=(size, target.width)).astype(np.float32)
        )
    np.savez(folder / "batches.npz", **batches)
    trained = [w.tensor.element_count for w in manifest.weights if w.role == "parameter"]
    return sum(trained), size


def _run_worker(engine: str, task: str, folder: Path, steps: int) -> dict[str, float]:
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--worker", engine, task, str(folder), str(steps)]
    command.append(repr(time.time()))
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | threads
    )
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def work(engine: str, task: str, folder: Path, steps: int, started: float) -> None:
    """One process's measurement: prints it, and leaves the weights after one step."""
    import numpy as np  # noqa: PLC0415 -- part of what is measured

    opened = {
        "onnxruntime": _open_onnx,
        "torch eager": _open_eager,
        "torch engine": _open_torch_engine,
    }
    step, weights = opened[engine](task, folder)
    start_s = time.time() - started
    batches = np.load(folder / "batches.npz")
    pairs = [(batches[f"input{i}"], batches[f"target{i}"]) for i in range(BATCHES)]
    step(*pairs[0])
    np.savez(folder / f"{engine}.npz", **weights())
    times_s = []
    for index in range(1, steps + WARM_UP_STEPS):
        inputs, target = pairs[index % BATCHES]
        before = time.perf_counter()
        step(inputs, target)
        times_s.append(time.perf_counter() - before)

    from fedge.edge_agent.trainer.child import peak_rss_bytes  # noqa: PLC0415 -- as above

    measured = {
        "ms_per_step": statistics.median(times_s[WARM_UP_STEPS - 1 :]) * 1000,
        "peak_mb": peak_rss_bytes() / 2**20,
        "start_s": start_s,
    }
    print(json.dumps(measured))


Opened = tuple[Callable[["Array", "Array"], None], Callable[[], dict[str, "Array"]]]


def _open_onnx(task: str, folder: Path) -> Opened:
    from fedge.edge_agent.engines import EngineName  # noqa: PLC0415 -- part of what is measured

    return _open_engine(EngineName.ONNX, folder)


def _open_torch_engine(task: str, folder: Path) -> Opened:
    from fedge.edge_agent.engines import EngineName  # noqa: PLC0415 -- part of what is measured

    return _open_engine(EngineName.TORCH, folder)


def _open_engine(name: str, folder: Path) -> Opened:
    import numpy as np  # noqa: PLC0415 -- part of what is measured

    from fedge.edge_agent.engines import open_engine  # noqa: PLC0415 -- as above
    from fedge.schemas.plan import PlanManifest  # noqa: PLC0415 -- as above

    manifest = PlanManifest.decode((folder / "manifest.json").read_bytes())
    engine = open_engine(name, manifest, (folder / "train.onnx").read_bytes())
    engine.load(dict(np.load(folder / "weights.npz")))
    mask = np.ones(manifest.defaults.batch_size, np.float32)
    lr = manifest.defaults.learning_rate

    def step(inputs: Array, target: Array) -> None:
        engine.step(inputs, target, mask, lr=lr, mu=0.0, seed=1)

    return step, engine.weights


def _open_eager(task_name: str, folder: Path) -> Opened:
    import numpy as np  # noqa: PLC0415 -- part of what is measured
    import torch  # noqa: PLC0415 -- as above

    from fedge.coordinator.task import SGD, load_task  # noqa: PLC0415 -- as above

    torch.set_num_threads(1)
    task = load_task(task_name)
    model = task.new_model()
    weights = {k: torch.from_numpy(v) for k, v in np.load(folder / "weights.npz").items()}
    model.load_state_dict(weights)
    made, lr = task.optimizer, task.defaults.learning_rate
    optimizer = (
        torch.optim.SGD(
            model.parameters(), lr, made.momentum, 0.0, made.weight_decay, made.nesterov
        )
        if isinstance(made, SGD)
        else torch.optim.Adam(model.parameters(), lr, made.betas, made.eps, made.weight_decay)
    )

    def step(inputs: Array, target: Array) -> None:
        losses = task.loss(model(torch.from_numpy(inputs)), torch.from_numpy(target))
        optimizer.zero_grad()
        (losses.mean() if task.loss_reduction == "mean" else losses.sum()).backward()
        optimizer.step()

    def trained() -> dict[str, Array]:
        return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}

    return step, trained


def _line(*cells: object) -> str:
    widths = (18, 10, 6, 14, 9, 9, 9, 9)
    return " ".join(f"{cell!s:>{width}}" for cell, width in zip(cells, widths, strict=True))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _, _, engine_name, task_reference, place, step_count, start = sys.argv
        work(engine_name, task_reference, Path(place), int(step_count), float(start))
    else:
        main()
