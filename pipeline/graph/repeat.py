"""Nearest upsampling that Keras and TensorFlow write as a repetition of rows and columns."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from pipeline.graph.base import (
    Fired,
    Pass,
    PassResult,
    constant_value,
    detach,
    input_at,
    is_standard,
    label,
    made_for_one,
    names_in,
    place_of,
    remove_detached,
)
from pipeline.graph.shapes import unique
from pipeline.graph.symbolic import Symbolic
from pipeline.graph.symbols import expr
from pipeline.graph.versions import OPTIONAL_OPSET, RESIZE_OPSET

NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}


class RepeatToResize(Pass):
    """1. Unsqueeze(axis) → Tile or Expand by n along that axis → Reshape that merges it into the axis before repeats
       every row n times: a nearest Resize by n. A Transpose in between stays, behind the Resize.
    2. Two nearest Resizes by whole numbers in a row, the first read by nobody else, are one.

    Not: before opset 11; where a tensor in between is read by anyone else or leaves the graph; where the algebra does
    not prove that the Reshape merges these two axes and nothing else.
    """

    name = "repeat-to-resize"

    def call(self, graph: gs.Graph) -> PassResult:
        if graph.opset < RESIZE_OPSET:
            return PassResult(False)
        fired: list[Fired] = []
        if any(is_standard(node, "Tile", "Expand") for node in graph.nodes):
            known, taken = Symbolic(graph), names_in(graph)
            for node in list(graph.nodes):
                if is_standard(node, "Reshape") and _repeat(graph, known, node, taken):
                    fired.append(("repeat", label(node)))
        for node in graph.nodes:
            if _is_whole_nearest(node) and _joined(graph, node):
                fired.append(("join", label(node)))
        remove_detached(graph)
        return PassResult.of(fired)


def _repeat(graph: gs.Graph, known: Symbolic, node: gs.Node, taken: set[str]) -> bool:
    transpose = made_for_one(graph, input_at(node, 0), "Transpose")
    copies = made_for_one(graph, input_at(transpose or node, 0), "Tile", "Expand")
    unsqueeze = made_for_one(graph, input_at(copies, 0), "Unsqueeze") if copies is not None else None
    if copies is None or unsqueeze is None:
        return False
    source, wide = known.shape(unsqueeze.inputs[0]), known.shape(copies.inputs[0])
    axes = known.integers(unsqueeze.inputs[1]) if len(unsqueeze.inputs) > 1 else unsqueeze.attrs.get("axes")
    result = known.shape(node.outputs[0])
    if source is None or wide is None or result is None or axes is None or len(axes) != 1:
        return False
    axis = axes[0] % len(wide)
    times = _times(known, copies, axis, len(wide))
    order = transpose.attrs["perm"] if transpose is not None else list(range(len(wide)))
    place = order.index(axis)
    if times is None or place == 0 or len(result) != len(source):
        return False
    partner = order[place - 1]
    grown = partner - (partner > axis)
    kept = [entry - (entry > axis) for entry in order if entry != axis]
    wanted = [source[entry] * (times if entry == grown else 1) for entry in kept]
    if list(result) != wanted:
        return False
    scales = np.ones(len(source), np.float32)
    scales[grown] = times
    resize = _resize(graph, unsqueeze.inputs[0], scales, taken)
    position = place_of(graph, node)
    graph.nodes.insert(position, resize)
    final = node.outputs[0]
    detach(*(old for old in (node, transpose, copies, unsqueeze) if old is not None))
    if kept == sorted(kept):
        resize.outputs = [final]
        return True
    middle = gs.Variable(unique(f"{final.name}.resize", taken), final.dtype)
    resize.outputs = [middle]
    name = unique(f"{resize.name}.transpose", taken)
    graph.nodes.insert(position + 1, gs.Node("Transpose", name, {"perm": kept}, [middle], [final]))
    return True


def _times(known: Symbolic, copies: gs.Node, axis: int, rank: int) -> int | None:
    """How often Tile or Expand repeats this axis; None where it is unknown or another axis grows too."""
    shape, result = known.shape(copies.inputs[0]), known.shape(copies.outputs[0])
    if is_standard(copies, "Tile"):
        repeats = known.integers(copies.inputs[1])
        if repeats is None or any(count != 1 for i, count in enumerate(repeats) if i != axis):
            return None
        return repeats[axis] if repeats[axis] > 0 else None
    if shape is None or result is None or len(result) != rank or shape[axis] != expr(1):
        return None
    if any(result[i] != shape[i] for i in range(rank) if i != axis):
        return None
    return result[axis].integer or None


def _resize(graph: gs.Graph, source: gs.Tensor, scales: NDArray[np.float32], taken: set[str]) -> gs.Node:
    name = unique("repeat.resize", taken)
    roi = gs.Variable.empty()
    if graph.opset < OPTIONAL_OPSET:
        roi = gs.Constant(unique(f"{name}.roi", taken), np.zeros(0, np.float32))
    return gs.Node("Resize", name, dict(NEAREST), [source, roi, gs.Constant(unique(f"{name}.scales", taken), scales)])


def _is_whole_nearest(node: gs.Node) -> bool:
    if not is_standard(node, "Resize") or len(node.inputs) != 3 or "axes" in node.attrs:
        return False
    scales = constant_value(input_at(node, 2))
    if scales is None or not scales.size or (scales < 1).any() or (scales != np.round(scales)).any():
        return False
    return all(node.attrs.get(key) == value for key, value in NEAREST.items())


def _joined(graph: gs.Graph, node: gs.Node) -> bool:
    first = made_for_one(graph, input_at(node, 0), "Resize")
    if first is None or not _is_whole_nearest(first):
        return False
    scales = gs.Constant(node.inputs[2].name, first.inputs[2].values * node.inputs[2].values)
    node.inputs[2] = scales
    node.inputs[0] = first.inputs[0]
    detach(first)
    return True
