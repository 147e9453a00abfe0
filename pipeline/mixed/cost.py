"""How long a network takes with some convolutions in INT8 and the others in FP16, estimated without a GPU."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from onnx import ModelProto, NodeProto

from pipeline.backends.layers import SIZES
from pipeline.backends.rates import TABLE, Rates
from pipeline.graph.cost import convolution_macs, tensor_shapes
from pipeline.graph.placement import PASSING, STANDARD, is_convolution

Stored = Literal["int8", "fp16"]
# Activations that engines compute in the kernel of the convolution before them.
FUSED = ("Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSwish")
# Between one kernel and the next, replayed from a CUDA graph: an assumption of about what H100 and H200 take.
KERNEL_MS = 0.002
# Of graph inputs and outputs: float32.
OUTER_BYTES = 4
# Stands in where the GPU is unknown or absent.
DEFAULT_RATES = TABLE["NVIDIA H200", "9.0"]


class CostModel:
    """A roofline: every kernel takes its arithmetic at the dense rate or its traffic at full bandwidth, the longer one.

    1. A convolution reads its input and weights in its own precision. Activations behind it are part of it.
    2. A tensor that only INT8 convolutions read, at once or through pools, resizes, concatenations, pads and
       activations, is written as INT8 and moved as such; one that only others read, as FP16.
    3. A tensor that both read is written as FP16 and requantized by a kernel of its own: the cost of a border.
    4. What enters and leaves the graph is float32 and cast by a kernel of its own.
    5. Every kernel takes ``KERNEL_MS`` besides.

    Milliseconds are a bound that no engine reaches; differences and ratios between candidates are what they are for.

    Args:
        model: the clean float graph.
        shapes: of the graph's inputs by name; a missing one is taken as the graph has it.
        rates: of the GPU.

    Raises:
        ModelError: the size of a convolution does not follow from the inputs' shapes.
    """

    def __init__(self, model: ModelProto, shapes: Mapping[str, Sequence[int]], rates: Rates = DEFAULT_RATES) -> None:
        self.rates, self.nodes = rates, list(model.graph.node)
        self.macs = convolution_macs(model, shapes)
        self.elements = {
            name: math.prod(axis for axis in axes or () if isinstance(axis, int))
            for name, axes in tensor_shapes(model, shapes).items()
        }
        self.fixed = {tensor.name for tensor in model.graph.initializer}
        self.inputs = [value.name for value in model.graph.input if value.name not in self.fixed]
        self.outputs = [value.name for value in model.graph.output]
        readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                readers[name].append(node)
        self.fused: dict[str, str] = {}  # a convolution's output -> what its kernel writes instead
        for node in self.nodes:
            behind = readers[node.output[0]]
            if is_convolution(node) and node.output[0] not in self.outputs and len(behind) == 1:
                (reader,) = behind
                if reader.op_type in FUSED and reader.domain in STANDARD:
                    self.fused[node.output[0]] = reader.output[0]

    def milliseconds(self, int8: Collection[str]) -> float:
        """Of one inference, with the convolutions of these node names in INT8 and the others in FP16."""
        wants = self._wants(int8)
        total = 0.0
        for node in self.nodes:
            if is_convolution(node):
                total += self._convolution(node, "int8" if node.name in int8 else "fp16", wants)
            elif node.output[0] not in self.fused.values():
                total += self._moving(node, wants)
        for name, precisions in wants.items():
            if len(precisions) > 1:
                total += self._kernel(self._bytes(name, "fp16") + self._bytes(name, "int8"))
        for name in self.inputs:
            total += self._kernel(self.elements[name] * OUTER_BYTES + self._bytes(name, _stored(wants[name])))
        for name in self.outputs:
            total += self._kernel(self._bytes(name, "fp16") + self.elements[name] * OUTER_BYTES)
        return total

    def borders(self, int8: Collection[str]) -> int:
        """Tensors that are requantized by a kernel of their own."""
        return sum(len(precisions) > 1 for precisions in self._wants(int8).values())

    def _wants(self, int8: Collection[str]) -> dict[str, set[Stored]]:
        """The precisions in which the readers of every activation want it."""
        wants: dict[str, set[Stored]] = defaultdict(set)
        for name in self.outputs:
            wants[name].add("fp16")
        for node in reversed(self.nodes):
            if is_convolution(node):
                kept: Stored = "int8" if node.name in int8 else "fp16"
                sources = node.input[:1]
            else:
                through = node.op_type in (*PASSING, *FUSED) and node.domain in STANDARD
                kept = _stored(wants[node.output[0]]) if through else "fp16"
                sources = node.input
            for name in sources:
                if name and name not in self.fixed:
                    wants[name].add(kept)
        return wants

    def _convolution(self, node: NodeProto, precision: Stored, wants: Mapping[str, set[Stored]]) -> float:
        written = self.fused.get(node.output[0], node.output[0])
        moved = sum(self._bytes(name, precision) for name in node.input[:2])
        moved += self._bytes(written, _stored(wants[written]))
        return self._kernel(moved, self.macs[node.name], precision)

    def _moving(self, node: NodeProto, wants: Mapping[str, set[Stored]]) -> float:
        stored = _stored(wants[node.output[0]])
        tensors = [name for name in node.input if name and name not in self.fixed] + [node.output[0]]
        return self._kernel(sum(self._bytes(name, stored) for name in tensors))

    def _bytes(self, tensor: str, precision: Stored) -> int:
        return self.elements.get(tensor, 0) * SIZES[precision]

    def _kernel(self, moved: int, macs: int = 0, precision: Stored = "fp16") -> float:
        seconds = max(2 * macs / self.rates.operations[precision], moved / self.rates.bandwidth)
        return 1e3 * seconds + KERNEL_MS


def _stored(wanted: Collection[Stored]) -> Stored:
    return "int8" if set(wanted) == {"int8"} else "fp16"
