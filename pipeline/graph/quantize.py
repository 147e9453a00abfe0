"""A float graph as an explicit INT8 graph: QuantizeLinear/DequantizeLinear where TensorRT fuses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from pipeline.calibration.table import CalibrationTable, check_table
from pipeline.config import EngineConfig, Placement
from pipeline.errors import CalibrationError, ModelError
from pipeline.graph.half import to_half
from pipeline.graph.placement import (
    CHANNEL_AXES,
    Site,
    activation_tensors,
    is_convolution,
    is_site,
    quantizable,
    shared_ranges,
    sites,
)
from pipeline.graph.scales import pair_scale, weight_scales
from pipeline.graph.shapes import all_names, set_value_info, unique
from pipeline.graph.staggering import INT8_BITS, stagger
from pipeline.graph.versions import with_opset

# First opsets with a channel axis, and with FP16 scales.
PER_CHANNEL_OPSET, HALF_SCALE_OPSET = 13, 19
BIAS = 2  # place among a convolution's inputs


def quantize(
    model: ModelProto,
    table: CalibrationTable,
    *,
    half: bool,
    exclude: Sequence[str] = (),
    qdq: Placement = "convolutions",
    input_bits: int = INT8_BITS,
) -> ModelProto:
    """The graph with explicit INT8 convolutions.

    1. The inputs that ``placement.sites`` names go through one QuantizeLinear/DequantizeLinear pair a tensor: per
       tensor, symmetric, scale = amax / 127, zero point int8 0. Other readers keep the float tensor, so no pair ever
       stands between a convolution and its activation. With ``qdq`` shared, the ranges are those of ``shared_ranges``.
    2. Its weight goes through a pair of its own: symmetric per output channel (axis 0; ConvTranspose: axis 1), scale =
       amax of the channel / 127. The weight stays a float initializer before QuantizeLinear, the form that every
       TensorRT parser since 8.0 reads; the engine holds int8.
       TensorRT 8.6's parser takes the kernel's size from ``kernel_shape`` alone where the weight is no initializer, so
       that attribute is written where it is absent.
    3. The bias stays float; it is the table's where that has one (``with_biases``).

    Not quantized: nodes that ``exclude`` names, convolutions whose weight is no initializer, every other operator.

    Args:
        model: a clean float32 graph, in whose tensor names ``table`` speaks.
        half: start from the typed FP16 graph with FP16 scales (raises the opset to 19) instead of the float32 graph
            with float32 scales (opset 13 at least).
        exclude: ``fnmatch`` patterns of node names.
        qdq: ``convolutions``: each of them alone; ``shared``: pools, resizes, pads and concatenations too.
        input_bits: of the image, for the convolutions that read it (``staggering``).

    Raises:
        CalibrationError: the table lacks tensors (named), belongs to another graph, or holds a range beyond FP16's.
        ConfigError: a pattern of ``exclude`` matches no convolution.
        ModelError: nothing to quantize, weights beyond FP16, an opset that cannot be raised.
    """
    # Nodes are found again by their place among the sites: to_half and with_opset keep their number and order.
    places = sites(model, exclude, qdq)
    if not any(places) and not exclude:
        raise ModelError("the graph has no Conv or ConvTranspose with constant weights", fix="build another precision")
    check_table(table, dict.fromkeys(tensor for site in places for tensor in site.values()), activation_tensors(model))
    if qdq == "shared":
        table = shared_ranges(model, table, exclude)
    result = with_opset(with_biases(model, table.biases, exclude), HALF_SCALE_OPSET if half else PER_CHANNEL_OPSET)
    if half:
        result = to_half(result)
    _Quantizer(result, np.dtype(np.float16 if half else np.float32), table).run(places)
    stagger(result, input_bits)
    set_value_info(result)
    try:
        onnx.checker.check_model(result, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(
            f"the INT8 graph is not valid ONNX: {str(error).strip().splitlines()[0]}",
            fix="build at --precision fp16, and report the model",
        ) from error
    return result


def quantized_as(
    model: ModelProto, table: CalibrationTable, settings: EngineConfig, *, half: bool = False
) -> ModelProto:
    """``quantize`` as the settings of an engine say."""
    return quantize(model, table, half=half, exclude=settings.exclude, qdq=settings.qdq, input_bits=settings.input_bits)


def with_biases(
    model: ModelProto, biases: Mapping[str, Sequence[float] | NDArray[np.float32]], exclude: Sequence[str] = ()
) -> ModelProto:
    """The graph whose quantized convolutions have these biases, by the tensor that they give; others keep theirs.

    Args:
        model: not changed; comes back as it is where there is nothing to do.
        exclude: as for ``quantize``.

    Raises:
        CalibrationError: a bias of another convolution's size.
    """
    if not biases:
        return model
    given = {node.output[0] for node in quantizable(model, exclude)} & set(biases)
    result = ModelProto()
    result.CopyFrom(model)
    taken, sizes = all_names(result), {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for node in result.graph.node:
        if not given.intersection(node.output):
            continue
        bias = np.asarray(biases[node.output[0]], np.float32)
        if len(node.input) <= BIAS or sizes.get(node.input[BIAS]) != bias.shape:
            raise CalibrationError(
                f"the calibration's bias of {node.name or node.output[0]} does not fit",
                expected=f"shape {sizes.get(node.input[BIAS]) if len(node.input) > BIAS else 'none: it has no bias'}",
                got=f"shape {bias.shape}",
                fix="calibrate this graph",
            )
        node.input[BIAS] = unique(f"{node.output[0]}.bias", taken)
        result.graph.initializer.append(numpy_helper.from_array(bias, node.input[BIAS]))
    return result


class _Quantizer:
    """Inserts the pairs into one model in place."""

    def __init__(self, model: ModelProto, dtype: np.dtype[Any], table: CalibrationTable) -> None:
        self.model, self.dtype, self.table = model, dtype, table
        self.taken = all_names(model)
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.fresh: list[TensorProto] = []
        self.nodes: list[NodeProto] = []
        self.pairs: dict[str, str] = {}

    def run(self, places: Sequence[Site]) -> None:
        todo = iter(places)
        for node in self.model.graph.node:
            site = next(todo) if is_site(node) else {}
            for slot, tensor in site.items():
                node.input[slot] = self._activation(node.input[slot], tensor)
            if site and is_convolution(node):
                _name_kernel(node, self.weights[node.input[1]])
                node.input[1] = self._weight(node)
            self.nodes.append(node)
        kept = [NodeProto.FromString(node.SerializeToString()) for node in self.nodes]
        del self.model.graph.node[:]
        self.model.graph.node.extend(kept)
        self.model.graph.initializer.extend(self.fresh)

    def _activation(self, name: str, calibrated: str) -> str:
        if name not in self.pairs:
            scale = pair_scale(self.table, calibrated, self.dtype)
            self.pairs[name] = self._pair(name, calibrated, scale, axis=None)
        return self.pairs[name]

    def _weight(self, node: NodeProto) -> str:
        """Weight through its pair; scales: (output channels,), or (output channels / group,) of ConvTranspose."""
        axis = CHANNEL_AXES[node.op_type]
        weight = numpy_helper.to_array(self.weights[node.input[1]]).astype(np.float32)
        scale = weight_scales(weight, axis, self.dtype)
        return self._pair(node.input[1], f"{node.name}.weight" if node.name else node.input[1], scale, axis=axis)

    def _pair(self, source: str, stem: str, scale: NDArray[Any], axis: int | None) -> str:
        scale_name, zero_name = unique(f"{stem}.scale", self.taken), unique(f"{stem}.zero_point", self.taken)
        self.fresh.append(numpy_helper.from_array(np.asarray(scale), scale_name))
        self.fresh.append(numpy_helper.from_array(np.zeros(scale.shape, np.int8), zero_name))
        integers, floats = unique(f"{stem}.int8", self.taken), unique(f"{stem}.dequantized", self.taken)
        attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
        for op, name, value, target in (
            ("QuantizeLinear", "quantize", source, integers),
            ("DequantizeLinear", "dequantize", integers, floats),
        ):
            self.nodes.append(
                onnx.helper.make_node(
                    op,
                    [value, scale_name, zero_name],
                    [target],
                    name=unique(f"{stem}.{name}", self.taken),
                    **attributes,
                )
            )
        return floats


def _name_kernel(node: NodeProto, weight: TensorProto) -> None:
    if not any(attribute.name == "kernel_shape" for attribute in node.attribute):
        node.attribute.append(onnx.helper.make_attribute("kernel_shape", list(weight.dims[2:])))
