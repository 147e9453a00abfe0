"""The UNet of ``models.unet`` as the clean ONNX graph that export and cleaning make of it: no torch, so that it also
exists on the GPU host."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from pipeline.unet import UNetOptions, UNetWeights, state_forms

EPSILON = 1e-5


def drawn_unet(seed: int = 0, **options: Any) -> UNetWeights:
    """A tiny UNet with drawn weights and statistics, whose activations stay of order 1."""
    rng = np.random.default_rng(seed)
    chosen = UNetOptions(**{"in_channels": 3, "classes": 4, "base_channels": 4, **options})
    state: dict[str, NDArray[Any]] = {}
    for name, form in state_forms(chosen).items():
        if form.dtype == "int64":
            state[name] = np.array(17, np.int64)
        elif name.endswith("running_var"):
            state[name] = rng.uniform(0.5, 2, form.shape).astype(np.float32)
        elif len(form.shape) == 4:
            spread = np.sqrt(2 / np.prod(form.shape[1:]))
            state[name] = (rng.standard_normal(form.shape) * spread).astype(np.float32)
        elif name.endswith("weight"):
            state[name] = (rng.uniform(0.6, 1.4, form.shape) * rng.choice([-1, 1], form.shape)).astype(np.float32)
        else:
            state[name] = (rng.standard_normal(form.shape) * 0.2).astype(np.float32)
    return UNetWeights(chosen, state)


def clean_unet(unet: UNetWeights, shape: tuple[int | str, ...]) -> ModelProto:
    """float32 image of ``shape`` (N, C, H, W; names are free axes) to logits, opset 17, BatchNorm folded."""
    return _Maker(unet, shape).model


class _Maker:
    def __init__(self, unet: UNetWeights, shape: tuple[int | str, ...]) -> None:
        self.options, self.state = unet.options, unet.state
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, NDArray[Any]] = {"scales": np.array([1, 1, 2, 2], np.float32)}
        sizes = [size for size in shape[2:] if isinstance(size, int)]  # none where they are free
        skips = [(self.block("inc", "image"), sizes)]
        for level in range(1, 5):
            source, sizes = skips[-1]
            sizes = [size // 2 for size in sizes]
            pooled = self.add("MaxPool", [source], f"{source}.maxpool", kernel_shape=[2, 2], strides=[2, 2])
            skips.append((self.block(f"down{level}.maxpool_conv.1", pooled), sizes))
        x, sizes = skips.pop()
        for level in range(1, 5):
            skip, wanted = skips.pop()
            x = self.up(f"up{level}", x, sizes, skip, wanted)
            sizes = wanted
        self.conv("outc.conv", x, output="logits")
        graph = helper.make_graph(
            self.nodes,
            "unet",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [shape[0], self.options.classes, *shape[2:]])],
            [numpy_helper.from_array(value, name) for name, value in self.weights.items()],
        )
        self.model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(self.model, full_check=True)

    def add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], output, **attributes))
        return output

    def conv(self, name: str, x: str, norm: str | None = None, output: str | None = None) -> str:
        weight = self.state[f"{name}.weight"].astype(np.float64)
        bias = self.state.get(f"{name}.bias", np.zeros(weight.shape[0])).astype(np.float64)
        if norm:
            gamma, beta, mean, variance = (
                self.state[f"{norm}.{kind}"].astype(np.float64)
                for kind in ("weight", "bias", "running_mean", "running_var")
            )
            factor = gamma / np.sqrt(variance + EPSILON)
            weight, bias = weight * factor[:, None, None, None], (bias - mean) * factor + beta
        self.weights[f"{name}.weight"], self.weights[f"{name}.bias"] = weight.astype("f4"), bias.astype("f4")
        inputs = [x, f"{name}.weight", f"{name}.bias"]
        return self.add("Conv", inputs, output or name, pads=[weight.shape[2] // 2] * 4)

    def block(self, name: str, x: str) -> str:
        for index in (0, 3):
            x = self.conv(f"{name}.double_conv.{index}", x, f"{name}.double_conv.{index + 1}")
            if self.options.activation == "silu":
                gate = self.add("Sigmoid", [x], f"{x}.sigmoid")
                x = self.add("Mul", [x, gate], f"{x}.mul")
            elif self.options.activation == "relu":
                x = self.add("Relu", [x], f"{x}.relu")
            else:
                x = self.add("LeakyRelu", [x], f"{x}.leakyrelu", alpha=0.01)
        return x

    def up(self, name: str, x: str, sizes: list[int], skip: str, wanted: list[int]) -> str:
        if self.options.upsampling == "transposed":
            for kind in ("weight", "bias"):
                self.weights[f"{name}.up.{kind}"] = self.state[f"{name}.up.{kind}"]
            inputs = [x, f"{name}.up.weight", f"{name}.up.bias"]
            x = self.add("ConvTranspose", inputs, f"{name}.up", strides=[2, 2])
        elif self.options.upsampling == "nearest":
            how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
            x = self.add("Resize", [x, "", "scales"], f"{x}.resize", **how)
        else:
            where = "align_corners" if self.options.align_corners else "half_pixel"
            how = {"mode": "linear", "coordinate_transformation_mode": where}
            x = self.add("Resize", [x, "", "scales"], f"{x}.resize", **how)
        missing = [want - 2 * have for want, have in zip(wanted, sizes, strict=True)]
        if not missing:
            shapes = [self.add("Shape", [tensor], f"{tensor}.{name}.shape", start=2, end=4) for tensor in (skip, x)]
            behind = self.add("Sub", shapes, f"{name}.sub")
            self.weights["none"] = np.zeros(6, np.int64)
            pads = self.add("Concat", ["none", behind], f"{name}.pads", axis=0)
            x = self.add("Pad", [x, pads], f"{x}.pad")
        elif any(missing):
            rows, columns = missing
            self.weights[f"{x}.pad.pads"] = np.array([0, 0, 0, 0, 0, 0, rows, columns], np.int64)
            x = self.add("Pad", [x, f"{x}.pad.pads"], f"{x}.pad")
        joined = self.add("Concat", [skip, x], f"{x}.concat", axis=1)
        return self.block(f"{name}.conv", joined)
