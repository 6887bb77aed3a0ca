"""Each operator of the torch engine does what onnxruntime does, on graphs of one node."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from fedge.edge_agent.engines.torch_program import OPERATORS, Program, specialise
from fedge.schemas.errors import PlanRefused, TrainingFailed
from fedge.schemas.onnx_wire import ALLOWED_OPERATORS

torch.set_num_threads(1)
RNG = np.random.default_rng(7)
INT_MIN, INT_MAX = -(2**63), 2**63 - 1


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return np.abs(floats(*shape)) + np.float32(0.1)


def small(*shape: int) -> np.ndarray:
    return (RNG.random(shape) * 1.6 - 0.8).astype(np.float32)


def whole(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def integers(low: int, high: int, *shape: int) -> np.ndarray:
    return RNG.integers(low, high, shape)


def bools(*shape: int) -> np.ndarray:
    return RNG.random(shape) < 0.5


class Fixed:
    """An operand that is an initializer of the graph rather than an input."""

    def __init__(self, *values: int, array: np.ndarray | None = None) -> None:
        self.array = whole(*values) if array is None else array


def one_node(operator: str, operands: list, outputs: int, opset: int, attributes: dict) -> bytes:
    inputs, initializers, names = [], [], []
    for position, operand in enumerate(operands):
        name = f"x{position}"
        if operand is None:
            names.append("")
        elif isinstance(operand, Fixed):
            initializers.append(numpy_helper.from_array(operand.array, name))
            names.append(name)
        else:
            dtype = helper.np_dtype_to_tensor_dtype(operand.dtype)
            inputs.append(helper.make_tensor_value_info(name, dtype, operand.shape))
            names.append(name)
    results = [f"y{position}" for position in range(outputs)]
    node = helper.make_node(operator, names, results, **attributes)
    declared = [onnx.ValueInfoProto(name=name) for name in results]
    graph = helper.make_graph([node], "one", inputs, declared, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    model = onnx.shape_inference.infer_shapes(model)
    return model.SerializeToString()


def run_reference(graph: bytes, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def run_torch(graph: bytes, feeds: dict[str, np.ndarray]) -> list[list[np.ndarray]]:
    """The outputs of the specialising run, and of a run afterwards."""
    tensors = {name: torch.tensor(array) for name, array in feeds.items()}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with torch.inference_mode():
        specialised, first = specialise(Program(graph), tensors, torch.device("cpu"))
        second = specialised.run(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]) or tensor.isnan().any(), "an input was written"
    return [[tensor.numpy() for tensor in outputs.values()] for outputs in (first, second)]


def check(operator: str, *operands, outputs: int = 1, opset: int = 18, **attributes) -> None:
    graph = one_node(operator, list(operands), outputs, opset, attributes)
    feeds = {
        f"x{position}": operand
        for position, operand in enumerate(operands)
        if isinstance(operand, np.ndarray)
    }
    expected = run_reference(graph, feeds)
    for actual in run_torch(graph, feeds):
        assert len(actual) == len(expected)
        for mine, theirs in zip(actual, expected, strict=True):
            assert mine.shape == theirs.shape
            assert mine.dtype == theirs.dtype
            np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-6)


X = floats(2, 3, 4)
EXTREME = np.array([-np.inf, np.inf, np.nan, 0.0, -1.5, 2.5, 0.5, -0.5], np.float32)
DIVIDENDS = whole(7, -7, 7, -7, 0, 6)
DIVISORS = whole(3, 3, -3, -3, 5, -3)

OF_ONE_TENSOR = """
    Abs Asinh Atan Ceil Celu Cos Cosh Elu Erf Exp Floor HardSigmoid HardSwish Identity LeakyRelu
    Mish Neg Reciprocal Relu Round Selu Sigmoid Sign Sin Sinh Softplus Softsign Tan Tanh
    ThresholdedRelu Size Shape IsNaN IsInf Flatten Transpose Softmax LogSoftmax ArgMax ArgMin
    GlobalAveragePool GlobalMaxPool
""".split()  # noqa: SIM905 -- a list of words
REDUCTIONS = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare".split()  # noqa: SIM905

CASES = [
    *((name, (X,), {}) for name in OF_ONE_TENSOR),
    *((name, (small(3, 4),), {}) for name in ("Acos", "Asin", "Atanh")),
    *((name, (positive(3, 4),), {}) for name in ("Log", "Sqrt")),
    ("Acosh", (positive(3, 4) + 1,), {}),
    ("Round", (np.array([0.5, 1.5, 2.5, -0.5, -2.5], np.float32),), {}),
    ("Celu", (X,), {"alpha": 2.5}),
    ("Elu", (X,), {"alpha": 0.5}),
    ("HardSigmoid", (X,), {"alpha": 0.3, "beta": 0.4}),
    ("LeakyRelu", (X,), {"alpha": 0.2}),
    ("Selu", (X,), {"alpha": 1.5, "gamma": 0.9}),
    ("ThresholdedRelu", (X,), {"alpha": 0.3}),
    ("Gelu", (X,), {"opset": 20}),
    ("Gelu", (X,), {"opset": 20, "approximate": "tanh"}),
    ("IsInf", (EXTREME,), {}),
    ("IsInf", (EXTREME,), {"detect_negative": 0}),
    ("IsInf", (EXTREME,), {"detect_positive": 0}),
    ("IsNaN", (EXTREME,), {}),
    *(
        (name, (X, floats(3, 1)), {})
        for name in ("Add", "Sub", "Mul", "Div", "Max", "Min", "PRelu")
    ),
    *((name, (X, floats(4), floats(1)), {}) for name in ("Sum", "Mean", "Max", "Min")),
    *((name, (whole(1, 2, 3), whole(3, 2, 1)), {}) for name in ("Equal", "Greater", "Less")),
    *((name, (whole(1, 2, 3), whole(3, 2, 1)), {}) for name in ("GreaterOrEqual", "LessOrEqual")),
    *((name, (bools(5), bools(5)), {}) for name in ("And", "Or", "Xor", "Equal")),
    ("Not", (bools(5),), {}),
    *(
        (name, (integers(-9, 9, 4, 3), integers(-9, 9, 3)), {})
        for name in ("BitwiseAnd", "BitwiseOr", "BitwiseXor", "Add", "Mul", "Sub")
    ),
    ("BitwiseNot", (integers(-9, 9, 4),), {}),
    ("Div", (DIVIDENDS, DIVISORS), {}),
    ("Mod", (DIVIDENDS, DIVISORS), {}),
    ("Mod", (DIVIDENDS, DIVISORS), {"fmod": 1}),
    ("Mod", (floats(9) * 5, floats(9)), {"fmod": 1}),
    ("Pow", (positive(3, 4), floats(4)), {}),
    ("Pow", (positive(3, 4), whole(2)), {}),
    ("Pow", (integers(1, 5, 4), np.array([0.5], np.float32)), {}),
    ("Clip", (X, np.array(-0.5, np.float32), np.array(0.5, np.float32)), {}),
    ("Clip", (X, None, np.array(0.5, np.float32)), {}),
    ("Clip", (X, np.array(0.5, np.float32)), {}),
    ("Clip", (X, np.array(0.5, np.float32), np.array(-0.5, np.float32)), {}),
    ("Where", (bools(2, 1, 4), X, floats(3, 1)), {}),
    *(
        ("Cast", (np.array([-2.7, -0.2, 0.0, 0.9, 3.5], np.float32),), {"to": code})
        for code in (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL, TensorProto.DOUBLE)
    ),
    ("Cast", (whole(0, 3, 2**32 + 5),), {"to": TensorProto.INT32}),
    ("Cast", (whole(0, 3, -4),), {"to": TensorProto.FLOAT}),
    ("Cast", (bools(6),), {"to": TensorProto.FLOAT}),
    ("Cast", (X,), {"to": TensorProto.FLOAT16}),
    ("CastLike", (X, whole(1)), {}),
    # layout
    ("Constant", (), {"value": numpy_helper.from_array(floats(2, 3))}),
    ("Constant", (), {"value_float": 1.5}),
    ("Constant", (), {"value_floats": [1.5, 2.5]}),
    ("Constant", (), {"value_int": 3}),
    ("Constant", (), {"value_ints": [3, 4]}),
    ("ConstantOfShape", (Fixed(2, 3),), {}),
    ("ConstantOfShape", (Fixed(2, 3),), {"value": numpy_helper.from_array(whole(7))}),
    ("ConstantOfShape", (Fixed(array=np.zeros(0, np.int64)),), {}),
    ("EyeLike", (floats(3, 4),), {"k": 1}),
    ("EyeLike", (floats(4, 3),), {"k": -1, "dtype": TensorProto.INT64}),
    ("Shape", (X,), {"start": 1}),
    ("Shape", (X,), {"start": -2, "end": -1}),
    ("Range", (Fixed(array=np.array(1)), Fixed(array=np.array(9)), Fixed(array=np.array(3))), {}),
    ("Range", (Fixed(array=np.array(9)), Fixed(array=np.array(1)), Fixed(array=np.array(-3))), {}),
    ("Reshape", (X, Fixed(0, -1)), {}),
    ("Reshape", (X, Fixed(4, 2, -1)), {}),
    ("Reshape", (floats(0, 3), Fixed(3, 0)), {"allowzero": 1}),
    *(("Flatten", (X,), {"axis": axis}) for axis in (0, 1, 2, 3, -1)),
    ("Squeeze", (floats(1, 3, 1, 2),), {}),
    ("Squeeze", (floats(1, 3, 1, 2), Fixed(-2)), {}),
    ("Unsqueeze", (X, Fixed(0, -1)), {}),
    ("Unsqueeze", (X, Fixed(3, 1)), {}),
    ("Transpose", (X,), {"perm": [1, 2, 0]}),
    ("Expand", (floats(3, 1), Fixed(2, 1, 4)), {}),
    ("Expand", (floats(3, 4), Fixed(1)), {}),
    ("Tile", (floats(2, 3), Fixed(2, 2)), {}),
    ("Concat", (X, floats(2, 1, 4)), {"axis": -2}),
    ("Split", (floats(7, 2),), {"num_outputs": 3, "outputs": 3}),
    ("Split", (floats(2, 7), Fixed(3, 0, 4)), {"axis": 1, "outputs": 3}),
    ("Slice", (X, Fixed(1), Fixed(INT_MAX), Fixed(-1), Fixed(2)), {}),
    ("Slice", (X, Fixed(-1, 0), Fixed(INT_MIN, 2), Fixed(2, 1), Fixed(-1, 1)), {}),
    ("Slice", (X, Fixed(-2), Fixed(-1)), {}),
    ("Slice", (X, Fixed(3), Fixed(1), Fixed(2)), {}),
    ("Pad", (X, Fixed(0, 1, 2, 1, 0, 0)), {}),
    ("Pad", (X, Fixed(1, -1, 0, 0, 0, 2), Fixed(array=np.array(3.5, np.float32))), {}),
    ("Pad", (X, Fixed(2, 1), None, Fixed(-1)), {"mode": "edge"}),
    ("Pad", (X, Fixed(0, 2, 3, 0, 1, 2)), {"mode": "reflect"}),
    ("Pad", (X, Fixed(0, 2, 3, 0, 1, 2)), {"mode": "wrap", "opset": 19}),
    ("Gather", (X, whole(1, -1, 0)), {"axis": 1}),
    ("Gather", (X, np.array(-1)), {"axis": 2}),
    ("Gather", (X, integers(-3, 3, 2, 2).astype(np.int32)), {"axis": -2}),
    ("GatherElements", (X, integers(-4, 4, 2, 2, 3)), {"axis": 2}),
    ("GatherND", (X, integers(-2, 2, 5, 2)), {}),
    ("GatherND", (X, integers(0, 2, 5, 1)), {}),
    ("GatherND", (X, integers(-3, 3, 2, 6, 1)), {"batch_dims": 1}),
    ("GatherND", (X, integers(-2, 2, 3, 4, 3) % [2, 3, 4]), {}),
    ("ScatterElements", (X, whole(2, -3, 1).reshape(1, 3, 1), floats(1, 3, 1)), {"axis": 2}),
    *(
        (
            "ScatterElements",
            (X, integers(-3, 3, 2, 5, 4), floats(2, 5, 4)),
            {"axis": 1, "reduction": reduction},
        )
        for reduction in ("add", "mul", "max", "min")
    ),
    ("ScatterND", (X, whole(1, 0, 0, 2).reshape(2, 2), floats(2, 4)), {}),
    ("ScatterND", (X, whole(1, 2, 3).reshape(1, 3), floats(1)), {}),
    *(
        ("ScatterND", (X, integers(-2, 2, 6, 2), floats(6, 4)), {"reduction": reduction})
        for reduction in ("add", "mul", "max", "min")
    ),
    ("OneHot", (whole(0, -1, 5, 2), Fixed(array=np.array(4)), floats(2)), {}),
    ("OneHot", (integers(-4, 4, 2, 3), Fixed(4), whole(7, 9)), {"axis": 1}),
    ("Trilu", (floats(2, 4, 3),), {}),
    ("Trilu", (floats(2, 4, 3), Fixed(array=np.array(-1))), {"upper": 0}),
    ("DepthToSpace", (floats(1, 8, 2, 3),), {"blocksize": 2}),
    ("DepthToSpace", (floats(1, 8, 2, 3),), {"blocksize": 2, "mode": "CRD"}),
    ("SpaceToDepth", (floats(1, 2, 4, 6),), {"blocksize": 2}),
    # reductions
    *(
        (f"Reduce{kind}", (positive(2, 3, 4), *axes), attributes)
        for kind in REDUCTIONS
        for axes, attributes in (
            ((), {}),
            ((), {"keepdims": 0}),
            ((Fixed(0, -1),), {}),
            ((Fixed(1),), {"keepdims": 0}),
        )
    ),
    ("ReduceSum", (X, Fixed(array=np.zeros(0, np.int64))), {"noop_with_empty_axes": 1}),
    ("ReduceSum", (X, Fixed(array=np.zeros(0, np.int64))), {}),
    ("ReduceSum", (integers(-9, 9, 4, 3).astype(np.int32), Fixed(0)), {}),
    ("ReduceMean", (integers(-9, 9, 4, 3), Fixed(0)), {}),
    *(
        (kind, (whole(3, 1, 3, 1).reshape(2, 2).repeat(2, 1),), attributes)
        for kind in ("ArgMax", "ArgMin")
        for attributes in ({"axis": -1}, {"axis": 1, "select_last_index": 1, "keepdims": 0})
    ),
    *(
        ("CumSum", (array, Fixed(array=np.array(-1))), {"exclusive": exclusive, "reverse": reverse})
        for array in (X, integers(-9, 9, 3, 4).astype(np.int32))
        for exclusive in (0, 1)
        for reverse in (0, 1)
    ),
    ("TopK", (X, Fixed(2)), {"outputs": 2}),
    ("TopK", (whole(3, 1, 3, 2, 3), Fixed(2)), {"outputs": 2}),
    ("TopK", (X, Fixed(2)), {"outputs": 2, "axis": 1, "largest": 0}),
    ("Softmax", (X,), {"axis": 1}),
    ("LogSoftmax", (X,), {"axis": 0}),
    ("MatMul", (floats(2, 1, 3, 4), floats(5, 4, 2)), {}),
    ("MatMul", (floats(4), floats(4)), {}),
    ("MatMul", (floats(3, 4), floats(4)), {}),
    ("Gemm", (floats(3, 4), floats(4, 2)), {}),
    ("Gemm", (floats(3, 4), floats(4, 2)), {"alpha": 0.5}),
    ("Gemm", (floats(4, 3), floats(2, 4), floats(2)), {"transA": 1, "transB": 1, "beta": 0.3}),
    ("Gemm", (floats(3, 4), floats(4, 2), floats(3, 1)), {"alpha": 2.0}),
    ("Einsum", (floats(2, 3, 4), floats(2, 4, 5)), {"equation": "bij, bjk -> bik"}),
    ("Einsum", (floats(2, 3, 4), floats(4, 5)), {"equation": "...i,ij->...j"}),
    # layers
    ("GlobalAveragePool", (floats(2, 3, 4, 5),), {}),
    ("GlobalMaxPool", (floats(2, 3, 4, 5),), {}),
    ("BatchNormalization", (X, floats(3), floats(3), floats(3), positive(3)), {"epsilon": 1e-3}),
    (
        "BatchNormalization",
        (X, floats(3), floats(3), floats(3), positive(3)),
        {"training_mode": 1, "momentum": 0.7, "outputs": 3},
    ),
    ("LayerNormalization", (X, floats(4), floats(4)), {}),
    ("LayerNormalization", (X, floats(3, 4)), {"axis": 1, "epsilon": 1e-3, "outputs": 3}),
    ("InstanceNormalization", (X, floats(3), floats(3)), {"epsilon": 1e-3}),
    ("GroupNormalization", (floats(2, 6, 4), floats(3), floats(3)), {"num_groups": 3}),
]


@pytest.mark.parametrize(
    ("operator", "operands", "options"), CASES, ids=[f"{c[0]}-{n}" for n, c in enumerate(CASES)]
)
def test_an_operator_agrees_with_onnxruntime(operator, operands, options):
    check(operator, *operands, **options)


def test_every_allowed_operator_is_known_and_tested():
    assert set(OPERATORS) >= ALLOWED_OPERATORS
    tested = {case[0] for case in CASES} | {"Conv", "ConvTranspose", "MaxPool", "AveragePool"}
    assert tested >= ALLOWED_OPERATORS


@st.composite
def windows(draw):
    """Attributes of a window over one or two dimensions, and a size of the input."""
    rank = draw(st.integers(1, 2))

    def each(low: int, high: int, count: int = rank) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    attributes = {"kernel_shape": each(1, 3), "strides": each(1, 3)}
    mode = draw(st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if mode == "NOTSET":
        low = [draw(st.integers(0, size - 1)) for size in attributes["kernel_shape"]]
        high = [draw(st.integers(0, size - 1)) for size in attributes["kernel_shape"]]
        attributes["pads"] = low + high
    else:
        attributes["auto_pad"] = mode
    if mode.startswith("SAME"):
        # Where a stride exceeds the window, onnxruntime pads by a negative number or refuses.
        sizes = zip(attributes["strides"], attributes["kernel_shape"], strict=True)
        attributes["strides"] = [min(step, size) for step, size in sizes]
    return attributes, each(5, 8)


@settings(deadline=None, max_examples=60)
@given(windows(), st.sampled_from([1, 2]), st.booleans(), st.integers(1, 2))
def test_convolution_agrees(window, groups, with_bias, dilation):
    attributes, spatial = window
    if attributes.get("auto_pad", "NOTSET") in ("NOTSET", "VALID"):
        attributes = {**attributes, "dilations": [dilation] * len(spatial)}
    weight = floats(4, 4 // groups, *attributes["kernel_shape"])
    operands = [floats(2, 4, *spatial), weight, *([floats(4)] if with_bias else [])]
    check("Conv", *operands, group=groups, **attributes)


@settings(deadline=None, max_examples=60)
@given(windows(), st.sampled_from([1, 2]), st.booleans(), st.integers(1, 2), st.data())
def test_transposed_convolution_agrees(window, groups, with_bias, dilation, data):
    attributes, spatial = window
    if "pads" in attributes:
        attributes = {**attributes, "dilations": [dilation] * len(spatial)}
        extra = [data.draw(st.integers(0, step - 1)) for step in attributes["strides"]]
        attributes["output_padding"] = extra
    weight = floats(4, 6 // groups, *attributes["kernel_shape"])
    operands = [floats(2, 4, *spatial), weight, *([floats(6)] if with_bias else [])]
    check("ConvTranspose", *operands, group=groups, **attributes)


def test_transposed_convolution_obeys_an_output_shape():
    for size in ([9, 10], [10, 11]):
        check(
            "ConvTranspose",
            floats(1, 2, 5, 5),
            floats(2, 3, 3, 3),
            strides=[2, 2],
            output_shape=size,
        )


@settings(deadline=None, max_examples=60)
@given(windows(), st.booleans(), st.booleans())
def test_max_pooling_agrees_with_its_indices(window, indexed, ceil):
    attributes, spatial = window
    attributes = {**attributes, "ceil_mode": int(ceil and "auto_pad" not in attributes)}
    check("MaxPool", floats(2, 3, *spatial), outputs=2 if indexed else 1, **attributes)


@settings(deadline=None, max_examples=60)
@given(windows(), st.booleans())
def test_average_pooling_agrees(window, include_padding):
    attributes, spatial = window
    check(
        "AveragePool",
        floats(2, 3, *spatial),
        count_include_pad=int(include_padding),
        **attributes,
    )


def test_three_dimensions_work_as_two_do():
    x = floats(1, 2, 4, 5, 4)
    check("Conv", x, floats(3, 2, 2, 2, 2), pads=[1, 0, 1, 0, 1, 1])
    check("ConvTranspose", x, floats(2, 3, 2, 2, 2), strides=[2, 1, 2])
    check("MaxPool", x, kernel_shape=[2, 2, 2], outputs=2)
    check("AveragePool", x, kernel_shape=[2, 2, 2])


def graph_of(nodes, inputs, outputs, initializers=(), opset: int = 18) -> bytes:
    graph = helper.make_graph(
        nodes,
        "some",
        [helper.make_tensor_value_info(name, dtype, None) for name, dtype in inputs],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in initializers],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return model.SerializeToString()


def test_shape_arithmetic_costs_no_instruction():
    """Flattening by the input's own sizes leaves one reshape; the rest is done while building."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["rows"]),
        helper.make_node("Unsqueeze", ["rows", "axis"], ["rows1"]),
        helper.make_node("Concat", ["rows1", "rest"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["x", "wanted"], ["y"]),
    ]
    constants = [("zero", np.array(0)), ("axis", whole(0)), ("rest", whole(-1))]
    graph = graph_of(nodes, [("x", TensorProto.FLOAT)], ["y"], constants)
    x = torch.tensor(X)
    specialised, outputs = specialise(Program(graph), {"x": x}, torch.device("cpu"))
    assert outputs["y"].shape == (2, 12)
    assert len(specialised.instructions) == 1
    assert torch.equal(specialised.run({"x": x + 1})["y"], (x + 1).reshape(2, 12))


def test_a_result_that_nobody_reads_is_not_computed():
    nodes = [
        helper.make_node("Exp", ["x"], ["unused"]),
        helper.make_node("Shape", ["unused"], ["shape"]),
        helper.make_node("Expand", ["one", "shape"], ["ones"]),
        helper.make_node("Add", ["x", "ones"], ["y"]),
    ]
    graph = graph_of(nodes, [("x", TensorProto.FLOAT)], ["y"], [("one", np.ones(1, np.float32))])
    specialised, _ = specialise(Program(graph), {"x": torch.tensor(X)}, torch.device("cpu"))
    assert [one.label for one in specialised.instructions] == ["Add (y)"]
    other = specialised.run({"x": torch.zeros(2, 3, 4)})["y"]
    assert torch.equal(other, torch.ones(2, 3, 4))


def test_outputs_may_be_inputs_and_constants():
    nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Neg", ["c"], ["z"])]
    graph = graph_of(nodes, [("x", TensorProto.FLOAT)], ["y", "z"], [("c", np.float32([2]))])
    specialised, first = specialise(Program(graph), {"x": torch.ones(2)}, torch.device("cpu"))
    second = specialised.run({"x": torch.zeros(2)})
    assert first["y"].tolist() == [1, 1]
    assert second["y"].tolist() == [0, 0]
    assert first["z"].tolist() == second["z"].tolist() == [-2]


def test_a_shape_that_depends_on_data_is_refused_by_name():
    graph = graph_of(
        [helper.make_node("Reshape", ["x", "sizes"], ["y"])],
        [("x", TensorProto.FLOAT), ("sizes", TensorProto.INT64)],
        ["y"],
    )
    inputs = {"x": torch.tensor(X), "sizes": torch.tensor([6, 4])}
    with pytest.raises(PlanRefused, match=r"Reshape \(y\): operand 1 \('sizes'\)"):
        specialise(Program(graph), inputs, torch.device("cpu"))


def test_an_unknown_operator_is_refused_by_name():
    nodes = [helper.make_node("Loop", ["x"], ["y"])]
    with pytest.raises(PlanRefused, match="no operator Loop"):
        Program(graph_of(nodes, [("x", TensorProto.FLOAT)], ["y"]))


def test_a_newer_opset_is_refused():
    nodes = [helper.make_node("Neg", ["x"], ["y"])]
    with pytest.raises(PlanRefused, match="opset 21"):
        Program(graph_of(nodes, [("x", TensorProto.FLOAT)], ["y"], opset=21))


def test_operands_that_do_not_fit_fail_with_the_operator_s_name():
    nodes = [helper.make_node("Add", ["a", "b"], ["y"])]
    graph = graph_of(nodes, [("a", TensorProto.FLOAT), ("b", TensorProto.FLOAT)], ["y"])
    inputs = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(TrainingFailed, match=r"Add \(y\) failed in torch"):
        specialise(Program(graph), inputs, torch.device("cpu"))


def test_data_in_another_file_is_never_read(tmp_path):
    (tmp_path / "secret").write_bytes(np.ones(2, np.float32).tobytes())
    stored = TensorProto(name="c", data_type=TensorProto.FLOAT, dims=[2])
    stored.data_location = TensorProto.EXTERNAL
    stored.external_data.add(key="location", value=str(tmp_path / "secret"))
    graph = helper.make_graph(
        [helper.make_node("Neg", ["c"], ["y"])],
        "some",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
        [stored],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    with pytest.raises(PlanRefused, match="another file"):
        Program(model.SerializeToString())
