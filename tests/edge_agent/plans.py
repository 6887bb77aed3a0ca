"""A plan written by hand, and the same training step in numpy: what the engines are tested with.

A linear model on scaled columns, squared error, momentum and the proximal term; small enough that
the numpy step below is plainly the textbook's. No compiler, no torch: an independent reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from fedge.schemas.blobs import describe
from fedge.schemas.features import TabularFeatures, ValueTarget
from fedge.schemas.onnx_wire import embed_weights
from fedge.schemas.plan import (
    Graphs,
    Padding,
    PlanManifest,
    StateSpec,
    TrainingDefaults,
    WeightSpec,
)
from fedge.schemas.tensor_spec import TensorSpec
from fedge.schemas.tensors import encode_tensors

COLUMNS = 3
MOMENTUM = 0.9

_FLOAT, _INT = TensorProto.FLOAT, TensorProto.INT64
_SHAPES = {
    "param.w": (_FLOAT, [COLUMNS, 1]),
    "param.b": (_FLOAT, [1]),
    "frozen.scale": (_FLOAT, [COLUMNS]),
    "buffer.input_sum": (_FLOAT, [COLUMNS]),
    "buffer.last_seed": (_INT, []),
}


def weight_specs() -> tuple[WeightSpec, ...]:
    names = {_FLOAT: "float32", _INT: "int64"}
    roles = {"param": "parameter", "frozen": "frozen", "buffer": "buffer"}
    return tuple(
        WeightSpec(
            tensor=TensorSpec(name=name.split(".")[1], dtype=names[kind], shape=tuple(shape)),
            role=roles[name.split(".")[0]],
        )
        for name, (kind, shape) in _SHAPES.items()
    )


@dataclass(frozen=True)
class HandMadePlan:
    manifest: PlanManifest
    train: bytes
    eval: bytes
    infer: bytes
    golden: bytes

    def write(self, folder: Path) -> None:
        """manifest.json, train.onnx, eval.onnx, infer.onnx, golden.safetensors."""
        (folder / "manifest.json").write_bytes(self.manifest.encode())
        (folder / "train.onnx").write_bytes(self.train)
        (folder / "eval.onnx").write_bytes(self.eval)
        (folder / "infer.onnx").write_bytes(self.infer)
        (folder / "golden.safetensors").write_bytes(self.golden)

    def model(self, weights: dict[str, np.ndarray]) -> bytes:
        named = {w.graph_name: weights[w.tensor.name] for w in self.manifest.weights}
        return embed_weights(self.infer, named)


def linear_plan(
    *, padding: Padding = Padding.MASK, train: bytes | None = None, infer: bytes | None = None
) -> HandMadePlan:
    """The plan; `train` or `infer` replace its graphs, and the manifest names them."""
    train = train or train_graph()
    infer = infer or infer_graph()
    evaluation = eval_graph()
    inputs = np.random.default_rng(5).normal(size=(8, COLUMNS)).astype(np.float32)
    golden = encode_tensors({"input": inputs})
    manifest = PlanManifest(
        task="hand-made",
        weights=weight_specs(),
        state=(
            StateSpec(tensor=TensorSpec(name="v.w", dtype="float32", shape=(COLUMNS, 1))),
            StateSpec(tensor=TensorSpec(name="v.b", dtype="float32", shape=(1,))),
        ),
        features=TabularFeatures(columns=COLUMNS),
        target=ValueTarget(width=1),
        output=TensorSpec(name="output", dtype="float32", shape=(-1, 1)),
        metrics=("absolute_error",),
        padding=padding,
        defaults=TrainingDefaults(batch_size=8),
        graphs=Graphs(train=describe(train), eval=describe(evaluation), infer=describe(infer)),
        golden=describe(golden),
    )
    return HandMadePlan(manifest, train, evaluation, infer, golden)


def initial_weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "w": rng.normal(size=(COLUMNS, 1)).astype(np.float32),
        "b": rng.normal(size=1).astype(np.float32),
        "scale": rng.uniform(0.5, 2.0, size=COLUMNS).astype(np.float32),
        "input_sum": np.zeros(COLUMNS, np.float32),
        "last_seed": np.array(0, np.int64),
    }


def examples(n: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, COLUMNS)).astype(np.float32)
    y = x @ np.array([[1.0], [-2.0], [0.5]], np.float32) + 0.3
    return x, (y + rng.normal(scale=0.1, size=(n, 1))).astype(np.float32)


class NumpyReference:
    """The same training in numpy float64, without a mask: padding must not matter to it."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        self.w, self.b = weights["w"].astype(float), weights["b"].astype(float)
        self.scale = weights["scale"].astype(float)
        self.global_w, self.global_b = self.w.copy(), self.b.copy()
        self.v_w, self.v_b = np.zeros_like(self.w), np.zeros_like(self.b)
        self.input_sum = weights["input_sum"].astype(float)

    def loss(self, x: np.ndarray, y: np.ndarray) -> float:
        return float(np.mean(((x * self.scale) @ self.w + self.b - y) ** 2))

    def step(self, x: np.ndarray, y: np.ndarray, *, lr: float, mu: float) -> float:
        loss = self.loss(x, y)
        scaled = x * self.scale
        slope = 2 * (scaled @ self.w + self.b - y) / len(x)
        self.v_w = MOMENTUM * self.v_w + scaled.T @ slope + mu * (self.w - self.global_w)
        self.v_b = MOMENTUM * self.v_b + slope.sum(axis=0) + mu * (self.b - self.global_b)
        self.w = self.w - lr * self.v_w
        self.b = self.b - lr * self.v_b
        self.input_sum = self.input_sum + x.sum(axis=0)
        return loss


def _value(name: str, kind: int, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _constants() -> list[onnx.TensorProto]:
    return [
        helper.make_tensor("two", _FLOAT, [], [2.0]),
        helper.make_tensor("momentum", _FLOAT, [], [MOMENTUM]),
        helper.make_tensor("column", _INT, [2], [-1, 1]),
        helper.make_tensor("first_axis", _INT, [1], [0]),
    ]


def _forward() -> list[onnx.NodeProto]:
    node = helper.make_node
    return [
        node("Mul", ["input", "frozen.scale"], ["scaled"]),
        node("MatMul", ["scaled", "param.w"], ["product"]),
        node("Add", ["product", "param.b"], ["output"]),
    ]


def _errors() -> list[onnx.NodeProto]:
    node = helper.make_node
    return [
        node("Reshape", ["mask", "column"], ["mask2"]),
        node("ReduceSum", ["mask"], ["count"], keepdims=0),
        node("Sub", ["output", "target"], ["raw_error"]),
        node("Mul", ["raw_error", "mask2"], ["error"]),
        node("Mul", ["error", "error"], ["squares"]),
        node("ReduceSum", ["squares"], ["square_sum"], keepdims=0),
        node("Abs", ["error"], ["absolute"]),
        node("ReduceSum", ["absolute"], ["metric.absolute_error"], keepdims=0),
    ]


def _update(name: str, gradient: str) -> list[onnx.NodeProto]:
    node = helper.make_node
    return [
        node("Sub", [f"param.{name}", f"global.{name}"], [f"drift_{name}"]),
        node("Mul", ["mu", f"drift_{name}"], [f"pull_{name}"]),
        node("Add", [gradient, f"pull_{name}"], [f"slope_{name}"]),
        node("Mul", ["momentum", f"state.v.{name}"], [f"kept_{name}"]),
        node("Add", [f"kept_{name}", f"slope_{name}"], [f"next.state.v.{name}"]),
        node("Mul", ["lr", f"next.state.v.{name}"], [f"move_{name}"]),
        node("Sub", [f"param.{name}", f"move_{name}"], [f"next.param.{name}"]),
    ]


def _batch_inputs() -> list[onnx.ValueInfoProto]:
    return [
        _value("input", _FLOAT, ["batch", COLUMNS]),
        _value("target", _FLOAT, ["batch", 1]),
        _value("mask", _FLOAT, ["batch"]),
    ]


def _weight_inputs() -> list[onnx.ValueInfoProto]:
    return [_value(name, kind, shape) for name, (kind, shape) in _SHAPES.items()]


def _serialised(nodes, inputs, outputs) -> bytes:
    graph = helper.make_graph(nodes, "hand_made", inputs, outputs, _constants())
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def train_graph(*extra: onnx.NodeProto, wasted_floats: int = 0) -> bytes:
    """`extra`: nodes whose results nobody uses. `wasted_floats`: of a detour of the loss."""
    node = helper.make_node
    loss = [node("Div", ["square_sum", "count"], ["loss"])]
    if wasted_floats:
        loss = [
            node("Div", ["square_sum", "count"], ["narrow"]),
            node("Constant", [], ["width"], value_ints=[wasted_floats]),
            node("Expand", ["narrow", "width"], ["wide"]),
            node("ReduceMean", ["wide"], ["loss"], keepdims=0),
        ]
    nodes = [
        *_forward(),
        *_errors(),
        *loss,
        node("Mul", ["error", "two"], ["twice"]),
        node("Div", ["twice", "count"], ["slope"]),
        node("Transpose", ["scaled"], ["scaled_t"], perm=[1, 0]),
        node("MatMul", ["scaled_t", "slope"], ["gradient_w"]),
        node("ReduceSum", ["slope", "first_axis"], ["gradient_b"], keepdims=0),
        *_update("w", "gradient_w"),
        *_update("b", "gradient_b"),
        node("Mul", ["input", "mask2"], ["kept_input"]),
        node("ReduceSum", ["kept_input", "first_axis"], ["new_sum"], keepdims=0),
        node("Add", ["buffer.input_sum", "new_sum"], ["next.buffer.input_sum"]),
        node("Identity", ["seed"], ["next.buffer.last_seed"]),
        *extra,
    ]
    moving = {name: shape for name, (_, shape) in _SHAPES.items() if name.split(".")[0] == "param"}
    state = {f"state.v.{name.split('.')[1]}": shape for name, shape in moving.items()}
    floats = {**moving, **state, "buffer.input_sum": [COLUMNS]}
    inputs = [
        *_weight_inputs(),
        *(_value(name, _FLOAT, shape) for name, shape in state.items()),
        *(_value(f"global.{n.split('.')[1]}", _FLOAT, s) for n, s in moving.items()),
        *_batch_inputs(),
        *(_value(name, _FLOAT, []) for name in ("lr", "mu")),
        _value("seed", _INT, []),
    ]
    outputs = [
        *(_value(f"next.{name}", _FLOAT, shape) for name, shape in floats.items()),
        _value("next.buffer.last_seed", _INT, []),
        *(_value(name, _FLOAT, []) for name in ("loss", "metric.absolute_error")),
    ]
    return _serialised(nodes, inputs, outputs)


def eval_graph() -> bytes:
    nodes = [*_forward(), *_errors(), helper.make_node("Identity", ["square_sum"], ["loss"])]
    outputs = [_value(name, _FLOAT, []) for name in ("loss", "metric.absolute_error")]
    return _serialised(nodes, [*_weight_inputs(), *_batch_inputs()], outputs)


def infer_graph() -> bytes:
    graph = helper.make_graph(
        _forward(),
        "hand_made",
        [_value("input", _FLOAT, ["batch", COLUMNS])],
        [_value("output", _FLOAT, ["batch", 1])],
    )
    # Its weights are open until a version fills them, so the checker would refuse it.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return model.SerializeToString()
