"""The UNet of ``models.unet`` as a TensorRT network, layer by layer, from its weights: no ONNX parser takes part.

The clean ONNX graph of the same network lends the names of its tensors, so that one calibration table serves both,
those of its nodes, so that an engine's layers are found in the graph, and says where Q/DQ pairs and zero padding go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from pipeline.backends.network_layers import Layers
from pipeline.calibration.table import CalibrationTable
from pipeline.errors import ModelError
from pipeline.graph.io import model_inputs, model_outputs
from pipeline.graph.placement import CHANNEL_AXES, Site, is_site
from pipeline.graph.scales import pair_scale, weight_scales
from pipeline.unet import UNetWeights

if TYPE_CHECKING:
    import tensorrt

EPSILON = 1e-5  # of torch.nn.BatchNorm2d
LEVELS = 4
COMPUTING = frozenset(
    {"Conv", "ConvTranspose", "Relu", "LeakyRelu", "Sigmoid", "Mul", "MaxPool", "Resize", "Pad", "Concat"}
)
ACTIVATIONS = {"relu": ("Relu", "RELU"), "leaky_relu": ("LeakyRelu", "LEAKY_RELU")}


@dataclass(frozen=True)
class Quantization:
    """What goes through INT8: the ranges, and what ``placement.sites`` says of the clean graph."""

    table: CalibrationTable
    sites: Sequence[Site]


@dataclass(frozen=True)
class UNetDefinition:
    """What defines one network; call it with an empty one.

    Attributes:
        unet: options and weights.
        clean: the clean float32 ONNX graph of the same UNet: (N, C, H, W) to logits.
        half: FP16 weights and activations, for strongly typed networks.
        fold: make BatchNorm part of the convolution's weights and bias (in float64, rounded once), as INT8 needs it.
            The network's float tensors are then the clean graph's and no others, so that a calibration table which is
            complete for the graph is complete for the network. Between a convolution and a Scale layer lies a tensor
            that no calibration sees, and where a range is missing on the implicit route TensorRT 8.6.0 computes wrong
            results in silence (docs/decisions/0003). On the explicit route the quantized weights are those of the
            typed graph. Otherwise BatchNorm is a Scale layer, whose result has the clean graph's name; the
            convolution's own is called ``<name>.convolution``.
        quantization: explicit INT8; None for none.
    """

    unet: UNetWeights
    clean: ModelProto
    half: bool = False
    fold: bool = False
    quantization: Quantization | None = None

    def __call__(self, trt: Any, network: tensorrt.INetworkDefinition) -> object:
        """Define the network; keep what it returns until the engine is built.

        Raises:
            ModelError: the clean graph is not this UNet's, or weights do not fit into FP16.
            EngineError: TensorRT refuses a layer.
        """
        layers = Layers(trt, network, half=self.half)
        _Definer(self, layers).run()
        return layers.kept


class _Definer:
    """Walks the UNet's forward pass and the clean graph's nodes side by side."""

    def __init__(self, definition: UNetDefinition, layers: Layers) -> None:
        self.layers, self.state, self.options = layers, definition.unet.state, definition.unet.options
        self.clean, self.fold, self.quantization = definition.clean, definition.fold, definition.quantization
        self.nodes = computing_nodes(self.clean)
        self.place = 0
        self.sites: dict[str, Site] = {}
        if self.quantization is not None:
            at = [node.output[0] for node in self.clean.graph.node if is_site(node)]
            self.sites = dict(zip(at, self.quantization.sites, strict=True))
        self.pairs: dict[str, Any] = {}

    def run(self) -> None:
        (source,), (target,) = model_inputs(self.clean), model_outputs(self.clean)
        shape = [size if isinstance(size, int) else -1 for size in source.shape]
        x = self.layers.entered(self.layers.input(source.name, shape))
        skips = [self.block("inc", x)]
        for level in range(1, LEVELS + 1):
            (node, (x,)) = self.step("MaxPool", skips[-1])
            skips.append(self.block(f"down{level}.maxpool_conv.1", self.layers.pool(node.output[0], x)))
        x = skips.pop()
        for level in range(1, LEVELS + 1):
            x = self.up(f"up{level}", x, skips.pop())
        self.layers.output(self.convolution("outc.conv", x), target.name)
        if self.place < len(self.nodes):
            raise self.differs("nothing")

    def block(self, name: str, x: Any) -> Any:
        """(convolution, BatchNorm, activation) twice."""
        for index in (0, 3):
            stem = f"{name}.double_conv"
            x = self.convolution(f"{stem}.{index}", x, norm=f"{stem}.{index + 1}")
            x = self.activation(x)
        return x

    def up(self, name: str, x: Any, skip: Any) -> Any:
        """Upsampled, padded where the clean graph pads, joined behind the skip connection, convolved."""
        if self.options.upsampling == "transposed":
            x = self.convolution(f"{name}.up", x, transposed=True)
        else:
            node, (x,) = self.step("Resize", x)
            linear = self.options.upsampling == "bilinear"
            x = self.layers.resize(node.output[0], x, linear=linear, align_corners=self.options.align_corners)
        if self.place < len(self.nodes) and self.nodes[self.place].op_type == "Pad":
            node, (x,) = self.step("Pad", x)
            x = self.layers.padded(node.output[0], x, skip)
        node, parts = self.step("Concat", skip, x)
        return self.block(f"{name}.conv", self.layers.concatenation(node.output[0], parts))

    def convolution(self, name: str, x: Any, norm: str | None = None, *, transposed: bool = False) -> Any:
        node, (x,) = self.step("ConvTranspose" if transposed else "Conv", x)
        target = node.output[0]
        weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        if norm and self.fold:
            factor, shift = self.normalisation(norm)
            weight = (weight * factor.reshape(-1, 1, 1, 1)).astype(np.float32)
            bias = shift if bias is None else bias * factor + shift
        kernel: Any = weight
        if self.sites.get(target):
            kernel = self.quantized(node.name or target, weight, CHANNEL_AXES[node.op_type])
        add = self.layers.deconvolution if transposed else self.layers.convolution
        if not norm or self.fold:
            return add(target, x, kernel, weight.shape, bias)
        made, titles = f"{target}.convolution", self.layers.titles
        titles[made], titles[target] = titles[target], f"{titles[target]}.scale"
        return self.layers.scale(target, add(made, x, kernel, weight.shape, bias), *self.normalisation(norm))

    def activation(self, x: Any) -> Any:
        if self.options.activation == "silu":
            node, _ = self.step("Sigmoid", x)
            gate = self.layers.activation(node.output[0], x, "SIGMOID")
            node, _ = self.step("Mul", x)
            return self.layers.product(node.output[0], x, gate)
        operator, kind = ACTIVATIONS[self.options.activation]
        node, _ = self.step(operator, x)
        return self.layers.activation(node.output[0], x, kind)

    def normalisation(self, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Factor and shift of BatchNorm in eval mode, (channels,) float64."""
        gamma, beta, mean, variance = (
            self.state[f"{name}.{kind}"].astype(np.float64)
            for kind in ("weight", "bias", "running_mean", "running_var")
        )
        factor = gamma / np.sqrt(variance + EPSILON)
        return factor, beta - mean * factor

    # ------------------------------------------------------------------ the clean graph beside it

    def step(self, operator: str, *inputs: Any) -> tuple[NodeProto, list[Any]]:
        """The clean graph's next node, and the layer's inputs, through their pairs where they have any.

        Raises:
            ModelError: it is another operator's.
        """
        if self.place == len(self.nodes) or self.nodes[self.place].op_type != operator:
            raise self.differs(operator)
        node = self.nodes[self.place]
        self.place += 1
        self.layers.titles[node.output[0]] = node.name or node.output[0]
        site = self.sites.get(node.output[0], {})
        return node, [self.paired(x, site[slot]) if slot in site else x for slot, x in enumerate(inputs)]

    def differs(self, expected: str) -> ModelError:
        rest = self.nodes[self.place :]
        got = f"{rest[0].op_type}, node {rest[0].name}" if rest else "the end"
        return ModelError(
            "the clean graph is not that of models.unet:UNet with these arguments",
            expected=expected,
            got=got,
            fix="correct network.arguments, or set engine.source to onnx",
        )

    def paired(self, x: Any, calibrated: str) -> Any:
        assert self.quantization is not None
        if calibrated not in self.pairs:
            scale = pair_scale(self.quantization.table, calibrated, self.layers.dtype)
            self.pairs[calibrated] = self.layers.pair(calibrated, x, scale)
        return self.pairs[calibrated]

    def quantized(self, name: str, weight: NDArray[Any], axis: int) -> Any:
        """The weight through a pair of its own, one scale an output channel."""
        dtype, constant = self.layers.dtype, self.layers.constant(f"{name}.weight", weight)
        scale = weight_scales(weight.astype(dtype).astype(np.float32), axis, dtype)
        return self.layers.pair(f"{name}.weight", constant, scale, axis)


def computing_nodes(model: ModelProto) -> list[NodeProto]:
    """The nodes that compute on the image, in the graph's order, without those that only work out sizes."""
    makers = {output: node for node in model.graph.node for output in node.output}
    sizes: set[str] = set()
    todo = [name for node in model.graph.node if node.op_type in ("Pad", "Resize") for name in node.input[1:]]
    while todo:
        name = todo.pop()
        node = makers.get(name)
        if node is not None and name not in sizes:
            sizes.add(name)
            todo += [] if node.op_type == "Shape" else node.input
    return [n for n in model.graph.node if n.op_type in COMPUTING and n.output[0] not in sizes]
