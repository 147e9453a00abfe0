"""Pads that become part of convolutions and pools, and paddings that are written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper

from pipeline.graph.base import run_passes
from pipeline.graph.padding import ExplicitPads, MergePads
from tests.unit.graph.builders import image, model, ops, run, weights

node = helper.make_node
SIZES = ("H", "W")


def net(
    nodes: Sequence[NodeProto],
    values: dict[str, Any] | None = None,
    *,
    given: Sequence[int | str] = (2, 4, 9, 8),
    opset: int = 17,
) -> onnx.ModelProto:
    initializers = {"w": weights(6, 4, 3, 3), **(values or {})}
    used = {name for n in nodes for name in n.input}
    kept = {name: value for name, value in initializers.items() if name in used}
    return model(nodes, {"x": given}, {"y": [None] * len(given)}, kept, opset=opset)


def alike(original: onnx.ModelProto, step: Any, *feeds: np.ndarray) -> onnx.ModelProto:
    """The rewritten model, which gives the same and changes no more when it is rewritten again."""
    changed, runs = run_passes(original, [step])
    assert runs[0].result.modified
    assert not runs[-1].result.modified
    assert changed.graph.input == original.graph.input
    assert changed.graph.output == original.graph.output
    for feed in feeds or (image(2, 4, 9, 8),):
        for want, got in zip(run(original, x=feed), run(changed, x=feed), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max(), rtol=0)
    return changed


def stays(original: onnx.ModelProto, step: Any) -> None:
    changed, runs = run_passes(original, [step])
    assert not runs[0].result.modified
    assert changed == original


def attribute(proto: onnx.ModelProto, name: str, position: int = -1) -> Any:
    found = {a.name: helper.get_attribute_value(a) for a in proto.graph.node[position].attribute}
    return found.get(name)


def pad(
    source: str, result: str, value: str = "", axes: str = "", widths: str = "pads", **attributes: Any
) -> NodeProto:
    inputs = [source, widths, value, axes]
    while not inputs[-1]:
        del inputs[-1]
    return node("Pad", inputs, [result], name=result, **attributes)


# H: 1 before, 0 behind; W: 2 before, 1 behind.
WIDTHS = np.array([0, 0, 1, 2, 0, 0, 0, 1])


@pytest.mark.parametrize("opset", [10, 11, 13, 18])
@pytest.mark.parametrize("own", [None, [1, 1, 0, 2]])
def test_a_pad_with_zeros_becomes_padding_of_the_convolution(opset: int, own: list[int] | None) -> None:
    first = pad("x", "p") if opset > 10 else node("Pad", ["x"], ["p"], name="p", pads=WIDTHS.tolist())
    follow = node("Conv", ["p", "w"], ["y"], name="conv", strides=[2, 1], **({"pads": own} if own else {}))
    merged = alike(net([first, follow], {"pads": WIDTHS}, opset=opset), MergePads())
    assert ops(merged) == ["Conv"]
    assert attribute(merged, "pads") == ([2, 3, 0, 3] if own else [1, 2, 0, 1])


def test_axes_say_which_widths_are_given() -> None:
    values = {"pads": np.array([2, 1, 1, 0]), "axes": np.array([3, -2])}
    merged = alike(net([pad("x", "p", axes="axes"), node("Conv", ["p", "w"], ["y"])], values, opset=18), MergePads())
    assert attribute(merged, "pads") == [1, 2, 0, 1]


def test_every_reader_is_looked_at_by_itself() -> None:
    nodes = [
        pad("x", "p"),
        node("Conv", ["p", "w"], ["a"], name="a"),
        node("Conv", ["p", "w"], ["b"], name="b", dilations=[1, 1]),
        node("Add", ["a", "b"], ["y"], name="y"),
    ]
    assert ops(alike(net(nodes, {"pads": WIDTHS}), MergePads())) == ["Conv", "Conv", "Add"]
    nodes[2] = node("MaxPool", ["p"], ["b"], name="b", kernel_shape=[3, 3])
    values = {"pads": WIDTHS, "w": weights(4, 4, 3, 3)}
    merged = alike(net(nodes, values), MergePads())
    assert ops(merged) == ["Pad", "Conv", "MaxPool", "Add"]
    assert merged.graph.node[1].input[0] == "x"


def test_a_pad_that_is_an_output_is_still_computed() -> None:
    original = net([pad("x", "p"), node("Conv", ["p", "w"], ["y"], name="conv")], {"pads": WIDTHS})
    original.graph.output.append(helper.make_tensor_value_info("p", TensorProto.FLOAT, (2, 4, 10, 11)))
    assert ops(alike(original, MergePads())) == ["Pad", "Conv"]


@pytest.mark.parametrize(
    ("first", "values"),
    [
        (pad("x", "p", "v"), {"v": np.float32(1)}),
        (pad("x", "p", mode="reflect"), {}),
        (pad("x", "p"), {"pads": np.array([0, 0, 1, 1, 0, 0, -1, 1])}),
        (pad("x", "p"), {"pads": np.array([0, 1, 0, 0, 0, 0, 0, 0]), "w": weights(6, 5, 3, 3)}),
        (pad("x", "p"), {"pads": np.array([1, 0, 0, 0, 0, 0, 0, 0])}),
    ],
)
def test_other_pads_before_a_convolution_stay(first: NodeProto, values: dict[str, Any]) -> None:
    stays(net([first, node("Conv", ["p", "w"], ["y"], name="conv")], {"pads": WIDTHS, **values}), MergePads())


def test_computed_widths_and_values_stay() -> None:
    follow = node("Conv", ["p", "w"], ["y"], name="conv")
    for name, kind, shape in (("pads", TensorProto.INT64, (8,)), ("v", TensorProto.FLOAT, ())):
        original = net([pad("x", "p", "v"), follow], {"pads": WIDTHS, "v": np.float32(0)})
        index = next(i for i, tensor in enumerate(original.graph.initializer) if tensor.name == name)
        del original.graph.initializer[index]
        original.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
        stays(original, MergePads())


def test_readers_that_cannot_pad_stay() -> None:
    values = {"pads": WIDTHS, "w": weights(6, 4, 3, 3)}
    stays(net([pad("x", "p"), node("Conv", ["p", "w"], ["y"], auto_pad="SAME_UPPER")], values), MergePads())
    stays(
        net([pad("x", "p"), node("ConvTranspose", ["p", "w"], ["y"])], {**values, "w": weights(4, 6, 3, 3)}),
        MergePads(),
    )
    stays(net([pad("x", "p"), node("Relu", ["p"], ["y"])], values), MergePads())
    as_weight = [pad("w", "p"), node("Conv", ["x", "p"], ["y"], name="conv")]
    stays(net(as_weight, values), MergePads())


@pytest.mark.parametrize("own", [{}, {"pads": [0, 0, 1, 1], "count_include_pad": 1}])
def test_an_average_counts_the_zeros(own: dict[str, Any]) -> None:
    follow = node("AveragePool", ["p"], ["y"], name="pool", kernel_shape=[3, 4], strides=[2, 2], **own)
    merged = alike(net([pad("x", "p"), follow], {"pads": WIDTHS}), MergePads())
    assert ops(merged) == ["AveragePool"]
    assert attribute(merged, "count_include_pad") == 1


@pytest.mark.parametrize(
    "own",
    [
        {"pads": [0, 0, 1, 1]},
        {"ceil_mode": 1},
        {"kernel_shape": [3, 2]},
        {"dilations": [2, 1]},
    ],
)
def test_averages_that_would_differ_stay(own: dict[str, Any]) -> None:
    follow = node("AveragePool", ["p"], ["y"], name="pool", **{"kernel_shape": [3, 3], "strides": [2, 2], **own})
    stays(net([pad("x", "p"), follow], {"pads": WIDTHS}, opset=19), MergePads())


@pytest.mark.parametrize(("value", "rectified"), [(-np.inf, False), (0, True), (-3, True)])
def test_a_maximum_does_not_see_what_is_small(value: float, rectified: bool) -> None:
    nodes = [
        node("Relu" if rectified else "Neg", ["x"], ["r"], name="r"),
        pad("r", "p", "v"),
        node("MaxPool", ["p"], ["y"], name="pool", kernel_shape=[3, 3], strides=[2, 2]),
    ]
    original = net(nodes, {"pads": WIDTHS, "v": np.float32(value)})
    feed = image(2, 4, 9, 8)
    assert ops(alike(original, MergePads(), feed, -np.abs(feed), np.abs(feed))) == [
        "Relu" if rectified else "Neg",
        "MaxPool",
    ]


@pytest.mark.parametrize("strides", [[1, 1], [2, 2], [3, 1]])
def test_a_maximum_sees_the_edge_once(strides: list[int]) -> None:
    nodes = [
        pad("x", "p", mode="edge"),
        node("MaxPool", ["p"], ["y"], name="pool", kernel_shape=[2, 3], strides=strides),
    ]
    merged = alike(net(nodes, {"pads": WIDTHS}), MergePads())
    assert ops(merged) == ["MaxPool"]
    assert attribute(merged, "pads") == [1, 2, 0, 1]


@pytest.mark.parametrize(
    "reader",
    [
        node("Conv", ["p", "w"], ["y"], name="conv"),
        node("AveragePool", ["p"], ["y"], name="pool", kernel_shape=[3, 3]),
        node("MaxPool", ["p"], ["y"], name="pool", kernel_shape=[2, 2]),
    ],
    ids=["convolution", "average", "a window beyond the edge"],
)
def test_others_see_the_edge_more_often(reader: NodeProto) -> None:
    stays(net([pad("x", "p", mode="edge"), reader], {"pads": WIDTHS}), MergePads())


@pytest.mark.parametrize(
    ("first", "value", "attributes"),
    [
        ("Neg", 0, {}),
        ("Relu", 1, {}),
        ("Relu", 0, {"ceil_mode": 1}),
        ("Relu", 0, {"dilations": [2, 2]}),
        ("Relu", 0, {"kernel_shape": [2, 2]}),
    ],
)
def test_maxima_that_would_differ_stay(first: str, value: float, attributes: dict[str, Any]) -> None:
    nodes = [
        node(first, ["x"], ["r"], name="r"),
        pad("r", "p", "v"),
        node("MaxPool", ["p"], ["y"], name="pool", **{"kernel_shape": [3, 3], **attributes}),
    ]
    stays(net(nodes, {"pads": WIDTHS, "v": np.float32(value)}), MergePads())


def test_indices_of_a_maximum_stay() -> None:
    nodes = [
        pad("x", "p", "v"),
        node("MaxPool", ["p"], ["m", "i"], name="pool", kernel_shape=[3, 3]),
        node("Cast", ["i"], ["f"], to=TensorProto.FLOAT, name="f"),
        node("Add", ["m", "f"], ["y"], name="y"),
    ]
    stays(net(nodes, {"pads": WIDTHS, "v": np.float32(-np.inf)}), MergePads())


@pytest.mark.parametrize("opset", [10, 17, 18])
def test_pads_in_a_row_become_one(opset: int) -> None:
    values = {"pads": WIDTHS, "more": np.array([0, 1, 0, 0, 0, 0, 2, 0]), "v": np.float32(2), "v2": np.float32(2)}
    if opset == 10:
        nodes = [
            node("Pad", ["x"], ["p"], name="p", pads=WIDTHS.tolist(), value=2.0),
            node("Pad", ["p"], ["y"], name="y", pads=values["more"].tolist(), value=2.0),
        ]
    elif opset == 17:
        nodes = [pad("x", "p", "v"), pad("p", "y", "v2", widths="more")]
    else:
        values |= {"more": np.array([1, 0, 0, 2]), "axes": np.array([1, 2])}
        nodes = [pad("x", "p", "v"), pad("p", "y", "v2", axes="axes", widths="more")]
    merged = alike(net(nodes, values, opset=opset), MergePads())
    assert ops(merged) == ["Pad"]
    assert merged.graph.node[0].output[0] == "y"


def test_three_pads_and_a_convolution_become_a_convolution() -> None:
    nodes = [pad("x", "p"), pad("p", "q"), pad("q", "r"), node("Conv", ["r", "w"], ["y"], name="conv")]
    merged = alike(net(nodes, {"pads": WIDTHS}), MergePads())
    assert ops(merged) == ["Conv"]
    assert attribute(merged, "pads") == [3, 6, 0, 3]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"value": "v"}, {}),
        ({"mode": "reflect"}, {}),
        ({"mode": "edge"}, {"mode": "edge"}),
        ({"widths": "crop"}, {}),
        ({}, {"widths": "crop"}),
    ],
)
def test_pads_in_a_row_that_differ_stay(first: dict[str, Any], second: dict[str, Any]) -> None:
    values = {"pads": WIDTHS, "v": np.float32(2), "crop": np.array([0, 0, -1, 0, 0, 0, 0, 0])}
    stays(net([pad("x", "p", **first), pad("p", "y", **second)], values), MergePads())


def test_a_pad_that_others_read_is_not_taken_into_the_next() -> None:
    nodes = [pad("x", "p"), pad("p", "q"), node("Exp", ["p"], ["e"]), node("Exp", ["q"], ["y"])]
    original = net(nodes, {"pads": WIDTHS})
    original.graph.output.append(helper.make_tensor_value_info("e", TensorProto.FLOAT, (2, 4, 10, 11)))
    stays(original, MergePads())


POOL = {"kernel_shape": [3, 2]}


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("strides", [[1, 1], [2, 3], [4, 2]])
@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("Conv", {}),
        ("MaxPool", POOL),
        ("AveragePool", POOL),
        ("AveragePool", {**POOL, "count_include_pad": 1}),
        ("MaxPool", {"kernel_shape": [4, 4]}),
    ],
)
def test_automatic_padding_is_written_out(op: str, attributes: dict[str, Any], strides: list[int], mode: str) -> None:
    inputs = ["x", "w"] if op == "Conv" else ["x"]
    original = net([node(op, inputs, ["y"], name="n", strides=strides, auto_pad=mode, **attributes)])
    explicit = alike(original, ExplicitPads())
    assert attribute(explicit, "auto_pad") is None
    assert len(attribute(explicit, "pads")) == 4


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize(("strides", "dilations"), [([2, 3], [1, 1]), ([1, 2], [2, 1])])
def test_automatic_padding_of_a_transposed_convolution(mode: str, strides: list[int], dilations: list[int]) -> None:
    up = node("ConvTranspose", ["x", "w"], ["y"], name="up", strides=strides, dilations=dilations, auto_pad=mode)
    for given in [(2, 4, 9, 8), (2, 4, *SIZES)]:
        explicit = alike(net([up], {"w": weights(4, 6, 4, 3)}, given=given), ExplicitPads())
        assert attribute(explicit, "auto_pad") is None


def test_stride_1_needs_no_sizes() -> None:
    given = (2, 4, *SIZES)
    same = node("Conv", ["x", "w"], ["y"], name="conv", auto_pad="SAME_LOWER", kernel_shape=[3, 3])
    explicit = alike(net([same], given=given), ExplicitPads(), image(2, 4, 9, 8), image(2, 4, 5, 6))
    assert attribute(explicit, "pads") == [1, 1, 1, 1]


def test_automatic_padding_that_depends_on_dynamic_sizes_stays() -> None:
    given = (2, 4, *SIZES)
    for op, inputs in (("Conv", ["x", "w"]), ("MaxPool", ["x"]), ("AveragePool", ["x"])):
        same = node(op, inputs, ["y"], auto_pad="SAME_UPPER", kernel_shape=[3, 3], strides=[2, 2])
        stays(net([same], given=given), ExplicitPads())
    valid = node("Conv", ["x", "w"], ["y"], auto_pad="VALID", strides=[2, 2])
    assert attribute(alike(net([valid], given=given), ExplicitPads()), "pads") == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("Conv", {"dilations": [2, 2]}),
        ("MaxPool", {"dilations": [2, 2], **POOL}),
        ("MaxPool", {"ceil_mode": 1, **POOL}),
        ("ConvTranspose", {"strides": [4, 4]}),
        ("ConvTranspose", {"output_shape": [9, 8]}),
        ("ConvTranspose", {"output_padding": [1, 1], "strides": [2, 2]}),
        ("Conv", {"auto_pad": "NOTSET", "pads": [1, 1, 1, 1]}),
    ],
)
def test_automatic_padding_that_is_not_clear_stays(op: str, attributes: dict[str, Any]) -> None:
    inputs = ["x"] if op == "MaxPool" else ["x", "w"]
    values = {"w": weights(4, 6, 3, 3) if op == "ConvTranspose" else weights(6, 4, 3, 3)}
    stays(net([node(op, inputs, ["y"], **{"auto_pad": "SAME_UPPER", **attributes})], values), ExplicitPads())


def test_a_weight_of_unknown_shape_stays() -> None:
    nodes = [node("Reshape", ["x", "s"], ["k"], name="k"), node("Conv", ["z", "k"], ["y"], name="c", auto_pad="VALID")]
    original = net(nodes)
    for name, kind, shape in (("s", TensorProto.INT64, ("R",)), ("z", TensorProto.FLOAT, (1, 4, 8, 8))):
        original.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
    stays(original, ExplicitPads())


def test_a_keras_block_of_padding_and_strides_becomes_one_convolution() -> None:
    """ZeroPadding2D and a convolution, then what Keras' stride 2 with "same" writes on an odd and an even size."""
    nodes = [
        pad("x", "p"),
        node("Conv", ["p", "w"], ["a"], name="a", auto_pad="VALID", strides=[2, 2]),
        node("Conv", ["a", "v"], ["b"], name="b", auto_pad="SAME_UPPER", strides=[2, 2]),
        node("Relu", ["b"], ["y"], name="y"),
    ]
    original = net(nodes, {"pads": WIDTHS, "v": weights(3, 6, 3, 3)})
    changed, _ = run_passes(original, [ExplicitPads(), MergePads()])
    assert ops(changed) == ["Conv", "Conv", "Relu"]
    assert [attribute(changed, "pads", i) for i in (0, 1)] == [[1, 2, 0, 1], [0, 1, 1, 1]]
    feed = image(2, 4, 9, 8)
    np.testing.assert_allclose(run(changed, x=feed)[0], run(original, x=feed)[0], atol=1e-6)
