"""Channels of a tensor brought to like ranges, so that INT8's one step a tensor is not too coarse for most of them.

Cross-layer equalization: an output channel of a convolution is divided by a factor, and every convolution that reads it
multiplies by it, so that the network computes the same. ReLU, pooling, resizing and concatenation let positive factors
through (M. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019). There
they follow from the weights; here from what the channels hold on images, of which a part is taken, as weights have a
range of their own to keep (G. Xiao et al., "SmoothQuant", ICML 2023).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from pipeline.graph.placement import CHANNEL_AXES, STANDARD, groups, is_convolution
from pipeline.graph.shapes import infer, with_weights

ACTIVATIONS = ("LeakyRelu", "PRelu", "Relu")
# Operators that give a positive multiple of their output for the same multiple of their input, channel by channel.
HOMOGENEOUS = (*ACTIVATIONS, "AveragePool", "MaxPool", "Pad", "Resize")
# The exponent: 0 leaves channels as they are, 1 gives all of them the largest one's range.
STRENGTH = 0.5
# Of the largest channel's range: smaller ones, of dead channels too, are taken for it.
FLOOR = 1 / 16


@dataclass(frozen=True)
class Chain:
    """A convolution whose output channels can be divided by positive factors.

    Attributes:
        node: its name.
        tensor: which shows the channels' ranges: its output, behind its activation.
        readers: every convolution that reads the channels, by name, and from which of its input channels on.
    """

    node: str
    tensor: str
    readers: tuple[tuple[str, int], ...]


def chains(model: ModelProto) -> tuple[Chain, ...]:
    """All of a clean float32 graph, in its order.

    Left out are convolutions of which something else than convolutions of one group reads the channels, such as an
    output of the graph, and weights that several nodes share.
    """
    return _Graph(model).chains()


def equalized(
    model: ModelProto, ranges: Mapping[str, NDArray[np.floating]], strength: float = STRENGTH
) -> tuple[ModelProto, dict[str, NDArray[np.float32]]]:
    """The graph with like ranges, and the factors (channels,) that the channels of each tensor were divided by.

    Args:
        ranges: of the channels of each chain's tensor: the largest absolute values, float (channels,).
        strength: see ``STRENGTH``.
    """
    graph = _Graph(model)
    weights = {name: numpy_helper.to_array(graph.weights[name]).copy() for name in graph.weights}
    factors = {}
    for chain in graph.chains():
        found = ranges[chain.tensor]
        ratio = np.clip(found / max(float(found.max()), float(np.finfo(np.float32).tiny)), FLOOR, 1)
        factors[chain.tensor] = factor = (ratio**strength).astype(np.float32)
        node = graph.nodes[chain.node]
        axis = CHANNEL_AXES[node.op_type]
        weights[node.input[1]] /= _along(factor, axis, weights[node.input[1]].ndim)
        if len(node.input) > 2:
            weights[node.input[2]] /= factor
        for name, first in chain.readers:
            reader = graph.nodes[name]
            axis, weight = 1 - CHANNEL_AXES[reader.op_type], weights[reader.input[1]]
            part = (slice(None),) * axis + (slice(first, first + len(factor)),)
            weight[part] *= _along(factor, axis, weight.ndim)
    return with_weights(model, weights), factors


def _along(factor: NDArray[np.float32], axis: int, rank: int) -> NDArray[np.float32]:
    return factor.reshape([-1 if at == axis else 1 for at in range(rank)])


class _Graph:
    """A graph's convolutions, and who reads what."""

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self.nodes = {node.name: node for node in graph.node}
        self.outputs = {value.name for value in graph.output}
        self.readers: dict[str, list[tuple[NodeProto, int]]] = {}
        for node in graph.node:
            for place, name in enumerate(node.input):
                self.readers.setdefault(name, []).append((node, place))
        uses = Counter(name for node in graph.node for name in node.input)
        constants = {tensor.name: tensor for tensor in graph.initializer}
        self.constants = constants
        # Of convolutions, each read once.
        self.weights = {
            name: constants[name]
            for node in graph.node
            if is_convolution(node)
            for name in node.input[1:]
            if name in constants and uses[name] == 1 and constants[name].data_type == TensorProto.FLOAT
        }
        self.channels = {
            name: value.type.tensor_type.shape.dim[1].dim_value or None
            for name, value in infer(model).items()
            if len(value.type.tensor_type.shape.dim) > 1
        }

    def chains(self) -> tuple[Chain, ...]:
        found = []
        for node in self.nodes.values():
            if self._is_known(node) and (node.op_type == "Conv" or groups(node) == 1):
                readers = self._reached(node.output[0], 0)
                if readers:
                    found.append(Chain(node.name, self._shown(node.output[0]), tuple(readers)))
        return tuple(found)

    def _is_known(self, node: NodeProto) -> bool:
        return is_convolution(node) and all(name in self.weights for name in node.input[1:])

    def _shown(self, tensor: str) -> str:
        readers = self.readers[tensor]
        if len(readers) == 1 and readers[0][0].op_type in ACTIVATIONS:
            return str(readers[0][0].output[0])
        return tensor

    def _reached(self, tensor: str, first: int) -> list[tuple[str, int]] | None:
        """The convolutions that a tensor's channels reach, as of this channel of theirs; None: others too."""
        if tensor in self.outputs:
            return None
        found: list[tuple[str, int]] = []
        for node, place in self.readers.get(tensor, []):
            if place == 0 and self._is_known(node) and groups(node) == 1:
                found.append((node.name, first))
                continue
            start = self._start(node, place)
            more = None if start is None else self._reached(node.output[0], first + start)
            if more is None:
                return None
            found += more
        return found

    def _start(self, node: NodeProto, place: int) -> int | None:
        """From which channel of a node's output on an input's lie, where the node lets factors through."""
        if node.domain not in STANDARD:
            return None
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "Concat":
            before = [self.channels.get(name) for name in node.input[:place]]
            joins_channels = attributes["axis"].i == 1
            return sum(size or 0 for size in before) if joins_channels and all(before) else None
        if node.op_type not in HOMOGENEOUS or place != 0:
            return None
        same = self.channels.get(node.input[0]) == self.channels.get(node.output[0]) is not None
        if node.op_type == "Pad":
            filled = node.input[2] if len(node.input) > 2 else ""
            same &= not filled or (filled in self.constants and not numpy_helper.to_array(self.constants[filled]).any())
        if node.op_type == "Resize":
            mode = attributes.get("coordinate_transformation_mode")
            same &= mode is None or mode.s != b"tf_crop_and_resize"  # which fills what lies outside
        return 0 if same else None
