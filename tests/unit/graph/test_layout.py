"""Layout Transposes: NHWC networks as tf2onnx and Keras write them, every operator that follows, and what must stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import NodeProto, TensorProto, helper

from pipeline.graph.base import PassRun, run_passes
from pipeline.graph.cleaning import clean_model
from pipeline.graph.layout import CancelTransposes, MergeTransposes
from pipeline.graph.mincut import MinimumCut
from tests.unit.graph.builders import array, image, model, ops, run, weights

TO_NCHW, TO_NHWC = [0, 3, 1, 2], [0, 2, 3, 1]
LAYOUT = (MergeTransposes(), CancelTransposes())


def transposes(proto: onnx.ModelProto) -> list[list[int]]:
    return [list(node.attribute[0].ints) for node in proto.graph.node if node.op_type == "Transpose"]


def node(op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> NodeProto:
    return helper.make_node(op, inputs, outputs, name=outputs[0], **attributes)


def to_nchw(source: str, result: str) -> NodeProto:
    return node("Transpose", [source], [result], perm=TO_NCHW)


def to_nhwc(source: str, result: str) -> NodeProto:
    return node("Transpose", [source], [result], perm=TO_NHWC)


def cleaned(original: onnx.ModelProto, *, atol: float = 0.0, **feeds: np.ndarray) -> tuple[onnx.ModelProto, Any]:
    """The model after the layout passes: equal results, same inputs and outputs, and nothing left for a second run."""
    proto, runs = run_passes(original, LAYOUT)
    onnx.checker.check_model(proto, full_check=True)
    assert list(proto.graph.input) == list(original.graph.input)
    assert list(proto.graph.output) == list(original.graph.output)
    for want, got in zip(run(original, **feeds), run(proto, **feeds), strict=True):
        assert want.shape == got.shape
        assert want.dtype == got.dtype
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=atol)
    again, more = run_passes(proto, LAYOUT)
    assert not any(step.result.modified for step in more)
    assert again == proto
    return proto, runs


def fired(runs: tuple[PassRun, ...]) -> dict[str, int]:
    count: dict[str, int] = {}
    for step in runs:
        for rule, _ in step.result.fired:
            count[rule] = count.get(rule, 0) + 1
    return count


# Whole networks.


class Keras:
    """Builds an NHWC network the way tf2onnx does: each convolution, pool and resize between two Transposes."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.values: dict[str, Any] = {}

    def add(self, op: str, inputs: list[str], **attributes: Any) -> str:
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(node(op, inputs, [name], **attributes))
        return name

    def constant(self, value: Any) -> str:
        name = f"const_{len(self.values)}"
        self.values[name] = value
        return name

    def sandwich(self, op: str, source: str, *others: str, **attributes: Any) -> str:
        inner = self.add("Transpose", [source], perm=TO_NCHW)
        return self.add("Transpose", [self.add(op, [inner, *others], **attributes)], perm=TO_NHWC)

    def block(self, source: str, channels: int, width: int) -> str:
        """Conv (with its own padding), BatchNormalization as Mul and Add with constants over the last axis, Relu."""
        pads = self.constant(np.array([0, 1, 1, 0, 0, 1, 1, 0]))
        padded = self.add("Pad", [source, pads])
        weight = self.constant(weights(width, channels, 3, 3))
        conv = self.sandwich("Conv", padded, weight, kernel_shape=[3, 3])
        scaled = self.add("Mul", [conv, self.constant(weights(width) + 1)])
        return self.add("Relu", [self.add("Add", [scaled, self.constant(weights(1, 1, 1, width))])])


def keras_unet(batch: int | str = 1, size: int = 16, *, nhwc_resize: bool = False) -> onnx.ModelProto:
    """Two levels, skip connections read by pool and Concat, bilinear upsampling, softmax over the last axis."""
    net = Keras()
    first = net.block("image", 3, 4)
    second = net.block(net.sandwich("MaxPool", first, kernel_shape=[2, 2], strides=[2, 2]), 4, 8)
    third = net.block(net.sandwich("MaxPool", second, kernel_shape=[2, 2], strides=[2, 2]), 8, 8)
    for skip, channels, width in ((second, 16, 4), (first, 8, 4)):
        linear = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
        if nhwc_resize:
            scales = net.constant(np.array([1, 2, 2, 1], np.float32))
            up = net.add("Resize", [third, "", scales], **linear)
        else:
            up = net.sandwich("Resize", third, "", net.constant(np.array([1, 1, 2, 2], np.float32)), **linear)
        third = net.block(net.add("Concat", [skip, up], axis=3), channels, width)
    weight, bias = net.constant(weights(3, 4, 1, 1)), net.constant(weights(3))
    logits = net.sandwich("Conv", third, weight, bias, kernel_shape=[1, 1])
    net.nodes.append(node("Softmax", [logits], ["masks"], axis=-1))
    return model(net.nodes, {"image": (batch, size, size, 3)}, {"masks": (batch, size, size, 3)}, net.values)


@pytest.mark.parametrize("nhwc_resize", [False, True])
@pytest.mark.parametrize("batch", [1, "N"])
def test_a_keras_unet_keeps_one_transpose_at_each_end(batch: int | str, nhwc_resize: bool) -> None:
    original = keras_unet(batch, nhwc_resize=nhwc_resize)
    proto, _ = cleaned(original, atol=1e-6, image=image(1, 16, 16, 3))
    assert transposes(proto) == [TO_NCHW, TO_NHWC]
    assert next(n.op_type for n in proto.graph.node) == "Transpose"
    for resize in (n for n in proto.graph.node if n.op_type == "Resize"):
        assert array(proto, resize.input[2]).tolist() == [1, 1, 2, 2]
    for concat in (n for n in proto.graph.node if n.op_type == "Concat"):
        assert concat.attribute[0].i == 1


@pytest.mark.parametrize("batch", [1, "N"])
def test_a_whole_cleaning_of_a_keras_unet_is_equal_and_idempotent_byte_for_byte(batch: int | str) -> None:
    original = keras_unet(batch, nhwc_resize=True)
    proto, _ = clean_model(original)
    again, _ = clean_model(proto)
    assert again.SerializeToString(deterministic=True) == proto.SerializeToString(deterministic=True)
    assert transposes(proto) == [TO_NCHW, TO_NHWC]
    feed = image(1, 16, 16, 3)
    np.testing.assert_allclose(run(proto, image=feed)[0], run(original, image=feed)[0], rtol=1e-5, atol=1e-6)


def test_channels_first_inside_and_an_argmax_at_the_end_need_no_transpose_at_the_output() -> None:
    nodes = [
        to_nchw("x", "a"),
        node("Conv", ["a", "w"], ["b"]),
        to_nhwc("b", "c"),
        node("ArgMax", ["c"], ["y"], axis=3, keepdims=0),
    ]
    original = model(
        nodes, {"x": (2, 4, 5, 3)}, {"y": (2, 4, 5)}, {"w": weights(6, 3, 1, 1)}, output_type=TensorProto.INT64
    )
    proto, _ = cleaned(original, x=image(2, 4, 5, 3))
    assert ops(proto) == ["Transpose", "Conv", "ArgMax"]


# Every operator that follows.

R4 = (2, 4, 6, 3)


def sandwiched(
    inner: list[NodeProto],
    values: dict[str, Any] | None = None,
    *,
    shape: tuple[int | str, ...] = (2, 3, 4, 6),
    outputs: dict[str, Any] | None = None,
    opset: int = 18,
    output_type: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """x (NCHW) → Conv → NHWC → ``inner`` from t to u → NCHW → Conv → y. ``outputs`` replaces what comes behind u."""
    nodes = [node("Conv", ["x", "w0"], ["c"]), to_nhwc("c", "t"), *inner]
    constants = {"w0": weights(3, 3, 1, 1), **(values or {})}
    if outputs is None:
        nodes += [to_nchw("u", "d"), node("Conv", ["d", "w1"], ["y"])]
        constants["w1"] = weights(2, 3, 1, 1)
        outputs = {"y": [None] * 4}
    return model(nodes, {"x": shape}, outputs, constants, opset=opset, output_type=output_type)


def between(op: str, inputs: list[str] | None = None, **attributes: Any) -> list[NodeProto]:
    return [node(op, inputs or ["t"], ["u"], **attributes)]


I64 = np.int64
FOLLOWING: dict[str, tuple[list[NodeProto], dict[str, Any]]] = {
    "relu": (between("Relu"), {}),
    "clip": (between("Clip", ["t", "lo", "hi"]), {"lo": np.float32(-0.2), "hi": np.float32(0.3)}),
    "last-axis constant": (between("Mul", ["t", "k"]), {"k": weights(3)}),
    "constant first": (between("Sub", ["k", "t"]), {"k": weights(6, 3)}),
    "full constant": (between("Add", ["t", "k"]), {"k": weights(1, 4, 6, 3)}),
    "scalar": (between("Div", ["t", "k"]), {"k": np.float32(3)}),
    "one entry": (between("Add", ["t", "k"]), {"k": np.ones(1, np.float32)}),
    "prelu": (between("PRelu", ["t", "k"]), {"k": weights(3)}),
    "where": (
        [node("Greater", ["t", "k"], ["m"]), node("Neg", ["t"], ["n"]), node("Where", ["m", "t", "n"], ["u"])],
        {"k": weights(3)},
    ),
    "min of three": (between("Min", ["t", "k", "k2"]), {"k": weights(3), "k2": weights(4, 1, 3)}),
    "cast": (
        [
            node("Cast", ["t"], ["h"], to=TensorProto.DOUBLE),
            node("Cast", ["h"], ["u"], to=TensorProto.FLOAT),
        ],
        {},
    ),
    "softmax": (between("Softmax", axis=-1), {}),
    "softmax over rows": (between("Softmax", axis=1), {}),
    "pad": (between("Pad", ["t", "p"], mode="reflect"), {"p": np.array([0, 1, 2, 0, 0, 0, 1, 0])}),
    "pad with axes": (between("Pad", ["t", "p", "", "a"]), {"p": np.array([1, 2, 0, 1]), "a": np.array([1, -2])}),
    "slice": (
        between("Slice", ["t", "s", "e", "a", "st"]),
        {"s": np.array([1, -1]), "e": np.array([4, -7]), "a": np.array([1, 2]), "st": np.array([1, -2])},
    ),
    "slice without axes": (between("Slice", ["t", "s", "e"]), {"s": np.array([0, 1]), "e": np.array([9, 3])}),
    "concat with a constant": (
        [node("Concat", ["t", "k"], ["v"], axis=3), node("Slice", ["v", "s", "e", "a"], ["u"])],
        {"k": weights(2, 4, 6, 2), "s": np.array([1]), "e": np.array([4]), "a": np.array([3])},
    ),
    "split": (
        [node("Split", ["t", "n"], ["p", "q"], axis=3), node("Concat", ["q", "p"], ["u"], axis=-1)],
        {"n": np.array([1, 2])},
    ),
    "reduce keeping axes": (
        [node("ReduceMean", ["t", "a"], ["v"]), node("Mul", ["t", "v"], ["u"])],
        {"a": np.array([1, 2])},
    ),
    "reduce all, keeping axes": ([node("ReduceMax", ["t"], ["v"]), node("Sub", ["t", "v"], ["u"])], {}),
    "argmax keeping axes": (
        [node("ArgMax", ["t"], ["v"], axis=3), node("Cast", ["v"], ["f"], to=1), node("Add", ["t", "f"], ["u"])],
        {},
    ),
    "gather": (between("Gather", ["t", "i"], axis=3), {"i": np.array([2, 0, 1])}),
    "tile": (between("Tile", ["t", "r"]), {"r": np.array([1, 2, 1, 1])}),
    "expand": (between("Expand", ["t", "r"]), {"r": np.array([2, 4, 6, 1])}),
    "resize by scales": (between("Resize", ["t", "", "s"], mode="linear"), {"s": np.array([1, 2, 3, 1], np.float32)}),
    "resize by sizes": (between("Resize", ["t", "", "", "s"], mode="nearest"), {"s": np.array([2, 7, 5, 3])}),
    "resize with axes": (
        between("Resize", ["t", "", "s"], mode="linear", axes=[1, 2]),
        {"s": np.array([2, 1.5], np.float32)},
    ),
    "normalize": (between("LpNormalization", axis=-1, p=2), {}),
    "dropout": (between("Dropout"), {}),
    "q/dq": (
        [
            node("QuantizeLinear", ["t", "s", "z"], ["q"], axis=3),
            node("DequantizeLinear", ["q", "s", "z"], ["u"], axis=3),
        ],
        {"s": np.array([0.1, 0.02, 0.3], np.float32), "z": np.zeros(3, np.int8)},
    ),
    "q/dq per tensor": (
        [node("QuantizeLinear", ["t", "s", "z"], ["q"]), node("DequantizeLinear", ["q", "s", "z"], ["u"])],
        {"s": np.float32(0.1), "z": np.int8(0)},
    ),
}


@pytest.mark.parametrize("case", FOLLOWING)
def test_operators_between_two_layouts_follow(case: str) -> None:
    inner, values = FOLLOWING[case]
    original = sandwiched(inner, values)
    proto, runs = cleaned(original, atol=1e-6, x=image(2, 3, 4, 6))
    assert "Transpose" not in ops(proto)
    assert fired(runs)["transpose"] == 2
    assert fired(runs)["permute"] == len(inner)


OLDER: dict[str, tuple[list[NodeProto], dict[str, Any], int]] = {
    "pad attribute": (between("Pad", pads=[0, 1, 2, 0, 0, 0, 1, 0]), {}, 10),
    "slice attributes": (between("Slice", starts=[1], ends=[3], axes=[-3]), {}, 9),
    "slice attributes without axes": (between("Slice", starts=[0, 1], ends=[2, 3]), {}, 9),
    "upsample 7": (between("Upsample", scales=[1.0, 2.0, 2.0, 1.0]), {}, 7),
    "upsample 9": (between("Upsample", ["t", "s"]), {"s": np.array([1, 2, 2, 1], np.float32)}, 9),
    "resize 10": (between("Resize", ["t", "s"]), {"s": np.array([1, 2, 2, 1], np.float32)}, 10),
    "resize 11": (
        between("Resize", ["t", "r", "s"], mode="linear"),
        {"s": np.array([1, 2, 2, 1], np.float32), "r": np.zeros(0, np.float32)},
        11,
    ),
    "reduce attribute": ([node("ReduceMean", ["t"], ["v"], axes=[1, -2]), node("Mul", ["t", "v"], ["u"])], {}, 12),
    "clip attributes": (between("Clip", min=-0.1, max=0.2), {}, 10),
}


@pytest.mark.parametrize("case", OLDER)
def test_operators_of_older_opsets_follow(case: str) -> None:
    inner, values, opset = OLDER[case]
    proto, _ = cleaned(sandwiched(inner, values, opset=opset), atol=1e-6, x=image(2, 3, 4, 6))
    assert "Transpose" not in ops(proto)


ENDING: dict[str, tuple[list[NodeProto], dict[str, Any], dict[str, Any], int]] = {
    "mean over the image": (between("ReduceMean", ["t", "a"], keepdims=0), {"a": np.array([1, 2])}, {"u": (2, 3)}, 1),
    "sum of all": (between("ReduceSum", keepdims=0), {}, {"u": ()}, 1),
    "one channel": (between("Gather", ["t", "i"], axis=3), {"i": np.array(1)}, {"u": (2, 4, 6)}, 1),
    "squeeze": (
        [node("ReduceMax", ["t", "a"], ["v"]), node("Squeeze", ["v", "a"], ["u"])],
        {"a": np.array([3])},
        {"u": (2, 4, 6)},
        1,
    ),
    "shape": (between("Shape"), {}, {"u": (4,)}, TensorProto.INT64),
    "part of the shape": (between("Shape", start=1, end=-1), {}, {"u": (2,)}, TensorProto.INT64),
    "size": (between("Size"), {}, {"u": ()}, TensorProto.INT64),
}


@pytest.mark.parametrize("case", ENDING)
def test_results_without_a_layout_take_either(case: str) -> None:
    inner, values, outputs, kind = ENDING[case]
    proto, _ = cleaned(sandwiched(inner, values, outputs=outputs, output_type=kind), atol=1e-6, x=image(2, 3, 4, 6))
    assert "Transpose" not in ops(proto)


def test_a_squeezed_mask_takes_either_layout_again_when_it_is_unsqueezed() -> None:
    inner = [
        node("ReduceMean", ["t", "a"], ["m"], keepdims=0),
        node("Sigmoid", ["m"], ["g"]),
        node("Unsqueeze", ["g", "a"], ["gate"]),
        node("Mul", ["t", "gate"], ["u"]),
    ]
    proto, _ = cleaned(sandwiched(inner, {"a": np.array([3])}), atol=1e-6, x=image(2, 3, 4, 6))
    assert "Transpose" not in ops(proto)


def test_computed_sizes_of_a_resize_and_widths_of_a_pad_are_put_in_order() -> None:
    nodes = [
        to_nhwc("x", "t"),
        node("Shape", ["t"], ["s"]),
        node("Mul", ["s", "two"], ["sizes"]),
        node("Resize", ["t", "", "", "sizes"], ["r"], mode="nearest", axes=None),
        node("Concat", ["zeros", "s"], ["widths"], axis=0),
        node("Pad", ["r", "widths"], ["p"]),
        to_nchw("p", "y"),
    ]
    del nodes[3].attribute[1:]
    values = {"two": np.array([1, 2, 2, 1]), "zeros": np.zeros(4, I64)}
    original = model(nodes, {"x": ("N", 3, "H", "W")}, {"y": [None] * 4}, values)
    proto, _ = run_passes(original, LAYOUT)
    for shape in ((1, 3, 4, 5), (2, 3, 3, 3)):
        assert (run(original, x=image(*shape))[0] == run(proto, x=image(*shape))[0]).all()


# Where the fewest Transposes are.


def test_readers_of_both_layouts_share_one_transpose() -> None:
    """x is read in NCHW by three and in NHWC by one: of four Transposes one stays."""
    nodes = [to_nchw("x", f"t{i}") for i in range(3)]
    nodes += [node("Relu", ["t0"], ["a"]), node("Conv", ["t1", "w"], ["b"]), node("Conv", ["t2", "w"], ["c"])]
    nodes += [node("Add", ["a", "b"], ["d"]), node("Add", ["d", "c"], ["y"])]
    original = model(nodes, {"x": (1, 4, 5, 3)}, {"y": (1, 3, 4, 5)}, {"w": weights(3, 3, 1, 1)})
    proto, _ = cleaned(original, x=image(1, 4, 5, 3))
    assert transposes(proto) == [TO_NCHW]


def test_a_skip_connection_that_a_fixed_operator_reads_costs_one_transpose_and_no_more() -> None:
    """The NHWC tensor in the middle is also flattened as it stands: that reader keeps a Transpose, the others none."""
    inner = [node("Relu", ["t"], ["u"]), node("Reshape", ["u", "flat"], ["z"])]
    original = sandwiched(inner, {"flat": np.array([2, -1])})
    original.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, (2, 72)))
    proto, _ = cleaned(original, x=image(2, 3, 4, 6))
    assert transposes(proto) == [TO_NHWC]


def test_of_equally_many_transposes_the_one_that_moves_less_stays() -> None:
    nodes = [
        node("Resize", ["x", "", "s"], ["u"], mode="nearest"),
        to_nchw("u", "t"),
        node("Conv", ["t", "w"], ["y"]),
    ]
    values = {"s": np.array([1, 2, 2, 1], np.float32), "w": weights(2, 3, 1, 1)}
    proto, runs = cleaned(model(nodes, {"x": (1, 4, 5, 3)}, {"y": (1, 2, 8, 10)}, values), x=image(1, 4, 5, 3))
    assert ops(proto) == ["Transpose", "Resize", "Conv"]
    assert array(proto, proto.graph.node[1].input[2]).tolist() == [1, 1, 2, 2]
    assert fired(runs) == {"transpose": 1, "permute": 1}


def test_what_can_stand_on_either_side_of_a_transpose_stands_by_the_convolution() -> None:
    """There a bias, a scale or a normalisation can become part of it; the Shape would only need one more node."""
    nodes = [
        node("Sub", ["x", "k"], ["s"]),
        to_nchw("s", "t"),
        node("Conv", ["t", "w"], ["c"]),
        to_nhwc("c", "d"),
        node("Add", ["d", "k"], ["y"]),
        node("Shape", ["x"], ["z"]),
    ]
    original = model(nodes, {"x": (1, 4, 5, 3)}, {"y": (1, 4, 5, 3)}, {"w": weights(3, 3, 1, 1), "k": weights(3)})
    original.graph.output.append(helper.make_tensor_value_info("z", TensorProto.INT64, (4,)))
    proto, runs = cleaned(original, atol=1e-6, x=image(1, 4, 5, 3))
    assert ops(proto) == ["Transpose", "Sub", "Conv", "Add", "Transpose", "Shape"]
    assert fired(runs)["permute"] == 2


def test_no_transpose_moves_onto_uint8() -> None:
    """Behind the Cast it moves four times the bytes, but TensorRT-RTX refuses to transpose uint8."""
    nodes = [node("Cast", ["x"], ["f"], to=1), to_nchw("f", "t"), node("Conv", ["t", "w"], ["y"])]
    original = model(
        nodes, {"x": (1, 4, 5, 3)}, {"y": (1, 2, 4, 5)}, {"w": weights(2, 3, 1, 1)}, input_type=TensorProto.UINT8
    )
    assert run_passes(original, LAYOUT)[0] == original


def small_operands(channels: int) -> onnx.ModelProto:
    """The maximum of c + T(a) + T(b), c being large: one Transpose of c would do instead of the two small ones."""
    nodes = [node("Conv", ["x", "w"], ["c"]), to_nchw("a", "at"), to_nchw("b", "bt")]
    nodes += [
        node("Add", ["c", "at"], ["d"]),
        node("Add", ["d", "bt"], ["e"]),
        node("ReduceMax", ["e"], ["y"], keepdims=0),
    ]
    inputs = {"x": (1, 3, 2, 40), "a": (1, 2, 1, 3), "b": (1, 2, 1, 3)}
    return model(nodes, inputs, {"y": ()}, {"w": weights(channels, 3, 1, 1)})


def test_fewer_transposes_are_not_worth_more_bytes() -> None:
    original = small_operands(3)
    assert run_passes(original, LAYOUT)[0] == original


def test_axes_of_size_1_cost_no_bytes() -> None:
    feeds = {"x": image(1, 3, 2, 40), "a": image(1, 2, 1, 3), "b": image(1, 2, 1, 3)}
    proto, _ = cleaned(small_operands(1), atol=1e-6, **feeds)
    assert transposes(proto) == [TO_NHWC]


def test_reshapes_do_not_become_more_transposes() -> None:
    """x1 + x2 and x1 + x2 + x3 as NCHW, two of the three by a Reshape: two Transposes would do, but one is there."""
    nodes = [node("Reshape", [f"x{i}", "r"], [f"t{i}"]) for i in (1, 2)]
    nodes += [to_nchw("x3", "t3"), node("Add", ["t1", "t2"], ["s"]), node("Add", ["s", "t3"], ["u"])]
    nodes += [node("Conv", ["s", "w"], ["y"]), node("Conv", ["u", "w"], ["z"])]
    values = {"r": np.array([1, 1, 4, 5]), "w": weights(2, 1, 1, 1)}
    inputs = {f"x{i}": (1, 4, 5, 1) for i in (1, 2, 3)}
    original = model(nodes, inputs, {"y": (1, 2, 4, 5), "z": (1, 2, 4, 5)}, values)
    assert run_passes(original, LAYOUT)[0] == original


def test_axis_names_that_only_the_output_claims_make_no_reshape_a_transpose() -> None:
    """y is declared (N, H, W, 1) and is (N, W, H, 1)."""
    nodes = [
        node("Relu", ["x"], ["c"]),
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "order"], ["t"]),
        node("Reshape", ["c", "t"], ["y"]),
        to_nhwc("c", "d"),
        node("Neg", ["d"], ["e"]),
        to_nchw("e", "z"),
    ]
    outputs = {"y": ("N", "H", "W", 1), "z": ("N", 1, "H", "W")}
    original = model(nodes, {"x": ("N", 1, "H", "W")}, outputs, {"order": np.array([0, 3, 2, 1])})
    proto, _ = cleaned(original, x=image(1, 1, 3, 4))
    assert ops(proto) == ["Relu", "Shape", "Gather", "Reshape", "Neg"]


def test_the_transpose_of_an_initializer_is_left_to_constant_folding() -> None:
    nodes = [to_nchw("k", "t"), node("Add", ["x", "t"], ["u"]), to_nhwc("u", "y")]
    original = model(nodes, {"x": (1, 3, 4, 5)}, {"y": (1, 4, 5, 3)}, {"k": weights(1, 4, 5, 3)})
    assert run_passes(original, LAYOUT)[0] == original


def test_graph_outputs_in_both_layouts_keep_their_names() -> None:
    nodes = [
        node("Relu", ["x"], ["n"]),
        to_nhwc("n", "h"),
        node("Neg", ["h"], ["g"]),
        to_nchw("g", "m"),
        to_nhwc("m", "o"),
    ]
    outputs = {"n": (1, 3, 4, 5), "h": (1, 4, 5, 3), "g": (1, 4, 5, 3), "m": (1, 3, 4, 5), "o": (1, 4, 5, 3)}
    proto, _ = cleaned(model(nodes, {"x": (1, 3, 4, 5)}, outputs), x=image(1, 3, 4, 5))
    assert len(transposes(proto)) == 2


def test_back_and_forth_between_input_and_output_leaves_a_copy() -> None:
    nodes = [to_nhwc("x", "t"), to_nchw("t", "y")]
    proto, _ = cleaned(model(nodes, {"x": (1, 3, 4, 5)}, {"y": (1, 3, 4, 5)}), x=image(1, 3, 4, 5))
    assert ops(proto) == ["Identity"]


def test_a_reshape_that_moves_an_axis_of_size_1_counts_as_a_transpose() -> None:
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        node("Reshape", ["c", "nhw1"], ["t"]),
        node("Sigmoid", ["t"], ["u"]),
        to_nchw("u", "d"),
        node("Conv", ["d", "v"], ["y"]),
    ]
    values = {"w": weights(1, 3, 1, 1), "v": weights(2, 1, 1, 1), "nhw1": np.array([-1, 4, 5, 1])}
    original = model(nodes, {"x": ("N", 3, 4, 5)}, {"y": ("N", 2, 4, 5)}, values)
    proto, _ = cleaned(original, x=image(2, 3, 4, 5))
    assert ops(proto) == ["Conv", "Sigmoid", "Conv"]


def test_channels_last_in_one_and_three_dimensions() -> None:
    for rank, there, back in ((3, [0, 2, 1], [0, 2, 1]), (5, [0, 2, 3, 4, 1], [0, 4, 1, 2, 3])):
        sides = list(range(4, 2 + rank))
        nodes = [
            node("Conv", ["x", "w"], ["c"]),
            node("Transpose", ["c"], ["t"], perm=there),
            node("Add", ["t", "k"], ["u"]),
            node("Transpose", ["u"], ["d"], perm=back),
            node("Conv", ["d", "w"], ["y"]),
        ]
        values = {"w": weights(3, 3, *[1] * len(sides)), "k": weights(3)}
        original = model(nodes, {"x": (1, 3, *sides)}, {"y": (1, 3, *sides)}, values)
        proto, _ = cleaned(original, atol=1e-6, x=image(1, 3, *sides))
        assert ops(proto) == ["Conv", "Add", "Conv"]


# Transposes in a row.


def test_transposes_in_a_row_become_one() -> None:
    nodes = [node("Transpose", ["x"], ["a"], perm=[1, 0, 2]), node("Transpose", ["a"], ["y"], perm=[0, 2, 1])]
    proto, runs = cleaned(model(nodes, {"x": (2, 3, 4)}, {"y": (3, 4, 2)}), x=image(2, 3, 4))
    assert transposes(proto) == [[1, 2, 0]]
    assert fired(runs) == {"merge": 1, "unread": 1}


def test_the_first_of_a_row_stays_for_its_other_reader() -> None:
    nodes = [
        node("Transpose", ["x"], ["a"], perm=[1, 0, 2]),
        node("Transpose", ["a"], ["b"], perm=[0, 2, 1]),
        node("MatMul", ["a", "b"], ["y"]),
    ]
    proto, _ = cleaned(model(nodes, {"x": (2, 3, 4)}, {"y": (3, 2, 2)}), x=image(2, 3, 4))
    assert sorted(transposes(proto)) == [[1, 0, 2], [1, 2, 0]]


def test_default_orders_and_orders_that_change_nothing() -> None:
    nodes = [
        node("Transpose", ["x"], ["a"]),
        node("Transpose", ["a"], ["b"]),
        node("Transpose", ["b"], ["c"], perm=[0, 1, 2]),
        node("Relu", ["c"], ["y"]),
    ]
    proto, _ = cleaned(model(nodes, {"x": (2, 3, 4)}, {"y": (2, 3, 4)}), x=image(2, 3, 4))
    assert ops(proto) == ["Relu"]


# What must stay.


def attention() -> onnx.ModelProto:
    nodes = [
        node("Reshape", ["x", "heads"], ["h"]),
        node("Transpose", ["h"], ["q"], perm=[0, 2, 1, 3]),
        node("Transpose", ["h"], ["k"], perm=[0, 2, 3, 1]),
        node("MatMul", ["q", "k"], ["s"]),
        node("Softmax", ["s"], ["p"], axis=-1),
        node("MatMul", ["p", "q"], ["o"]),
        node("Transpose", ["o"], ["m"], perm=[0, 2, 1, 3]),
        node("Reshape", ["m", "tokens"], ["y"]),
    ]
    values = {"heads": np.array([2, 5, 2, 4]), "tokens": np.array([2, 5, 8])}
    return model(nodes, {"x": (2, 5, 8)}, {"y": (2, 5, 8)}, values)


def pixel_shuffle_transpose() -> onnx.ModelProto:
    nodes = [
        node("Reshape", ["x", "six"], ["a"]),
        node("Transpose", ["a"], ["b"], perm=[0, 1, 4, 2, 5, 3]),
        node("Relu", ["b"], ["c"]),
        node("Reshape", ["c", "four"], ["y"]),
    ]
    values = {"six": np.array([1, 2, 2, 2, 3, 4]), "four": np.array([1, 2, 6, 8])}
    return model(nodes, {"x": (1, 8, 3, 4)}, {"y": (1, 2, 6, 8)}, values)


def staying(inner: list[NodeProto], values: dict[str, Any] | None = None, **options: Any) -> onnx.ModelProto:
    return sandwiched(inner, values, **options)


def with_branch() -> onnx.ModelProto:
    """An If whose branches read the NHWC tensor from outside."""
    branch = [
        helper.make_graph(
            [helper.make_node(op, ["t"], [f"{op}_y"])],
            op,
            [],
            [helper.make_tensor_value_info(f"{op}_y", TensorProto.FLOAT, (2, 4, 6, 3))],
        )
        for op in ("Neg", "Abs")
    ]
    nodes = [node("If", ["yes"], ["u"], then_branch=branch[0], else_branch=branch[1])]
    return sandwiched(nodes, {"yes": np.array(True)})


STAYING = {
    "attention": attention(),
    "pixel shuffle": pixel_shuffle_transpose(),
    "a layout of its own": staying(between("MatMul", ["t", "m"]), {"m": weights(3, 3)}),
    "instance norm over rows": staying(between("InstanceNormalization", ["t", "k", "k"]), {"k": weights(4)}),
    "batch norm over rows": staying(
        between("BatchNormalization", ["t", "k", "k", "k", "v"]), {"k": weights(4), "v": np.ones(4, np.float32)}
    ),
    "a flattened image": staying(between("Reshape", ["t", "r"]), {"r": np.array([2, 6, 4, 3])}),
    "softmax before opset 13": staying(between("Softmax", axis=3), opset=12),
    "a resize of the channels": staying(
        between("Resize", ["t", "", "s"], mode="nearest"),
        {"s": np.array([1, 1, 1, 1.5], np.float32)},
        outputs={"u": [None] * 4},
    ),
    "a constant of higher rank": staying(
        [node("Add", ["t", "k"], ["v"]), node("Squeeze", ["v", "a"], ["u"])],
        {"k": weights(1, 1, 1, 1, 3), "a": np.array([0])},
    ),
    "rows first": staying(
        between("ArgMax", axis=0, keepdims=0), outputs={"u": [None] * 3}, output_type=TensorProto.INT64
    ),
    "an if that reads it": with_branch(),
}


@pytest.mark.parametrize("case", STAYING)
def test_transposes_that_work_stay(case: str) -> None:
    proto, runs = run_passes(STAYING[case], LAYOUT)
    assert not fired(runs)
    assert proto == STAYING[case]


def test_an_operator_of_another_domain_stays_in_its_layout() -> None:
    nodes = [
        to_nchw("x", "a"),
        helper.make_node("Relu", ["a"], ["b"], domain="org.example"),
        to_nhwc("b", "y"),
    ]
    original = model(nodes, {"x": (1, 4, 5, 3)}, {"y": (1, 4, 5, 3)}, domains=["org.example"])
    assert run_passes(original, LAYOUT)[0] == original


def test_metadata_of_the_nodes_that_follow_stays() -> None:
    original = sandwiched(between("Softmax", axis=-1))
    softmax = next(n for n in original.graph.node if n.op_type == "Softmax")
    softmax.metadata_props.add(key="scope", value="head")
    proto, _ = cleaned(original, atol=1e-6, x=image(2, 3, 4, 6))
    (kept,) = (n for n in proto.graph.node if n.op_type == "Softmax")
    assert kept.metadata_props[0].value == "head"


# Random networks: never unequal, never more Transposes.

STEPS = st.sampled_from(["nhwc", "nchw", "relu", "add", "concat", "pad", "mean", "pool", "split", "softmax", "mul"])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(steps=st.lists(st.tuples(STEPS, st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=14))
def test_random_networks_stay_equal(steps: list[tuple[str, int, int]]) -> None:
    """Every step takes tensors that are there already, so results have several readers in both layouts."""
    nodes: list[NodeProto] = []
    values: dict[str, Any] = {"pads": np.array([0, 0, 1, 0, 0, 0, 0, 1]), "axes": np.array([1, 3])}
    tensors: list[tuple[str, tuple[int, ...]]] = [("x", (1, 3, 4, 5))]
    for number, (step, first, second) in enumerate(steps):
        (name, shape), (other, size) = tensors[first % len(tensors)], tensors[second % len(tensors)]
        result = f"n{number}"
        match step:
            case "nhwc" | "nchw":
                order = TO_NHWC if step == "nhwc" else TO_NCHW
                nodes.append(node("Transpose", [name], [result], perm=order))
                shape = tuple(shape[axis] for axis in order)
            case "relu" | "softmax":
                nodes.append(node("Relu" if step == "relu" else "Softmax", [name], [result]))
            case "mul":
                values[f"k{number}"] = weights(shape[3])
                nodes.append(node("Mul", [name, f"k{number}"], [result]))
            case "add" | "concat":
                if size != shape:
                    continue
                made = {"axis": 1 + number % 3} if step == "concat" else {}
                nodes.append(node("Add" if step == "add" else "Concat", [name, other], [result], **made))
                shape = tuple(n * 2 if i == made.get("axis") else n for i, n in enumerate(shape))
            case "pad":
                nodes.append(node("Pad", [name, "pads"], [result]))
                shape = (shape[0], shape[1], shape[2] + 1, shape[3] + 1)
            case "mean":
                nodes.append(node("ReduceMean", [name, "axes"], [result]))
                shape = (shape[0], 1, shape[2], 1)
            case "pool":
                nodes.append(node("GlobalMaxPool", [name], [result]))
                shape = (*shape[:2], 1, 1)
            case "split":
                if shape[2] < 2:
                    continue
                values[f"s{number}"] = np.array([1, shape[2] - 1])
                nodes.append(node("Split", [name, f"s{number}"], [f"{result}_rest", result], axis=2))
                tensors.append((f"{result}_rest", (*shape[:2], 1, shape[3])))
                shape = (*shape[:2], shape[2] - 1, shape[3])
        tensors.append((result, shape))
    if not nodes:
        return
    read = {name for one in nodes for name in one.input}
    outputs = {name: shape for name, shape in tensors[1:] if name not in read or name.endswith("3")}
    original = model(nodes, {"x": (1, 3, 4, 5)}, outputs, values, opset=18)
    proto, _ = cleaned(original, atol=1e-6, x=image(1, 3, 4, 5))
    assert len(transposes(proto)) <= len(transposes(original))


# The cut.


def test_the_cut_is_the_least_and_the_nearest_to_the_source() -> None:
    cut = MinimumCut()
    for start, end, capacity in [("s", "a", 3), ("s", "b", 2), ("a", "b", 1), ("a", "t", 2), ("b", "t", 3)]:
        cut.add(start, end, capacity)
    assert cut.source_side("s", "t") == {"s"}
    wide = MinimumCut()
    for start, end, capacity in [("s", "a", 9), ("a", "b", 1), ("b", "c", 1), ("c", "t", 9)]:
        wide.add(start, end, capacity)
    assert wide.source_side("s", "t") == {"s", "a"}
