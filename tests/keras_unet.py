"""The classical Keras U-Net: its layers in numpy, and the ONNX graphs that exporters write of it.

Each form was compared, node by node, with what the exporter itself writes: Keras 3.15 on torch (TorchScript exporter),
tf2onnx 1.17 on TensorFlow 2.15, and the converters of keras2onnx 1.7 by their source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

Array = NDArray[np.float32]
TO_FIRST, TO_LAST = [0, 3, 1, 2], [0, 2, 3, 1]
LEVELS = 5
FORMS = ("keras3", "tf2onnx17", "tf2onnx9", "keras2onnx9", "keras2onnx7")
OPSETS = {"keras3": 20, "tf2onnx17": 17, "tf2onnx9": 9, "keras2onnx9": 9, "keras2onnx7": 7}


@dataclass(frozen=True)
class Layer:
    """A convolution: kernel (height, width, inputs, outputs), bias, and "relu", "sigmoid" or "softmax"."""

    name: str
    kernel: Array
    bias: Array
    activation: str


@dataclass(frozen=True)
class KerasUNet:
    """Ten 3×3 convolutions down, at each level up nearest upsampling, a 2×2 convolution and two 3×3 ones.

    Args:
        size: height and width, a multiple of 16.
        layers: convolutions in their order.
    """

    size: int
    channels: int
    layers: tuple[Layer, ...]

    def outputs(self, image: Array) -> dict[str, Array]:
        """Each convolution's result behind its activation, (N, H, W, C), by its name."""
        made: dict[str, Array] = {}
        layers = iter(self.layers)

        def conv(x: Array) -> Array:
            layer = next(layers)
            made[layer.name] = ACTIVATIONS[layer.activation](same_convolution(x, layer.kernel) + layer.bias)
            return made[layer.name]

        unroll(conv, max_pool, lambda x: x.repeat(2, 1).repeat(2, 2), lambda a, b: np.concatenate([a, b], 3), image)
        return made


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: np.asarray(1 / (1 + np.exp(-x.astype(np.float64))), np.float32),
    "softmax": lambda x: (
        np.exp(x - x.max(3, keepdims=True)) / np.exp(x - x.max(3, keepdims=True)).sum(3, keepdims=True)
    ),
}


def unroll(
    conv: Callable[[Any], Any],
    pool: Callable[[Any], Any],
    up: Callable[[Any], Any],
    join: Callable[[Any, Any], Any],
    x: Any,
    drop: Callable[[Any], Any] = lambda x: x,
) -> Any:
    """The network's order of operations on whatever these take."""
    skips = []
    for level in range(LEVELS):
        x = conv(conv(x))
        x = drop(x) if level >= LEVELS - 2 else x
        if level < LEVELS - 1:
            skips.append(x)
            x = pool(x)
    for skip in reversed(skips):
        x = conv(conv(join(skip, conv(up(x)))))
    return conv(conv(x))


def drawn(size: int = 32, base: int = 4, channels: int = 1, *, classes: int = 1, seed: int = 0) -> KerasUNet:
    """With drawn weights (he_normal, as the original) and biases; one class: sigmoid, otherwise softmax."""
    rng = np.random.default_rng(seed)
    layers: list[Layer] = []

    def add(name: str, inputs: int, outputs: int, side: int = 3, activation: str = "relu") -> None:
        kernel = rng.standard_normal((side, side, inputs, outputs)) * np.sqrt(2 / (side * side * inputs))
        bias = rng.standard_normal(outputs) * 0.1
        layers.append(Layer(name, kernel.astype(np.float32), bias.astype(np.float32), activation))

    widths = [base << level for level in range(LEVELS)]
    for level, width in enumerate(widths):
        add(f"down{level}a", widths[level - 1] if level else channels, width)
        add(f"down{level}b", width, width)
    for level in reversed(range(LEVELS - 1)):
        add(f"up{level}", widths[level + 1], widths[level], side=2)
        add(f"up{level}a", 2 * widths[level], widths[level])
        add(f"up{level}b", widths[level], widths[level])
    add("last", base, max(2, classes))
    add("mask", max(2, classes), classes, 1, "sigmoid" if classes == 1 else "softmax")
    return KerasUNet(size, channels, tuple(layers))


def same_widths(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and behind one axis with ``padding="same"``: an odd one comes behind."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def windows(x: Array, side: int, stride: int, value: float) -> NDArray[Any]:
    """(N, H, W, C, side, side) of what is padded as ``padding="same"`` asks."""
    rows, columns = (same_widths(size, side, stride) for size in x.shape[1:3])
    padded = np.pad(x, ((0, 0), rows, columns, (0, 0)), constant_values=value)
    return np.lib.stride_tricks.sliding_window_view(padded, (side, side), (1, 2))[:, ::stride, ::stride]


def same_convolution(x: Array, kernel: Array, stride: int = 1) -> Array:
    """Keras's Conv2D with ``padding="same"``, summed in float64."""
    seen = windows(x, len(kernel), stride, 0).astype(np.float64)
    return np.asarray(np.einsum("nhwcij,ijco->nhwo", seen, kernel, optimize=True), np.float32)


def max_pool(x: Array, side: int = 2, stride: int = 2) -> Array:
    """Keras's MaxPooling2D with ``padding="same"``; as "valid" where the stride divides the size."""
    return np.asarray(windows(x, side, stride, -np.inf).max((4, 5)))


class Writer:
    """Nodes and weights of a graph, tensors named by their operators."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []

    def __call__(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=f"node_{name}", **attributes))
        return name

    def const(self, value: Any, kind: type = np.int64) -> str:
        name = f"const_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value, kind), name))
        return name

    def finish(self, result: str, given: list[int | str], made: list[int | str]) -> ModelProto:
        self.nodes.append(helper.make_node("Identity", [result], ["mask"], "end"))
        graph = helper.make_graph(
            self.nodes,
            "keras",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, given)],
            [helper.make_tensor_value_info("mask", TensorProto.FLOAT, made)],
            self.weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        return model

    # Keras 3 on torch.

    def cast(self, x: str) -> str:
        return self("Cast", x, to=TensorProto.FLOAT)

    def repeated(self, x: str, axis: int) -> str:
        """``repeat_interleave`` by 2: an axis of its own, expanded, and merged by a Reshape to computed sizes."""
        shape = self("Shape", x)
        sizes = [self("Gather", shape, self.const(position), axis=0) for position in range(4)]
        target = [2 if position == axis + 1 else -1 for position in range(5)]
        ones = self("ConstantOfShape", self.const([5]), value=helper.make_tensor("one", TensorProto.INT64, [1], [1]))
        unknown = self("Equal", self.const(target), self("Mul", ones, self.const(-1)))
        target_shape = self("Where", unknown, ones, self.const(target))
        wide = self("Expand", self("Unsqueeze", x, self.const([axis + 1])), target_shape)
        sizes[axis] = self("Mul", sizes[axis], self.const(2))
        wanted = self("Concat", *(self("Unsqueeze", size, self.const([0])) for size in sizes), axis=0)
        return self.cast(self("Reshape", wide, wanted, allowzero=0))

    def computed_pad(self, x: str, rows: tuple[int, int], columns: tuple[int, int], **mode: Any) -> str:
        """``F.pad`` (N, C, H, W), whose widths torch writes last axis first and turns round in the graph."""
        none = self("ConstantOfShape", self.const([4]), value=helper.make_tensor("none", TensorProto.INT64, [1], [0]))
        flat = self("Concat", self.const([*columns, *rows]), none, axis=0)
        pairs = self("Reshape", flat, self.const([-1, 2]), allowzero=0)
        last = self.const([-1]), self.const([-(2**63) + 1]), self.const([0]), self.const([-1])
        turned = self("Transpose", self("Slice", pairs, *last), perm=[1, 0])
        return self("Pad", x, self("Cast", self("Reshape", turned, self.const([-1])), to=TensorProto.INT64), "", **mode)


def export(network: KerasUNet, form: str, batch: int | str = 1) -> ModelProto:
    """The network, (N, H, W, C) to (N, H, W, classes), as one of FORMS; what the exporter folds stands folded."""
    writer = Writer(OPSETS[form])
    layers = iter(network.layers)
    before, behind = ({"perm": TO_FIRST}, {"perm": TO_LAST})
    tf2onnx = form.startswith("tf2onnx")

    def parameters(layer: Layer) -> tuple[str, str]:
        return writer.const(layer.kernel.transpose(3, 2, 0, 1), np.float32), writer.const(layer.bias, np.float32)

    def activate(x: str, layer: Layer) -> str:
        if layer.activation != "softmax":
            return writer(layer.activation.capitalize(), x)
        x = writer("Transpose", x, **behind) if tf2onnx else x
        return writer("Softmax", x, axis=-1 if form == "keras3" else 3)

    def conv3(x: str) -> str:
        layer = next(layers)
        side = len(layer.kernel)
        weight, bias = parameters(layer)
        x = writer("Transpose", writer.cast(x), **before)
        attributes: dict[str, Any] = {"kernel_shape": [side] * 2, "strides": [1, 1], "dilations": [1, 1], "group": 1}
        widths = same_widths(network.size, side, 1)
        if widths[0] != widths[1]:
            x, widths = writer.computed_pad(x, widths, widths, mode="constant"), (0, 0)
        x = writer("Conv", x, weight, **attributes, pads=[widths[0]] * 4)
        x = writer.cast(writer("Add", writer.cast(writer("Transpose", x, **behind)), bias))
        return writer.cast(activate(writer.cast(x), layer))

    def conv2(x: str) -> str:
        layer = next(layers)
        side = len(layer.kernel)
        less, more = same_widths(network.size, side, 1)
        # With free sizes keras2onnx leaves the padding to auto_pad.
        auto = form == "keras2onnx7"
        padding: dict[str, Any] = {"auto_pad": "SAME_UPPER"} if auto else {"pads": [less, less, more, more]}
        x = writer("Transpose", x, **before) if not tf2onnx else x
        x = writer("Conv", x, *parameters(layer), kernel_shape=[side] * 2, strides=[1, 1], **padding)
        return activate(writer("Transpose", x, **behind) if not tf2onnx else x, layer)

    def pool(x: str) -> str:
        if tf2onnx:
            return writer("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
        x = writer("Transpose", writer.cast(x) if form == "keras3" else x, **before)
        padding = {"pads": [0] * 4} if form == "keras3" else {"auto_pad": "VALID"}
        x = writer("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], **padding)
        return writer("Transpose", x, **behind)

    def up(x: str) -> str:
        if form == "keras3":
            return writer.repeated(writer.repeated(x, 1), 2)
        x = writer("Transpose", x, **before) if not tf2onnx else x
        doubled = [1.0, 1.0, 2.0, 2.0]
        if form == "tf2onnx17":  # since TensorFlow 2 counts half pixels
            scales = writer.const([], np.float32), writer.const(doubled, np.float32)
            mode = {"coordinate_transformation_mode": "tf_half_pixel_for_nn", "nearest_mode": "floor"}
            x = writer("Resize", x, *scales, mode="nearest", exclude_outside=0, **mode)
        elif writer.opset == 9:
            x = writer("Upsample", x, writer.const(doubled, np.float32), mode="nearest")
        else:
            x = writer("Upsample", x, mode="nearest", scales=doubled)
        return writer("Transpose", x, **behind) if not tf2onnx else x

    def join(a: str, b: str) -> str:
        return writer("Concat", a, b, axis=1 if tf2onnx else 3)

    x = "image"
    classes = network.layers[-1].kernel.shape[-1]
    free = -1 if isinstance(batch, str) else batch
    if tf2onnx and network.channels == 1:  # a Reshape is enough
        x = writer("Reshape", x, writer.const([free, 1, network.size, network.size]))
    elif tf2onnx:
        x = writer("Transpose", x, **before)
    # In inference a Dropout of Keras 3 and tf2onnx is gone; keras2onnx writes Identity.
    drop = (lambda x: writer("Identity", x)) if form.startswith("keras2onnx") else (lambda x: x)
    x = unroll(conv3 if form == "keras3" else conv2, pool, up, join, x, drop)
    if tf2onnx and classes == 1:
        x = writer("Reshape", x, writer.const([free, network.size, network.size, 1]))
    sides: list[int | str] = [network.size, network.size]
    return writer.finish(x, [batch, *sides, network.channels], [batch, *sides, classes])
