"""Gathers that repeat pixels: what exporters write for ``F.interpolate(mode="nearest-exact")``, as Resize."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto

from pipeline.graph.base import (
    Fired,
    Pass,
    PassResult,
    constant_value,
    detach,
    input_at,
    is_standard,
    label,
    made_by,
    names_in,
    only_reader,
    remove_detached,
)
from pipeline.graph.resampling import exact_scale, index_map
from pipeline.graph.shapes import unique
from pipeline.graph.symbolic import Symbolic
from pipeline.graph.symbols import LARGEST, expr, floor
from pipeline.graph.symbols import ratio as ratio_of
from pipeline.graph.versions import OPTIONAL_OPSET

# Tried in this order. The second picks floor((i + 1/2) / scale), the definition of nearest-exact.
FORMS = (("asymmetric", "floor"), ("half_pixel", "round_prefer_ceil"), ("half_pixel", "round_prefer_floor"))


class GatherToResize(Pass):
    """Transpose (image axes first) → GatherND → Transpose (back), as torch's exporter writes nearest-exact.

    1. Constant indices along each image axis that are those of a nearest Resize: that Resize.
    2. Indices that the graph computes for dynamic sizes, floor((i + 1/2) · (size / (size · scale))): the Resize by
       scale, where size is proved to be the axis's and the indices of every size up to ``LARGEST`` are the same.

    The source indices are compared with those that ONNX Runtime's Resize picks.

    Not: before opset 13; where the tensors between have other readers; indices that are no product of one list per
    axis; axes whose ratio is not one number for all sizes.
    """

    name = "gather-to-resize"

    def call(self, graph: gs.Graph) -> PassResult:
        gathers = [node for node in graph.nodes if is_standard(node, "GatherND") and graph.opset >= OPTIONAL_OPSET]
        if not gathers:
            return PassResult(False)
        known = Symbolic(graph)
        fired: list[Fired] = []
        for node in gathers:
            name = label(node)
            if self._rewrite(graph, node, known):
                fired.append(("nearest-exact", name))
        remove_detached(graph)
        return PassResult.of(fired)

    @staticmethod
    def _rewrite(graph: gs.Graph, node: gs.Node, known: Symbolic) -> bool:
        first, last = made_by(node.inputs[0], "Transpose"), only_reader(graph, node.outputs[0], "Transpose")
        if first is None or last is None or node.attrs.get("batch_dims", 0) != 0:
            return False
        data, rank = first.inputs[0], len(first.attrs.get("perm", ()))
        count = rank - 2
        if count < 1 or list(first.attrs["perm"]) != [*range(2, rank), 0, 1]:
            return False
        if list(last.attrs.get("perm", ())) != [count, count + 1, *range(count)]:
            return False
        shape = known.shape(data)
        if shape is None or len(shape) != rank:
            return False
        constant = constant_value(node.inputs[1])
        if constant is not None:
            sources = [size.integer for size in shape[2:]]
            found = _constant(constant, sources, graph.opset)
        else:
            found = _computed(node.inputs[1], shape[2:], known, graph.opset)
        if found is None:
            return False
        scales, form = found
        result = last.outputs[0]
        weight = gs.Constant(unique(f"{result.name}.scales", names_in(graph)), np.array([1, 1, *scales], np.float32))
        node.inputs = [data, gs.Variable.empty(), weight]
        node.op, node.domain = "Resize", None
        node.attrs.clear()
        node.attrs |= {"mode": "nearest", "coordinate_transformation_mode": form[0], "nearest_mode": form[1]}
        detach(last)
        node.outputs = [result]
        return True


def _constant(
    indices: NDArray[Any], sources: Sequence[int | None], opset: int
) -> tuple[list[np.float32], tuple[str, str]] | None:
    """Scales and form of the Resize that picks (*sizes, axes) constant indices."""
    count = len(sources)
    if indices.ndim != count + 1 or indices.shape[-1] != count or indices.size == 0:
        return None
    lists = [indices[(0,) * axis + (slice(None),) + (0,) * (count - axis - 1) + (axis,)] for axis in range(count)]
    if not np.array_equal(np.stack(np.meshgrid(*lists, indexing="ij"), axis=-1), indices):
        return None
    if any(source is None or picked.min() < 0 or picked.max() >= source
           for picked, source in zip(lists, sources, strict=True)):  # fmt: skip
        return None
    scales = [exact_scale(source or 0, len(picked)) for picked, source in zip(lists, sources, strict=True)]
    if any(scale is None for scale in scales):
        return None
    for form in FORMS:
        maps = [_map(form, source or 0, scale, opset) for source, scale in zip(sources, scales, strict=True)]
        if all(np.array_equal(picked, found) for picked, found in zip(lists, maps, strict=True)):
            return [scale for scale in scales if scale is not None], form
    return None


def _map(form: tuple[str, str], source: int, scale: Any, opset: int) -> NDArray[np.int64]:
    attributes = {"mode": "nearest", "coordinate_transformation_mode": form[0], "nearest_mode": form[1]}
    return index_map(attributes, source, opset, scale=scale)


def _computed(
    indices: gs.Tensor, sizes: Sequence[Any], known: Symbolic, opset: int
) -> tuple[list[np.float32], tuple[str, str]] | None:
    """Scales and form for ``Concat(Unsqueeze(Expand(rows)), Unsqueeze(Expand(columns)))`` over two dynamic axes."""
    concat = made_by(indices, "Concat")
    if concat is None or len(sizes) != 2 or len(concat.inputs) != 2 or concat.attrs["axis"] not in (-1, 2):
        return None
    parts = [_expanded(part) for part in concat.inputs]
    if any(part is None for part in parts):
        return None
    (rows, row_target), (columns, column_target) = parts  # type: ignore[misc]
    rows_node = made_by(rows, "Unsqueeze")
    if rows_node is None or constant_value(input_at(rows_node, 1)) is None or row_target is not column_target:
        return None
    if constant_value(rows_node.inputs[1]).tolist() not in ([-1], [1]):
        return None
    shape = made_by(row_target, "Shape")
    grid = made_by(shape.inputs[0], "Max") if shape is not None else None
    if shape is None or grid is None or shape.attrs.get("start", 0) != 0 or "end" in shape.attrs:
        return None
    if {id(tensor) for tensor in grid.inputs} != {id(rows), id(columns)}:
        return None
    factors: list[np.float32] = []
    places: list[NDArray[np.float32]] = []
    for picked, size in zip((rows_node.inputs[0], columns), sizes, strict=True):
        found = _ratio(picked, known)
        if found is None:
            return None
        length, ratio = found
        scale = np.float32(float(1 / ratio))
        if Fraction(float(scale)) != 1 / ratio or length != floor(size * (1 / ratio)):
            return None
        count = int(LARGEST * (1 / ratio))
        factors.append(scale)
        places.append((np.arange(count, dtype=np.float32) + np.float32(0.5)) * np.float32(float(ratio)))
    for form in FORMS:
        maps = [_map(form, LARGEST, scale, opset) for scale in factors]
        if all(np.array_equal(np.floor(place).astype(np.int64), found)
               for place, found in zip(places, maps, strict=True)):  # fmt: skip
            return factors, form
    return None


def _expanded(tensor: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor] | None:
    """Indices and target shape of ``Unsqueeze(Expand(indices, shape), -1)``."""
    node = made_by(tensor, "Unsqueeze")
    axes = constant_value(input_at(node, 1)) if node is not None else None
    expand = made_by(node.inputs[0], "Expand") if node is not None else None
    if expand is None or axes is None or axes.tolist() not in ([-1], [2]):
        return None
    return expand.inputs[0], expand.inputs[1]


def _ratio(indices: gs.Tensor, known: Symbolic) -> tuple[Any, Fraction] | None:
    """Length and r of ``Cast((Range(0, length, 1) + 0.5) · r)`` to int64, in float32."""
    cast = made_by(indices, "Cast")
    product = made_by(cast.inputs[0], "Mul") if cast is not None else None
    if cast is None or product is None or cast.attrs["to"] != TensorProto.INT64:
        return None
    for places, factor in (product.inputs, reversed(product.inputs)):
        added, ratio = made_by(places, "Add"), _number(factor, known)
        if added is None or ratio is None or ratio <= 0:
            continue
        for ramp, half in (added.inputs, reversed(added.inputs)):
            steps, offset = made_by(ramp, "Range"), constant_value(half)
            if steps is None or offset is None or offset.size != 1 or offset.dtype != np.float32 or offset != 0.5:
                continue
            start, end, step = (known.value(tensor) for tensor in steps.inputs)
            if start is None or end is None or step is None:
                return None
            whole = start.flat[0] == expr(0) and step.flat[0] == expr(1)
            return (end.flat[0], ratio) if whole else None
    return None


def _number(tensor: gs.Tensor, known: Symbolic) -> Fraction | None:
    """The number that a float scalar is for all sizes, rounded once: a constant, or the quotient of two sizes."""
    node, value = made_by(tensor, "Div"), known.value(tensor)
    if node is not None:
        top, bottom = (known.value(part) for part in node.inputs)
        if top is None or bottom is None or top.size != 1 or bottom.size != 1:
            return None
        return ratio_of(top.flat[0], bottom.flat[0])
    if value is None or value.size != 1:
        return None
    constant: Fraction | None = value.flat[0].constant
    return constant
