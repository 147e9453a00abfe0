"""Small UNets made of ONNX nodes: no torch, so that they also exist on the GPU host."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from pipeline.calibration.table import CalibrationTable

SIZE, CHANNELS, CLASSES = 32, 16, 3


def tiny_unet(batch: int | str = 1, *, size: int | str = SIZE, antialias: bool = False, seed: int = 0) -> ModelProto:
    """float32 image (batch, 3, size, size) to logits (batch, 3, size, size), opset 17; a name leaves the sizes free.

    Two levels: the lower one comes up by Resize, the upper one by ConvTranspose; both are concatenated with their skip.
    """
    rng = np.random.default_rng(seed)
    height, width = (size, size) if isinstance(size, int) else (f"{size}_height", f"{size}_width")
    weights: dict[str, NDArray[np.float32]] = {}
    nodes = []

    def conv(name: str, source: str, inputs: int, outputs: int, kernel: int = 3) -> str:
        scale = np.sqrt(2 / (inputs * kernel * kernel))
        weights[f"{name}.weight"] = (rng.standard_normal((outputs, inputs, kernel, kernel)) * scale).astype(np.float32)
        weights[f"{name}.bias"] = (rng.standard_normal(outputs) * 0.1).astype(np.float32)
        sources = [source, f"{name}.weight", f"{name}.bias"]
        nodes.append(helper.make_node("Conv", sources, [f"{name}.out"], name, pads=[kernel // 2] * 4))
        return f"{name}.out"

    def relu(source: str) -> str:
        nodes.append(helper.make_node("Relu", [source], [f"{source}.relu"], f"{source}.Relu"))
        return f"{source}.relu"

    def pool(source: str) -> str:
        attributes = {"kernel_shape": [2, 2], "strides": [2, 2]}
        nodes.append(helper.make_node("MaxPool", [source], [f"{source}.pool"], f"{source}.MaxPool", **attributes))
        return f"{source}.pool"

    c = CHANNELS
    first = relu(conv("down0", "image", 3, c))
    second = relu(conv("down1", pool(first), c, 2 * c))
    bottom = relu(conv("bottom", pool(second), 2 * c, 2 * c))
    weights["scales"] = np.array([1, 1, 2, 2], np.float32)
    extra = {"antialias": 1} if antialias else {}
    mode = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    nodes.append(helper.make_node("Resize", [bottom, "", "scales"], ["resized"], "up1", **mode, **extra))
    nodes.append(helper.make_node("Concat", [second, "resized"], ["joined1"], "join1", axis=1))
    middle = relu(conv("up_conv1", "joined1", 4 * c, 2 * c))
    weights["up0.weight"] = (rng.standard_normal((2 * c, c, 2, 2)) * np.sqrt(1 / c)).astype(np.float32)
    weights["up0.bias"] = np.zeros(c, np.float32)
    nodes.append(
        helper.make_node("ConvTranspose", [middle, "up0.weight", "up0.bias"], ["upped"], "up0", strides=[2, 2])
    )
    nodes.append(helper.make_node("Concat", [first, "upped"], ["joined0"], "join0", axis=1))
    last = relu(conv("up_conv0", "joined0", 2 * c, c))
    conv("head", last, c, CLASSES, 1)
    nodes[-1].output[0] = "logits"
    graph = helper.make_graph(
        nodes,
        "tiny_unet",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, height, width])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, CLASSES, height, width])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opset = 18 if antialias else 17
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def save(model: ModelProto, path: Path) -> Path:
    onnx.save(model, path)
    return path


def images(count: int, batch: int = 1, seed: int = 1) -> list[dict[str, NDArray[np.float32]]]:
    """Smooth float32 images in about -2 … 2."""
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        coarse = rng.standard_normal((batch, 3, SIZE // 4, SIZE // 4)).astype(np.float32)
        result.append({"image": np.ascontiguousarray(coarse.repeat(4, 2).repeat(4, 3))})
    return result


def reference(model: ModelProto, feeds: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """The logits on ONNX Runtime."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["logits"], feeds)[0]


def observed_table(model: ModelProto, feeds: list[dict[str, NDArray[np.float32]]]) -> CalibrationTable:
    """amax of every activation over the images: a MinMax table."""
    opened = ModelProto()
    opened.CopyFrom(model)
    names = ["image", *(name for node in model.graph.node for name in node.output)]
    known = {value.name for value in opened.graph.output}
    opened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names[1:] if name not in known)
    session = ort.InferenceSession(opened.SerializeToString(), providers=["CPUExecutionProvider"])
    amax = dict.fromkeys(names, 0.0)
    for feed in feeds:
        values = dict(zip(names[1:], session.run(names[1:], feed), strict=True))
        for name, value in {**feed, **values}.items():
            amax[name] = max(amax[name], float(np.abs(value).max()))
    return CalibrationTable("minmax", amax)
