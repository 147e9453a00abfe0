"""Shape arithmetic: sizes that are known become constants, and what has to stay becomes as short as it can be."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto, helper

from pipeline.graph.base import (
    Fired,
    Pass,
    PassResult,
    detach,
    input_at,
    is_output,
    is_standard,
    label,
    names_in,
    place_of,
    remove_detached,
)
from pipeline.graph.resampling import exact_scale
from pipeline.graph.shape_rules import Shape, Value
from pipeline.graph.shapes import unique
from pipeline.graph.symbolic import Symbolic
from pipeline.graph.symbols import Expr, exact, expr, ratio
from pipeline.graph.value_rules import VALUES

SCALES, SIZES = 2, 3
KINDS = (TensorProto.INT32, TensorProto.INT64, TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.BOOL)
# Inputs that hold computed sizes, as 1-D int64 tensors.
SIZE_SLOTS = {"Resize": (SIZES,), "Pad": (1,), "Reshape": (1,), "Expand": (1,), "Slice": (1, 2)}
# From here on Shape takes start and end.
SHAPE_RANGE_OPSET = 15
FAR = 2**63 - 1


class FoldSizes(Pass):
    """1. A node of shape arithmetic whose result is the same for all sizes that the graph may be given becomes a
       constant: also where only some axes are dynamic (``Gather(Shape(x), 2)`` with a dynamic batch), and where the
       sizes are not known but what is computed from them is (alignment pads of sizes that are multiples of 16).

    Not: graph outputs; float arithmetic that float32 would round.
    """

    name = "fold-sizes"

    def call(self, graph: gs.Graph) -> PassResult:
        if not any(is_standard(node, "Shape", "Size") for node in graph.nodes):
            return PassResult(False)
        known = Symbolic(graph)
        fired: list[Fired] = []
        for node in graph.nodes:
            if not is_standard(node, *VALUES) or not node.inputs or is_output(graph, node.outputs[0]):
                continue
            value = _constant(known, node.outputs[0])
            if value is not None:
                fired.append(("size", label(node)))
                tensor = node.outputs[0]
                detach(node)
                tensor.to_constant(value)
        remove_detached(graph)
        return PassResult.of(fired)


class SizesToScales(Pass):
    """1. Sizes of a Resize become constant float32 scales where for every axis the output's size is the input's times
       one constant that float32 holds, for all sizes that the graph may be given; with both sizes known, where
       floor(input · scale) gives the output's size exactly, in float32 and in float64. ``axes`` goes with them.

    Not: with a ``keep_aspect_ratio_policy`` other than stretch; where the sizes' ratio depends on the sizes, as with
    ``size=skip.shape`` of a skip that may have an odd size.
    """

    name = "sizes-to-scales"

    def call(self, graph: gs.Graph) -> PassResult:
        resizes = [n for n in graph.nodes if is_standard(n, "Resize") and input_at(n, SIZES) is not None]
        if not resizes:
            return PassResult(False)
        known, taken = Symbolic(graph), names_in(graph)
        fired: list[Fired] = []
        for node in resizes:
            scales = self._scales(known, node)
            if scales is not None:
                node.inputs[SCALES] = gs.Constant(unique(f"{node.outputs[0].name}.scales", taken), scales)
                del node.inputs[SIZES]
                node.attrs.pop("axes", None)
                fired.append(("sizes-to-scales", label(node)))
        return PassResult.of(fired)

    @staticmethod
    def _scales(known: Symbolic, node: gs.Node) -> NDArray[np.float32] | None:
        wanted, given = known.value(node.inputs[SIZES]), known.shape(node.inputs[0])
        if wanted is None or given is None or node.attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch":
            return None
        axes = [axis % len(given) for axis in node.attrs.get("axes", range(len(given)))]
        if wanted.size != len(axes):
            return None
        scales = np.ones(len(given), np.float32)
        for axis, size in zip(axes, wanted.flat, strict=True):
            scale = _scale(size, given[axis])
            if scale is None:
                return None
            scales[axis] = scale
        return scales


class ShortenArithmetic(Pass):
    """Sizes that a Resize, Pad, Reshape, Expand or Slice reads are computed from as few nodes as the graph allows.

    1. Reshape: a size that the input has at the same place is 0, one that follows from the others -1.
    2. Slice: an end at or behind the axis' end is the largest integer, one that is k before it is -k; Expand: a size
       that the input has is 1.
    3. What is the size of a tensor above is read by one Shape (with a Slice before opset 15); an alignment pad that is
       the difference of two sizes by two Shapes and one Sub; constants and these parts by one Concat.

    All of them or none: the rewrite stays only where the graph gets fewer nodes by it.

    Not: where a size is neither constant nor the size (or, for Pad, a difference of sizes) of tensors above.
    """

    name = "shorten-arithmetic"

    def call(self, graph: gs.Graph) -> PassResult:
        places = list(self._places(graph))
        if not places:
            return PassResult(False)
        known = Symbolic(graph)
        draft = _Draft(graph, known)
        before = len(_live(graph))
        fired: list[Fired] = []
        for node, slot in places:
            if draft.replace(node, slot):
                fired.append(("shorten", label(node)))
        if len(_live(graph)) >= before:
            draft.undo()
            return PassResult(False)
        return PassResult.of(fired)

    @staticmethod
    def _places(graph: gs.Graph) -> Iterator[tuple[gs.Node, int]]:
        for node in graph.nodes:
            for slot in SIZE_SLOTS.get(node.op, ()) if is_standard(node, *SIZE_SLOTS) else ():
                tensor = input_at(node, slot)
                if tensor is not None and not isinstance(tensor, gs.Constant) and tensor.inputs:
                    yield node, slot


@dataclass
class _Draft:
    """A rewrite that can be taken back."""

    graph: gs.Graph
    known: Symbolic
    added: list[gs.Node] = field(default_factory=list)
    replaced: list[tuple[gs.Node, int, gs.Tensor]] = field(default_factory=list)
    made: dict[tuple[object, ...], gs.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._taken = names_in(self.graph)

    def replace(self, node: gs.Node, slot: int) -> bool:
        """Whether the sizes in this slot are now computed in the shortest way known."""
        value = self.known.value(node.inputs[slot])
        if value is None or value.ndim != 1 or value.size == 0:
            return False
        parts = self._parts(node, slot, value)
        if parts is None:
            return False
        self.replaced.append((node, slot, node.inputs[slot]))
        node.inputs[slot] = parts[0] if len(parts) == 1 else self._node("Concat", parts, node, axis=0)
        return True

    def undo(self) -> None:
        for node, slot, tensor in self.replaced:
            node.inputs[slot] = tensor
        added = {id(node) for node in self.added}
        detach(*self.added)
        self.graph.nodes = [node for node in self.graph.nodes if id(node) not in added]

    def _parts(self, node: gs.Node, slot: int, value: Value) -> list[gs.Tensor] | None:
        entries = _relative(self.known, node, slot, list(value))
        sources = list(_above(node, self.known))
        parts: list[gs.Tensor] = []
        place = 0
        while place < len(entries):
            run = _longest(entries[place:], sources)
            numbers = _numbers(entries[place:])
            whole = self._whole_difference(node, entries, place, sources)
            if whole is not None:
                length, part = whole
                parts.append(part)
            elif run is not None and run[0] > numbers:
                length, tensor, axis = run
                parts.append(self._sizes(tensor, axis, axis + length, node))
            elif numbers:
                length = numbers
                parts.append(self._constant([entry.integer or 0 for entry in entries[place : place + length]]))
            else:
                difference = self._difference(node, entries, place, sources)
                if difference is None:
                    return None
                length, part = difference
                parts.append(part)
            place += length
        return parts

    def _whole_difference(
        self, node: gs.Node, entries: Sequence[Expr], place: int, sources: Sequence[tuple[gs.Tensor, Shape]]
    ) -> tuple[int, gs.Tensor] | None:
        """All widths behind the axes at once: without a range, the whole of a Shape is one node less than a part."""
        rank = len(self.known.shape(node.inputs[0]) or ())
        if not is_standard(node, "Pad") or self.graph.opset >= SHAPE_RANGE_OPSET or len(entries) != 2 * rank:
            return None
        own = self.known.shape(node.inputs[0]) or ()
        aligned = tuple(entry + size for entry, size in zip(entries[rank:], own, strict=True))
        if not any(shape == aligned for _, shape in sources) or all(entry.integer == 0 for entry in entries[rank:]):
            return None
        if place == 0 and _numbers(entries) >= rank:
            return rank, self._constant([entry.integer or 0 for entry in entries[:rank]])
        return self._difference(node, entries, place, sources) if place == rank else None

    def _difference(
        self, node: gs.Node, entries: Sequence[Expr], place: int, sources: Sequence[tuple[gs.Tensor, Shape]]
    ) -> tuple[int, gs.Tensor] | None:
        """Widths of a Pad that align its input with a tensor above: (how many, their tensor)."""
        own = self.known.shape(node.inputs[0])
        if not is_standard(node, "Pad") or own is None or input_at(node, 3) is not None:
            return None
        axis = place % len(own)
        aligned = [entry + size for entry, size in zip(entries[place:], own[axis:], strict=False)]
        run = _longest(aligned, [(t, s) for t, s in sources if len(s) == len(own)])
        if run is None:
            return None
        length, tensor, start = run
        left = self._sizes(tensor, start, start + length, node)
        right = self._sizes(node.inputs[0], axis, axis + length, node)
        return length, self._node("Sub", [left, right], node)

    def _sizes(self, tensor: gs.Tensor, start: int, end: int, reader: gs.Node) -> gs.Tensor:
        rank = len(self.known.shape(tensor) or ())
        if (start, end) == (0, rank):
            return self._node("Shape", [tensor], reader)
        if self.graph.opset >= SHAPE_RANGE_OPSET:
            return self._node("Shape", [tensor], reader, start=start, end=end)
        whole = self._node("Shape", [tensor], reader)
        return self._node("Slice", [whole, self._constant([start]), self._constant([end])], reader)

    def _constant(self, numbers: Sequence[int]) -> gs.Tensor:
        key = ("constant", *numbers)
        if key not in self.made:
            self.made[key] = gs.Constant(self._name("sizes"), np.array(numbers, np.int64))
        return self.made[key]

    def _node(self, op: str, inputs: Sequence[gs.Tensor], reader: gs.Node, **attributes: int) -> gs.Tensor:
        """The result of a node, made before its first reader; equal nodes are made once."""
        key = (op, *(id(tensor) for tensor in inputs), *sorted(attributes.items()))
        if key not in self.made:
            name = self._name(op.lower())
            result = gs.Variable(name, np.dtype(np.int64))
            node = gs.Node(op, name, dict(attributes), list(inputs), [result])
            self.graph.nodes.insert(place_of(self.graph, reader), node)
            self.added.append(node)
            self.made[key] = result
        return self.made[key]

    def _name(self, stem: str) -> str:
        return unique(f"shape_arithmetic.{stem}", self._taken)


def _constant(known: Symbolic, tensor: gs.Tensor) -> NDArray[np.generic] | None:
    """The tensor's value in its own type where every entry is a number; None otherwise."""
    value, kind = known.value(tensor), known.element_type(tensor)
    if value is None or kind not in KINDS:
        return None
    entries = [entry.constant if isinstance(entry, Expr) else entry for entry in value.flat]
    if any(entry is None for entry in entries):
        return None
    to = np.dtype(helper.tensor_dtype_to_np_dtype(kind))
    numbers = [float(entry) if to.kind == "f" else int(entry) for entry in entries if entry is not None]
    return np.array(numbers, to).reshape(value.shape)


def _scale(size: Expr, source: Expr) -> np.float32 | None:
    if size == source:
        return np.float32(1)
    wanted, given = size.integer, source.integer
    if wanted is not None and given is not None:
        return exact_scale(given, wanted) if given > 0 else None
    factor = ratio(size, source)
    return np.float32(float(factor)) if factor is not None and factor > 0 and exact(source * factor) else None


def _relative(known: Symbolic, node: gs.Node, slot: int, entries: list[Expr]) -> list[Expr]:
    """The entries with those replaced that the operator itself takes from its input (rules 1 and 2)."""
    own = known.shape(node.inputs[0])
    if own is None:
        return entries
    if is_standard(node, "Reshape") and not node.attrs.get("allowzero", 0):
        same = [expr(0) if i < len(own) and e == own[i] and e.integer is None else e for i, e in enumerate(entries)]
        open_ones = [i for i, entry in enumerate(same) if entry.integer is None]
        if len(open_ones) == 1 and expr(-1) not in same:
            same[open_ones[0]] = expr(-1)
        return same
    if is_standard(node, "Expand"):
        offset = len(entries) - len(own)
        return [
            expr(1) if i >= offset and entry == own[i - offset] and entry.integer is None else entry
            for i, entry in enumerate(entries)
        ]
    if is_standard(node, "Slice") and slot == 2:
        axes = known.integers(input_at(node, 3)) if input_at(node, 3) is not None else list(range(len(entries)))
        steps = known.integers(input_at(node, 4)) if input_at(node, 4) is not None else [1] * len(entries)
        if axes is None or steps is None:
            return entries
        ends = zip(entries, axes, steps, strict=True)
        return [_end(entry, own[axis]) if step > 0 else entry for entry, axis, step in ends]
    return entries


def _end(entry: Expr, size: Expr) -> Expr:
    """A Slice's end as a constant, where it is the axis' end or a constant number before it."""
    cut = (size - entry).integer
    if entry.integer is not None or cut is None:
        return entry
    return expr(FAR if cut <= 0 else -cut)


def _above(node: gs.Node, known: Symbolic) -> Iterator[tuple[gs.Tensor, Shape]]:
    """Every tensor that the node depends on, with its shape, nearest first; no constants and no shape arithmetic."""
    queue: deque[gs.Node] = deque([node])
    seen_nodes, seen = {id(node)}, set()
    while queue:
        for tensor in queue.popleft().inputs:
            if id(tensor) in seen or tensor.is_empty() or isinstance(tensor, gs.Constant):
                continue
            seen.add(id(tensor))
            shape = known.shape(tensor)
            if shape and known.value(tensor) is None:
                yield tensor, shape
            for producer in tensor.inputs:
                if id(producer) not in seen_nodes:
                    seen_nodes.add(id(producer))
                    queue.append(producer)


def _longest(entries: Sequence[Expr], sources: Sequence[tuple[gs.Tensor, Shape]]) -> tuple[int, gs.Tensor, int] | None:
    """The longest run of sizes of one tensor that the entries begin with: (length, tensor, first axis)."""
    best: tuple[int, gs.Tensor, int] | None = None
    for tensor, shape in sources:
        for start in range(len(shape)):
            length = 0
            for entry, size in zip(entries, shape[start:], strict=False):
                if entry != size:
                    break
                length += 1
            if length > (best[0] if best else 0):
                best = (length, tensor, start)
    return best


def _numbers(entries: Sequence[Expr]) -> int:
    """How many of the first entries are constants."""
    return next((i for i, entry in enumerate(entries) if entry.integer is None), len(entries))


def _live(graph: gs.Graph) -> set[int]:
    """The nodes that an output, or a subgraph, depends on."""
    roots: list[gs.Tensor] = list(graph.outputs)
    for part in graph.subgraphs(recursive=True):
        roots += [*part.outputs, *(tensor for node in part.nodes for tensor in node.inputs)]
    queue = deque(producer for tensor in roots for producer in tensor.inputs)
    seen: set[int] = set()
    while queue:
        node = queue.popleft()
        if id(node) not in seen:
            seen.add(id(node))
            queue.extend(producer for tensor in node.inputs for producer in tensor.inputs)
    return seen
