"""Resize nodes in the form that engines read best: constant float32 scales and no roi."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from pipeline.graph.base import Fired, Pass, PassResult, constant_value, input_at, is_standard, label
from pipeline.graph.shapes import unique
from pipeline.graph.sizes import infer_shapes, known_sizes

SCALES, SIZES = 2, 3
# From here on roi and scales may be left out.
OPTIONAL_OPSET = 13


class NormalizeResize(Pass):
    """1. Empty roi, empty scales or empty sizes are omitted, from opset 13 on: before, they are required inputs.
    2. Sizes become constant float32 scales where every output size is known, or is the same axis as the input's
       (scale 1), and floor(size_in · scale) gives size_out exactly, in float32 and in float64.

    Not: with ``axes``, with a ``keep_aspect_ratio_policy`` other than stretch, where a size is computed from a dynamic
    axis, where no float32 scale gives the size.
    """

    name = "normalize-resize"

    def call(self, graph: gs.Graph) -> PassResult:
        fired: list[Fired] = []
        resizes = [node for node in graph.nodes if is_standard(node, "Resize") and graph.opset >= 11]
        for node in resizes if graph.opset >= OPTIONAL_OPSET else ():
            fired += self._omit_empty(node)
        if any(input_at(node, SIZES) is not None for node in resizes):
            infer_shapes(graph)
        taken = set(graph.tensors())
        for node in resizes:
            scales = self._scales(node)
            if scales is not None:
                name = unique(f"{node.outputs[0].name}.scales", taken)
                node.inputs[SCALES] = gs.Constant(name, scales)
                del node.inputs[SIZES]
                fired.append(("sizes-to-scales", label(node)))
        return PassResult.of(fired)

    @staticmethod
    def _omit_empty(node: gs.Node) -> list[Fired]:
        fired: list[Fired] = []
        for slot in range(1, len(node.inputs)):
            value = constant_value(input_at(node, slot))
            if value is not None and value.size == 0:
                node.inputs[slot] = gs.Variable.empty()
                fired.append(("omit-empty", label(node)))
        while fired and node.inputs[-1].is_empty():
            del node.inputs[-1]
        return fired

    @staticmethod
    def _scales(node: gs.Node) -> NDArray[np.float32] | None:
        if input_at(node, SIZES) is None or "axes" in node.attrs:
            return None
        if node.attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch":
            return None
        wanted, given = known_sizes(node.inputs[SIZES]), node.inputs[0].shape
        if not isinstance(wanted, list) or given is None or len(wanted) != len(given):
            return None
        scales: list[np.float32] = []
        for size, source in zip(wanted, given, strict=True):
            if isinstance(size, str) and size == source:
                scales.append(np.float32(1))
                continue
            if not isinstance(size, int) or not isinstance(source, int) or source < 1:
                return None
            scale = np.float32(size) / np.float32(source)
            if int(np.floor(np.float32(source) * scale)) != size or int(source * float(scale)) != size:
                return None
            scales.append(scale)
        return np.array(scales, np.float32)
