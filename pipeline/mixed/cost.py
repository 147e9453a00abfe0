"""How long a network takes with some convolutions in INT8 and the others in FP16, estimated."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from onnx import ModelProto, NodeProto

from pipeline.backends.layers import SIZES
from pipeline.backends.rates import TABLE, Rates
from pipeline.graph.cost import convolution_macs, tensor_shapes
from pipeline.graph.placement import PASSING, STANDARD, is_convolution
from pipeline.mixed.measured import Measured, Stored, measure
from pipeline.reports import EngineAccount

# Activations that engines compute in the kernel of the convolution before them.
FUSED = ("Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSwish")
# Between one kernel and the next, replayed from a CUDA graph: an assumption of about what H100 and H200 take.
KERNEL_MS = 0.002
# Of graph inputs and outputs: float32.
OUTER_BYTES = 4
# Stands in where the GPU is unknown or absent.
DEFAULT_RATES = TABLE["NVIDIA H200", "9.0"]

# Copies' time that a border takes until a mixture was timed. H200, TensorRT 8.6.0: 1.7 for isbi, 1.5 for camvid
# (tests/data/mixed). The convolution at a border is slower too.
BORDER_FACTOR = 1.6

# The precisions in which the readers of every activation want it.
Wants = dict[str, set[Stored]]


class CostModel:
    """The kernels of a network, and the borders between its precisions.

    1. A tensor that only INT8 convolutions read, at once or through pools, resizes, concatenations, pads and
       activations, is stored as INT8 and moved as such; one that others read, as FP16. Activations behind a convolution
       are part of it.
    2. A border is a tensor that a convolution or another node makes in one precision and that is read in the other one,
       or in both: a kernel of its own requantizes it and changes its layout. It takes ``border_factor`` times a copy of
       its values in both precisions.
    3. As a roofline, every kernel takes its arithmetic at the dense rate or its traffic at full bandwidth, the longer
       one, and ``KERNEL_MS`` besides. What enters and leaves the graph is float32 and cast by a kernel of its own.
       Such milliseconds are a bound that no engine reaches; differences between candidates are what they are for.
    4. After ``learn``, every kernel takes what it took in the engine, all FP16 or all INT8, of its precision, and a
       copy what these engines' copies say. Borders that all INT8 has are part of its kernels.

    Args:
        model: the clean float graph.
        shapes: of the graph's inputs by name; a missing one is taken as the graph has it.
        rates: of the GPU.
        quantized: convolutions that all INT8 has in INT8, by node name; default: all.

    Attributes:
        macs: multiply-accumulates of the convolutions by node name.
        border_factor: what ``correct`` has fitted.

    Raises:
        ModelError: the size of a convolution does not follow from the inputs' shapes.
    """

    def __init__(
        self,
        model: ModelProto,
        shapes: Mapping[str, Sequence[int]],
        rates: Rates = DEFAULT_RATES,
        quantized: Collection[str] | None = None,
    ) -> None:
        self.rates, self.nodes = rates, list(model.graph.node)
        self.macs = convolution_macs(model, shapes)
        self.quantized = frozenset(self.macs if quantized is None else quantized)
        self.border_factor = BORDER_FACTOR
        self.measured: Measured | None = None
        self.copy_ms, self.bandwidth = KERNEL_MS, rates.bandwidth
        self.elements = {
            name: math.prod(axis for axis in axes or () if isinstance(axis, int))
            for name, axes in tensor_shapes(model, shapes).items()
        }
        self.fixed = {tensor.name for tensor in model.graph.initializer}
        self.inputs = [value.name for value in model.graph.input if value.name not in self.fixed]
        self.outputs = [value.name for value in model.graph.output]
        self.fused = _fused(self.nodes, self.outputs)
        self.activations = set(self.fused.values())
        self._known: dict[frozenset[str], tuple[float, float]] = {}
        self._given: frozenset[str] = frozenset()
        self._given = frozenset(self._borders(self.quantized, self._wants(self.quantized)))

    def learn(self, engines: Mapping[Stored, EngineAccount]) -> None:
        """Take the kernels' times from the engines all FP16 and all INT8.

        Raises:
            EngineError: they do not tell which layers compute the convolutions.
        """
        self.measured = measure(engines, self.macs, {node.name for node in self.nodes} - self.macs.keys())
        self.copy_ms, self.bandwidth = self.measured.kernel_ms, self.measured.bandwidth or self.rates.bandwidth
        self._known.clear()

    def correct(self, timed: Mapping[frozenset[str], float]) -> None:
        """Fit ``border_factor`` by least squares to mixtures: measured milliseconds by their convolutions in INT8."""
        parts = [(*self._parts(int8), ms) for int8, ms in timed.items()]
        weight = sum(border**2 for _, border, _ in parts)
        if weight:
            self.border_factor = max(sum(border * (ms - kernels) for kernels, border, ms in parts) / weight, 0)

    @property
    def source(self) -> str:
        """What the milliseconds rest on, for people."""
        if self.measured is None:
            return self.rates.source
        return (
            "kernels of the engines all FP16 and all INT8, as profiled; a border takes "
            f"{self.border_factor:.2f} times a copy at {self.bandwidth / 1e9:.0f} GB/s and {1e3 * self.copy_ms:.1f} µs"
        )

    def milliseconds(self, int8: Collection[str]) -> float:
        """Of one inference, with the convolutions of these node names in INT8 and the others in FP16."""
        kernels, border = self._parts(frozenset(int8))
        return kernels + self.border_factor * border

    def borders(self, int8: Collection[str]) -> int:
        """Tensors that are requantized by a kernel of their own, and not so in all INT8."""
        return len(self._borders(int8, self._wants(int8)))

    def _parts(self, int8: frozenset[str]) -> tuple[float, float]:
        """Milliseconds of the kernels, and of copies at the borders."""
        if int8 not in self._known:
            wants = self._wants(int8)
            sizes = [self._bytes(name, "fp16") + self._bytes(name, "int8") for name in self._borders(int8, wants)]
            self._known[int8] = (
                self._roofline(int8, wants) if self.measured is None else self._sum(self.measured, int8, wants),
                sum(self.copy_ms + 1e3 * size / self.bandwidth for size in sizes),
            )
        return self._known[int8]

    def _sum(self, measured: Measured, int8: Collection[str], wants: Wants) -> float:
        return sum(measured.nodes[self._own(node, int8, wants)].get(node.name, 0) for node in self.nodes)

    def _roofline(self, int8: Collection[str], wants: Wants) -> float:
        total = 0.0
        for node in self.nodes:
            own = self._own(node, int8, wants)
            if is_convolution(node):
                tensors = [*node.input[:2], self.fused.get(node.output[0], node.output[0])]
                total += self._kernel(sum(self._bytes(name, own) for name in tensors), self.macs[node.name], own)
            elif node.output[0] not in self.activations:
                tensors = [name for name in node.input if name and name not in self.fixed] + [node.output[0]]
                total += self._kernel(sum(self._bytes(name, own) for name in tensors))
        for name in self.inputs:
            total += self._kernel(self.elements[name] * OUTER_BYTES + self._bytes(name, _stored(wants[name])))
        for name in self.outputs:
            total += self._kernel(self._bytes(name, "fp16") + self.elements[name] * OUTER_BYTES)
        return total

    def _borders(self, int8: Collection[str], wants: Wants) -> list[str]:
        found = []
        for node in self.nodes:
            written = self.fused.get(node.output[0], node.output[0])
            ends = wants[written] | {self._own(node, int8, wants)}
            if len(ends) > 1 and node.output[0] not in self.activations and written not in self._given:
                found.append(written)
        return found

    def _own(self, node: NodeProto, int8: Collection[str], wants: Wants) -> Stored:
        """The precision that the node computes in."""
        if is_convolution(node):
            return "int8" if node.name in int8 else "fp16"
        through = node.op_type in (*PASSING, *FUSED) and node.domain in STANDARD
        return _stored(wants[node.output[0]]) if through else "fp16"

    def _wants(self, int8: Collection[str]) -> Wants:
        wants: Wants = defaultdict(set)
        for name in self.outputs:
            wants[name].add("fp16")
        for node in reversed(self.nodes):
            own = self._own(node, int8, wants)
            for name in node.input[:1] if is_convolution(node) else node.input:
                if name and name not in self.fixed:
                    wants[name].add(own)
        return wants

    def _bytes(self, tensor: str, precision: Stored) -> int:
        return self.elements.get(tensor, 0) * SIZES[precision]

    def _kernel(self, moved: int, macs: int = 0, precision: Stored = "fp16") -> float:
        seconds = max(2 * macs / self.rates.operations[precision], moved / self.rates.bandwidth)
        return 1e3 * seconds + KERNEL_MS


def _stored(wanted: Collection[Stored]) -> Stored:
    return "int8" if set(wanted) == {"int8"} else "fp16"


def _fused(nodes: Sequence[NodeProto], outputs: Collection[str]) -> dict[str, str]:
    """By a convolution's output, what its kernel writes instead: the result of the activation behind it."""
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in nodes:
        for name in node.input:
            readers[name].append(node)
    found = {}
    for node in nodes:
        behind = readers[node.output[0]]
        if is_convolution(node) and node.output[0] not in outputs and len(behind) == 1:
            (reader,) = behind
            if reader.op_type in FUSED and reader.domain in STANDARD:
                found[node.output[0]] = reader.output[0]
    return found
