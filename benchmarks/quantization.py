"""What int8 weights do to the file that a keyboard predicts with: size, answers, time, memory.

    python benchmarks/quantization.py                            the 1.41 M model, 10 minutes of it
    python benchmarks/quantization.py --minutes 1 --cells 128    a quick look
    python benchmarks/quantization.py --weights kept.safetensors goes on from them, and keeps them

The next-word model of Hard et al. 2018 (10,000 words, 670 cells, 96 dimensions) is trained in one
place for some minutes by its plan's own train graph, with Adam, on what people typed: lines of
{"user", "text"} in FEDGE_DATA/sms/messages.jsonl, or what --data names. The last tenth of each
person's messages is held out. Then four files of the same weights:

    float32    as the plan has it without `[export]`
    int8       with `[export] quantization = "int8"`: int8 weights, float32 arithmetic
    dynamic    int8 weights and int8 arithmetic (DynamicQuantizeLinear, MatMulInteger)
    library    onnxruntime.quantization.quantize_dynamic of the float32 file

For each: recall and perplexity at every word of the held-out messages, one prediction at a time as
an app makes them; how often its first suggestion is that of float32; and the time and memory of a
process that does nothing but predict, on one thread. On a machine that is busy with other things
only the processor time means something.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from fedge.coordinator.compiler import CompiledPlan
    from fedge.schemas.plan import PlanManifest
    from fedge.schemas.words import Vocabulary, WordEncoder

# Imports are where they are needed: the process that predicts is measured with what it loads.

WORDS = 10_000
BATCH = 32
LEARNING_RATE = 0.002
HELD_OUT = 0.1
CALLS, WARM_UP_CALLS = 2000, 50
MAX_BYTES, MAX_POINTS, MAX_P99_MS, MAX_MIB = 1_500_000, 0.3, 10.0, 90
TYPED = ("see you ", "what time are ", "i am on the way to ", "ok thanks ", "can you ", "haha ")


def main() -> None:
    options = arguments()
    train, test = messages(options.data)
    plan, encoder = compiled(options, train)
    weights = trained(options, plan, encoder, train)
    prefixes = every_prefix(encoder, test[:: max(1, len(test) // options.messages)])
    report: dict[str, Any] = {
        "parameters": sum(array.size for array in weights.values()),
        "trained_messages": len(train),
        "predictions": len(prefixes[0]),
        "files": {},
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "manifest.json").write_bytes(plan.manifest.encode())
        (folder / "words.txt").write_bytes(encoder.vocabulary.encode())
        first: np.ndarray | None = None
        for name, model in files(plan, weights, folder).items():
            path = folder / f"{name}.onnx"
            path.write_bytes(model)
            measured, suggested = recall(path, *prefixes)
            first = suggested if first is None else first
            measured["same_first_suggestion"] = float((suggested == first).mean())
            report["files"][name] = {"bytes": len(model), **measured, **predicting(folder, path)}
    show(report)
    text = json.dumps(report, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = Path(os.environ.get("FEDGE_DATA", "../shared/data")) / "sms" / "messages.jsonl"
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--minutes", type=float, default=10.0, help="of training; 0: none")
    parser.add_argument("--cells", type=int, default=670)
    parser.add_argument("--dimensions", type=int, default=96)
    parser.add_argument("--messages", type=int, default=1500, help="held-out ones that are used")
    parser.add_argument("--weights", type=Path, help="to begin with, if there; and to keep")
    parser.add_argument("--json", type=Path, help="write the numbers to this file, too")
    options = parser.parse_args()
    if not options.data.is_file():
        sys.exit(f"{options.data} is not there: set FEDGE_DATA, or name a file with --data")
    return options


def messages(path: Path) -> tuple[list[str], list[str]]:
    """(training, held out): the last tenth of each person's."""
    people: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        one = json.loads(line)
        people.setdefault(one["user"], []).append(one["text"])
    train, test = [], []
    for texts in people.values():
        kept = len(texts) - max(1, round(HELD_OUT * len(texts)))
        train += texts[:kept]
        test += texts[kept:]
    return train, test


def compiled(options: argparse.Namespace, train: list[str]) -> tuple[CompiledPlan, WordEncoder]:
    """The float32 plan, and the encoder of its words."""
    import torch  # noqa: PLC0415 -- see the top of the file

    from fedge.coordinator.compiler import compile_task  # noqa: PLC0415 -- as above
    from fedge.coordinator.task import Adam  # noqa: PLC0415 -- as above
    from fedge.coordinator.tasks.next_word import next_word  # noqa: PLC0415 -- as above
    from fedge.coordinator.vocabularies import most_frequent  # noqa: PLC0415 -- as above
    from fedge.schemas.words import FIRST_WORD, Vocabulary, WordEncoder  # noqa: PLC0415 -- as above

    torch.set_num_threads(1)
    vocabulary = Vocabulary(most_frequent(train, WORDS - FIRST_WORD))
    task = next_word(vocabulary, cells=options.cells, dimensions=options.dimensions)
    plan = compile_task(dataclasses.replace(task, optimizer=Adam()))
    window = plan.manifest.features.tensor.shape[1]
    return plan, WordEncoder(vocabulary, window)


def trained(
    options: argparse.Namespace, plan: CompiledPlan, encoder: WordEncoder, train: list[str]
) -> dict[str, np.ndarray]:
    """The weights after some minutes of the train graph on one thread."""
    import numpy as np  # noqa: PLC0415 -- see the top of the file
    from safetensors.numpy import load_file, save_file  # noqa: PLC0415 -- as above

    from fedge.edge_agent.engines import EngineName, open_engine  # noqa: PLC0415 -- as above

    begin: Mapping[str, np.ndarray] = plan.initial_weights
    if options.weights is not None and options.weights.is_file():
        begin = load_file(options.weights)
    graph = plan.blobs[plan.manifest.graphs.train.sha256]
    engine = open_engine(EngineName.ONNX, plan.manifest, graph)
    engine.load(begin)
    inputs, targets = encoder.windows(train)
    rng, mask = np.random.default_rng(0), np.ones(BATCH, np.float32)
    ends, step, losses = time.monotonic() + 60 * options.minutes, 0, []
    while time.monotonic() < ends:
        rows = rng.choice(len(inputs), BATCH, replace=False)
        result = engine.step(inputs[rows], targets[rows], mask, lr=LEARNING_RATE, mu=0.0, seed=step)
        losses.append(result.loss)
        step += 1
        if step % 200 == 0:
            epochs = step * BATCH / len(inputs)
            print(
                f"step {step}, {epochs:.2f} epochs, loss {np.mean(losses[-200:]):.3f}", flush=True
            )
    weights = {name: np.array(array) for name, array in engine.weights().items()}
    if options.weights is not None:
        save_file(weights, options.weights)
    return weights


# ---------------------------------------------------------------- files


def files(plan: CompiledPlan, weights: Mapping[str, np.ndarray], folder: Path) -> dict[str, bytes]:
    """The four files of the same weights, float32 first."""
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415 -- as above

    from fedge.coordinator.compiler.quantized_graph import (  # noqa: PLC0415 -- as above
        quantizable,
        quantize_graph,
    )
    from fedge.schemas.model_file import complete_model  # noqa: PLC0415 -- as above
    from fedge.schemas.onnx_wire import embed_weights  # noqa: PLC0415 -- as above
    from fedge.schemas.plan import Quantization, quantized_names  # noqa: PLC0415 -- as above
    from fedge.schemas.quantization import quantized  # noqa: PLC0415 -- as above

    manifest, infer = plan.manifest, plan.blobs[plan.manifest.graphs.infer.sha256]
    chosen = quantizable(infer, manifest.weights, set(weights))
    quantization = Quantization(int8=tuple(weight.tensor.name for weight in chosen))
    changed = manifest.model_copy(update={"quantization": quantization})
    float32 = complete_model(manifest, infer, weights)
    named = {spec.graph_name: weights[spec.tensor.name] for spec in manifest.weights}
    for spec in chosen:
        pair = quantized(weights[spec.tensor.name])
        named.update(zip(quantized_names(spec.graph_name), pair, strict=True))
    source, made = folder / "source.onnx", folder / "library.onnx"
    source.write_bytes(float32)
    quantize_dynamic(source, made, per_channel=True, weight_type=QuantType.QInt8)
    return {
        "float32": float32,
        "int8": complete_model(changed, quantize_graph(infer, chosen), weights),
        "dynamic": embed_weights(dynamic_graph(infer, {w.graph_name for w in chosen}), named),
        "library": made.read_bytes(),
    }


def dynamic_graph(infer: bytes, chosen: set[str]) -> bytes:
    """The other way: products of int8 numbers, the inputs of each rounded with a scale of its own.

    For linear layers as torch exports them (a transposed weight in MatMul or Gemm) and for tables.
    """
    import onnx  # noqa: PLC0415 -- see the top of the file
    from onnx import TensorProto  # noqa: PLC0415 -- as above
    from onnx.helper import make_node, make_tensor  # noqa: PLC0415 -- as above

    from fedge.schemas.plan import quantized_names  # noqa: PLC0415 -- as above

    model = onnx.load_from_string(infer)
    across: dict[str, str] = {}
    nodes = []
    for node in model.graph.node:
        out = node.output[0]
        if node.op_type == "Transpose" and node.input[0] in chosen:
            across[out] = node.input[0]
            nodes.append(make_node("Transpose", [quantized_names(node.input[0])[0]], [out]))
        elif node.op_type == "Gather" and node.input[0] in chosen:
            int8, scale = quantized_names(node.input[0])
            nodes += [
                make_node("Gather", [int8, node.input[1]], [f"{out}.q"]),
                make_node("Cast", [f"{out}.q"], [f"{out}.f"], to=TensorProto.FLOAT),
                make_node("Gather", [scale, node.input[1]], [f"{out}.s"]),
                make_node("Unsqueeze", [f"{out}.s", "last"], [f"{out}.c"]),
                make_node("Mul", [f"{out}.f", f"{out}.c"], [out]),
            ]
        elif node.op_type in ("MatMul", "Gemm") and node.input[1] in across:
            scale = quantized_names(across[node.input[1]])[1]
            product = out if node.op_type == "MatMul" else f"{out}.p"
            x, x_scale, x_zero, whole = (f"{out}.{name}" for name in ("x", "xs", "xz", "i"))
            nodes += [
                make_node("DynamicQuantizeLinear", [node.input[0]], [x, x_scale, x_zero]),
                make_node("MatMulInteger", [x, node.input[1], x_zero], [whole]),
                make_node("Cast", [whole], [f"{out}.f"], to=TensorProto.FLOAT),
                make_node("Mul", [x_scale, scale], [f"{out}.s"]),
                make_node("Mul", [f"{out}.f", f"{out}.s"], [product]),
            ]
            if node.op_type == "Gemm":
                nodes.append(make_node("Add", [product, node.input[2]], [out]))
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(make_tensor("last", TensorProto.INT64, [1], [-1]))
    data: bytes = model.SerializeToString()
    return data


# ---------------------------------------------------------------- measurements


def every_prefix(encoder: WordEncoder, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, next words): what was typed before each word of the texts."""
    import numpy as np  # noqa: PLC0415 -- see the top of the file

    inputs, targets = encoder.windows(texts)
    rows, steps = np.nonzero(targets)
    typed = np.where(np.arange(encoder.window) <= steps[:, np.newaxis], inputs[rows], 0)
    return typed, targets[rows, steps]


def recall(path: Path, typed: np.ndarray, following: np.ndarray) -> tuple[dict[str, float], Any]:
    """Measures of a file, and its first suggestion each time."""
    import numpy as np  # noqa: PLC0415 -- see the top of the file

    from fedge.edge_agent.engines.onnx_session import open_session  # noqa: PLC0415 -- as above
    from fedge.schemas.words import FIRST_WORD  # noqa: PLC0415 -- as above

    session = open_session(str(path))
    places, logs, suggested = [], [], []
    for row, word in zip(typed, following, strict=True):
        scores = session.run(["output"], {"input": row[np.newaxis]})[0][0]
        places.append(int((scores > scores[word]).sum()) if word >= FIRST_WORD else len(scores))
        logs.append(float(scores[word]))
        suggested.append(int(scores.argmax()))
    found, known = np.array(places), following >= FIRST_WORD
    measured = {
        "top1_recall": float((found < 1).mean()),
        "top3_recall": float((found < 3).mean()),
        "perplexity": float(np.exp(-np.array(logs)[known].mean())),
    }
    return measured, np.array(suggested)


def predicting(folder: Path, model: Path) -> dict[str, float]:
    """Time and memory of a process of its own that predicts from the file."""
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--worker", str(folder), str(model)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | threads,
    )
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def work(folder: Path, model: Path) -> None:
    """The process that predicts, as an app's would."""
    from fedge.edge_agent.predictor import Predictor  # noqa: PLC0415 -- what is measured
    from fedge.schemas.plan import PlanManifest  # noqa: PLC0415 -- as above
    from fedge.schemas.words import Vocabulary  # noqa: PLC0415 -- as above

    manifest: PlanManifest = PlanManifest.decode((folder / "manifest.json").read_bytes())
    words: Vocabulary = Vocabulary.decode((folder / "words.txt").read_bytes())
    predictor = Predictor(model, manifest, words)
    times_ms = []
    for call in range(CALLS + WARM_UP_CALLS):
        if call == WARM_UP_CALLS:
            began_s = time.process_time()
        before = time.perf_counter()
        predictor.predict(TYPED[call % len(TYPED)])
        times_ms.append((time.perf_counter() - before) * 1000)
    processor_s = time.process_time() - began_s
    ordered = sorted(times_ms[WARM_UP_CALLS:])
    memory = {
        line.split(":")[0]: int(line.split()[1]) / 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(("VmRSS", "VmHWM"))
    }
    measured = {
        "processor_ms": processor_s * 1000 / CALLS,
        "p50_ms": ordered[CALLS // 2],
        "p99_ms": ordered[CALLS * 99 // 100],
        "resident_mib": memory["VmRSS"],
        "peak_mib": memory["VmHWM"],
    }
    print(json.dumps(measured))


def show(report: dict[str, Any]) -> None:
    from processes import print_table  # noqa: PLC0415 -- the worker does without

    rows = [("parameters", f"{report['parameters']:,}", f"{report['predictions']:,} predictions")]
    float32 = report["files"]["float32"]
    for name, one in report["files"].items():
        top1 = 100 * (one["top1_recall"] - float32["top1_recall"])
        top3 = 100 * (one["top3_recall"] - float32["top3_recall"])
        rows += [
            ("", "", ""),
            (name, f"{one['bytes']:,} B", f"goal {MAX_BYTES:,} B" if name == "int8" else ""),
            (
                "  top-1, top-3",
                f"{one['top1_recall']:.2%}, {one['top3_recall']:.2%}",
                f"{top1:+.2f}, {top3:+.2f} points; goal {MAX_POINTS} points",
            ),
            (
                "  perplexity",
                f"{one['perplexity']:.2f}",
                f"first suggestion as float32's: {one['same_first_suggestion']:.2%}",
            ),
            (
                "  a prediction",
                f"{one['p50_ms']:.2f} ms, p99 {one['p99_ms']:.2f} ms",
                f"goal p99 {MAX_P99_MS:g} ms; {one['processor_ms']:.2f} ms of processor time",
            ),
            (
                "  memory",
                f"{one['resident_mib']:.0f} MiB, peak {one['peak_mib']:.0f} MiB",
                f"goal {MAX_MIB} MiB",
            ),
        ]
    print_table(rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
