"""The structure of a graph: work that is done twice, taken apart and put together again, or not needed at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from pipeline.graph.base import (
    STANDARD,
    Fired,
    Pass,
    PassResult,
    array_of,
    bypass,
    detach,
    input_at,
    is_output,
    is_sparse,
    is_standard,
    label,
    made_by,
    made_for_one,
    names_in,
    only_reader,
    remove_detached,
    slots,
)
from pipeline.graph.shapes import same_sizes, unique
from pipeline.graph.sizes import infer_shapes
from pipeline.graph.symbolic import Symbolic

# Two of these with the same inputs are two draws.
RANDOM = (
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
)
# Operators that keep the entries and their order in memory.
RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
# An end beyond every size that a tensor can have.
ENDLESS = 2**31 - 1
# How many results of an operator its first use needs; the others are there on demand.
NEEDED = {"MaxPool": 1, "Dropout": 1, "BatchNormalization": 1, "LayerNormalization": 1}
TOLERANCE = 1e-6
# Pixel shuffles: the types that ONNX Runtime has both operators for, and the orders of their Transposes.
SHUFFLED = (TensorProto.FLOAT, TensorProto.DOUBLE)
# Mode, and the axes of the six that hold the channels and the two factors.
TO_SPACE = {(0, 1, 4, 2, 5, 3): ("CRD", 1, 2, 3), (0, 3, 4, 1, 5, 2): ("DCR", 3, 1, 2)}
TO_DEPTH, CHANNELS_FIRST = (0, 3, 5, 1, 2, 4), (0, 1, 3, 5, 2, 4)
MODE_OPSET = 11
# Before, a BatchNormalization with more than one result was one in training mode.
TRAINING_OPSET = 14


class MergeDuplicates(Pass):
    """1. Two nodes with the same operator, attributes and inputs (initializers by value) are one: the first stays.

    Not: random operators and Dropout; operators with subgraphs, of other domains, or with attributes that cannot be
    compared; where both results leave the graph.
    """

    name = "merge-duplicates"

    def call(self, graph: gs.Graph) -> PassResult:
        fired: list[Fired] = []
        first: dict[Any, list[gs.Node]] = {}
        for node in list(graph.nodes):
            key = _signature(node)
            if key is None:
                continue
            twin = next((other for other in first.setdefault(key, []) if _same_constants(other, node)), None)
            if twin is None:
                first[key].append(node)
                continue
            name = label(node)
            if self._merge(graph, twin, node):
                fired.append(("duplicate", name))
        remove_detached(graph)
        return PassResult.of(fired)

    @staticmethod
    def _merge(graph: gs.Graph, kept: gs.Node, node: gs.Node) -> bool:
        pairs = list(zip(kept.outputs, node.outputs, strict=True))
        if any(is_output(graph, one) and is_output(graph, other) for one, other in pairs):
            return False
        detach(node)
        for position, (one, other) in enumerate(pairs):
            if other.is_empty():
                continue
            stays, goes = (other, one) if is_output(graph, other) else (one, other)
            for reader, slot in list(slots(goes)):
                reader.inputs[slot] = stays
            kept.outputs[position] = stays
        return True


class SimplifyConcats(Pass):
    """1. A Concat of one input goes.
    2. A Concat that another Concat on the same axis alone reads becomes part of it.
    3. Neighbouring inputs of a Concat that are all results of one Split on that axis, in their order, are the Split's
       input; so are Slices (step 1, constant bounds) that follow each other from the first entry to the last.
    4. A Slice of a Concat on its axis that takes exactly one of the inputs is that input; so are the results of a Split
       where each of them is one.

    Not: sizes along the axis that are not known; steps other than 1; results that leave the graph.
    """

    name = "simplify-concats"

    def call(self, graph: gs.Graph) -> PassResult:
        if not any(is_standard(node, "Concat") for node in graph.nodes):
            return PassResult(False)
        infer_shapes(graph)
        fired: list[Fired] = []
        for node in list(graph.nodes):
            if is_standard(node, "Concat"):
                name = label(node)
                fired += [("nested-concat", name)] * self._flatten(graph, node)
                fired += [("rejoin", name)] * self._rejoin(node)
                if len(node.inputs) == 1 and bypass(graph, node, node.inputs[0], node.outputs[0]):
                    fired.append(("single-concat", name))
            elif is_standard(node, "Slice", "Split") and node.inputs:
                fired += self._take_part(graph, node)
        remove_detached(graph)
        return PassResult.of(fired)

    @staticmethod
    def _flatten(graph: gs.Graph, node: gs.Node) -> bool:
        """Rule 2."""
        inputs: list[gs.Tensor] = []
        for tensor in node.inputs:
            inner = made_for_one(graph, tensor, "Concat")
            if inner is not None and _axis(inner) == _axis(node):
                inputs += list(inner.inputs)
                detach(inner)
            else:
                inputs.append(tensor)
        if len(inputs) == len(node.inputs):
            return False
        _set_inputs(node, inputs)
        return True

    @staticmethod
    def _rejoin(node: gs.Node) -> bool:
        """Rule 3."""
        axis, inputs = _axis(node), list(node.inputs)
        done: list[gs.Tensor] = []
        while inputs:
            count, whole = _joined(inputs, axis)
            done.append(whole)
            inputs = inputs[count:]
        if len(done) == len(node.inputs) and all(a is b for a, b in zip(done, node.inputs, strict=True)):
            return False
        _set_inputs(node, done)
        return True

    @staticmethod
    def _take_part(graph: gs.Graph, node: gs.Node) -> list[Fired]:
        """Rule 4."""
        concat = made_by(node.inputs[0], "Concat")
        if concat is None:
            return []
        spans, bounds = _spans(concat), _parts(node, _axis(concat))
        if spans is None or bounds is None or len(bounds) != len(node.outputs):
            return []
        found = {(low, high): tensor for tensor, low, high in spans if low < high}
        if any(span not in found for span in bounds) or any(is_output(graph, tensor) for tensor in node.outputs):
            return []
        name, results = label(node), list(node.outputs)
        detach(node)
        for result, span in zip(results, bounds, strict=True):
            for reader, slot in list(slots(result)):
                reader.inputs[slot] = found[span]
        return [("part-of-concat", name)]


class RemoveNoOps(Pass):
    """1. A Reshape, Flatten, Squeeze, Unsqueeze, or several in a row, whose result has the shape that an earlier
       tensor of the row has: its readers read that one.
    2. A Reshape of a Reshape (Flatten, Squeeze, Unsqueeze) reads the first one's input.
    3. An Expand or Tile to the shape that is there already goes.
    4. A Slice that takes every entry in its order goes, and a Split into one.

    Two shapes are the same where each size is the same number or the same axis name; in rule 1 one size may be unknown,
    as the number of entries settles it.

    Not: rule 2 where the target copies a size (0) that differs between the two inputs; where names of graph outputs
    forbid it.
    """

    name = "remove-no-ops"

    def call(self, graph: gs.Graph) -> PassResult:
        if not any(is_standard(node, *RESHAPES, "Expand", "Tile", "Slice", "Split") for node in graph.nodes):
            return PassResult(False)
        known = Symbolic(graph)
        fired: list[Fired] = []
        for node in list(graph.nodes):
            name = label(node)
            if is_standard(node, *RESHAPES):
                source = self._same(node, known)
                if source is not None and bypass(graph, node, source, node.outputs[0]):
                    fired.append(("reshape-back", name))
                elif node.inputs and self._skip(node, known):
                    fired.append(("reshape-twice", name))
            elif self._keeps_all(node, known) and bypass(graph, node, node.inputs[0], node.outputs[0]):
                fired.append((f"whole-{node.op.lower()}", name))
        fired += _drop_unread(graph, RESHAPES)
        remove_detached(graph)
        return PassResult.of(fired)

    @staticmethod
    def _same(node: gs.Node, known: Symbolic) -> gs.Tensor | None:
        """Rule 1: the tensor furthest up the row that the node gives back."""
        wanted = known.shape(node.outputs[0])
        found: gs.Tensor | None = None
        tensor, reshape = node.inputs[0], node
        while True:
            given = known.shape(tensor)
            if isinstance(tensor, gs.Constant):
                return found
            if (given is not None and wanted is not None and same_sizes(given, wanted)) or _undoes(node, reshape):
                found = tensor
            above = made_by(tensor, *RESHAPES)
            if above is None:
                return found
            tensor, reshape = above.inputs[0], above

    @staticmethod
    def _skip(node: gs.Node, known: Symbolic) -> bool:
        """Rule 2."""
        inner = made_by(node.inputs[0], *RESHAPES)
        target = array_of(input_at(node, 1))
        if not is_standard(node, "Reshape") or inner is None or target is None:
            return False
        if isinstance(inner.inputs[0], gs.Constant):
            return False
        copied = [] if node.attrs.get("allowzero", 0) else [axis for axis, size in enumerate(target) if size == 0]
        given, source = known.shape(node.inputs[0]), known.shape(inner.inputs[0])
        if copied and (given is None or source is None):
            return False
        if any(axis >= len(source) or given[axis] != source[axis] for axis in copied if source and given):
            return False
        node.inputs[0] = inner.inputs[0]
        return True

    @staticmethod
    def _keeps_all(node: gs.Node, known: Symbolic) -> bool:
        if not node.inputs or isinstance(node.inputs[0], gs.Constant):
            return False
        if is_standard(node, "Split"):
            return len(node.outputs) == 1
        if is_standard(node, "Slice"):
            return _takes_all(node, known)
        if is_standard(node, "Tile"):
            repeats = array_of(input_at(node, 1))
            return repeats is not None and bool((repeats == 1).all())
        if not is_standard(node, "Expand"):
            return False
        given, wanted = known.shape(node.inputs[0]), known.shape(node.outputs[0])
        return given is not None and given == wanted


class SumRepeatedInputs(Pass):
    """1. A Concat on axis 1 that has one tensor several times, and whose readers are ungrouped Convs with constant
       weights, has it once: the Convs' weight slices for it are added, in float64.

    Not: weights whose sum the weights' own type does not hold within 1e-6 relative (float16); sizes along the axis
    that are not known; other readers.
    """

    name = "sum-repeated-inputs"

    def call(self, graph: gs.Graph) -> PassResult:
        concats = [node for node in graph.nodes if is_standard(node, "Concat") and _repeats(node)]
        if not concats:
            return PassResult(False)
        infer_shapes(graph)
        taken = names_in(graph)
        return PassResult.of([("repeated", label(node)) for node in concats if self._sum(graph, node, taken)])

    @staticmethod
    def _sum(graph: gs.Graph, node: gs.Node, taken: set[str]) -> bool:
        result, spans = node.outputs[0], _spans(node)
        readers = list(slots(result))
        own = {id(other) for other in graph.nodes}
        if spans is None or result.shape is None or _axis(node) not in (1, 1 - len(result.shape)):
            return False
        if is_output(graph, result) or not readers:
            return False
        weights: list[Any] = []
        for reader, slot in readers:
            if id(reader) not in own or slot != 0 or not is_standard(reader, "Conv"):
                return False
            weight = array_of(reader.inputs[1])
            summed = None if weight is None else _summed(weight, spans)
            if summed is None:
                return False
            weights.append(summed)
        for (reader, _), weight in zip(readers, weights, strict=True):
            reader.inputs[1] = gs.Constant(unique(reader.inputs[1].name, taken), weight)
        _set_inputs(node, list({id(tensor): tensor for tensor in node.inputs}.values()))
        result.shape = None
        return True


class FoldPixelShuffle(Pass):
    """1. Reshape (N, C·r·r, H, W) → (N, C, r, r, H, W), Transpose [0, 1, 4, 2, 5, 3], Reshape → (N, C, H·r, W·r), as
       PixelShuffle is taken apart, is DepthToSpace in CRD mode; with (N, r, r, C, H, W) and [0, 3, 4, 1, 5, 2] in DCR
       mode (TensorFlow's order).
    2. Reshape (N, C, H·r, W·r) → (N, C, H, r, W, r), Transpose [0, 3, 5, 1, 2, 4], Reshape → (N, r·r·C, H, W) is
       SpaceToDepth; [0, 1, 3, 5, 2, 4], as PixelUnshuffle orders them, where C is 1.

    Not: types other than float32 and float64, the ones that ONNX Runtime has both operators for; more than one size of
    a Reshape that is not known; intermediate results that others read; different factors for height and width; CRD
    before opset 11.
    """

    name = "fold-pixel-shuffle"

    def call(self, graph: gs.Graph) -> PassResult:
        if not any(is_standard(node, "Transpose") and len(node.attrs.get("perm", ())) == 6 for node in graph.nodes):
            return PassResult(False)
        known = Symbolic(graph)
        fired: list[Fired] = []
        for node in list(graph.nodes):
            row = _row(graph, node)
            found = _pixel_shuffle(known, row, graph.opset) if row else None
            if row and found:
                fired.append((found[0].lower(), label(node)))
                split, transpose, last = row
                _set_inputs(last, [split.inputs[0]])
                last.op, last.attrs = found
                detach(split, transpose)
        remove_detached(graph)
        return PassResult.of(fired)


class DropUnreadOutputs(Pass):
    """1. Results on demand that nobody reads (MaxPool's indices, Dropout's mask, BatchNormalization's and
       LayerNormalization's statistics) go.

    Not: BatchNormalization in training mode, which before opset 14 its results on demand stand for; a result in front
    of one that is read.
    """

    name = "drop-unread-outputs"

    def call(self, graph: gs.Graph) -> PassResult:
        fired: list[Fired] = []
        for node in graph.nodes:
            if node.domain not in STANDARD or node.op not in NEEDED or node.attrs.get("training_mode", 0):
                continue
            if node.op == "BatchNormalization" and graph.opset < TRAINING_OPSET:
                continue
            while len(node.outputs) > NEEDED[node.op]:
                tensor = node.outputs[-1]
                if tensor.outputs or (not tensor.is_empty() and is_output(graph, tensor)):
                    break
                fired.append(("unread-output", label(node)))
                del node.outputs[-1]
        return PassResult.of(fired)


# Duplicates.


def _signature(node: gs.Node) -> Any:
    """What two nodes must have in common, values of initializers left out; None where a node stays as it is."""
    origin = getattr(node, "origin", None)
    skipped = {a.name for a in origin.attribute} - set(getattr(node, "imported", {})) if origin is not None else set()
    if node.domain not in STANDARD or node.op in RANDOM or not node.inputs or skipped:
        return None
    attributes: list[Any] = []
    for key, value in sorted(node.attrs.items()):
        if isinstance(value, gs.Tensor):
            array = array_of(value)
            if array is None:
                return None
            value = (str(array.dtype), array.shape, array.tobytes())
        elif isinstance(value, (list, tuple)) and all(isinstance(entry, (int, float, str)) for entry in value):
            value = tuple(value)
        elif not isinstance(value, (int, float, str)):
            return None
        attributes.append((key, type(value).__name__, value))
    inputs: list[Any] = []
    for tensor in node.inputs:
        comparable = isinstance(tensor, gs.Constant) and not is_sparse(tensor) and not isinstance(tensor.dtype, int)
        kind = (str(tensor.dtype), tuple(tensor.shape)) if comparable else id(tensor)
        inputs.append("" if tensor.is_empty() else kind)
    results = tuple(tensor.is_empty() for tensor in node.outputs)
    return node.op, tuple(attributes), tuple(inputs), results


def _same_constants(one: gs.Node, other: gs.Node) -> bool:
    """Whether the initializers of two nodes with one signature hold the same bits."""
    for a, b in zip(one.inputs, other.inputs, strict=True):
        if a is not b and not a.is_empty() and array_of(a).tobytes() != array_of(b).tobytes():
            return False
    return True


# Parts of tensors along one axis.


def _axis(node: gs.Node) -> int:
    axis = node.attrs["axis"]
    shape = node.outputs[0].shape
    return int(axis) + (len(shape) if axis < 0 and shape is not None else 0)


def _spans(concat: gs.Node) -> list[tuple[gs.Tensor, int, int]] | None:
    """Each input of a Concat with the entries from … to that it fills; None where a size is not known."""
    axis, position = _axis(concat), 0
    spans: list[tuple[gs.Tensor, int, int]] = []
    for tensor in concat.inputs:
        size = _size(tensor, axis)
        if size is None:
            return None
        spans.append((tensor, position, position + size))
        position += size
    return spans


def _size(tensor: gs.Tensor, axis: int) -> int | None:
    shape = tensor.shape
    if shape is None or not -len(shape) <= axis < len(shape):
        return None
    size = shape[axis]
    return int(size) if isinstance(size, (int, np.integer)) else None


def _parts(node: gs.Node, axis: int) -> list[tuple[int, int]] | None:
    """The entries from … to along ``axis`` that each result of a Slice or Split holds; None for all else."""
    source = node.inputs[0]
    size = _size(source, axis)
    if size is None:
        return None
    if is_standard(node, "Slice"):
        bounds = _bounds(node)
        if bounds is None or len(bounds) != 1:
            return None
        along, start, end, step = bounds[0]
        if along % len(source.shape) != axis % len(source.shape) or step != 1:
            return None
        low, high = (min(max(edge + size * (edge < 0), 0), size) for edge in (start, end))
        return [(low, high)] if low < high else None
    if node.attrs.get("axis", 0) % len(source.shape) != axis % len(source.shape):
        return None
    sizes = [_size(tensor, axis) for tensor in node.outputs]
    known = [one for one in sizes if one is not None]
    ends = [sum(known[: i + 1]) for i in range(len(known))]
    whole = len(known) == len(sizes) and sum(known) == size
    return [(end - one, end) for end, one in zip(ends, known, strict=True)] if whole else None


def _bounds(node: gs.Node) -> list[tuple[int, int, int, int]] | None:
    """(axis, start, end, step) of a Slice with constant bounds; None for another."""
    lists: list[Any] = []
    for slot, key in enumerate(("starts", "ends", "axes", "steps"), 1):
        tensor = input_at(node, slot)
        value = array_of(tensor) if tensor is not None else node.attrs.get(key)
        if tensor is not None and value is None:
            return None
        lists.append(None if value is None else [int(entry) for entry in np.ravel(value)])
    starts, ends, axes, steps = lists
    if starts is None or ends is None:
        return None
    axes, steps = axes or list(range(len(starts))), steps or [1] * len(starts)
    even = len(starts) == len(ends) == len(axes) == len(steps)
    return list(zip(axes, starts, ends, steps, strict=True)) if even else None


def _takes_all(node: gs.Node, known: Symbolic) -> bool:
    bounds, shape = _bounds(node), known.shape(node.inputs[0])
    if bounds is None:
        return False
    for axis, start, end, step in bounds:
        size = shape[axis].integer if shape is not None else None
        from_first = start == 0 or (size is not None and start <= -size)
        to_last = end >= ENDLESS or (size is not None and end >= size)
        if step != 1 or not from_first or not to_last:
            return False
    return True


def _joined(tensors: Sequence[gs.Tensor], axis: int) -> tuple[int, gs.Tensor]:
    """How many of the first tensors together are one whole tensor, and which."""
    maker = made_by(tensors[0], "Slice", "Split")
    if maker is None or isinstance(maker.inputs[0], gs.Constant):
        return 1, tensors[0]
    source = maker.inputs[0]
    size, reached = _size(source, axis), 0
    if is_standard(maker, "Split") and len(maker.outputs) > 1:
        count = len(maker.outputs)
        rank = len(source.shape) if source.shape is not None else 0
        along = maker.attrs.get("axis", 0)
        same_axis = along == axis if not rank else along % rank == axis % rank
        complete = len(tensors) >= count and all(a is b for a, b in zip(maker.outputs, tensors, strict=False))
        return (count, source) if complete and same_axis else (1, tensors[0])
    for count, tensor in enumerate(tensors, 1):
        node = made_by(tensor, "Slice")
        parts = _parts(node, axis) if node is not None and node.inputs[0] is source else None
        if size is None or parts is None or parts[0][0] != reached:
            break
        reached = parts[0][1]
        if reached == size and count > 1:
            return count, source
    return 1, tensors[0]


# Rows of reshaping operators.


def _undoes(last: gs.Node, first: gs.Node) -> bool:
    """Whether ``last`` takes out exactly the axes of size 1 that ``first``, right before it, put in; or the reverse."""
    above = made_by(last.inputs[0])
    if above is None or above is not first or {last.op, first.op} != {"Squeeze", "Unsqueeze"}:
        return False
    axes = _given(first)
    return axes is not None and axes == _given(last) and min(axes, default=-1) >= 0


def _given(node: gs.Node) -> list[int] | None:
    tensor = input_at(node, 1)
    values = node.attrs.get("axes") if tensor is None else array_of(tensor)
    return None if values is None else sorted(int(axis) for axis in np.ravel(values))


def _drop_unread(graph: gs.Graph, ops: Sequence[str]) -> list[Fired]:
    """Take out nodes of these operators that a rewrite left without readers."""
    fired: list[Fired] = []
    for node in reversed(graph.nodes):
        unread = is_standard(node, *ops) and node.outputs and not node.outputs[0].outputs
        if unread and not is_output(graph, node.outputs[0]):
            fired.append(("unread", label(node)))
            detach(node)
    return fired


# Repeated inputs.


def _repeats(concat: gs.Node) -> bool:
    return len({id(tensor) for tensor in concat.inputs}) < len(concat.inputs)


def _summed(weight: Any, spans: Sequence[tuple[gs.Tensor, int, int]]) -> Any:
    """The weight with the input channels of equal tensors added; None where its type does not hold the sums, and for a
    grouped weight, which has fewer input channels."""
    if weight.ndim < 2 or weight.shape[1] != spans[-1][2] or weight.dtype.kind != "f":
        return None
    sums: dict[int, Any] = {}
    for tensor, start, end in spans:
        part = weight[:, start:end].astype(np.float64)
        sums[id(tensor)] = sums[id(tensor)] + part if id(tensor) in sums else part
    exact = np.concatenate(list(sums.values()), axis=1)
    with np.errstate(over="ignore"):
        rounded = exact.astype(weight.dtype)
    close = np.isfinite(rounded).all() and (np.abs(rounded - exact) <= TOLERANCE * np.abs(exact)).all()
    return rounded if close else None


# Pixel shuffles.


def _row(graph: gs.Graph, node: gs.Node) -> tuple[gs.Node, gs.Node, gs.Node] | None:
    """Reshape, Transpose, Reshape around a Transpose of six axes, read by nobody else."""
    if not is_standard(node, "Transpose") or len(node.attrs.get("perm", ())) != 6 or not node.inputs:
        return None
    before, after = made_for_one(graph, node.inputs[0], "Reshape"), only_reader(graph, node.outputs[0], "Reshape")
    if before is None or after is None or not any(other is after for other in graph.nodes):
        return None
    return (before, node, after) if after.inputs[0] is node.outputs[0] else None


def _pixel_shuffle(
    known: Symbolic, row: tuple[gs.Node, gs.Node, gs.Node], opset: int
) -> tuple[str, dict[str, Any]] | None:
    """The operator that the row is, with its attributes."""
    split, transpose, join = row
    whole, parts, result = (known.shape(t) for t in (split.inputs[0], split.outputs[0], join.outputs[0]))
    if whole is None or parts is None or result is None or (len(whole), len(parts), len(result)) != (4, 6, 4):
        return None
    if known.element_type(split.inputs[0]) not in SHUFFLED:
        return None
    order = tuple(transpose.attrs["perm"])
    if order in TO_SPACE:
        mode, channels, high, across = TO_SPACE[order]
        block, depth = parts[high].integer, parts[channels]
        if block is None or block < 2 or parts[across] != parts[high] or (mode == "CRD" and opset < MODE_OPSET):
            return None
        joined = [parts[0], depth * block * block, parts[4], parts[5]]
        target = [whole[0], depth, whole[2] * block, whole[3] * block]
        if same_sizes(joined, whole) and same_sizes(target, result):
            return "DepthToSpace", {"blocksize": block, **({"mode": mode} if opset >= MODE_OPSET else {})}
        return None
    block, depth = parts[3].integer, parts[1]
    if (
        block is None
        or block < 2
        or parts[5] != parts[3]
        or not (order == TO_DEPTH or (order == CHANNELS_FIRST and depth.integer == 1))
    ):
        return None
    joined = [parts[0], depth, parts[2] * block, parts[4] * block]
    target = [whole[0], depth * block * block, parts[2], parts[4]]
    return ("SpaceToDepth", {"blocksize": block}) if same_sizes(joined, whole) and same_sizes(target, result) else None


def _set_inputs(node: gs.Node, inputs: Sequence[gs.Tensor]) -> None:
    node.inputs.clear()
    node.inputs.extend(inputs)
