"""Graphs from other exporters: hand-built node by node as they write them, and, where they are installed, their own.

The real ones carry the marker ``matrix`` and skip where their package is missing: segmentation_models_pytorch, MONAI,
Keras, TensorFlow with tf2onnx.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from pipeline.backends.onnxruntime import OnnxRuntimeRunner
from pipeline.graph.cleaning import clean_model
from tests.unit.graph.builders import image, model, weights

TOLERANCE = 1e-5
NCHW, NHWC = [0, 3, 1, 2], [0, 2, 3, 1]
FREE = np.iinfo(np.int32).max


def cleaned_and_equal(raw: ModelProto, *shapes: tuple[int, ...]) -> ModelProto:
    """The clean graph: equal to the raw one at these input shapes, and not changed by cleaning again."""
    cleaned, _ = clean_model(raw)
    assert list(cleaned.graph.input) == list(raw.graph.input)
    assert list(cleaned.graph.output) == list(raw.graph.output)
    (name,) = (value.name for value in raw.graph.input)
    with (
        OnnxRuntimeRunner(raw.SerializeToString(), optimize=False) as before,
        OnnxRuntimeRunner(cleaned.SerializeToString(), optimize=False) as after,
    ):
        for shape in shapes:
            want, have = (next(iter(runner({name: image(*shape)}).values())) for runner in (before, after))
            assert have.shape == want.shape
            assert np.abs(have - want).max() <= TOLERANCE * np.abs(want).max(), shape
    again, _ = clean_model(cleaned)
    assert again.SerializeToString(deterministic=True) == cleaned.SerializeToString(deterministic=True)
    return cleaned


def counts(proto: ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in proto.graph.node)


class Graph:
    """Nodes and initializers of a graph under construction, tensors named by their operators."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.values: dict[str, Any] = {}

    def __call__(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=f"node_{name}", **attributes))
        return name

    def const(self, value: Any, kind: type = np.int64) -> str:
        name = f"const_{len(self.values)}"
        self.values[name] = np.asarray(value, kind)
        return name

    def axes(self, op: str, x: str, *axes: int) -> str:
        return self(op, x, axes=list(axes)) if self.opset < 13 else self(op, x, self.const(axes))

    def slice(self, x: str, start: int, end: int) -> str:
        return self("Slice", x, self.const([start]), self.const([end]), self.const([0]))

    def finish(self, result: str, inputs: Sequence[int | str], outputs: Sequence[int | str]) -> ModelProto:
        self.nodes.append(helper.make_node("Identity", [result], ["logits"], name="Identity"))
        return model(self.nodes, {"image": inputs}, {"logits": outputs}, self.values, opset=self.opset)


# tf2onnx: NHWC outside and in shape arithmetic, int32 sizes, SAME_UPPER, BatchNorm folded already.


def tf2onnx_network(opset: int, up: Callable[[Graph, str], str], side: int | str) -> ModelProto:
    graph = Graph(opset)
    same = {"auto_pad": "SAME_UPPER"} if isinstance(side, str) else {"pads": [1] * 4}

    def conv(x: str, inputs: int, outputs: int) -> str:
        weight = graph.const(weights(outputs, inputs, 3, 3), np.float32)
        result = graph("Conv", x, weight, graph.const(weights(outputs), np.float32), **same, kernel_shape=[3, 3])
        return graph("Relu", result)

    skip = conv(graph("Transpose", "image", perm=NCHW), 3, 4)
    low = conv(graph("MaxPool", skip, kernel_shape=[2, 2], strides=[2, 2]), 4, 6)
    joined = graph("Concat", skip, up(graph, low), axis=1)
    result = graph("Softmax", conv(joined, 10, 2), axis=1)
    other = "W" if isinstance(side, str) else side
    shape = ["N", side, other]
    return graph.finish(graph("Transpose", result, perm=NHWC), [*shape, 3], [*shape, 2])


def tf_upsampling(graph: Graph, x: str) -> str:
    """UpSampling2D(2, "bilinear") with dynamic sizes."""
    shape = graph("Shape", x)
    kept = graph.slice(shape, 0, 2)
    last = graph("Cast", graph("Gather", shape, graph.const(NHWC)), to=TensorProto.INT32)
    sides = []
    for axis in (1, 2):
        side = graph.axes("Squeeze", graph.slice(last, axis, axis + 1), 0)
        sides.append(graph.axes("Unsqueeze", graph("Mul", side, graph.const(2, np.int32)), 0))
    doubled = graph("Cast", graph("Concat", *sides, axis=0), to=TensorProto.INT64)
    empty = graph.const([], np.float32)
    sizes = graph("Concat", kept, doubled, axis=0)
    mode = {"coordinate_transformation_mode": "half_pixel", "mode": "linear", "nearest_mode": "floor"}
    return graph("Resize", x, empty, empty, sizes, **mode)


def tf_repeat(graph: Graph, x: str) -> str:
    """UpSampling2D(2, "nearest") of (N, 6, 4, 4): each axis repeated by Tile, behind a Transpose to NHWC."""
    height = graph("Tile", graph.axes("Unsqueeze", x, 3), graph.const([1, 1, 1, 2, 1]))
    last = graph("Transpose", height, perm=[0, 2, 3, 4, 1])
    shape = graph("Cast", graph("Gather", graph("Shape", x), graph.const(NHWC)), to=TensorProto.INT32)
    first = [graph.slice(shape, 0, 1), graph.const([8], np.int32), graph.slice(shape, 2, FREE)]
    rows = graph("Reshape", last, graph("Cast", graph("Concat", *first, axis=0), to=TensorProto.INT64))
    width = graph("Tile", graph.axes("Unsqueeze", rows, 3), graph.const([1, 1, 1, 2, 1]))
    shape = graph("Cast", graph("Shape", rows), to=TensorProto.INT32)
    second = [graph.slice(shape, 0, 2), graph.const([8], np.int32), graph.slice(shape, 3, FREE)]
    both = graph("Reshape", width, graph("Cast", graph("Concat", *second, axis=0), to=TensorProto.INT64))
    return graph("Transpose", both, perm=NCHW)


TF_MINIMUM = Counter(Transpose=2, Conv=3, Relu=3, MaxPool=1, Resize=1, Concat=1, Softmax=1)


@pytest.mark.parametrize("opset", [11, 17])
def test_tf2onnx_upsampling_with_dynamic_sizes_is_a_resize_by_2(opset: int) -> None:
    raw = tf2onnx_network(opset, tf_upsampling, "H")
    assert counts(cleaned_and_equal(raw, (1, 8, 8, 3), (2, 12, 20, 3))) == TF_MINIMUM


@pytest.mark.parametrize("opset", [11, 17])
def test_tf2onnx_repetition_is_a_resize_by_2(opset: int) -> None:
    raw = tf2onnx_network(opset, tf_repeat, 8)
    assert counts(cleaned_and_equal(raw, (1, 8, 8, 3), (2, 8, 8, 3))) == TF_MINIMUM


# Keras 3 on torch: a Cast at every layer, a BatchNorm in pieces, every convolution between two Transposes.


def keras_network(first: bool) -> ModelProto:
    """A UNet of two levels, channels first or last."""
    graph = Graph(20)
    axis = 1 if first else 3

    def per_channel(low: float, high: float, channels: int) -> str:
        shape = (1, channels, 1, 1) if first else (1, 1, 1, channels)
        return graph.const(np.random.default_rng(channels).uniform(low, high, shape), np.float32)

    def to_nchw(x: str) -> str:
        return x if first else graph("Transpose", x, perm=NCHW)

    def back(x: str) -> str:
        return x if first else graph("Transpose", x, perm=NHWC)

    def cast(x: str) -> str:
        return graph("Cast", x, to=TensorProto.FLOAT)

    def block(x: str, inputs: int, outputs: int) -> str:
        weight = graph.const(weights(outputs, inputs, 3, 3), np.float32)
        x = cast(back(graph("Conv", to_nchw(cast(x)), weight, pads=[1] * 4)))
        x = graph("Sub", x, per_channel(-0.5, 0.5, outputs))
        x = graph("Mul", x, per_channel(0.5, 1.5, outputs))
        x = graph("Add", x, per_channel(-0.5, 0.5, outputs))
        return graph("Relu", cast(cast(x)))

    skip = block(cast("image"), 3, 4)
    low = block(back(cast(graph("MaxPool", to_nchw(cast(skip)), kernel_shape=[2, 2], strides=[2, 2]))), 4, 6)
    # Channels first, it goes to NHWC and back around the Resize.
    wide = to_nchw(cast(low)) if not first else graph("Transpose", graph("Transpose", low, perm=NHWC), perm=NCHW)
    scales = graph.const([1, 1, 2, 2], np.float32)
    up = graph("Resize", wide, "", scales, mode="linear", coordinate_transformation_mode="pytorch_half_pixel")
    up = back(up) if not first else graph("Transpose", graph("Transpose", up, perm=NHWC), perm=NCHW)
    joined = graph("Concat", cast(skip), cast(up), axis=axis if first else -1)
    weight = graph.const(weights(2, 10, 1, 1), np.float32)
    result = graph("Add", back(graph("Conv", to_nchw(joined), weight)), per_channel(-1, 1, 2))
    image_shape, logits = (["N", 3, 8, 8], ["N", 2, 8, 8]) if first else (["N", 8, 8, 3], ["N", 8, 8, 2])
    return graph.finish(result, image_shape, logits)


@pytest.mark.parametrize("first", [True, False], ids=["channels-first", "channels-last"])
def test_keras_networks_keep_only_the_transposes_of_their_ends(first: bool) -> None:
    shape = (3, 8, 8) if first else (8, 8, 3)
    left = counts(cleaned_and_equal(keras_network(first), (1, *shape), (2, *shape)))
    minimum = Counter(Conv=3, Relu=2, MaxPool=1, Resize=1, Concat=1)
    assert left == (minimum if first else minimum + Counter(Transpose=2))


# torch 1.x, opset 9: sizes to Upsample's scales.


@pytest.mark.parametrize("batch", [1, "N"])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_opset_9_upsample_becomes_a_resize(batch: int | str, mode: str) -> None:
    """floor(size · 2.0) in floats, divided by the size, behind two ones."""
    graph = Graph(9)
    old = {"kernel_shape": [3, 3], "pads": [1] * 4}
    skip = graph("Relu", graph("Conv", "image", graph.const(weights(4, 3, 3, 3), np.float32), **old))
    low = graph("MaxPool", skip, kernel_shape=[2, 2], strides=[2, 2])
    sizes, given = [], []
    for axis in (2, 3):
        side = graph("Gather", graph("Shape", low), graph.const(axis), axis=0)
        wanted = graph("Mul", graph("Cast", side, to=TensorProto.FLOAT), graph.const(2.0, np.float32))
        sizes.append(graph("Unsqueeze", graph("Floor", wanted), axes=[0]))
        given.append(graph("Unsqueeze", graph("Cast", side, to=TensorProto.FLOAT), axes=[0]))
    scale = graph("Div", graph("Concat", *sizes, axis=0), graph("Concat", *given, axis=0))
    scales = graph("Concat", graph.const([1, 1], np.float32), scale, axis=0)
    joined = graph("Concat", skip, graph("Upsample", low, scales, mode=mode), axis=1)
    result = graph("Conv", joined, graph.const(weights(2, 8, 3, 3), np.float32), **old)
    raw = graph.finish(result, [batch, 3, 8, 12], [batch, 2, 8, 12])
    cleaned = cleaned_and_equal(raw, (1, 3, 8, 12))
    assert counts(cleaned) == Counter(Conv=2, Relu=1, MaxPool=1, Resize=1, Concat=1)
    assert cleaned.opset_import[0].version >= 13


# mmsegmentation, DeepLab: back to the image's size.

SIZED = 3  # nodes beside the Resize where height and width are free: two Shapes and a Concat


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize(("side", "extra"), [((24, 40), 0), (("H", "W"), SIZED)], ids=["static", "dynamic"])
def test_a_resize_to_the_size_of_the_image(opset: int, side: tuple[Any, Any], extra: int) -> None:
    graph = Graph(opset)
    shape, sides = graph("Shape", "image"), []
    for axis in (2, 3):
        sides.append(graph.axes("Unsqueeze", graph("Gather", shape, graph.const(axis), axis=0), 0))
    weight = graph.const(weights(4, 3, 3, 3), np.float32)
    low = graph("Relu", graph("Conv", "image", weight, pads=[1] * 4, strides=[4, 4]))
    logits = graph("Conv", low, graph.const(weights(2, 4, 1, 1), np.float32))
    wanted = graph("Cast", graph("Concat", *sides, axis=0), to=TensorProto.INT64)
    sizes = graph("Concat", graph.slice(graph("Shape", logits), 0, 2), wanted, axis=0)
    empty = graph.const([], np.float32)
    mode = {"mode": "linear", "coordinate_transformation_mode": "align_corners"}
    result = graph("Resize", logits, empty, empty, sizes, **mode)
    raw = graph.finish(result, ["N", 3, *side], ["N", 2, *side])
    sizes_tried = [(24, 40)] if extra == 0 else [(24, 40), (17, 23)]
    left = counts(cleaned_and_equal(raw, *((batch, 3, *size) for batch in (1, 2) for size in sizes_tried)))
    core = Counter(Conv=2, Relu=1, Resize=1)
    assert left & core == core
    # Before opset 15 a Shape gives all axes, and a Slice cuts them.
    assert (left - core).total() <= (extra if opset >= 15 or not extra else extra + 2), left


# EfficientNet: "same" padding as a node of its own, more of it behind than in front.


def test_padding_before_a_depthwise_convolution_becomes_its_own() -> None:
    graph = Graph(17)
    zero = graph.const(0, np.float32)
    stem = graph("Pad", "image", graph.const([0, 0, 0, 0, 0, 0, 1, 1]), zero, mode="constant")
    stem = graph("Conv", stem, graph.const(weights(4, 3, 3, 3), np.float32), strides=[2, 2])
    swish = graph("Mul", stem, graph("Sigmoid", stem))
    deep = graph("Pad", swish, graph.const([0, 0, 1, 1, 0, 0, 1, 1]), zero, mode="constant")
    deep = graph("Conv", deep, graph.const(weights(4, 1, 3, 3), np.float32), group=4)
    raw = graph.finish(deep, ["N", 3, 16, 16], ["N", 4, 8, 8])
    assert counts(cleaned_and_equal(raw, (1, 3, 16, 16))) == Counter(Conv=2, Sigmoid=1, Mul=1)


# MONAI: a pixel shuffle in pieces, the batch's size in the target shapes.


def test_a_pixel_shuffle_in_pieces_is_one_operator() -> None:
    graph = Graph(17)
    wide = graph("Conv", "image", graph.const(weights(12, 3, 3, 3), np.float32), pads=[1] * 4)
    batch = graph.axes("Unsqueeze", graph("Gather", graph("Shape", wide), graph.const(0), axis=0), 0)
    split = graph("Concat", batch, graph.const([3, 2, 2, 8, 10]), axis=0)
    moved = graph("Transpose", graph("Reshape", wide, split), perm=[0, 1, 4, 2, 5, 3])
    whole = graph("Reshape", moved, graph("Concat", batch, graph.const([3, 16, 20]), axis=0))
    last = graph("Conv", whole, graph.const(weights(2, 3, 1, 1), np.float32))
    raw = graph.finish(last, ["N", 3, 8, 10], ["N", 2, 16, 20])
    assert counts(cleaned_and_equal(raw, (1, 3, 8, 10), (2, 3, 8, 10))) == Counter(Conv=2, DepthToSpace=1)


# The real exporters.

# What no static network needs, whoever exported it.
COPIES = {
    "Identity",
    "Cast",
    "Dropout",
    "Constant",
    "Pad",
    "Shape",
    "Gather",
    "Slice",
    "Squeeze",
    "Unsqueeze",
    "Expand",
}


def import_torchvision() -> None:
    """Its library is built for CUDA and does not load beside torch for the CPU; networks need none of its operators."""
    torch = pytest.importorskip("torch")
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        pytest.skip("torchvision is not installed")
    except RuntimeError:
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor a, Tensor b, float c) -> Tensor")


def torch_networks() -> dict[str, tuple[str, Callable[[Any], Any], int]]:
    """Name: package, network, channels; images of 64×96."""
    flat: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
    own: dict[str, Any] = {"encoder_weights": None, "classes": 3}
    return {
        "smp-unet": ("segmentation_models_pytorch", lambda smp: smp.Unet("resnet18", **own), 3),
        "smp-unet-mobilenet": ("segmentation_models_pytorch", lambda smp: smp.Unet("mobilenet_v2", **own), 3),
        "smp-unet-efficientnet": ("segmentation_models_pytorch", lambda smp: smp.Unet("efficientnet-b0", **own), 3),
        "smp-unetplusplus": ("segmentation_models_pytorch", lambda smp: smp.UnetPlusPlus("resnet18", **own), 3),
        "smp-deeplabv3plus": ("segmentation_models_pytorch", lambda smp: smp.DeepLabV3Plus("resnet18", **own), 3),
        "smp-linknet": ("segmentation_models_pytorch", lambda smp: smp.Linknet("resnet18", **own), 3),
        "monai-unet": (
            "monai.networks.nets",
            lambda nets: nets.UNet(**flat, channels=(8, 16, 32), strides=(2, 2), num_res_units=2, norm="batch"),
            1,
        ),
        "monai-basicunet": (
            "monai.networks.nets",
            lambda nets: nets.BasicUNet(**flat, features=(8, 8, 16, 32, 64, 8), norm="batch"),
            1,
        ),
        "monai-dynunet": (
            "monai.networks.nets",
            lambda nets: nets.DynUNet(
                **flat,
                kernel_size=[3, 3, 3],
                strides=[1, 2, 2],
                upsample_kernel_size=[2, 2],
                filters=[8, 16, 32],
            ),
            1,
        ),
        "monai-segresnet": ("monai.networks.nets", lambda nets: nets.SegResNet(init_filters=8, **flat), 1),
    }


@pytest.mark.matrix
@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize("name", torch_networks())
def test_networks_of_other_packages(name: str, exporter: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    package, make, channels = torch_networks()[name]
    if package.startswith("segmentation"):
        import_torchvision()
    module = pytest.importorskip(package)
    torch.manual_seed(0)
    example = (torch.randn(1, channels, 64, 96),)
    names: dict[str, Any] = {"input_names": ["image"], "output_names": ["logits"], "opset_version": 18}
    extra: dict[str, Any] = {"dynamo": True, "external_data": False} if exporter == "dynamo" else {"dynamo": False}
    torch.onnx.export(make(module).eval(), example, tmp_path / "raw.onnx", **names, **extra)
    cleaned = cleaned_and_equal(onnx.load(tmp_path / "raw.onnx"), (1, channels, 64, 96))
    assert not COPIES & set(counts(cleaned))
    assert "Transpose" not in counts(cleaned)


@pytest.mark.matrix
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("upsampling", ["bilinear", "nearest", "transposed"])
def test_keras(layout: str, upsampling: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras: Any = pytest.importorskip("keras")
    if keras.config.backend() != "torch":
        pytest.skip("Keras runs on another backend already")
    layers, axis = keras.layers, 1 if layout == "channels_first" else -1
    keras.utils.set_random_seed(0)
    keras.config.set_image_data_format(layout)

    def block(x: Any, channels: int) -> Any:
        x = layers.Conv2D(channels, 3, padding="same", use_bias=False)(x)
        return layers.ReLU()(layers.BatchNormalization(axis=axis)(x))

    shape = (3, 32, 32) if axis == 1 else (32, 32, 3)
    pixels = keras.Input(shape, name="image")
    skip = block(pixels, 4)
    low = block(layers.MaxPooling2D()(skip), 8)
    if upsampling == "transposed":
        up = layers.Conv2DTranspose(4, 2, strides=2, padding="same")(low)
    else:
        up = layers.UpSampling2D(2, interpolation=upsampling)(low)
    logits = layers.Conv2D(2, 1)(block(layers.Concatenate(axis=axis)([skip, up]), 4))
    network = keras.Model(pixels, logits)
    network(np.zeros((2, *shape), np.float32))  # an export asks for a call before
    network.export(tmp_path / "raw.onnx", format="onnx", verbose=False)
    cleaned = cleaned_and_equal(onnx.load(tmp_path / "raw.onnx"), (1, *shape), (2, *shape))
    up_op = "ConvTranspose" if upsampling == "transposed" else "Resize"
    minimum = Counter({"Conv": 4, "Relu": 3, "MaxPool": 1, "Concat": 1, up_op: 1})
    assert counts(cleaned) == (minimum if axis == 1 else minimum + Counter(Transpose=2))


@pytest.mark.matrix
@pytest.mark.parametrize("method", ["bilinear", "nearest"])
@pytest.mark.parametrize("side", [16, None], ids=["static", "dynamic"])
def test_tf2onnx(method: str, side: int | None) -> None:
    tf = pytest.importorskip("tensorflow")
    tf2onnx = pytest.importorskip("tf2onnx")
    kernels = [weights(3, 3, 3, 4), weights(3, 3, 4, 8), weights(3, 3, 12, 2)]

    def network(pixels: Any) -> Any:
        skip = tf.nn.relu(tf.nn.conv2d(pixels, kernels[0], 1, "SAME"))
        low = tf.nn.relu(tf.nn.conv2d(tf.nn.max_pool2d(skip, 2, 2, "VALID"), kernels[1], 1, "SAME"))
        up = tf.image.resize(low, tf.shape(skip)[1:3], method=method)
        return tf.nn.conv2d(tf.concat([skip, up], -1), kernels[2], 1, "SAME")

    signature = [tf.TensorSpec((1, side, side, 3), tf.float32, name="image")]
    raw, _ = tf2onnx.convert.from_function(tf.function(network, signature), input_signature=signature, opset=17)
    shapes = [(1, 16, 16, 3)] if side else [(1, 16, 16, 3), (1, 17, 23, 3)]
    left = counts(cleaned_and_equal(raw, *shapes))
    minimum = Counter(Transpose=2, Conv=3, Relu=2, MaxPool=1, Concat=1, Resize=1)
    assert left & minimum == minimum
    assert (left - minimum).total() <= (0 if side else SIZED)
