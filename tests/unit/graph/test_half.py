from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pipeline.errors import ModelError
from pipeline.graph.half import to_half
from pipeline.graph.shapes import element_type, infer
from tests.unit.graph.builders import array, conv_net, image, model, ops, run, weights

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


def types(proto: onnx.ModelProto) -> dict[str, int]:
    found = {name: element_type(value) for name, value in infer(proto).items()}
    return {**found, **{t.name: t.data_type for t in proto.graph.initializer}}


def test_two_casts_and_stable_names() -> None:
    original = conv_net()
    half = to_half(original)
    assert ops(half) == ["Cast", *ops(original), "Cast"]
    assert [node.name for node in half.graph.node][1:-1] == [node.name for node in original.graph.node]
    assert {t.name for t in half.graph.initializer} == {t.name for t in original.graph.initializer}
    found = types(half)
    assert (found["image"], found["logits"]) == (FLOAT, FLOAT)
    assert {name for name, kind in found.items() if kind == FLOAT} == {"image", "logits"}
    assert {value.name for value in half.graph.value_info} >= {"a", "a.relu", "image.half", "logits.half"}
    feed = image(1, 3, 8, 8)
    (want,), (got,) = run(original, image=feed), run(half, image=feed)
    error = np.abs(want - got).max() / np.abs(want).max()
    assert 1e-6 < error < 3e-3


def test_resize_keeps_its_scales_and_reads_fp16() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="c"),
        helper.make_node("Resize", ["c", "", "scales"], ["y"], name="up", mode="linear"),
    ]
    values = {"w": weights(2, 2, 1, 1), "scales": np.float32([1, 1, 2, 2])}
    half = to_half(model(nodes, {"x": (1, 2, 4, 4)}, {"y": (1, 2, 8, 8)}, values))
    found = types(half)
    assert (found["scales"], found["w"], found["c"]) == (FLOAT, HALF, HALF)
    assert ops(half) == ["Cast", "Conv", "Resize", "Cast"]


def test_an_initializer_shared_with_a_float32_slot_exists_in_both_types() -> None:
    """What torch does with dynamo: one [1, 1, 2, 2] for Resize scales and for a Mul."""
    nodes = [
        helper.make_node("Mul", ["x", "shared"], ["m"], name="m"),
        helper.make_node("Resize", ["m", "", "shared"], ["y"], name="up", mode="nearest"),
    ]
    original = model(nodes, {"x": (1, 1, 2, 4)}, {"y": (1, 1, 4, 8)}, {"shared": np.float32([1, 1, 2, 2])})
    half = to_half(original)
    assert array(half, "shared").dtype == np.float32
    assert array(half, "shared.half").dtype == np.float16
    np.testing.assert_allclose(run(half, x=image(1, 1, 2, 4))[0], run(original, x=image(1, 1, 2, 4))[0], rtol=2e-3)


def test_sizes_are_computed_in_float32() -> None:
    """4097 is no FP16 number: a size computed in FP16 would be 4096."""
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="r"),
        helper.make_node("Shape", ["r"], ["s"], name="s"),
        helper.make_node("Cast", ["s"], ["f"], to=FLOAT, name="f"),
        helper.make_node("Mul", ["f", "one"], ["m"], name="m"),
        helper.make_node("Cast", ["m"], ["i"], to=TensorProto.INT64, name="i"),
        helper.make_node("Expand", ["bias", "i"], ["e"], name="e"),
        helper.make_node("Add", ["r", "e"], ["y"], name="y"),
    ]
    values = {"one": np.float32(1), "bias": np.float32([0.5])}
    half = to_half(model(nodes, {"x": ("N", 4097)}, {"y": ("N", 4097)}, values))
    (got,) = run(half, x=image(1, 4097))
    assert got.shape == (1, 4097)
    assert types(half)["y.half"] == HALF


def test_a_uint8_input_becomes_fp16_data() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=FLOAT, name="f"),
        helper.make_node("Conv", ["f", "w"], ["y"], name="c"),
    ]
    original = model(
        nodes, {"x": (1, 2, 4, 4)}, {"y": (1, 2, 4, 4)}, {"w": weights(2, 2, 1, 1)}, input_type=TensorProto.UINT8
    )
    half = to_half(original)
    assert types(half)["f"] == HALF
    assert ops(half) == ["Cast", "Conv", "Cast"]


def test_an_output_that_others_read_and_an_integer_output() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["y"], name="r"),
        helper.make_node("Neg", ["y"], ["n"], name="n"),
        helper.make_node("ArgMax", ["n"], ["m"], axis=1, keepdims=0, name="m"),
    ]
    original = model(nodes, {"x": (2, 5)}, {"y": (2, 5)})
    original.graph.output.append(helper.make_tensor_value_info("m", TensorProto.INT64, (2,)))
    half = to_half(original)
    assert ops(half) == ["Cast", "Relu", "Neg", "ArgMax", "Cast"]
    want, got = run(original, x=image(2, 5)), run(half, x=image(2, 5))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-3)
    assert (got[1] == want[1]).all()


def test_an_operator_without_fp16_computes_in_float32_between_casts() -> None:
    node = helper.make_node("Mystery", ["r"], ["m"], name="mystery", domain="org.example")
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="r"),
        node,
        helper.make_node("Neg", ["m"], ["y"], name="n"),
    ]
    original = model(nodes, {"x": (2,)}, {"y": (2,)}, domains=["org.example"])
    original.graph.value_info.append(helper.make_tensor_value_info("m", FLOAT, (2,)))
    half = to_half(original)
    assert ops(half) == ["Cast", "Relu", "Cast", "Mystery", "Cast", "Neg", "Cast"]
    onnx.checker.check_model(half)


def test_weights_beyond_fp16_are_named() -> None:
    heavy = weights(4, 3, 3, 3)
    heavy[0, 0, 0, 0] = 70000
    with pytest.raises(ModelError, match=r"1 weight tensors do not fit FP16: a\.weight .*7e\+04"):
        to_half(conv_net(**{"a.weight": heavy}))


def test_an_open_clip_bound_is_no_overflow() -> None:
    nodes = [helper.make_node("Clip", ["x", "low", "high"], ["y"], name="clip")]
    values = {"low": np.float32(0), "high": np.finfo(np.float32).max}
    half = to_half(model(nodes, {"x": (3,)}, {"y": (3,)}, values))
    np.testing.assert_allclose(run(half, x=np.float32([-1, 2, 3]))[0], [0, 2, 3])


def test_control_flow_is_refused() -> None:
    branch = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["b"])], "b", [], [helper.make_tensor_value_info("b", FLOAT, None)]
    )
    node = helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch, name="choice")
    with pytest.raises(ModelError, match="choice"):
        to_half(model([node], {"x": (2,)}, {"y": (2,)}, {"flag": np.array(True)}))


def test_metadata_and_the_argument_stay() -> None:
    original = conv_net()
    original.metadata_props.add(key="card", value="x")
    original.graph.node[0].metadata_props.add(key="n", value="node")
    before = original.SerializeToString(deterministic=True)
    half = to_half(original)
    assert original.SerializeToString(deterministic=True) == before
    assert half.metadata_props[0].value == "x"
    assert half.graph.node[1].metadata_props[0].value == "node"
