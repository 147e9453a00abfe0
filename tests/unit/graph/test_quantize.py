from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pipeline.calibration.table import CalibrationTable
from pipeline.errors import CalibrationError, ConfigError, ModelError
from pipeline.graph.emulate import exactly_rounded
from pipeline.graph.placement import activation_tensors, quantizable_tensors
from pipeline.graph.quantize import quantize
from tests.unit.graph.builders import array, conv_net, image, model, ops, run, weights

TABLE = CalibrationTable("minmax", {"image": 4.0, "a": 9.0, "a.relu": 5.0, "b": 9.0, "b.relu": 6.0, "logits": 9.0})


def fake_quantized(x: np.ndarray, scale: Any) -> np.ndarray:
    """The arithmetic of Q/DQ by its definition, in float64."""
    return np.clip(np.rint(x.astype(np.float64) / scale), -128, 127) * scale


def convolved(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, pad: int) -> np.ndarray:
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], axis=(2, 3))
    result = np.einsum("nchwij,ocij->nohw", windows, weight)
    return result if bias is None else result + bias.reshape(1, -1, 1, 1)


def expected(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """conv_net by hand, quantized as the docstring of ``quantize`` says."""
    ranges = {"a": 4.0, "b": 5.0, "c": 6.0}
    for name in "abc":
        weight = array(proto, f"{name}.weight").astype(np.float64)
        amax = np.abs(weight).max(axis=(1, 2, 3), keepdims=True)
        bias = array(proto, f"{name}.bias").astype(np.float64) if name != "c" else None
        x = convolved(
            fake_quantized(x, ranges[name] / 127), fake_quantized(weight, amax / 127), bias, pad=0 if name == "c" else 1
        )
        x = np.maximum(x, 0) if name != "c" else x
    return x


def test_the_integers_are_those_of_the_definition() -> None:
    original = conv_net()
    feed = image(1, 3, 8, 8)
    want = expected(original, feed)
    (got,) = run(quantize(original, TABLE, half=False), image=feed)
    (unquantized,) = run(original, image=feed)
    # Means, because a value on the edge between two integers may fall to either side.
    assert np.abs(got - want).mean() < 5e-4 * np.abs(want).mean()
    assert np.abs(unquantized - want).mean() > 5e-3 * np.abs(want).mean()


def test_fp16_scales_cost_little() -> None:
    original = conv_net(opset=19)
    feed = image(1, 3, 8, 8)
    want = expected(original, feed)
    quantized = quantize(original, TABLE, half=True)
    error = np.abs(run(exactly_rounded(quantized), image=feed)[0] - want).mean()
    assert error < 0.015 * np.abs(want).mean()


def test_where_the_pairs_stand() -> None:
    quantized = quantize(conv_net(), TABLE, half=False)
    producers = {name: node for node in quantized.graph.node for name in node.output}
    for node in quantized.graph.node:
        if node.op_type == "Conv":
            for slot in (0, 1):
                dequantize = producers[node.input[slot]]
                assert dequantize.op_type == "DequantizeLinear"
                assert producers[dequantize.input[0]].op_type == "QuantizeLinear"
        if node.op_type == "Relu":
            assert producers[node.input[0]].op_type == "Conv"
    kinds = {t.name: t.data_type for t in quantized.graph.initializer}
    assert kinds["a.bias"] == kinds["a.weight"] == TensorProto.FLOAT
    assert kinds["image.zero_point"] == kinds["a.weight.zero_point"] == TensorProto.INT8
    assert array(quantized, "a.weight.scale").shape == (4,)
    assert array(quantized, "image.scale").shape == ()
    assert not array(quantized, "a.weight.zero_point").any()
    assert ops(quantized).count("QuantizeLinear") == 6


def test_readers_share_one_pair_and_other_readers_keep_the_float_tensor() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="r"),
        helper.make_node("Conv", ["r", "p.weight"], ["p"], name="p"),
        helper.make_node("Conv", ["r", "q.weight"], ["q"], name="q"),
        helper.make_node("Add", ["p", "q"], ["s"], name="s"),
        helper.make_node("Add", ["s", "r"], ["y"], name="y"),
    ]
    values = {"p.weight": weights(2, 2, 1, 1), "q.weight": weights(2, 2, 1, 1)}
    original = model(nodes, {"x": (1, 2, 4, 4)}, {"y": (1, 2, 4, 4)}, values)
    assert quantizable_tensors(original) == ("r",)
    quantized = quantize(original, CalibrationTable("minmax", {"r": 3.0}), half=False)
    assert ops(quantized).count("QuantizeLinear") == 3
    readers = {node.name: list(node.input) for node in quantized.graph.node}
    assert readers["p"][0] == readers["q"][0] == "r.dequantized"
    assert readers["y"] == ["s", "r"]


def transposed(group: int) -> onnx.ModelProto:
    weight = weights(4, 6 // group, 2, 2)
    weight[:, 0] *= 50
    node = helper.make_node("ConvTranspose", ["x", "up.weight"], ["y"], name="up", strides=[2, 2], group=group)
    return model([node], {"x": (1, 4, 5, 5)}, {"y": (1, 6, 10, 10)}, {"up.weight": weight})


@pytest.mark.parametrize("group", [1, 2])
def test_transposed_convolutions_quantize_along_axis_1(group: int) -> None:
    original = transposed(group)
    feed = image(1, 4, 5, 5)
    quantized = quantize(original, CalibrationTable("minmax", {"x": float(np.abs(feed).max())}), half=False)
    scale = array(quantized, "up.weight.scale")
    assert scale.shape == (6 // group,)
    assert scale[0] > 20 * scale[1]
    attributes = {a.name: a.i for n in quantized.graph.node if n.name == "up.weight.quantize" for a in n.attribute}
    assert attributes == {"axis": 1}
    (want,), (got,) = run(original, x=feed), run(quantized, x=feed)
    per_channel = np.abs(want - got).max(axis=(0, 2, 3)) / np.abs(want).max(axis=(0, 2, 3))
    assert (per_channel < 0.03).all()


def test_grouped_convolutions_quantize_along_axis_0() -> None:
    node = helper.make_node("Conv", ["x", "d.weight"], ["y"], name="d", group=4)
    original = model([node], {"x": (1, 4, 5, 5)}, {"y": (1, 4, 5, 5)}, {"d.weight": weights(4, 1, 1, 1)})
    quantized = quantize(original, CalibrationTable("minmax", {"x": 3.0}), half=True)
    assert array(quantized, "d.weight.scale").shape == (4,)


@pytest.mark.parametrize("half", [False, True])
def test_no_scale_is_zero_or_infinite(half: bool) -> None:
    tiny = weights(4, 3, 3, 3)
    tiny[0] = 0
    tiny[1] *= 1e-30
    tiny[2] *= 1e-5
    amax = {**TABLE.amax, "image": 1e-9}
    quantized = quantize(conv_net(**{"a.weight": tiny}), CalibrationTable("minmax", amax), half=half)
    for tensor in quantized.graph.initializer:
        if tensor.name.endswith(".scale"):
            scale = array(quantized, tensor.name).astype(np.float64)
            assert (scale > 0).all(), tensor.name
            assert np.isfinite(scale).all(), tensor.name
    # The third channel's weights, about 3e-6, stay within the range of their scale.
    scale = array(quantized, "a.weight.scale").astype(np.float64)
    assert np.abs(array(quantized, "a.weight")[2].astype(np.float64)).max() <= 127.5 * scale[2]


def test_a_range_beyond_fp16_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"tensor image.*beyond FP16"):
        quantize(conv_net(), CalibrationTable("minmax", {**TABLE.amax, "image": 1e7}), half=True)


def test_half_raises_the_opset_and_keeps_names_and_metadata() -> None:
    original = conv_net(opset=13)
    original.metadata_props.add(key="card", value="x")
    original.graph.node[0].metadata_props.add(key="n", value="node")
    quantized = quantize(original, TABLE, half=True)
    assert quantized.opset_import[0].version == 19
    assert quantized.metadata_props[0].value == "x"
    conv = next(node for node in quantized.graph.node if node.name == "a")
    assert conv.metadata_props[0].value == "node"
    assert [value.name for value in quantized.graph.output] == ["logits"]
    assert array(quantized, "a.relu.scale").dtype == np.float16
    assert quantize(conv_net(opset=11), TABLE, half=False).opset_import[0].version == 13


def test_an_opset_that_cannot_be_raised_is_an_error() -> None:
    original = conv_net(opset=13)
    branch = helper.make_graph([], "branch", [], [])
    original.graph.node.append(helper.make_node("Mystery", ["logits"], ["z"], domain="org.example", branch=branch))
    original.opset_import.append(helper.make_opsetid("org.example", 1))
    with pytest.raises(ModelError, match=r"opset 13 to 19: the operator org\.example::Mystery .* holds a graph"):
        quantize(original, TABLE, half=True)


def test_missing_ranges_are_listed() -> None:
    amax = {name: value for name, value in TABLE.amax.items() if name != "b.relu"}
    with pytest.raises(CalibrationError, match=r"lacks 1 of the ranges[\s\S]*b\.relu"):
        quantize(conv_net(), CalibrationTable("minmax", amax), half=False)
    quantized = quantize(conv_net(), CalibrationTable("minmax", amax), half=False, exclude=["c"])
    assert ops(quantized).count("QuantizeLinear") == 4


def test_a_table_of_another_graph_is_recognised() -> None:
    with pytest.raises(CalibrationError, match="another graph"):
        quantize(conv_net(), CalibrationTable("minmax", {"conv1": 1.0, "conv2": 2.0, "image": 3.0}), half=False)


def test_excluded_nodes_stay_float_and_their_tensors_need_no_range() -> None:
    original = conv_net()
    assert quantizable_tensors(original, ["[ab]"]) == ("b.relu",)
    quantized = quantize(original, CalibrationTable("minmax", {"b.relu": 2.0}), half=False, exclude=["a", "b*"])
    assert ops(quantized).count("QuantizeLinear") == 2


def test_an_exclude_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"'up\*'[\s\S]*a, b, c"):
        quantize(conv_net(), TABLE, half=False, exclude=["a", "up*"])


def test_nothing_to_quantize_is_an_error() -> None:
    node = helper.make_node("Relu", ["x"], ["y"], name="r")
    with pytest.raises(ModelError, match="no Conv"):
        quantize(model([node], {"x": (1,)}, {"y": (1,)}), TABLE, half=False)


def test_tensors_of_the_whole_network() -> None:
    original = conv_net()
    assert quantizable_tensors(original) == ("image", "a.relu", "b.relu")
    assert activation_tensors(original) == ("image", "a", "a.relu", "b", "b.relu", "logits")
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], name="s"),
        helper.make_node("Relu", ["x"], ["r"], name="r"),
        helper.make_node("ArgMax", ["r"], ["m"], axis=1, name="m"),
        helper.make_node("Expand", ["r", "s"], ["y"], name="y"),
    ]
    assert activation_tensors(model(nodes, {"x": (1, 2)}, {"y": (1, 2)})) == ("x", "r", "y")


def test_exact_rounding_repairs_what_onnxruntime_truncates() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16, name="h"),
        helper.make_node("QuantizeLinear", ["h", "s", "z"], ["y"], name="q"),
    ]
    values = {"s": np.float16(0.5), "z": np.int8(0)}
    original = model(nodes, {"x": (4,)}, {"y": (4,)}, values, opset=19, ir=9, output_type=TensorProto.INT8)
    feed = np.float32([0.4, 0.25, -0.4, 0.75])  # 0.8, 0.5, -0.8, 1.5 quanta; ties go to the even integer
    assert run(exactly_rounded(original), x=feed)[0].tolist() == [1, 0, -1, 2]


def test_the_kernel_is_named_for_parsers_that_read_no_weights() -> None:
    net = conv_net()
    for node in net.graph.node:
        kept = [attribute for attribute in node.attribute if attribute.name != "kernel_shape"]
        del node.attribute[:]
        node.attribute.extend(kept)
    table = CalibrationTable("minmax", dict.fromkeys(quantizable_tensors(net), 4.0))
    quantized = quantize(net, table, half=False)
    kernels = {
        node.name: list(attribute.ints)
        for node in quantized.graph.node
        for attribute in node.attribute
        if attribute.name == "kernel_shape"
    }
    convolutions = {node.name for node in quantized.graph.node if node.op_type == "Conv"}
    assert set(kernels) == convolutions
    assert all(len(kernel) == 2 for kernel in kernels.values())
