"""The byte-level ONNX reader against the onnx package, on files good, bad and hostile."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from fedge.schemas.errors import PlanRefused
from fedge.schemas.onnx_wire import (
    ALLOWED_OPERATORS,
    MAX_GRAPH_DEPTH,
    check_graph,
    embed_weights,
    inspect_graph,
)

NAMES = st.text(alphabet="abcxyz.é/0", min_size=1, max_size=6)
DTYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}


def linear(**attributes: object) -> onnx.ModelProto:
    """`output = input @ param.w + param.b`, the weights left open."""
    nodes = [
        helper.make_node("MatMul", ["input", "param.w"], ["product"]),
        helper.make_node("Add", ["product", "param.b"], ["output"], **attributes),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 2])],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])


def weights() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(3)
    return {
        "param.w": generator.standard_normal((3, 2)).astype(np.float32),
        "param.b": generator.standard_normal(2).astype(np.float32),
    }


def checked(model: onnx.ModelProto | bytes) -> None:
    data = model if isinstance(model, bytes) else model.SerializeToString()
    check_graph(data, inputs=["input"], outputs=["output"], open_names=["param.w", "param.b"])


@st.composite
def tensors(draw: st.DrawFn) -> onnx.TensorProto:
    name = draw(NAMES)
    values = draw(st.lists(st.integers(-(2**40), 2**40), max_size=4))
    if draw(st.booleans()):
        return numpy_helper.from_array(np.array(values, np.int64), name)
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)


@st.composite
def graphs(draw: st.DrawFn, depth: int = 0) -> onnx.GraphProto:
    nodes = []
    for index in range(draw(st.integers(0, 3))):
        node = helper.make_node(
            draw(st.sampled_from(["Add", "Conv", "If", "Custom"])),
            draw(st.lists(NAMES, max_size=3)),
            draw(st.lists(NAMES, max_size=2)),
            domain=draw(st.sampled_from(["", "ai.onnx", "com.example"])),
            name=f"n{index}",
            axis=draw(st.integers(-5, 5)),
            scales=draw(st.lists(st.floats(width=32), min_size=1, max_size=3)),
        )
        node.attribute.append(helper.make_attribute("value", draw(tensors())))
        if depth < 2 and draw(st.booleans()):
            node.attribute.append(helper.make_attribute("body", draw(graphs(depth + 1))))
        nodes.append(node)
    infos = [
        helper.make_tensor_value_info(
            draw(NAMES),
            draw(st.sampled_from(list(DTYPES.values()))),
            draw(st.lists(st.one_of(st.integers(0, 9), NAMES, st.none()), max_size=3)),
        )
        for _ in range(draw(st.integers(0, 4)))
    ]
    split = draw(st.integers(0, len(infos)))
    return helper.make_graph(nodes, "g", infos[:split], infos[split:], draw(st.lists(tensors())))


def operators_of(graph: onnx.GraphProto) -> set[tuple[str, str]]:
    """By the onnx package: the independent reading."""
    found = set()
    for node in graph.node:
        found.add((node.domain, node.op_type))
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found |= operators_of(attribute.g)
    return found


@settings(max_examples=150, deadline=None)
@given(graph=graphs(), producer=st.text(max_size=300))
def test_the_reader_sees_what_the_onnx_package_sees(graph: onnx.GraphProto, producer: str) -> None:
    model = helper.make_model(
        graph,
        producer_name=producer,
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("com.example", 2**31)],
    )
    found = inspect_graph(model.SerializeToString())
    assert found.operators == operators_of(graph)
    assert found.opsets == {one.domain: one.version for one in model.opset_import}
    assert [info.name for info in found.inputs] == [info.name for info in graph.input]
    assert [info.name for info in found.outputs] == [info.name for info in graph.output]
    assert list(found.initializers) == [tensor.name for tensor in graph.initializer]
    codes = {code: name for name, code in DTYPES.items()}
    for info, reference in zip(found.inputs, graph.input, strict=True):
        assert info.dtype == codes[reference.type.tensor_type.elem_type]
        sizes = [
            getattr(dim, dim.WhichOneof("value")) if dim.WhichOneof("value") else None
            for dim in reference.type.tensor_type.shape.dim
        ]
        assert list(info.shape or ()) == sizes


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
@example(b"\x3a\x00" * 2)
@example(b"\x3b")
@example(b"\x00\x00")
@example(b"\xff" * 11)
def test_random_bytes_are_read_or_refused_and_nothing_else(data: bytes) -> None:
    try:
        inspect_graph(data)
    except PlanRefused:
        return
    onnx.ModelProto.FromString(data)


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_changed_byte_never_hides_an_operator_from_the_reader(position: int, value: int) -> None:
    data = bytearray(linear().SerializeToString())
    data[position % len(data)] = value
    try:
        found = inspect_graph(bytes(data))
    except PlanRefused:
        return
    assert found.operators == operators_of(onnx.ModelProto.FromString(bytes(data)).graph)


def test_every_truncated_file_is_refused() -> None:
    whole = linear().SerializeToString()
    assert inspect_graph(whole).operators == {("", "MatMul"), ("", "Add")}
    for size in range(len(whole)):
        with pytest.raises(PlanRefused):
            checked(whole[:size])


def test_a_graph_with_the_plan_s_interface_passes() -> None:
    checked(linear())


def test_a_foreign_domain_is_refused() -> None:
    model = linear(domain="com.example")
    with pytest.raises(PlanRefused, match=r"com\.example::Add is not allowed"):
        checked(model)
    declared = linear()
    declared.opset_import.add(domain="com.example", version=1)
    with pytest.raises(PlanRefused, match=r"foreign operator domain 'com\.example'"):
        checked(declared)


@pytest.mark.parametrize("operator", ["RandomNormal", "If", "Loop", "Optional", "StringNormalizer"])
def test_an_operator_that_does_more_than_compute_is_refused(operator: str) -> None:
    assert operator not in ALLOWED_OPERATORS
    model = linear()
    model.graph.node[0].op_type = operator
    with pytest.raises(PlanRefused, match=operator):
        checked(model)


def test_an_operator_within_an_attribute_s_graph_is_found() -> None:
    model = linear()
    hidden = helper.make_graph([helper.make_node("Loop", [], [])], "inner", [], [])
    model.graph.node[0].attribute.append(helper.make_attribute("body", hidden))
    with pytest.raises(PlanRefused, match="Loop"):
        checked(model)


def test_an_operator_within_a_function_is_found_and_functions_are_refused() -> None:
    model = linear()
    function = helper.make_function(
        "com.example", "f", ["x"], ["y"], [helper.make_node("Loop", ["x"], ["y"])], []
    )
    model.functions.append(function)
    assert ("", "Loop") in inspect_graph(model.SerializeToString()).operators
    model.functions[0].node[0].op_type = "Add"
    with pytest.raises(PlanRefused, match="functions"):
        checked(model)


def test_external_data_is_refused_in_initializers_and_in_attributes() -> None:
    outside = numpy_helper.from_array(np.zeros(3, np.float32), "v")
    outside.ClearField("raw_data")
    outside.data_location = TensorProto.EXTERNAL
    outside.external_data.add(key="location", value="/etc/passwd")
    model = linear()
    model.graph.initializer.append(outside)
    with pytest.raises(PlanRefused, match="other files"):
        checked(model)
    model = linear()
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=outside))
    with pytest.raises(PlanRefused, match="other files"):
        checked(model)


def test_another_interface_is_refused() -> None:
    data = linear().SerializeToString()
    with pytest.raises(PlanRefused, match=r"inputs are not the plan's: missing \['mask'\]"):
        check_graph(data, inputs=["input", "mask"], outputs=["output"])
    with pytest.raises(PlanRefused, match=r"outputs are not the plan's.*foreign \['output'\]"):
        check_graph(data, inputs=["input"], outputs=[])
    with pytest.raises(PlanRefused, match=r"\['param.w'\], which nothing defines"):
        check_graph(data, inputs=["input"], outputs=["output"], open_names=["param.b"])


def test_a_name_that_only_an_inner_graph_reads_counts_as_open() -> None:
    model = linear()
    inner = helper.make_graph(
        [helper.make_node("Add", ["secret", "product"], ["o"])],
        "inner",
        [],
        [helper.make_tensor_value_info("o", TensorProto.FLOAT, [1])],
    )
    model.graph.node[1].attribute.append(helper.make_attribute("body", inner))
    found = inspect_graph(model.SerializeToString())
    assert found.open_names == {"param.w", "param.b", "secret"}


def test_a_field_given_twice_is_refused() -> None:
    data = linear().SerializeToString()
    hidden = helper.make_graph([helper.make_node("Loop", [], [])], "g", [], [])
    second = onnx.ModelProto(graph=hidden).SerializeToString()
    with pytest.raises(PlanRefused, match="field 7 twice"):
        inspect_graph(data + second)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(PlanRefused, match="field 99 that is not part of ONNX"):
        inspect_graph(linear().SerializeToString() + b"\x98\x06\x01")


def test_nesting_beyond_the_limit_is_refused_and_up_to_it_read() -> None:
    def nested(depth: int) -> bytes:
        graph = helper.make_graph([helper.make_node("Add", [], [])], "g", [], [])
        for _ in range(depth - 1):
            node = helper.make_node("If", [], [], body=graph)
            graph = helper.make_graph([node], "g", [], [])
        return helper.make_model(graph).SerializeToString()

    assert ("", "Add") in inspect_graph(nested(MAX_GRAPH_DEPTH)).operators
    with pytest.raises(PlanRefused, match="nested"):
        inspect_graph(nested(MAX_GRAPH_DEPTH + 1))
    with pytest.raises(PlanRefused, match="nested"):
        inspect_graph(nested(20))


def test_an_embedded_model_is_valid_and_computes_with_the_weights() -> None:
    complete = embed_weights(linear().SerializeToString(), weights())
    onnx.checker.check_model(complete, full_check=True)
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    session = onnxruntime.InferenceSession(complete, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"input": rows})
    expected = rows @ weights()["param.w"] + weights()["param.b"]
    np.testing.assert_allclose(output, expected, rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        NAMES,
        st.tuples(
            st.sampled_from(["float32", "float64", "float16", "int64", "int32", "uint8", "bool"]),
            st.lists(st.integers(0, 300), max_size=3),
        ),
        min_size=1,
    )
)
def test_embedded_arrays_are_read_back_by_the_onnx_package(
    arrays: dict[str, tuple[str, list[int]]],
) -> None:
    generator = np.random.default_rng(0)
    given_weights = {}
    for name, (dtype, shape) in arrays.items():
        small = [size % 5 for size in shape[:-1]] + shape[-1:]
        given_weights[name] = (generator.standard_normal(small) * 50).astype(dtype)
    graph = helper.make_graph(
        [helper.make_node("Sum", [name], [f"out {name}"]) for name in arrays], "g", [], []
    )
    data = embed_weights(helper.make_model(graph).SerializeToString(), given_weights)
    initializers = onnx.ModelProto.FromString(data).graph.initializer
    assert [one.name for one in initializers] == sorted(arrays)
    for one in initializers:
        read = numpy_helper.to_array(one)
        assert read.dtype == given_weights[one.name].dtype
        np.testing.assert_array_equal(read, given_weights[one.name])


def test_embedding_gives_the_same_bytes_in_any_order_and_from_any_memory_layout() -> None:
    infer = linear().SerializeToString()
    first = embed_weights(infer, weights())
    turned = {name: np.asfortranarray(array) for name, array in reversed(weights().items())}
    assert embed_weights(infer, turned) == first
    assert embed_weights(infer, weights() | {"buffer.count": np.array(3)}) == first
    big_endian = {
        name: array.astype(array.dtype.newbyteorder(">")) for name, array in turned.items()
    }
    assert embed_weights(infer, big_endian) == first


def test_embedding_refuses_missing_weights_and_foreign_dtypes() -> None:
    infer = linear().SerializeToString()
    with pytest.raises(PlanRefused, match="has no weights"):
        embed_weights(infer, {"param.w": weights()["param.w"]})
    with pytest.raises(PlanRefused, match="complex64"):
        embed_weights(infer, weights() | {"param.b": np.zeros(2, np.complex64)})
