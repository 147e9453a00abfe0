"""Unpooling to the places of the maxima (SegNet), in operators that TensorRT knows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
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
    is_output,
    is_standard,
    label,
    made_by,
    names_in,
    only_reader,
    place_of,
    remove_detached,
)
from pipeline.graph.shape_rules import Shape
from pipeline.graph.shapes import unique
from pipeline.graph.symbolic import Symbolic
from pipeline.graph.symbols import expr

# Equal takes floats from here on, and ReduceMax its axes as an input from there on.
FIRST_OPSET = 11
AXES_INPUT_OPSET = 18
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


@dataclass(frozen=True)
class _Unpool:
    """One unpooling: ``pool``'s indices place ``values``; ``last`` makes the result."""

    pool: gs.Node
    values: gs.Tensor
    last: gs.Node


class RewriteUnpool(Pass):
    """MaxPool with indices, and what scatters values to those indices. For a pool of k × k windows side by side
    (strides k, no pads, no dilations) over sizes that k divides:

    1. MaxUnpool of the same windows.
    2. What torch's exporter writes for ``max_unpool2d``: the pool's indices less the first index of each plane (a
       second MaxPool, of 1 × 1), plus the planes' offsets again, and ScatterND of the values into zeros.

    Both become: SpaceToDepth brings each window's pixels into one column; a pixel is chosen where it equals its
    column's maximum and no earlier pixel does (ONNX takes the first of equal ones, and after a ReLU whole windows
    are 0); Where puts the values there and DepthToSpace brings them back. One choice per pool serves all its
    unpoolings. The pool keeps its values alone.

    Not: before opset 11; other windows; sizes that k is not proved to divide; an output of another size than the pool's
    input; indices from elsewhere, or that leave the graph; other types than floats.
    """

    name = "rewrite-unpool"

    def call(self, graph: gs.Graph) -> PassResult:
        ends = [node for node in graph.nodes if is_standard(node, "MaxUnpool", "ScatterND")]
        if not ends or graph.opset < FIRST_OPSET:
            return PassResult(False)
        known = Symbolic(graph)
        found = [
            unpool for node in ends for unpool in [_max_unpool(node, known) or _scatter(graph, node, known)] if unpool
        ]
        emitter = _Emitter(graph, known)
        fired: list[Fired] = []
        for unpool in found:
            fired.append(("unpool", label(unpool.last)))
            emitter.write(unpool)
        if fired:
            remove_detached(graph)
            graph.cleanup(recurse_functions=False)
            for pool in emitter.pools:
                if not pool.outputs[1].outputs and not is_output(graph, pool.outputs[1]):
                    del pool.outputs[1]
        return PassResult.of(fired)


class _Emitter:
    def __init__(self, graph: gs.Graph, known: Symbolic) -> None:
        self.graph, self.known = graph, known
        self.taken = names_in(graph)
        self.chosen: dict[int, tuple[gs.Tensor, gs.Tensor]] = {}
        self.pools: list[gs.Node] = []
        self.place = 0

    def write(self, unpool: _Unpool) -> None:
        pool, result = unpool.pool, unpool.last.outputs[0]
        size, data = pool.attrs["kernel_shape"][0], pool.inputs[0]
        if id(pool) not in self.chosen:
            self.place = place_of(self.graph, pool) + 1
            self.chosen[id(pool)] = self._choice(pool)
            self.pools.append(pool)
        first, columns = self.chosen[id(pool)]
        self.place = place_of(self.graph, unpool.last)
        stem = result.name
        kind = _numpy_type(self.known, data)
        values = self._add("Reshape", [unpool.values, self._constant(f"{stem}.flat", [0, 1, -1])], f"{stem}.values")
        zero = gs.Constant(unique(f"{stem}.zero", self.taken), np.zeros((), kind))
        placed = self._add("Where", [first, values, zero], f"{stem}.placed")
        shape = self.known.shape(data)
        depth = [size.integer for size in shape[1:]] if shape is not None else [None]
        if None not in depth:
            channels, height, width = (int(entry or 0) for entry in depth)
            target: gs.Tensor = self._constant(f"{stem}.grid", [0, channels * size**2, height // size, width // size])
        else:
            target = self._add("Shape", [columns], f"{stem}.grid", np.dtype(np.int64))
        grid = self._add("Reshape", [placed, target], f"{stem}.depth")
        detach(unpool.last)
        name = unique(label(unpool.last) if unpool.last.name else stem, self.taken)
        self._insert(gs.Node("DepthToSpace", name, {"blocksize": size}, [grid], [result]))

    def _choice(self, pool: gs.Node) -> tuple[gs.Tensor, gs.Tensor]:
        """The mask (batch, place in the window, channel and window) of each window's first maximum."""
        data, size, stem = pool.inputs[0], pool.attrs["kernel_shape"][0], pool.outputs[0].name
        kind, bools = _numpy_type(self.known, data), np.dtype(np.bool_)
        columns = self._add("SpaceToDepth", [data], f"{stem}.windows", attrs={"blocksize": size})
        pixels = self._add("Reshape", [columns, self._constant(f"{stem}.flat", [0, size**2, -1])], f"{stem}.pixels")
        greatest = self._add("Equal", [pixels, self._maximum(pixels, f"{stem}.greatest")], f"{stem}.is_greatest", bools)
        order = np.arange(size**2, 0, -1).astype(kind).reshape(1, -1, 1)
        ranks = gs.Constant(unique(f"{stem}.order", self.taken), order)
        zero = gs.Constant(unique(f"{stem}.zero", self.taken), np.zeros((), kind))
        ranked = self._add("Where", [greatest, ranks, zero], f"{stem}.ranked")
        return self._add("Equal", [ranked, self._maximum(ranked, f"{stem}.rank")], f"{stem}.is_first", bools), columns

    def _maximum(self, tensor: gs.Tensor, name: str) -> gs.Tensor:
        if self.graph.opset < AXES_INPUT_OPSET:
            return self._add("ReduceMax", [tensor], name, attrs={"axes": [1]})
        return self._add("ReduceMax", [tensor, self._constant(f"{name}.axes", [1])], name)

    def _constant(self, name: str, values: list[int]) -> gs.Constant:
        return gs.Constant(unique(name, self.taken), np.array(values, np.int64))

    def _add(
        self, op: str, inputs: list[gs.Tensor], name: str, kind: Any = None, attrs: dict[str, Any] | None = None
    ) -> gs.Tensor:
        result = gs.Variable(unique(name, self.taken), inputs[0].dtype if kind is None else kind)
        self._insert(gs.Node(op, result.name, attrs, inputs, [result]))
        return result

    def _insert(self, node: gs.Node) -> None:
        self.graph.nodes.insert(self.place, node)
        self.place += 1


def _numpy_type(known: Symbolic, tensor: gs.Tensor) -> Any:
    return onnx.helper.tensor_dtype_to_np_dtype(known.element_type(tensor))


def _windows(pool: gs.Node, known: Symbolic) -> int | None:
    """The side of the windows, where they are square, side by side and cover the input."""
    kernel, shape = list(pool.attrs.get("kernel_shape", ())), known.shape(pool.inputs[0])
    if len(kernel) != 2 or kernel[0] != kernel[1] or list(pool.attrs.get("strides", [1, 1])) != kernel:
        return None
    if any(pool.attrs.get("pads", ())) or any(step != 1 for step in pool.attrs.get("dilations", ())):
        return None
    if pool.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or pool.attrs.get("storage_order", 0):
        return None
    if shape is None or len(shape) != 4 or known.element_type(pool.inputs[0]) not in FLOATS:
        return None
    size = int(kernel[0])
    return size if all((side * Fraction(1, size)).whole for side in shape[2:]) else None


def _indexing_pool(indices: gs.Tensor, known: Symbolic) -> gs.Node | None:
    """The pool that these are the indices of."""
    pool = made_by(indices, "MaxPool")
    if pool is None or len(pool.outputs) != 2 or pool.outputs[1] is not indices or _windows(pool, known) is None:
        return None
    return pool


def _max_unpool(node: gs.Node, known: Symbolic) -> _Unpool | None:
    pool = _indexing_pool(node.inputs[1], known) if node.op == "MaxUnpool" else None
    if pool is None:
        return None
    size, shape = list(pool.attrs["kernel_shape"]), known.shape(pool.inputs[0])
    if list(node.attrs["kernel_shape"]) != size or list(node.attrs.get("strides", [1, 1])) != size:
        return None
    wanted = known.value(input_at(node, 2))
    if any(node.attrs.get("pads", ())) or (input_at(node, 2) is not None and (wanted is None or shape is None)):
        return None
    if wanted is not None and tuple(wanted.flat) != shape:
        return None
    return _Unpool(pool, node.inputs[0], node)


def _scatter(graph: gs.Graph, node: gs.Node, known: Symbolic) -> _Unpool | None:
    if node.op != "ScatterND" or node.attrs.get("reduction", "none") != "none":
        return None
    last = only_reader(graph, node.outputs[0], "Reshape")
    flat = made_by(node.inputs[2], "Reshape")
    places = made_by(node.inputs[1], "Unsqueeze", "Reshape")
    if last is None or flat is None or places is None or not _is_zero(node.inputs[0], known):
        return None
    if places.op == "Unsqueeze":
        places = made_by(places.inputs[0], "Reshape")
    pool = _offset_pool(places.inputs[0], known) if places is not None else None
    if pool is None:
        return None
    shape, values, target = known.shape(pool.inputs[0]), flat.inputs[0], known.value(last.inputs[1])
    if shape is None or target is None or target.size != len(shape):
        return None
    # One size may follow from the others, since all entries are as many as the pool's input has.
    named = all(wanted in (size, expr(-1)) for wanted, size in zip(target.flat, shape, strict=True))
    if not named or known.shape(node.inputs[0]) != (math.prod(shape, start=expr(1)),):
        return None
    if known.shape(values) != known.shape(pool.outputs[0]):
        return None
    return _Unpool(pool, values, last)


def _is_zero(tensor: gs.Tensor, known: Symbolic) -> bool:
    """Whether every entry is 0: an initializer, or a ConstantOfShape behind Reshapes."""
    node = made_by(tensor, "Reshape", "ConstantOfShape")
    while node is not None and node.op == "Reshape":
        tensor = node.inputs[0]
        node = made_by(tensor, "Reshape", "ConstantOfShape")
    if node is not None:
        fill = node.attrs.get("value")
        return fill is None or not np.any(fill.values)
    value = constant_value(tensor)
    return value is not None and not np.any(value)


def _offset_pool(places: gs.Tensor, known: Symbolic) -> gs.Node | None:
    """The pool behind ``(indices - first index of the plane) + offset of the plane``."""
    added = made_by(places, "Add")
    for relative, offsets in _both_ways(added):
        taken = made_by(relative, "Sub")
        pool = _indexing_pool(taken.inputs[0], known) if taken is not None else None
        if taken is None or pool is None or not _is_first_index(taken.inputs[1], pool.inputs[0], known):
            continue
        shape = known.shape(pool.inputs[0])
        if shape is not None and _is_offset(offsets, shape, known):
            return pool
    return None


def _both_ways(node: gs.Node | None) -> Iterator[tuple[gs.Tensor, gs.Tensor]]:
    if node is not None:
        yield node.inputs[0], node.inputs[1]
        yield node.inputs[1], node.inputs[0]


def _is_first_index(tensor: gs.Tensor, data: gs.Tensor, known: Symbolic) -> bool:
    """Whether this is the flat index of each plane's first pixel, by a MaxPool of 1 × 1 over ``data``."""
    cut = made_by(tensor, "Slice")
    pool = made_by(cut.inputs[0], "MaxPool") if cut is not None else None
    if cut is None or pool is None or len(pool.outputs) != 2 or pool.outputs[1] is not cut.inputs[0]:
        return False
    settings = [known.integers(input_at(cut, slot)) for slot in range(1, 5)]
    plain = not any(pool.attrs.get("pads", ())) and not pool.attrs.get("storage_order", 0)
    one = list(pool.attrs.get("kernel_shape", ())) == [1, 1] and list(pool.attrs.get("strides", [1, 1])) == [1, 1]
    corner = settings[:3] == [[0, 0], [1, 1], [2, 3]] and settings[3] in (None, [1, 1])
    return pool.inputs[0] is data and plain and one and corner


def _is_offset(tensor: gs.Tensor, shape: Shape, known: Symbolic) -> bool:
    """Whether this is (batch · channels + channel) · height · width, as (batch, channels, 1, 1)."""
    batch, channels, height, width = shape
    constant = constant_value(tensor)
    if constant is not None:
        sizes = [size.integer for size in shape]
        if None in sizes:
            return False
        n, c, h, w = (int(size or 0) for size in sizes)
        expected: NDArray[np.int64] = np.arange(n * c).reshape(n, c, 1, 1) * (h * w)
        return bool(np.array_equal(constant, expected))
    for ramp, factor in _both_ways(made_by(tensor, "Mul")):
        area, shaped = known.value(factor), made_by(ramp, "Reshape")
        steps = made_by(shaped.inputs[0], "Range") if shaped is not None else None
        if shaped is None or steps is None or area is None or area.size != 1 or area.flat[0] != height * width:
            continue
        planes = (batch * channels, channels, expr(1), expr(1))
        values = [known.value(part) for part in steps.inputs]
        limits = [value.flat[0] for value in values if value is not None and value.size == 1]
        form = known.integers(shaped.inputs[1])
        if limits == [expr(0), planes[0], expr(1)] and form == [-1, channels.integer, 1, 1]:
            return True
    return False
