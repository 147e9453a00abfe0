"""Slices and negative Pads that take away what the node before them made: as Keras and TensorFlow write padding "same"
of a ConvTranspose, and as sizes are aligned that are aligned already."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from pipeline.graph.base import (
    Fired,
    Pass,
    PassResult,
    bypass,
    input_at,
    is_standard,
    label,
    made_for_one,
    names_in,
    remove_detached,
)
from pipeline.graph.padding import Spans, pad_spans, set_pad_spans
from pipeline.graph.shape_rules import slice_parts
from pipeline.graph.symbolic import Symbolic

CROPS = ("Slice", "Pad")


class CropTransposed(Pass):
    """1. A Slice or negative Pad that cuts a constant number of rows or columns off a ConvTranspose becomes its pads:
       the same sums, the cut ones never computed.

    Not: where anyone else reads the ConvTranspose; batch or channel axes; steps other than 1; an ``auto_pad`` or an
    ``output_shape``; where the cut is not the same for all sizes.
    """

    name = "crop-transposed"

    def call(self, graph: gs.Graph) -> PassResult:
        places = [(node, conv) for node, conv in _cropped(graph, "ConvTranspose") if _has_plain_pads(conv)]
        if not places:
            return PassResult(False)
        known = Symbolic(graph)
        fired: list[Fired] = []
        for node, conv in places:
            cuts, name = _cuts(known, node), label(node)
            if cuts is None or any(cut != (0, 0) for cut in cuts[:2]):
                continue
            if bypass(graph, node, node.inputs[0], node.outputs[0]):
                own = conv.attrs.get("pads") or [0] * (2 * len(cuts) - 4)
                added = [begin for begin, _ in cuts[2:]] + [end for _, end in cuts[2:]]
                conv.attrs["pads"] = [a + b for a, b in zip(own, added, strict=True)]
                conv.outputs[0].shape = None
                fired.append(("crop", name))
        remove_detached(graph)
        return PassResult.of(fired)


class CropPads(Pass):
    """1. A Slice or negative Pad that cuts off a Pad no more than that added there: the Pad adds that much less. In
       every mode what is added depends on its distance from the edge alone. RemoveZeroPads takes out what is left.

    Not: where anyone else reads the Pad; computed widths; a Pad that crops itself; steps other than 1; where the cut
    is not the same for all sizes.
    """

    name = "crop-pads"

    def call(self, graph: gs.Graph) -> PassResult:
        places = _cropped(graph, "Pad")
        if not places:
            return PassResult(False)
        known, taken = Symbolic(graph), names_in(graph)
        fired: list[Fired] = []
        for node, pad in places:
            cuts, name = _cuts(known, node), label(node)
            spans = pad_spans(pad, len(cuts)) if cuts is not None else None
            if cuts is None or spans is None:
                continue
            left = [(a - c, b - d) for (a, b), (c, d) in zip(spans, cuts, strict=True)]
            if all(width >= 0 for span in left for width in span) and bypass(
                graph, node, node.inputs[0], node.outputs[0]
            ):
                set_pad_spans(graph, pad, left, taken)
                pad.outputs[0].shape = None
                fired.append(("crop", name))
        remove_detached(graph)
        return PassResult.of(fired)


def _cropped(graph: gs.Graph, op: str) -> list[tuple[gs.Node, gs.Node]]:
    """Each Slice or Pad, with the node of this operator that makes its input for it alone."""
    crops = [node for node in graph.nodes if is_standard(node, *CROPS)]
    return [(node, made) for node in crops if (made := made_for_one(graph, input_at(node, 0), op)) is not None]


def _has_plain_pads(conv: gs.Node) -> bool:
    return conv.attrs.get("auto_pad", "NOTSET") == "NOTSET" and not conv.attrs.get("output_shape")


def _cuts(known: Symbolic, node: gs.Node) -> Spans | None:
    """How much a Slice or Pad cuts off at the beginning and the end of every axis; None where it does anything else,
    or not the same for all sizes."""
    before, after = known.shape(node.inputs[0]), known.shape(node.outputs[0])
    if before is None or after is None:
        return None
    if is_standard(node, "Pad"):
        spans = pad_spans(node, len(before))
        grows = spans is None or any(width > 0 for span in spans for width in span)
        return None if spans is None or grows else [(-begin, -end) for begin, end in spans]
    parts = slice_parts(known, node, len(before))
    if parts is None:
        return None
    cuts = [(0, 0)] * len(before)
    for axis, first, _, step in parts:
        start, cut = first.integer, (before[axis] - after[axis]).integer
        if step != 1 or start is None or start < 0 or cut is None or cut < start:
            return None
        cuts[axis] = (start, cut - start)
    return cuts
