"""Scales and shifts per channel that become part of a convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from pipeline.graph.base import run_passes
from pipeline.graph.batchnorm import FoldBatchNorm
from pipeline.graph.cleaning import clean_model
from tests.unit.graph.builders import array, image, model, ops, run, weights

node = helper.make_node


def batchnorm(source: str, result: str, name: str = "bn", **attributes: Any) -> NodeProto:
    return node("BatchNormalization", [source, "g", "beta", "mean", "var"], [result], name=name, **attributes)


def parameters(channels: int = 6, kind: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(5)
    return {
        "g": rng.uniform(0.5, 2, channels).astype(kind),
        "beta": rng.uniform(-1, 1, channels).astype(kind),
        "mean": rng.uniform(-1, 1, channels).astype(kind),
        "var": rng.uniform(0.1, 3, channels).astype(kind),
    }


def net(
    nodes: Sequence[NodeProto],
    values: dict[str, Any] | None = None,
    *,
    given: Sequence[int | str] = (2, 4, 8, 8),
    opset: int = 17,
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A graph from x to y, with a 3×3 weight of 4 to 6 channels and parameters of a BatchNormalization of 6."""
    initializers = {"w": weights(6, 4, 3, 3), **parameters(), **(values or {})}
    used = {name for n in nodes for name in n.input}
    kept = {name: value for name, value in initializers.items() if name in used}
    return model(nodes, {"x": given}, {"y": [None] * len(given)}, kept, opset=opset, input_type=kind, output_type=kind)


def conv(result: str = "c", **attributes: Any) -> NodeProto:
    return node("Conv", ["x", "w"], [result], name="conv", **{"pads": [1] * 4, **attributes})


def folded_alike(original: onnx.ModelProto, tolerance: float = 3e-6, **feeds: np.ndarray) -> onnx.ModelProto:
    """The folded model, which gives the same and changes no more when folded again."""
    folded, runs = run_passes(original, [FoldBatchNorm()])
    assert runs[0].result.modified
    assert not runs[-1].result.modified
    assert folded.graph.input == original.graph.input
    assert folded.graph.output == original.graph.output
    feeds = feeds or {"x": image(2, 4, 8, 8)}
    for want, got in zip(run(original, **feeds), run(folded, **feeds), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max(), rtol=0)
    return folded


def stays(original: onnx.ModelProto) -> None:
    folded, runs = run_passes(original, [FoldBatchNorm()])
    assert not runs[0].result.modified
    assert folded == original


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_batchnorm_becomes_weight_and_bias(op: str, bias: bool, group: int) -> None:
    shape = (6, 4 // group, 3, 3) if op == "Conv" else (4, 6 // group, 2, 2)
    attributes: dict[str, Any] = {"pads": [1] * 4} if op == "Conv" else {"strides": [2, 2]}
    inputs = ["x", "up.weight", "up.bias"] if bias else ["x", "up.weight"]
    values = {"up.weight": weights(*shape), "up.bias": weights(6)}
    nodes = [node(op, inputs, ["c"], name="conv", group=group, **attributes), batchnorm("c", "y", epsilon=1e-3)]
    folded = folded_alike(net(nodes, values))
    assert ops(folded) == [op]
    assert list(folded.graph.node[0].input) == ["x", "up.weight", "up.bias"]


@pytest.mark.parametrize("rank", [1, 3])
def test_one_and_three_dimensional_and_depthwise_convolutions(rank: int) -> None:
    values = {"w": weights(6, 1, *[3] * rank)}
    nodes = [conv(pads=[1] * 2 * rank, group=6), batchnorm("c", "y")]
    shape = (2, 6, *[5] * rank)
    assert ops(folded_alike(net(nodes, values, given=shape), x=image(*shape))) == ["Conv"]


@pytest.mark.parametrize(("kind", "tolerance"), [(np.float16, 4e-3), (np.float64, 1e-14)])
def test_other_floating_types_keep_theirs(kind: Any, tolerance: float) -> None:
    """ONNX Runtime has no convolution in float64, so ONNX's own reference computes both."""
    element = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    values = {"w": weights(6, 4, 3, 3).astype(kind), **parameters(kind=kind)}
    original = net([conv(), batchnorm("c", "y")], values, kind=element, opset=15)
    folded, _ = run_passes(original, [FoldBatchNorm()])
    assert ops(folded) == ["Conv"]
    assert {tensor.data_type for tensor in folded.graph.initializer} == {element}
    feed = {"x": image(2, 4, 8, 8).astype(kind)}
    (want,), (got,) = (ReferenceEvaluator(proto).run(None, feed) for proto in (original, folded))
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max(), rtol=0)


def test_parameters_and_weights_that_several_nodes_share_stay_as_they_are() -> None:
    nodes = [
        conv("a"),
        node("Conv", ["x", "w"], ["b"], name="other", pads=[1] * 4),
        batchnorm("a", "an", "bn1"),
        node("BatchNormalization", ["b", "g", "g", "mean", "var"], ["bn"], name="bn2"),
        node("Add", ["an", "bn"], ["s"], name="s"),
        batchnorm("s", "y", "bn3"),
    ]
    folded = folded_alike(net(nodes))
    assert ops(folded) == ["Conv", "Conv", "Add", "BatchNormalization"]
    assert folded.graph.node[0].input[1] != folded.graph.node[1].input[1]


@pytest.mark.parametrize("opset", [7, 9, 14])
def test_every_opset_of_batchnorm(opset: int) -> None:
    attributes = {"spatial": 1} if opset == 7 else {}
    assert ops(folded_alike(net([conv(), batchnorm("c", "y", **attributes)], opset=opset))) == ["Conv"]


def test_training_stays() -> None:
    extra = node("BatchNormalization", ["c", "g", "beta", "mean", "var"], ["y", "m", "v", "sm", "sv"], name="bn")
    stays(net([conv(), extra], opset=9))
    extra = node("BatchNormalization", ["c", "g", "beta", "mean", "var"], ["y", "m", "v"], name="bn", training_mode=1)
    stays(net([conv(), extra]))
    stays(net([conv(), batchnorm("c", "y")], opset=6))
    assert ops(run_passes(net([conv(), batchnorm("c", "y", is_test=1)], opset=6), [FoldBatchNorm()])[0]) == ["Conv"]


def test_parameters_per_pixel_stay() -> None:
    stays(net([conv(), batchnorm("c", "y", spatial=0)], opset=7))
    stays(net([conv(), batchnorm("c", "y")], {"g": weights(5)}))


def test_another_reader_or_an_output_in_between_stays() -> None:
    original = net([conv(), batchnorm("c", "y")])
    original.graph.output.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, (2, 6, 8, 8)))
    stays(original)
    stays(net([conv(), batchnorm("c", "n"), node("Add", ["n", "c"], ["y"], name="add")]))


def test_a_reader_in_a_branch_counts() -> None:
    value = helper.make_tensor_value_info
    branch = [
        helper.make_graph([node(op, ["c"], [f"{op}_out"])], op, [], [value(f"{op}_out", TensorProto.FLOAT, None)])
        for op in ("Neg", "Relu")
    ]
    nodes = [
        conv(),
        batchnorm("c", "n"),
        node("ReduceSum", ["n"], ["sum"], keepdims=0, name="sum"),
        node("Cast", ["sum"], ["yes"], to=TensorProto.BOOL, name="yes"),
        node("If", ["yes"], ["y"], then_branch=branch[0], else_branch=branch[1], name="if"),
    ]
    stays(net(nodes))


def test_what_is_not_finite_stays() -> None:
    stays(net([conv(), batchnorm("c", "y")], {"var": np.full(6, -1, np.float32)}))
    stays(net([conv(), batchnorm("c", "y")], {"g": np.full(6, 3e38, np.float32), "var": np.zeros(6, np.float32)}))


def test_computed_parameters_stay() -> None:
    original = net([conv(), batchnorm("c", "y")])
    index = next(i for i, tensor in enumerate(original.graph.initializer) if tensor.name == "g")
    del original.graph.initializer[index]
    original.graph.input.append(helper.make_tensor_value_info("g", TensorProto.FLOAT, (6,)))
    stays(original)


@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 1), (1, 1, 1), (1,), ()])
def test_constants_per_channel_become_part_of_the_convolution(shape: tuple[int, ...]) -> None:
    """As TF writes a BatchNormalization: Sub, Mul or Div, Add."""
    nodes = [
        conv(),
        node("Sub", ["c", "m"], ["t1"], name="sub"),
        node("Div", ["t1", "s"], ["t2"], name="div"),
        node("Mul", ["k", "t2"], ["t3"], name="mul"),
        node("Sub", ["o", "t3"], ["t4"], name="from"),
        node("Add", ["t4", "m"], ["y"], name="add"),
    ]
    values = {"m": weights(*shape), "s": weights(*shape) + 2, "k": weights(*shape) + 1, "o": weights(*shape)}
    values = {name: np.asarray(value, np.float32) for name, value in values.items()}
    original = net(nodes, values)
    folded = folded_alike(original)
    assert ops(folded) == ["Conv"]
    rules = run_passes(original, [FoldBatchNorm()])[1][0].result.fired
    assert rules == tuple(("affine", name) for name in ("sub", "div", "mul", "from", "add"))


def test_a_bias_added_behind_leaves_the_weight_alone() -> None:
    original = net([conv(), node("Add", ["c", "b"], ["y"], name="add")], {"b": weights(6, 1, 1)})
    folded = folded_alike(original)
    assert list(folded.graph.node[0].input)[:2] == ["x", "w"]
    assert (array(folded, "w") == array(original, "w")).all()
    assert (array(folded, folded.graph.node[0].input[2]) == array(original, "b").ravel()).all()


@pytest.mark.parametrize(
    ("op", "inputs", "constant"),
    [
        ("Mul", ["c", "k"], weights(8)),  # along W
        ("Mul", ["c", "k"], weights(6, 8, 1)),  # per row
        ("Mul", ["c", "k"], weights(2, 6, 1, 1)),  # per image
        ("Add", ["c", "k"], weights(1, 1, 1, 1, 1)),  # raises the rank
        ("Div", ["k", "c"], weights(6, 1, 1)),
        ("Div", ["c", "k"], np.zeros((6, 1, 1), np.float32)),
        ("Pow", ["c", "k"], weights(6, 1, 1)),
    ],
)
def test_other_arithmetic_stays(op: str, inputs: list[str], constant: np.ndarray) -> None:
    original = net([conv(), node(op, inputs, ["y"], name="op")], {"k": constant})
    del original.graph.output[0].type.tensor_type.shape.dim[:]
    original.graph.output[0].type.tensor_type.ClearField("shape")
    stays(original)


def test_a_constant_that_widens_one_channel_stays() -> None:
    values = {"w": weights(1, 4, 3, 3), "k": weights(6, 1, 1)}
    stays(net([conv(), node("Mul", ["c", "k"], ["y"], name="mul")], values))


def pad(source: str, result: str, mode: str, value: str | None = None) -> NodeProto:
    return node("Pad", [source, "pads", *([value] if value else [])], [result], name="pad", mode=mode)


@pytest.mark.parametrize("mode", ["reflect", "edge", "wrap"])
def test_modes_that_repeat_values_commute(mode: str) -> None:
    values = {"pads": np.array([0, 0, 1, 2, 0, 0, 2, 0])}
    assert ops(folded_alike(net([conv(), pad("c", "p", mode), batchnorm("p", "y")], values, opset=19))) == [
        "Conv",
        "Pad",
    ]


@pytest.mark.parametrize("opset", [10, 17])
def test_a_padded_constant_is_rewritten_where_all_channels_agree(opset: int) -> None:
    widths = [0, 0, 1, 1, 0, 0, 1, 1]
    attributes = {"pads": widths, "value": 1.5} if opset == 10 else {}
    inputs = ["c", "pads", "v"] if opset == 17 else ["c"]
    nodes = [
        conv(),
        node("Pad", inputs, ["p"], name="pad", **attributes),
        node("Mul", ["p", "two"], ["m"], name="mul"),
        node("Add", ["m", "one"], ["y"], name="add"),
    ]
    values = {"pads": np.array(widths), "v": np.float32(1.5), "two": np.float32([2]), "one": np.float32([1])}
    folded = folded_alike(net(nodes, values, opset=opset))
    assert ops(folded) == ["Conv", "Pad"]
    value = folded.graph.node[1]
    got = array(folded, value.input[2]) if opset == 17 else {a.name: a.f for a in value.attribute}["value"]
    assert got == 4


def test_zeros_stay_zeros_behind_a_scale() -> None:
    nodes = [conv(), pad("c", "p", "constant"), node("Mul", ["p", "k"], ["y"], name="mul")]
    values = {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "k": weights(6, 1, 1)}
    folded = folded_alike(net(nodes, values))
    assert ops(folded) == ["Conv", "Pad"]
    assert len(folded.graph.node[1].input) == 2


def test_a_crop_commutes_with_everything() -> None:
    values = {"pads": np.array([0, 0, -1, -1, 0, 0, -1, -1])}
    assert ops(folded_alike(net([conv(), pad("c", "p", "constant"), batchnorm("p", "y")], values))) == ["Conv", "Pad"]


def test_a_padded_constant_that_channels_do_not_share_stays() -> None:
    values = {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}
    stays(net([conv(), pad("c", "p", "constant"), batchnorm("p", "y")], values))


def test_padded_channels_stay() -> None:
    values = {"pads": np.array([0, 1, 0, 0, 0, 0, 0, 0]), **parameters(7)}
    stays(net([conv(), pad("c", "p", "reflect"), batchnorm("p", "y")], values))
    values = {"pads": np.array([0, 1, 0, 0, 0, -1, 0, 0])}
    stays(net([conv(), pad("c", "p", "reflect"), batchnorm("p", "y")], values))


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_batchnorm_before_an_unpadded_convolution(group: int, bias: bool) -> None:
    inputs = ["n", "w", "b"] if bias else ["n", "w"]
    nodes = [node("Relu", ["x"], ["r"]), batchnorm("r", "n"), node("Conv", inputs, ["y"], name="conv", group=group)]
    values = {"w": weights(6, 4 // group, 3, 3), "b": weights(6), **parameters(4)}
    folded = folded_alike(net(nodes, values))
    assert ops(folded) == ["Relu", "Conv"]


def test_several_convolutions_absorb_one_batchnorm() -> None:
    nodes = [
        batchnorm("x", "n"),
        node("Conv", ["n", "w"], ["a"], name="a"),
        node("Conv", ["n", "w"], ["b"], name="b", dilations=[1, 1]),
        node("Sub", ["a", "b"], ["d"], name="d"),
        node("Add", ["d", "a"], ["y"], name="y"),
    ]
    assert ops(folded_alike(net(nodes, parameters(4)))) == ["Conv", "Conv", "Sub", "Add"]
    nodes[4].input[1] = "n"
    stays(net(nodes, {**parameters(4), "w": weights(4, 4, 1, 1)}))


def test_a_shift_before_zero_padding_or_a_transposed_convolution_stays() -> None:
    nodes = [batchnorm("x", "n"), node("Conv", ["n", "w"], ["y"], name="conv", pads=[0, 0, 1, 0])]
    stays(net(nodes, parameters(4)))
    nodes = [batchnorm("x", "n"), node("Conv", ["n", "w"], ["y"], name="conv", auto_pad="SAME_UPPER")]
    stays(net(nodes, parameters(4)))
    nodes = [batchnorm("x", "n"), node("ConvTranspose", ["n", "w"], ["y"], name="up")]
    stays(net(nodes, {**parameters(4), "w": weights(4, 6, 2, 2)}))


def test_a_shift_that_would_cost_accuracy_stays() -> None:
    nodes = [batchnorm("x", "n"), node("Conv", ["n", "w"], ["y"], name="conv")]
    stays(net(nodes, {**parameters(4), "mean": np.full(4, 1000, np.float32)}))


@pytest.mark.parametrize(("op", "inputs"), [("Mul", ["x", "k"]), ("Mul", ["k", "x"]), ("Div", ["x", "k"])])
@pytest.mark.parametrize("to", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("shape", [(4, 1, 1), (1,)])
def test_a_scale_before_a_convolution(op: str, inputs: list[str], to: str, shape: tuple[int, ...]) -> None:
    weight = weights(6, 2, 3, 3) if to == "Conv" else weights(4, 3, 3, 3)
    nodes = [node(op, inputs, ["m"], name="op"), node(to, ["m", "w"], ["y"], name="conv", group=2, pads=[1] * 4)]
    folded = folded_alike(net(nodes, {"w": weight, "k": weights(*shape) + 2}))
    assert ops(folded) == [to]
    assert len(folded.graph.node[0].input) == 2


def test_scales_before_that_stay() -> None:
    follow = node("Conv", ["m", "w"], ["y"], name="conv")
    values = {"w": weights(6, 4, 3, 3), "k": weights(4, 1, 1)}
    stays(net([node("Add", ["x", "k"], ["m"], name="op"), follow], values))
    stays(net([node("Div", ["k", "x"], ["m"], name="op"), follow], values))
    stays(net([node("Mul", ["x", "k"], ["m"], name="op"), follow], values, given=(2, 1, 8, 8)))  # 1 channel becomes 4
    stays(net([node("Mul", ["x", "k"], ["m"], name="op"), follow], values, given=(2, "C", 8, 8)))
    stays(
        net(
            [node("Mul", ["w0", "k"], ["m"], name="op"), node("Conv", ["x", "m"], ["y"])], {**values, "w0": values["w"]}
        )
    )


def test_pixels_are_scaled_before_the_convolution() -> None:
    """Weights a 255th as large would lose digits in FP16."""
    nodes = [
        node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        node("Transpose", ["f"], ["t"], perm=[0, 3, 1, 2]),
        node("Mul", ["t", "k"], ["m"]),
        node("Conv", ["m", "w"], ["y"], name="conv"),
    ]
    values = {"w": weights(6, 4, 3, 3), "k": np.float32(1 / 255)}
    for kind, folds in ((TensorProto.UINT8, False), (TensorProto.FLOAT16, True)):
        original = model(nodes, {"x": (2, 8, 8, 4)}, {"y": [None] * 4}, values, input_type=kind)
        assert ("Mul" in ops(run_passes(original, [FoldBatchNorm()])[0])) == (not folds)


def test_a_whole_cleaning_names_the_folded_convolution_after_its_module() -> None:
    nodes = [node("Conv", ["x", "inc.0.weight"], ["c"], name="whatever", pads=[1] * 4), batchnorm("c", "y")]
    original = net(nodes, {"inc.0.weight": weights(6, 4, 3, 3)})
    cleaned, _ = clean_model(original)
    assert list(cleaned.graph.node[0].input) == ["x", "inc.0.weight", "inc.0.bias"]
    again, runs = clean_model(cleaned)
    assert not any(step.result.modified for step in runs)
    assert again == cleaned


def test_foreign_types_and_sparse_constants_stay() -> None:
    original = net([conv(), node("Mul", ["c", "k"], ["y"], name="mul")], {"k": weights(6, 1, 1)})
    index = next(i for i, tensor in enumerate(original.graph.initializer) if tensor.name == "k")
    del original.graph.initializer[index]
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.float32([2]), "k"), numpy_helper.from_array(np.array([1]), "i"), [6, 1, 1]
    )
    original.graph.sparse_initializer.append(sparse)
    folded, runs = run_passes(original, [FoldBatchNorm()])
    assert not runs[0].result.modified
    assert ops(folded) == ["Conv", "Mul"]
