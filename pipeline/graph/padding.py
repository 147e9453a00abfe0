"""Pad nodes, and the padding of convolutions and pools."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from pipeline.graph.base import (
    Fired,
    Pass,
    PassResult,
    bypass,
    constant_value,
    detach,
    input_at,
    is_output,
    is_standard,
    label,
    made_by,
    made_for_one,
    names_in,
    put_input,
    remove_detached,
    slots,
)
from pipeline.graph.shapes import unique
from pipeline.graph.sizes import infer_shapes

POOLS = ("MaxPool", "AveragePool")
PADDED = ("Conv", "ConvTranspose", *POOLS)
# Before this opset a Pad has its widths and its value in attributes.
PAD_INPUTS_OPSET = 11
# From this opset on an AveragePool may count what it pads.
COUNT_PADDING_OPSET = 7

Spans = list[tuple[int, int]]


class RemoveZeroPads(Pass):
    """1. A Pad whose widths are all the constant 0 goes, whatever its mode.

    Not: widths that the graph computes (dynamic sizes), negative widths (they crop).
    """

    name = "remove-zero-pads"

    def call(self, graph: gs.Graph) -> PassResult:
        fired: list[Fired] = []
        for node in list(graph.nodes):
            if not is_standard(node, "Pad") or not _is_zero(_widths(node)):
                continue
            name = label(node)
            if bypass(graph, node, node.inputs[0], node.outputs[0]):
                fired.append(("zero-pad", name))
        remove_detached(graph)
        return PassResult.of(fired)


class ExplicitPads(Pass):
    """Conv, ConvTranspose, MaxPool and AveragePool say how much they pad, instead of leaving it to ``auto_pad``:

    1. ``VALID`` goes; no padding is the default.
    2. ``SAME_UPPER`` and ``SAME_LOWER`` become ``pads`` of the total width, per axis, that the ONNX standard asks for:
       max((⌈size / stride⌉ - 1) · stride + kernel - size, 0), which stride 1 makes kernel - 1 whatever the size;
       (kernel - 1) · dilation + 1 - stride for a ConvTranspose. An odd one pads the end (UPPER) or the beginning.

    Not: rule 2 where the stride is larger than 1 and the size dynamic, with dilations other than 1 (ConvTranspose
    aside) and where a ConvTranspose would have to crop; ``output_shape``, ``output_padding``, ``ceil_mode``.
    """

    name = "explicit-pads"

    def call(self, graph: gs.Graph) -> PassResult:
        nodes = [n for n in graph.nodes if is_standard(n, *PADDED) and n.attrs.get("auto_pad", "NOTSET") != "NOTSET"]
        if nodes:
            infer_shapes(graph)
        fired: list[Fired] = []
        for node in nodes:
            mode = node.attrs["auto_pad"]
            totals = self._totals(node, mode)
            if totals is None:
                continue
            less, more = [total // 2 for total in totals], [total - total // 2 for total in totals]
            node.attrs["pads"] = more + less if mode == "SAME_LOWER" else less + more
            del node.attrs["auto_pad"]
            fired.append(("auto-pad", label(node)))
        return PassResult.of(fired)

    @staticmethod
    def _totals(node: gs.Node, mode: str) -> list[int] | None:
        attrs, shape = node.attrs, node.inputs[0].shape
        kernel = _kernel(node)
        if (
            kernel is None
            or attrs.get("ceil_mode", 0)
            or "output_shape" in attrs
            or any(attrs.get("output_padding", ()))
        ):
            return None
        if mode == "VALID":
            return [0] * len(kernel)
        strides = attrs.get("strides", [1] * len(kernel))
        dilations = attrs.get("dilations", [1] * len(kernel))
        if node.op == "ConvTranspose":
            totals = [(k - 1) * d + 1 - s for k, d, s in zip(kernel, dilations, strides, strict=True)]
            return totals if min(totals) >= 0 else None
        if any(d != 1 for d in dilations):
            return None
        sizes = list(shape[2:]) if shape is not None else [None] * len(kernel)
        totals = []
        for size, k, s in zip(sizes, kernel, strides, strict=True):
            if s == 1:
                totals.append(k - 1)
            elif isinstance(size, int):
                totals.append(max((-(-size // s) - 1) * s + k - size, 0))
            else:
                return None
        return totals


class MergePads(Pass):
    """1. A Pad with zeros before a Conv becomes part of the convolution's ``pads``.
    2. A Pad with zeros before an AveragePool becomes part of its ``pads``, which it counts from then on.
    3. A Pad before a MaxPool becomes part of its ``pads`` where the value is -inf, or where it is at most 0 and a Relu
       comes before the Pad: every window holds a value that is not smaller. So does one of mode edge, as Keras on torch
       has it: a window that reaches beyond the edge holds the edge too.
    4. Of two Pads in a row with the same value, the second pads the sum of both.
    5. A Pad that lost its last reader to these rules goes. The readers of a Pad are looked at one by one.

    Not: computed widths or values, negative widths (they crop), other modes, padding of the batch or channels,
    ConvTranspose (its ``pads`` crop), ``auto_pad`` other than NOTSET. Pools: not with ``ceil_mode``, dilations or
    padding as wide as the kernel; an AveragePool that pads already without counting it; a MaxPool that gives indices.
    """

    name = "merge-pads"

    def call(self, graph: gs.Graph) -> PassResult:
        pads = [node for node in graph.nodes if is_standard(node, "Pad")]
        if any(input_at(node, 3) is not None and node.inputs[0].shape is None for node in pads):
            infer_shapes(graph)
        taken = names_in(graph) if pads else set()
        fired: list[Fired] = []
        for node in pads:
            edge = node.attrs.get("mode") == "edge"
            value, spans = -np.inf if edge else pad_value(node), _growing(pad_spans(node))
            if value is None or spans is None:
                continue
            merged = None if edge else self._merge(graph, node, value, spans, taken)
            if merged is not None:
                fired.append(("pad-of-pad", label(node)))
                spans = merged
            source, result, moved = node.inputs[0], node.outputs[0], False
            for reader, slot in list(slots(result)):
                pads_then = self._absorbed(graph, reader, value, spans, source) if slot == 0 else None
                if pads_then is None:
                    continue
                reader.inputs[0] = source
                reader.attrs["pads"] = pads_then
                if reader.op == "AveragePool":
                    reader.attrs["count_include_pad"] = 1
                fired.append(("pad-into", label(reader)))
                moved = True
            if moved and not result.outputs and not is_output(graph, result):
                detach(node)
        remove_detached(graph)
        return PassResult.of(fired)

    @staticmethod
    def _merge(graph: gs.Graph, node: gs.Node, value: Any, spans: Spans, taken: set[str]) -> Spans | None:
        """Widths of this Pad and the one before it together, which is taken out; None where there is none such."""
        first = made_for_one(graph, node.inputs[0], "Pad")
        inner = _growing(pad_spans(first, len(spans))) if first is not None else None
        if first is None or inner is None or pad_value(first) != value:
            return None
        both = [(a + c, b + d) for (a, b), (c, d) in zip(inner, spans, strict=True)]
        set_pad_spans(graph, node, both, taken)
        node.inputs[0] = first.inputs[0]
        detach(first)
        return both

    @staticmethod
    def _absorbed(graph: gs.Graph, reader: gs.Node, value: Any, spans: Spans, source: gs.Tensor) -> list[int] | None:
        """``pads`` of the reader once it pads itself; None where it cannot."""
        attrs = reader.attrs
        if not is_standard(reader, "Conv", *POOLS) or attrs.get("auto_pad", "NOTSET") != "NOTSET":
            return None
        if any(span != (0, 0) for span in spans[:2]):
            return None
        own = attrs.get("pads", [0] * (2 * len(spans) - 4))
        added = [begin for begin, _ in spans[2:]] + [end for _, end in spans[2:]]
        pads = [a + b for a, b in zip(own, added, strict=True)]
        if reader.op == "Conv":
            return pads if value == 0 else None
        if attrs.get("ceil_mode", 0) or any(d != 1 for d in attrs.get("dilations", ())):
            return None
        if any(width >= size for width, size in zip(pads, 2 * list(attrs["kernel_shape"]), strict=True)):
            return None
        if reader.op == "AveragePool":
            uncounted = any(own) and not attrs.get("count_include_pad", 0)
            return pads if value == 0 and not uncounted and graph.opset >= COUNT_PADDING_OPSET else None
        fits = value == -np.inf or (value <= 0 and made_by(source, "Relu") is not None)
        return pads if fits and not any(not t.is_empty() for t in reader.outputs[1:]) else None


def pad_spans(node: gs.Node, rank: int | None = None) -> Spans | None:
    """Widths (begin, end) of a Pad for every axis; None where the graph computes them, or where ``axes`` need a rank
    that neither the caller nor the shape of the Pad's input knows."""
    widths = _widths(node)
    if widths is None:
        return None
    entries = [int(width) for width in widths]
    half = len(entries) // 2
    given = list(zip(entries[:half], entries[half:], strict=True))
    if input_at(node, 3) is None:
        return given
    axes, shape = constant_value(input_at(node, 3)), node.inputs[0].shape
    rank = rank or (len(shape) if shape is not None else None)
    if axes is None or rank is None:
        return None
    spans = [(0, 0)] * rank
    for axis, span in zip(axes.tolist(), given, strict=True):
        spans[axis] = span
    return spans


def pad_value(node: gs.Node) -> Any:
    """What a Pad of mode constant pads with; None where the graph computes it, and for other modes."""
    if node.attrs.get("mode", "constant") != "constant":
        return None
    tensor = input_at(node, 2)
    if tensor is None:
        return node.attrs.get("value", 0)
    value = constant_value(tensor)
    return value.item() if value is not None else None


def set_pad_spans(graph: gs.Graph, node: gs.Node, spans: Spans, taken: set[str]) -> None:
    """Let a Pad add these widths, one pair for every axis."""
    widths = [begin for begin, _ in spans] + [end for _, end in spans]
    if graph.opset < PAD_INPUTS_OPSET:
        node.attrs["pads"] = widths
        return
    if len(node.inputs) > 3:  # axes
        del node.inputs[3]
    node.inputs[1] = gs.Constant(unique(f"{node.outputs[0].name}.pads", taken), np.array(widths, np.int64))


def set_pad_value(graph: gs.Graph, node: gs.Node, value: NDArray[Any], taken: set[str]) -> None:
    """Let a Pad of mode constant pad with another value (rank 0, of the type of its data)."""
    if graph.opset < PAD_INPUTS_OPSET:
        node.attrs["value"] = float(value)
        return
    put_input(node, 2, gs.Constant(unique(f"{node.outputs[0].name}.value", taken), value))


def _growing(spans: Spans | None) -> Spans | None:
    return spans if spans is not None and all(width >= 0 for span in spans for width in span) else None


def _kernel(node: gs.Node) -> list[int] | None:
    """Kernel size per spatial axis: the attribute, or the shape of the weight."""
    if "kernel_shape" in node.attrs:
        return list(node.attrs["kernel_shape"])
    shape = node.inputs[1].shape if node.op not in POOLS else None
    sizes = [size for size in (shape or ())[2:] if isinstance(size, int)]
    return sizes if shape is not None and len(sizes) == len(shape) - 2 else None


def _widths(node: gs.Node) -> Any:
    """Widths of a Pad: an input since opset 11, an attribute before; None where the graph computes them."""
    tensor = input_at(node, 1)
    return constant_value(tensor) if tensor is not None else node.attrs.get("pads", node.attrs.get("paddings"))


def _is_zero(widths: Any) -> bool:
    return widths is not None and not any(widths)
