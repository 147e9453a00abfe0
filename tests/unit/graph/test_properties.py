"""Cleaning never changes what a network computes: random small UNet-like graphs, written as many exporters do."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.graph.cleaning import clean_model
from tests.unit.graph.builders import image

TOLERANCE = 1e-5
EXAMPLES = 100
NCHW, NHWC = (0, 3, 1, 2), (0, 2, 3, 1)
FREE = np.iinfo(np.int64).max

Draw = Callable[..., Any]


@dataclass(frozen=True)
class Tensor:
    """A float32 tensor (N, channels, H, W) of the graph under construction; ``size``: H, W where they are static."""

    name: str
    channels: int
    size: tuple[int, int] | None


class Network:
    """Nodes and initializers so far; every operator is written as its opset wants it."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.opset: int = draw(st.integers(11, 21))
        self.rng = np.random.default_rng(draw(st.integers(0, 999)))
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, np.ndarray] = {}
        self.count = 0

    def pick(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def name(self) -> str:
        self.count += 1
        return f"t{self.count}"

    def node(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        names = [self.name() for _ in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=self.pick("", f"n{names[0]}"), **attributes))
        return names[0]

    def constant(self, value: Any, kind: type = np.int64, *, hidden: bool = False) -> str:
        """An initializer (an equal one again, now and then), a Constant node, or an Identity of an initializer."""
        array = np.asarray(value, kind)
        forms = ("initializer", "shared", "node", "identity")
        # ONNX's checker misjudges a Resize whose scales or sizes stand behind an Identity.
        form = self.pick(*forms[: 4 if hidden else 3])
        if form == "node":
            return self.node("Constant", value=numpy_helper.from_array(array))
        if form == "shared":
            for name, known in self.initializers.items():
                if known.dtype == array.dtype and np.array_equal(known, array):
                    return name
        name = self.name()
        self.initializers[name] = array
        return self.node("Identity", name) if form == "identity" else name

    def weights(self, *shape: int) -> str:
        return self.constant(
            self.rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) or 1), np.float32, hidden=True
        )

    def parameter(self, channels: int, low: float, high: float) -> str:
        """A value per channel; often the same one everywhere, as in fresh networks."""
        equal = self.pick(True, False)
        values = np.full(channels, high) if equal else self.rng.uniform(low, high, channels)
        return self.constant(values, np.float32, hidden=True)

    # What the opset decides.

    def with_axes(self, op: str, x: str, *axes: int) -> str:
        if self.opset < 13:
            return self.node(op, x, axes=list(axes))
        return self.node(op, x, self.constant(axes))

    def slice(self, x: str, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int]) -> str:
        return self.node("Slice", x, self.constant(starts), self.constant(ends), self.constant(axes))

    def resize(self, x: str, *, scales: str = "", sizes: str = "") -> str:
        mode: dict[str, Any] = self.pick(
            {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
            {"mode": "nearest", "coordinate_transformation_mode": "half_pixel", "nearest_mode": "round_prefer_floor"},
            {"mode": "nearest", "coordinate_transformation_mode": "half_pixel", "nearest_mode": "round_prefer_ceil"},
            {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
            {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"},
            {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
            {"mode": "linear", "coordinate_transformation_mode": "asymmetric"},
            {"mode": "cubic", "coordinate_transformation_mode": "half_pixel", "cubic_coeff_a": -0.75},
        )
        empty = self.constant([], np.float32) if self.opset < 13 or self.pick(True, False) else ""
        if not sizes:
            return self.node("Resize", x, empty, scales, **mode)
        return self.node("Resize", x, empty, empty, sizes, **mode)

    # Shape arithmetic, as exporters write it.

    def sizes(self, x: Tensor, first: int, last: int) -> str:
        """The axes first … last - 1 of x's shape, int64."""
        shape = self.node("Shape", x.name)
        form = self.pick("slice", "gather", "gathers", "attribute")
        if form == "attribute" and self.opset >= 15:
            self.nodes.pop()
            return self.node("Shape", x.name, start=first, end=last)
        if form == "gather":
            return self.node("Gather", shape, self.constant(range(first, last)))
        if form == "gathers":
            single = [self.node("Gather", shape, self.constant(axis), axis=0) for axis in range(first, last)]
            return self.node("Concat", *[self.with_axes("Unsqueeze", entry, 0) for entry in single], axis=0)
        return self.slice(shape, [first], [last], [0])

    def doubled(self, sizes: str) -> str:
        """Twice the sizes, by integers or by way of floats."""
        if self.pick(True, False):
            return self.node("Mul", sizes, self.constant([2]))
        floats = self.node("Cast", sizes, to=TensorProto.FLOAT)
        product = self.node("Mul", floats, self.constant([2.0], np.float32))
        rounded = self.node("Floor", product) if self.pick(True, False) else product
        return self.node("Cast", rounded, to=TensorProto.INT64)

    # Blocks: tensor to tensor of the same size.

    def conv(self, x: Tensor, outputs: int | None = None) -> Tensor:
        outputs = outputs or self.pick(2, 3, 4)
        kernel, dilation = self.pick((3, 1), (1, 1), (2, 1), (3, 2))
        groups = x.channels if self.pick(False, False, True) else 1
        outputs = outputs * groups if groups == 1 or outputs % groups else outputs
        inputs = [x.name, self.weights(outputs, x.channels // groups, kernel, kernel)]
        if self.pick(True, False):
            inputs.append(self.parameter(outputs, -0.3, 0.3))
        padding: dict[str, Any] = {"pads": [dilation * (kernel // 2)] * 4}
        # An even kernel keeps the size by auto_pad alone; ONNX Runtime knows none with dilations.
        if kernel == 2 or (dilation == 1 and self.pick(True, False)):
            padding = {"auto_pad": self.pick("SAME_UPPER", "SAME_LOWER")}
        result = self.node("Conv", *inputs, group=groups, dilations=[dilation] * 2, **padding)
        return Tensor(result, outputs, x.size)

    def padded(self, x: Tensor) -> Tensor:
        """A convolution whose padding is a node of its own, the same on both sides or all behind."""
        pads = self.constant(self.pick([0, 0, 1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 2, 2]))
        value = [self.constant(self.pick(0, 1), np.float32)] if self.pick(True, False) else []
        weight = self.weights(3, x.channels, 3, 3)
        padded = self.node("Pad", x.name, pads, *value, mode=self.pick("constant", "edge"))
        return Tensor(self.node("Conv", padded, weight), 3, x.size)

    def batchnorm(self, x: Tensor) -> Tensor:
        c = x.channels
        ranges = ((0.5, 1.5), (-0.3, 0.3), (-0.3, 0.3), (0.5, 1.5))
        return self.same(x, "BatchNormalization", *[self.parameter(c, low, high) for low, high in ranges])

    def affine(self, x: Tensor) -> Tensor:
        """A BatchNorm in pieces, as Keras writes it."""
        for op in self.pick(("Sub", "Mul", "Add"), ("Mul", "Add"), ("Add",), ("Div",)):
            value = self.rng.uniform(0.5, 1.5, (x.channels, 1, 1))
            constant = self.constant(value if self.pick(True, False) else value[None], np.float32)
            x = self.same(x, op, constant)
        return x

    def activation(self, x: Tensor) -> Tensor:
        return self.same(x, self.pick("Relu", "LeakyRelu", "Sigmoid", "Identity"))

    def dropout(self, x: Tensor) -> Tensor:
        if self.opset < 12 or self.pick(True, False):
            return self.same(x, "Dropout")
        return self.same(x, "Dropout", self.constant(0.5, np.float32), self.constant(False, np.bool_))

    def cast(self, x: Tensor) -> Tensor:
        if self.pick(True, False):
            x = self.same(x, "Cast", to=TensorProto.DOUBLE)
        return self.same(x, "Cast", to=TensorProto.FLOAT)

    def transposed(self, x: Tensor) -> Tensor:
        """Something in NHWC between two Transposes."""
        last = self.node("Transpose", x.name, perm=NHWC)
        form = self.pick("activation", "affine", "concat", "nothing")
        if form == "activation":
            last = self.node("Relu", last)
        elif form == "affine":
            last = self.node("Mul", last, self.constant(self.rng.uniform(0.5, 1.5, x.channels), np.float32))
        elif form == "concat":
            last = self.node("Concat", last, last, axis=self.pick(-1, 3))
        return Tensor(self.node("Transpose", last, perm=NCHW), x.channels * (1 + (form == "concat")), x.size)

    def cut(self, x: Tensor) -> Tensor:
        """Pads that are zero, or that a Slice or a negative Pad takes away again."""
        amount = self.pick(0, 1)
        pads = self.constant([0, 0, amount, amount, 0, 0, amount, amount])
        value = [self.constant(0, np.float32)] if self.pick(True, False) else []
        padded = self.node("Pad", x.name, pads, *value, mode=self.pick("constant", "reflect", "edge"))
        if amount and self.pick(True, False):
            padded = self.slice(padded, [1, 1], [-1, -1], [2, 3])
        elif amount:
            padded = self.node("Pad", padded, self.constant([0, 0, -1, -1, 0, 0, -1, -1]))
        return Tensor(padded, x.channels, x.size)

    def whole(self, x: Tensor) -> Tensor:
        """Operators that give their input back."""
        form = self.pick("slice", "concat", "unsqueeze", "reshape", "halves")
        if form == "slice":
            return Tensor(self.slice(x.name, [0, 0], [FREE, x.channels], [2, 1]), x.channels, x.size)
        if form == "concat":
            return self.same(x, "Concat", axis=1)
        if form == "unsqueeze":
            axis = self.pick(0, 1, 2)
            return Tensor(
                self.with_axes("Squeeze", self.with_axes("Unsqueeze", x.name, axis), axis), x.channels, x.size
            )
        if form == "reshape":
            return self.same(x, "Reshape", self.node("Shape", x.name))
        first = self.slice(x.name, [0], [1], [1])
        rest = self.slice(x.name, [1], [FREE], [1])
        halves = (first, rest) if self.pick(True, False) else (rest, first)
        return Tensor(self.node("Concat", *halves, axis=1), x.channels, x.size) if x.channels > 1 else x

    def doubles(self, x: Tensor) -> Tensor:
        """The same thing computed twice."""
        one, two = self.node("Relu", x.name), self.node("Relu", x.name)
        form = self.pick("add", "stack", "concat")
        if form == "add":
            return Tensor(self.node("Add", one, two), x.channels, x.size)
        if form == "stack":
            return Tensor(self.mean(one, two, x.name), x.channels, x.size)
        return Tensor(self.node("Concat", one, two, axis=1), 2 * x.channels, x.size)

    def mean(self, *tensors: str) -> str:
        """Their mean by way of a stack."""
        axis = self.pick(0, 1, 4)
        stack = self.node("Concat", *[self.with_axes("Unsqueeze", tensor, axis) for tensor in tensors], axis=axis)
        if self.opset < 18:
            return self.node("ReduceMean", stack, axes=[axis], keepdims=0)
        return self.node("ReduceMean", stack, self.constant([axis]), keepdims=0)

    def branch(self, x: Tensor) -> Tensor:
        """An If that captures outer tensors."""
        value = helper.make_tensor_value_info
        branches = [
            helper.make_graph(
                [helper.make_node(op, [x.name], [f"{op}{self.count}"])], op, [], [value(f"{op}{self.count}", 1, None)]
            )
            for op in ("Relu", "Neg")
        ]
        condition = self.constant(self.pick(True, False), np.bool_)
        return Tensor(self.node("If", condition, then_branch=branches[0], else_branch=branches[1]), x.channels, x.size)

    def same(self, x: Tensor, op: str, *others: str, **attributes: Any) -> Tensor:
        return Tensor(self.node(op, x.name, *others, **attributes), x.channels, x.size)

    def block(self, x: Tensor) -> Tensor:
        kinds = (
            *(self.conv, self.batchnorm, self.activation),  # listed twice: networks are mostly made of these
            *(self.conv, self.batchnorm, self.activation),
            *(self.affine, self.dropout, self.cast, self.transposed),
            *(self.padded, self.cut, self.whole, self.doubles, self.branch),
        )
        for kind in self.draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4)):
            x = kind(x)
        return self.conv(x, self.pick(2, 3)) if x.channels > 8 else x

    # Down and up.

    def down(self, x: Tensor) -> Tensor:
        size = None if x.size is None else (x.size[0] // 2, x.size[1] // 2)
        if self.pick(True, False):
            indices = self.pick(1, 2)  # the second output, the indices, is read by nobody
            pooled = self.node("MaxPool", x.name, outputs=indices, kernel_shape=[2, 2], strides=[2, 2])
            return Tensor(pooled, x.channels, size)
        return Tensor(self.node("AveragePool", x.name, kernel_shape=[2, 2], strides=[2, 2]), x.channels, size)

    def up(self, x: Tensor, skip: Tensor) -> Tensor:
        """x at the size of skip, or twice x's size where that is the same or ``align`` follows."""
        form = self.pick("scales", "skip", "doubled", "transposed", "shuffle", "repeat")
        size = None if x.size is None else (2 * x.size[0], 2 * x.size[1])
        if form == "scales":
            return Tensor(self.resize(x.name, scales=self.constant([1, 1, 2, 2], np.float32)), x.channels, size)
        if form == "skip":
            sizes = self.node("Concat", self.sizes(x, 0, 2), self.sizes(skip, 2, 4), axis=0)
            return Tensor(self.resize(x.name, sizes=sizes), x.channels, skip.size)
        if form == "doubled":
            sizes = self.node("Concat", self.sizes(x, 0, 2), self.doubled(self.sizes(x, 2, 4)), axis=0)
            return Tensor(self.resize(x.name, sizes=sizes), x.channels, size)
        if form == "transposed":
            kernel = self.pick(2, 3)
            weight = self.weights(x.channels, 3, kernel, kernel)
            bias = [self.parameter(3, -0.3, 0.3)] if self.pick(True, False) else []
            wide = self.node("ConvTranspose", x.name, weight, *bias, strides=[2, 2])
            return Tensor(wide if kernel == 2 else self.slice(wide, [0, 0], [-1, -1], [2, 3]), 3, size)
        if form == "shuffle":
            return self.shuffle(x)
        return self.repeat(x)

    def shuffle(self, x: Tensor) -> Tensor:
        """DepthToSpace, as an operator or in pieces."""
        size = None if x.size is None else (2 * x.size[0], 2 * x.size[1])
        wide = self.node("Conv", x.name, self.weights(12, x.channels, 1, 1))
        if x.size is None or self.pick(True, False):
            return Tensor(self.node("DepthToSpace", wide, blocksize=2, mode=self.pick("DCR", "CRD")), 3, size)
        height, width = x.size
        batch = [self.constant([-1])] if self.pick(True, False) else [self.sizes(Tensor(wide, 12, x.size), 0, 1)]
        split, order = self.pick(
            ([3, 2, 2], [0, 1, 4, 2, 5, 3]), ([2, 2, 3], [0, 3, 4, 1, 5, 2]), ([3, 2, 2], [0, 1, 4, 3, 5, 2])
        )
        parts = self.node("Concat", *batch, self.constant([*split, height, width]), axis=0)
        moved = self.node("Transpose", self.node("Reshape", wide, parts), perm=order)
        whole = self.node("Concat", *batch, self.constant([3, 2 * height, 2 * width]), axis=0)
        return Tensor(self.node("Reshape", moved, whole), 3, size)

    def repeat(self, x: Tensor) -> Tensor:
        """Nearest by repetition: both axes at once, (N, C, H, W) -> (N, C, H, 2, W, 2), or one after the other."""
        size = None if x.size is None else (2 * x.size[0], 2 * x.size[1])
        if self.pick(True, False):
            wide = self.node("Expand", self.with_axes("Unsqueeze", x.name, 3, 5), self.constant([1, 1, 1, 2, 1, 2]))
            shape = self.node("Concat", self.sizes(x, 0, 2), self.doubled(self.sizes(x, 2, 4)), axis=0)
            return Tensor(self.node("Reshape", wide, shape), x.channels, size)
        op = self.pick("Expand", "Tile")
        for axis in (2, 3):
            counts = self.constant([2 if i == axis + 1 else 1 for i in range(5)])
            wide = self.node(op, self.with_axes("Unsqueeze", x.name, axis + 1), counts)
            sides = [self.sizes(x, i, i + 1) for i in range(4)]
            sides[axis] = self.doubled(sides[axis])
            x = Tensor(self.node("Reshape", wide, self.node("Concat", *sides, axis=0)), x.channels, x.size)
        return Tensor(x.name, x.channels, size)

    def align(self, x: Tensor, skip: Tensor) -> Tensor:
        """F.pad to the skip's size, half of what is missing on each side."""
        missing = self.node("Sub", self.sizes(skip, 2, 4), self.sizes(x, 2, 4))
        before = self.node("Div", missing, self.constant([2]))
        after = self.node("Sub", missing, before)
        zero = self.constant([0, 0])
        return Tensor(
            self.node("Pad", x.name, self.node("Concat", zero, before, zero, after, axis=0)), x.channels, skip.size
        )


@st.composite
def networks(draw: Draw) -> tuple[ModelProto, list[tuple[int, ...]]]:
    """A valid model and the shapes of ``image`` to run it with."""
    make = Network(draw)
    depth = make.pick(1, 2)
    dynamic = make.pick("static", "batch", "all")
    aligned = make.pick(True, False)
    step = 1 if aligned else 2**depth
    least = -(-5 // step) * step  # the smallest level still has a row, and reflection something to mirror
    free = [draw(st.integers(0, 9)) * step + max(least, 2**depth * 2) for _ in range(4)]
    height, width = free[:2]
    channels = make.pick(1, 3)
    shape: list[int | str | None] = [1, channels, height, width]
    shapes: list[tuple[int, ...]] = [(1, channels, height, width)]
    if dynamic != "static":
        shape[0] = make.pick("N", None)
        shapes.append((2, channels, height, width))
    if dynamic == "all":
        shape[2:] = make.pick(["H", "W"], [None, None])
        shapes.append((1, channels, *free[2:]))
    x = Tensor("image", channels, None if dynamic == "all" else (height, width))
    skips: list[Tensor] = []
    for _ in range(depth):
        x = make.block(make.conv(x))
        skips.append(x)
        x = make.down(x)
    x = make.block(x)
    for skip in reversed(skips):
        up = make.up(x, skip)
        if aligned:
            up = make.align(up, skip)
        joined = make.node("Concat", *make.pick((skip.name, up.name), (up.name, skip.name)), axis=1)
        x = make.block(make.conv(Tensor(joined, skip.channels + up.channels, skip.size)))
    logits = make.conv(x, 2)
    make.nodes[-1].output[0] = "logits"
    value = helper.make_tensor_value_info
    out: list[int | str | None] = [shape[0], logits.channels, *shape[2:]]
    graph = helper.make_graph(
        make.nodes,
        "graph",
        [value("image", TensorProto.FLOAT, shape)],
        [value("logits", TensorProto.FLOAT, out)],
        [numpy_helper.from_array(array, name) for name, array in make.initializers.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", make.opset)], ir_version=8), shapes


def check(raw: ModelProto, shapes: Sequence[tuple[int, ...]]) -> None:
    onnx.checker.check_model(raw, full_check=True)
    before = raw.SerializeToString(deterministic=True)
    cleaned, _ = clean_model(raw)
    assert raw.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(cleaned, full_check=True)
    assert list(cleaned.graph.input) == list(raw.graph.input)
    assert list(cleaned.graph.output) == list(raw.graph.output)
    with (
        OnnxRuntimeRunner(before, optimize=False) as first,
        OnnxRuntimeRunner(cleaned.SerializeToString(), optimize=False) as second,
    ):
        for shape in shapes:
            want, have = (runner({"image": image(*shape)})["logits"] for runner in (first, second))
            assert have.shape == want.shape
            assert np.abs(have - want).max() <= TOLERANCE * np.abs(want).max(), shape
    again, _ = clean_model(cleaned)
    assert again.SerializeToString(deterministic=True) == cleaned.SerializeToString(deterministic=True)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(networks())
def test_cleaning_never_changes_the_result(network: tuple[ModelProto, list[tuple[int, ...]]]) -> None:
    check(*network)
