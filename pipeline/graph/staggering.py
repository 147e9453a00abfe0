"""The image quantized several times with staggered steps, for a first convolution that sees finer ones.

Of all that INT8 rounds, the image matters most: an error there goes through every layer. INT8 kernels work on 32
channels at a time and an image has 1 to 4, so copies of it cost little. Copy k of n is shifted by (k + 1/2) / n - 1/2
steps before it is rounded, and the convolution adds up n-ths of its weights over the copies: their mean is the image in
steps of 1/n. This is dither (Roberts, Picture coding using pseudo-random noise, 1962) with a fixed pattern whose shifts
add up to zero, so that nothing has to be subtracted and zero padding stays what it was.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper

from pipeline.graph.placement import PASSING, groups, is_convolution
from pipeline.graph.scales import weight_scales
from pipeline.graph.shapes import all_names, unique

# Channels that an INT8 kernel works on at a time.
KERNEL_CHANNELS = 32
INT8_BITS = 8


def stagger(model: ModelProto, input_bits: int) -> None:
    """Give the convolutions that read the image finer steps of it, in place.

    They are the quantized ones whose input no other convolution has worked on and no pooling, resizing, concatenation
    or padding gives; with one group, and with room for the copies in one kernel's channels. Others stay as they are.

    Args:
        model: with Q/DQ pairs, as ``quantize`` makes it.
        input_bits: 8 changes nothing; every bit more doubles the copies and halves the step.
    """
    copies = 1 << (input_bits - INT8_BITS)
    if copies == 1:
        return
    work = _Stagger(model, copies)
    worked_on: set[str] = set()
    for node in list(model.graph.node):
        if is_convolution(node):
            if node.input[0] not in worked_on:
                work.widen(node)
            worked_on.update(node.output)
        elif worked_on.intersection(node.input):
            worked_on.update(node.output)
    work.finish()


class _Stagger:
    def __init__(self, model: ModelProto, copies: int) -> None:
        self.model, self.copies, self.taken = model, copies, all_names(model)
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producers = {name: node for node in model.graph.node for name in node.output}
        self.pairs: dict[str, str] = {}
        # What goes before a node, by the first tensor that it gives.
        self.before: dict[str, list[NodeProto]] = {}

    def widen(self, node: NodeProto) -> None:
        """Let a convolution read the copies, with n-ths of its weights for each; where it can."""
        image, weights = self.pair(node.input[0]), self.pair(node.input[1])
        if node.op_type != "Conv" or image is None or weights is None or groups(node) != 1:
            return
        name, scale_name, zero_name = weights[0].input
        source = self.producers.get(image[0].input[0])
        weight, scale = (numpy_helper.to_array(self.tensors[one]) for one in (name, scale_name))
        if weight.shape[1] * self.copies > KERNEL_CHANNELS or (source is not None and source.op_type in PASSING):
            return
        fresh: list[NodeProto] = []
        if node.input[0] not in self.pairs:
            self.pairs[node.input[0]] = self.copy(*image, fresh)
        node.input[0] = self.pairs[node.input[0]]
        kernel = (np.concatenate([weight] * self.copies, axis=1) / self.copies).astype(weight.dtype)
        scale = weight_scales(kernel.astype(np.float32), 0, scale.dtype)
        inputs = [self.keep(kernel, f"{name}.copies"), self.keep(scale, f"{scale_name}.copies"), zero_name]
        node.input[1] = self.pair_like(*weights, inputs, fresh)
        self.before[node.output[0]] = fresh

    def pair(self, name: str) -> tuple[NodeProto, NodeProto] | None:
        """QuantizeLinear and DequantizeLinear that give a tensor."""
        back = self.producers.get(name)
        there = self.producers.get(back.input[0]) if back is not None and back.op_type == "DequantizeLinear" else None
        return None if back is None or there is None else (there, back)

    def copy(self, there: NodeProto, back: NodeProto, fresh: list[NodeProto]) -> str:
        """The copies as one tensor along the channels, through a pair of the image's own scale."""
        image, scale = there.input[0], numpy_helper.to_array(self.tensors[there.input[1]])
        shifted = []
        for place in range(self.copies):
            offset = ((place + 0.5) / self.copies - 0.5) * scale
            name = self.keep(np.asarray(offset, scale.dtype), f"{image}.shift")
            shifted.append(unique(f"{image}.shifted", self.taken))
            fresh.append(onnx.helper.make_node("Add", [image, name], [shifted[-1]], name=shifted[-1]))
        whole = unique(f"{image}.copies", self.taken)
        fresh.append(onnx.helper.make_node("Concat", shifted, [whole], name=whole, axis=1))
        return self.pair_like(there, back, [whole, *there.input[1:]], fresh)

    def pair_like(self, there: NodeProto, back: NodeProto, inputs: list[str], fresh: list[NodeProto]) -> str:
        """What a pair like another gives for other inputs."""
        for node, given in ((there, inputs), (back, [None, *inputs[1:]])):
            made = NodeProto()
            made.CopyFrom(node)
            made.name, made.output[0] = unique(node.name, self.taken), unique(node.output[0], self.taken)
            made.input[:] = [fresh[-1].output[0] if name is None else name for name in given]
            fresh.append(made)
        result: str = made.output[0]
        return result

    def keep(self, array: NDArray[Any], stem: str) -> str:
        name = unique(stem, self.taken)
        self.model.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def finish(self) -> None:
        """Put the new nodes in order, and leave out what nothing reads any more."""
        nodes = [one for node in self.model.graph.node for one in (*self.before.get(node.output[0], ()), node)]
        read = {value.name for value in self.model.graph.output}
        kept: list[NodeProto] = []
        for node in reversed(nodes):
            if read.intersection(node.output) or node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                read.update(node.input)
                kept.append(node)
        kept = [NodeProto.FromString(node.SerializeToString()) for node in reversed(kept)]
        del self.model.graph.node[:]
        self.model.graph.node.extend(kept)
        for tensor in [tensor for tensor in self.model.graph.initializer if tensor.name not in read]:
            self.model.graph.initializer.remove(tensor)
