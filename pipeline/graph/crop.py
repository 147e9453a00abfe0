"""Slices behind transposed convolutions, as Keras and TensorFlow write padding "same"."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from pipeline.graph.base import (
    Fired,
    Pass,
    PassResult,
    bypass,
    input_at,
    is_output,
    is_standard,
    label,
    remove_detached,
    slots,
)
from pipeline.graph.shape_rules import slice_parts
from pipeline.graph.symbolic import Symbolic


class CropTransposed(Pass):
    """1. A Slice that cuts a constant number of rows or columns off a ConvTranspose becomes its pads: the same sums,
       the cut ones never computed.

    Not: where anyone else reads the ConvTranspose; batch or channel axes; steps other than 1; an ``auto_pad`` or an
    ``output_shape``; where the cut is not the same for all sizes.
    """

    name = "crop-transposed"

    def call(self, graph: gs.Graph) -> PassResult:
        places = [(node, conv) for node in graph.nodes if (conv := _cropped(graph, node)) is not None]
        if not places:
            return PassResult(False)
        known = Symbolic(graph)
        fired: list[Fired] = []
        for node, conv in places:
            pads, name = _pads(known, node, conv), label(node)
            if pads is not None and bypass(graph, node, node.inputs[0], node.outputs[0]):
                conv.attrs["pads"] = pads
                conv.outputs[0].shape = None
                fired.append(("crop", name))
        remove_detached(graph)
        return PassResult.of(fired)


def _cropped(graph: gs.Graph, node: gs.Node) -> gs.Node | None:
    """The ConvTranspose that this Slice alone reads."""
    source = input_at(node, 0) if is_standard(node, "Slice") else None
    if source is None or len(source.inputs) != 1 or is_output(graph, source) or len(list(slots(source))) != 1:
        return None
    conv = source.inputs[0]
    plain = conv.attrs.get("auto_pad", "NOTSET") == "NOTSET" and not conv.attrs.get("output_shape")
    return conv if is_standard(conv, "ConvTranspose") and plain else None


def _pads(known: Symbolic, node: gs.Node, conv: gs.Node) -> list[int] | None:
    before, after = known.shape(node.inputs[0]), known.shape(node.outputs[0])
    if before is None or after is None:
        return None
    parts = slice_parts(known, node, len(before))
    if parts is None:
        return None
    count = len(before) - 2
    pads = list(conv.attrs.get("pads") or [0] * (2 * count))
    for axis, first, _, step in parts:
        start, cut = first.integer, (before[axis] - after[axis]).integer
        if axis < 2 or step != 1 or start is None or start < 0 or cut is None or cut < start:
            return None
        pads[axis - 2] += start
        pads[axis - 2 + count] += cut - start
    return pads
